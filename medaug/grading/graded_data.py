"""What a comparison has to know of its real images once they are scored: counts, warnings, and the labels and groups of the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medaug import storage
from medaug.cohort import SPLITS, Cohort

_LEAK = ("level", "n", "accuracy", "balanced_accuracy", "chance", "memoryless", "verdict", "warning")

__all__ = ["GradedData", "graded_data"]


@dataclass(frozen=True)
class GradedData:
    """A real cohort without its cases: nothing here names a patient, a file or an image.

    Attributes:
        name, modality, classes, ordinal, image_size, channels, content_sha256, created_by: of the cohort.
        splits: split -> images, groups, per_class (images per class).
        leak: the leak indicator with its warning; empty if it was not measured.
        group_origins: how many images were grouped by patient, column or similarity; empty if intake did not say.
        target: label of every test image, in the cohort's order.
        groups: number of the group of every test image. Groups are numbered in the order of their pseudonyms, so that the
            bootstrap, which draws them in that order, meets the same resamples.
        ids_sha256: of the test images' ids, to know them again.
    """

    name: str
    modality: str
    classes: tuple[str, ...]
    ordinal: bool
    image_size: int
    channels: int
    content_sha256: str
    created_by: Mapping[str, Any]
    splits: Mapping[str, Mapping[str, Any]]
    leak: Mapping[str, Any]
    group_origins: Mapping[str, int]
    target: tuple[int, ...]
    groups: tuple[int, ...]
    ids_sha256: str

    @property
    def group_names(self) -> list[str]:
        """`groups` as text that sorts like the numbers."""
        return [f"{number:09d}" for number in self.groups]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> GradedData:
        """The data of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of another kind, or labels and groups do not fit.
        """
        lists = {name: tuple(content[name]) for name in ("classes", "target", "groups")}
        data = cls(**{**content, **lists})
        count = len(data.classes)
        if not data.target or len(data.target) != len(data.groups) or not all(0 <= label < count for label in data.target):
            raise ValueError("target")
        for split in SPLITS:
            if len(data.splits[split]["per_class"]) != count or data.splits[split]["images"] < data.splits[split]["groups"]:
                raise ValueError(split)
        return data


def graded_data(cohort: Cohort) -> GradedData:
    """What is kept of a cohort."""
    numbers = {group: number for number, group in enumerate(sorted(cohort.groups("test")))}
    leak = cohort.notes.get("leak") or {}
    return GradedData(
        name=cohort.name,
        modality=cohort.modality,
        classes=cohort.classes,
        ordinal=cohort.ordinal,
        image_size=cohort.image_size,
        channels=cohort.channels,
        content_sha256=cohort.content_sha256,
        created_by=dict(cohort.created_by),
        splits={
            split: {
                "images": len(cohort.split(split)),
                "groups": len(cohort.groups(split)),
                "per_class": cohort.class_counts(split),
            }
            for split in SPLITS
        },
        leak={name: leak[name] for name in _LEAK if name in leak},
        group_origins=dict((cohort.notes.get("groups") or {}).get("images_by_origin") or {}),
        target=tuple(case.label for case in cohort.test),
        groups=tuple(numbers[case.group] for case in cohort.test),
        ids_sha256=storage.sha256_json([case.id for case in cohort.test]),
    )
