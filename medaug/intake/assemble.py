"""From records to a cohort: conflicts and duplicates out, groups found, splits made, and every choice noted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medaug import storage
from medaug.cohort import SPLITS
from medaug.errors import DataError
from medaug.intake import duplicates
from medaug.intake.classes import Classes, find_classes, tidy
from medaug.intake.read import SPLIT_RANK, Quarantine
from medaug.intake.records import IntakeOptions, Record
from medaug.splits import grouped_split

DEFAULT_RATIOS = (0.7, 0.1, 0.2)


@dataclass
class Assembly:
    """What becomes the cohort, and what the report says about how.

    Attributes:
        records: the images that stay, each with label, group, patient and split.
        classes: ordered class names.
        leak: see `duplicates.leak_indicator`.
        groups: how groups were found: number, origin, largest, threshold ...
        neighbour_distances: of the images that were grouped automatically.
        notes: one sentence each.
    """

    records: list[Record]
    classes: Classes
    leak: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    neighbour_distances: np.ndarray = field(default_factory=lambda: np.zeros(0))
    notes: list[str] = field(default_factory=list)


def assemble(
    records: Sequence[Record], options: IntakeOptions, has_splits: bool, quarantine: Quarantine, names: dict[str, str]
) -> Assembly:
    """Decide on labels, duplicates, groups and splits of all records.

    Args:
        records: with at least one label each.
        options: as given.
        has_splits: the source says which split every image is in; kept unless `options.split` is given.
        quarantine: receives what is left out.
        names: class names for integer labels.

    Raises:
        DataError: `no-usable-image`, `class-too-small`, `labels-not-classes`, `split-impossible`, `split-missing`.
    """
    if not records:
        raise no_usable_image(quarantine)
    ordered = sorted(records, key=Record.order)
    for record in ordered:
        record.labels = tuple(sorted({names.get(label, label) for label in record.labels}))
    classes = find_classes([label for record in ordered for label in record.labels], options.ordinal)
    sets = duplicates.Union(len(ordered))
    merged = _join_known(ordered, sets)
    kept = _without_duplicates(ordered, _labelled(ordered, classes, quarantine), sets, quarantine)
    if not kept:
        raise no_usable_image(quarantine)
    result = Assembly([ordered[index] for index in kept], classes, notes=list(classes.notes))
    if merged:
        result.notes.append(f"{merged} pair(s) of patients or groups hold identical images and were joined to one group.")
    keeps_splits = has_splits and options.split is None
    _group(result, ordered, kept, sets, keeps_splits)
    _refuse_small_classes(result.records, classes.names)
    _split(result, options, keeps_splits, quarantine)
    result.groups = _describe_groups(result.records) | result.groups
    result.leak = _leak(result.records, options.seed)
    return result


def no_usable_image(quarantine: Quarantine) -> DataError:
    """The error for a source of which nothing remains."""
    codes = ", ".join(f"{count} {code}" for code, count in quarantine.by_code().items()) or "no image file was found"
    return DataError(
        "no-usable-image", f"The source holds no usable labelled image ({codes}); check the source and the label table."
    )


def _labelled(records: Sequence[Record], classes: Classes, quarantine: Quarantine) -> list[int]:
    """Indices of records with one label; those with several are left out."""
    single = []
    for index, record in enumerate(records):
        meant = {classes.index[tidy(label)] for label in record.labels}
        if len(meant) == 1:
            record.label = meant.pop()
            single.append(index)
        else:
            quarantine.add(record.quarantine_name, "conflicting-label", "The label table gives this image several classes.")
    return single


def _join_known(records: Sequence[Record], sets: duplicates.Union) -> int:
    """Join what certainly belongs together; returns how many pairs of known groups shared an identical image."""
    owners: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        for key in record.group_keys:
            sets.join(owners.setdefault(key, index), index)
    sets.join_equal([record.volume if _is_own_volume(record) else None for record in records])
    _join_studies(records, sets)
    merged = 0
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        if record.is_blank:
            continue  # an empty slice says nothing about whose it is
        other = first.setdefault(record.pixels, index)
        if sets.find(other) != sets.find(index):
            merged += int(bool(record.group_keys) and bool(records[other].group_keys))
            sets.join(other, index)
    return merged


def _is_own_volume(record: Record) -> bool:
    return record.volume is not None and record.volume.startswith("file ")


def _join_studies(records: Sequence[Record], sets: duplicates.Union) -> None:
    """Images of one DICOM study without a patient; a study that all of them share is a placeholder."""
    studies = [None if record.group_keys or _is_own_volume(record) else record.volume for record in records]
    if len({study for study in studies if study}) > 1:
        sets.join_equal(studies)


def _without_duplicates(
    records: Sequence[Record], labelled: Sequence[int], sets: duplicates.Union, quarantine: Quarantine
) -> list[int]:
    """Indices that stay: one of each set of identical images, none where their labels differ."""
    same = duplicates.Union(len(records))
    usable = set(labelled)
    same.join_equal([record.pixels if index in usable else None for index, record in enumerate(records)])
    same.join_equal([record.case_id if index in usable else None for index, record in enumerate(records)])
    members: dict[int, list[int]] = defaultdict(list)
    for index in labelled:
        members[same.find(index)].append(index)
    kept = []
    for copies in members.values():
        if len({records[index].label for index in copies}) > 1:
            for index in copies:
                quarantine.add(records[index].quarantine_name, "conflicting-label", "Identical images have different labels.")
            continue
        # The copy in the most held-out split stays, so that fixed test sets keep their images.
        best, *others = sorted(copies, key=lambda index: (SPLIT_RANK[records[index].split], index))
        kept.append(best)
        for index in others:
            code = records[best].case_id
            quarantine.add(
                records[index].quarantine_name, "duplicate-image", f"The image is identical to case {code}, which stays."
            )
    return sorted(kept)


def _group(result: Assembly, ordered: Sequence[Record], kept: Sequence[int], sets: duplicates.Union, keeps_splits: bool) -> None:
    """Give every kept record its group and its patient's pseudonym, both named after the smallest source.

    Where the source's own splits are kept, look-alikes are not joined: they are a guess, and each group that crosses a
    split costs its training images. Near-copies are joined all the same.
    """
    alone = [index for index in kept if not ordered[index].group_keys]
    thumbnails = _thumbnails([ordered[index] for index in alone])
    grouping = duplicates.find_groups(thumbnails, [sets.find(index) for index in alone], near_copies_only=keeps_splits)
    first: dict[int, int] = {}
    for index, number in zip(alone, grouping.labels, strict=True):
        sets.join(first.setdefault(number, index), index)
    members: dict[int, list[Record]] = defaultdict(list)
    for index in kept:
        members[sets.find(index)].append(ordered[index])
    for group in members.values():
        patient_known = any(key[0] == "patient" for record in group for key in record.group_keys)
        name = ("p" if patient_known else "g") + _members_sha256(group)
        for record in group:
            record.group = name
    _name_patients(result.records)
    result.neighbour_distances = grouping.neighbour_distances
    result.groups = _describe_search(grouping, len(alone))
    if alone:
        result.notes.append(f"{len(alone)} image(s) have no patient and no group: {_how_grouped(len(alone), keeps_splits)}")


def _how_grouped(number: int, keeps_splits: bool) -> str:
    if keeps_splits:
        return "near-copies were grouped; --split divides the source anew by patient-like groups."
    if number > duplicates.MAX_CLUSTERED:
        return f"only near-copies were grouped, for they are more than {duplicates.MAX_CLUSTERED}; give a patient column."
    return "patient-like groups were found from the pixels."


def _members_sha256(records: Sequence[Record]) -> str:
    """Name of a set of images: other members, as another grouping makes them, never share it."""
    return storage.sha256_json(sorted([record.source, record.position] for record in records))[:12]


def _name_patients(records: Sequence[Record]) -> None:
    members: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        for kind, value in record.group_keys:
            if kind == "patient":
                members[value].append(record)
    names_of = {value: "p" + _members_sha256(own) for value, own in members.items()}
    for record in records:
        names = [names_of[value] for kind, value in record.group_keys if kind == "patient"]
        record.patient = min(names, default="")


def _describe_groups(records: Sequence[Record]) -> dict[str, Any]:
    """Number and sizes of the groups of the images that stay."""
    sizes = Counter(record.group for record in records)
    origins = Counter(record.group_keys[0][0] if record.group_keys else "automatic" for record in records)
    return {
        "number": len(sizes),
        "largest": max(sizes.values()),
        "alone": sum(size == 1 for size in sizes.values()),
        "images_by_origin": dict(sorted(origins.items())),
    }


def _describe_search(grouping: duplicates.Grouping, automatic: int) -> dict[str, Any]:
    """How the groups of `automatic` images without patient or group were found."""
    return {
        "automatic": automatic,
        "near_copies": grouping.near_copies,
        "threshold": grouping.threshold,
        "largest_allowed": grouping.largest_allowed if automatic else None,
    }


def _thumbnails(records: Sequence[Record]) -> np.ndarray:
    side = duplicates.THUMBNAIL_SIZE
    images = [record.thumbnail for record in records if record.thumbnail is not None]
    return np.stack(images) if images else np.zeros((0, side, side), np.float16)


def _refuse_small_classes(records: Sequence[Record], names: Sequence[str]) -> None:
    for label, name in enumerate(names):
        cases = sum(record.label == label for record in records)
        groups = len({record.group for record in records if record.label == label})
        if cases < 2 or groups < 2:
            raise DataError(
                "class-too-small",
                f"Class {name!r} has {cases} usable image(s) in {groups} group(s) or patient(s), at least 2 of each are needed; "
                "add images, join it with another class or leave it out.",
            )


def _split(result: Assembly, options: IntakeOptions, keeps_splits: bool, quarantine: Quarantine) -> None:
    if keeps_splits:
        _keep_splits(result, options.seed, quarantine)
    else:
        _assign(result.records, options.split or DEFAULT_RATIOS, options.seed)
    for label, name in enumerate(result.classes.names):
        present = {record.split for record in result.records if record.label == label}
        if "training" not in present:
            raise DataError(
                "class-too-small",
                f"Class {name!r} has no usable image in the training split; use --split to divide the source anew.",
            )
        result.notes.extend(f"Class {name!r} has no image in the {split} split." for split in SPLITS[1:] if split not in present)


def _assign(records: Sequence[Record], ratios: Sequence[float], seed: int) -> None:
    names = grouped_split([record.label for record in records], [record.group for record in records], ratios, seed)
    for record, name in zip(records, names, strict=True):
        record.split = name


def _keep_splits(result: Assembly, seed: int, quarantine: Quarantine) -> None:
    """The source's own splits; a group in several of them stays in the most held-out one only."""
    home: dict[str, str | None] = {}
    for record in result.records:
        home[record.group] = min(home.get(record.group, record.split), record.split, key=lambda name: SPLIT_RANK[name])
    kept = []
    for record in result.records:
        if record.split is None:
            quarantine.add(
                record.quarantine_name, "split-unknown", "The source has splits but gives none that is known for this image."
            )
        elif record.split != home[record.group]:
            reason = f"Its group is also in the {home[record.group]} split; this {record.split} image would leak it."
            quarantine.add(record.quarantine_name, "group-crosses-splits", reason)
        else:
            kept.append(record)
    result.records = kept
    present = {record.split for record in kept}
    if "training" not in present:
        raise DataError(
            "split-missing", "The source's own splits leave no training image; use --split to divide the source anew."
        )
    for missing, ratios in (("validation", (0.875, 0.125, 0.0)), ("test", (0.8, 0.0, 0.2))):
        if missing not in present:
            _assign([record for record in kept if record.split == "training"], ratios, seed)
            result.notes.append(
                f"The source has no {missing} split: {ratios[1] + ratios[2]:.1%} of its training groups were taken for it."
            )
    crossing = quarantine.by_code().get("group-crosses-splits", 0)
    if crossing:
        result.notes.append(
            f"The source's own splits share patients or look-alike groups: {crossing} image(s) were left out "
            "of training or validation."
        )


def _leak(records: Sequence[Record], seed: int) -> dict[str, Any]:
    sides = [[record for record in records if record.split == split] for split in ("training", "test")]
    if not all(sides):
        text = "No test split: the leak indicator cannot be computed."
        return {"level": "unknown", "verdict": text, "warning": None, "n": 0}
    (train, train_labels), (test, test_labels) = ((_thumbnails(side), [record.label for record in side]) for side in sides)
    return duplicates.leak_indicator(train, train_labels, test, test_labels, seed=seed)
