"""The gate's checks: each is a function of the cases that gives a verdict, reasons and numbers per case.

A new check is one function and one entry of `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import DataError
from medaug.io.raster import read_unit_png
from medaug.quality.copies import (
    CopyReport,
    copy_report,
    copy_threshold,
    cross_group_distances,
    nearest_distances,
)
from medaug.quality.fidelity import MINIMUM, RandomConvFeatures, features_of
from medaug.quality.images import image_batches
from medaug.quality.pseudo_label import DISAGREES, LabelFilter, train_filter
from medaug.training.classifier import ClassifierRecipe

ACCEPT, QUARANTINE, REJECT = "accept", "quarantine", "reject"
VERDICTS = (ACCEPT, QUARANTINE, REJECT)  # from the mildest to the strictest
CONSTANT_STD = 1 / 255  # a picture with less contrast than one 8-bit level shows nothing

__all__ = ["CHECKS", "Check", "CopyRuler", "Finding", "GateContext", "worst"]


@dataclass(frozen=True)
class Finding:
    """What one check says of one case.

    Attributes:
        verdict: "accept", "quarantine" (a person may look at it) or "reject".
        reasons: (code, sentence) pairs; empty when accepted.
        lineage: numbers to keep with the case.
    """

    verdict: str = ACCEPT
    reasons: tuple[tuple[str, str], ...] = ()
    lineage: Mapping[str, Any] = field(default_factory=dict)


def worst(verdicts: Sequence[str]) -> str:
    """The strictest verdict; "accept" of none."""
    return max(verdicts, key=VERDICTS.index, default=ACCEPT)


@dataclass(frozen=True, eq=False)
class CopyRuler:
    """Features of the training images and the distance below which an image counts as a copy.

    Attributes:
        extractor: the feature space.
        training: (M, D) features of the real training cases.  ids: their case ids.
        threshold: see `copy_threshold`.
        basis: "validation" or "other groups of training": what the threshold was taken from.
        n: images behind the threshold.
    """

    extractor: RandomConvFeatures
    training: np.ndarray
    ids: tuple[str, ...]
    threshold: float
    basis: str
    n: int

    def distances(self, cohort: Cohort, cases: Sequence[Case]) -> tuple[np.ndarray, list[str]]:
        """Distance to the nearest training image, (N,), and that image's case id."""
        features = features_of(self.extractor, image_batches(cohort, cases))
        distances, nearest = nearest_distances(features, self.training)
        return distances, [self.ids[index] for index in nearest]


@dataclass(eq=False)
class GateContext:
    """What checks may use; the filter and the ruler are made when a check first asks for them.

    Attributes:
        cohort: the real cohort.  synthetic: the cases under judgement.
        filter_dir: cache of trained filters.
        threshold: confidence threshold of the pseudo-label check.
        recipe, network, seed, calibrate: of the filter.
        copies: filled by the copies check.
    """

    cohort: Cohort
    synthetic: Cohort
    filter_dir: Path
    threshold: float
    recipe: ClassifierRecipe | None = None
    network: str = "simple_cnn"
    seed: int = 0
    calibrate: bool = False
    copies: CopyReport | None = None

    @cached_property
    def label_filter(self) -> LabelFilter:
        """The pseudo-label filter, trained or read from its cache."""
        return train_filter(
            self.cohort, self.filter_dir, recipe=self.recipe, network=self.network, seed=self.seed, calibrate=self.calibrate
        )

    @cached_property
    def ruler(self) -> CopyRuler:
        """The copy ruler; test stays untouched: validation gives the threshold, or training across groups if it is small."""
        real = [case for case in self.cohort.training if not case.is_synthetic]
        extractor = RandomConvFeatures(0, self.cohort.channels)
        training = features_of(extractor, image_batches(self.cohort, real))
        if len(self.cohort.validation) >= MINIMUM:
            held_out = features_of(extractor, image_batches(self.cohort, self.cohort.validation))
            distances, basis = nearest_distances(held_out, training)[0], "validation"
        else:
            distances, basis = cross_group_distances(training, [case.group for case in real]), "other groups of training"
        ids = tuple(case.id for case in real)
        return CopyRuler(extractor, training, ids, copy_threshold(distances), basis, len(distances))


Check = Callable[[GateContext, Sequence[Case]], list[Finding]]


def usable(context: GateContext, cases: Sequence[Case]) -> list[Finding]:
    """Reject images that cannot be read, have another size, or show nothing."""
    return [_usable(context.synthetic, case) for case in cases]


def _usable(cohort: Cohort, case: Case) -> Finding:
    try:
        image = read_unit_png(cohort.path(case))
    except DataError as error:
        return Finding(REJECT, ((error.code, "The image cannot be read."),))
    made = (case.lineage or {}).get("image_sha256")
    if made is not None and storage.sha256_file(cohort.path(case)) != made:
        return Finding(REJECT, (("image-changed", "The image is not the one that was generated."),))
    wanted = (cohort.image_size, cohort.image_size) + ((3,) if cohort.channels == 3 else ())
    if image.shape != wanted:
        return Finding(REJECT, (("image-size", f"The image has shape {image.shape}, {wanted} is needed."),))
    spread = float(image.std())
    if not np.isfinite(image).all() or spread < CONSTANT_STD:
        text = f"The image shows nothing: its standard deviation is {spread:.2g} of the range."
        return Finding(REJECT, (("image-constant", text),))
    return Finding()


def pseudo_label(context: GateContext, cases: Sequence[Case]) -> list[Finding]:
    """Reject images whose class the filter does not see, or not surely enough."""
    names, findings = context.cohort.classes, []
    verdicts = context.label_filter.judge(context.synthetic, cases, context.threshold)
    for case, seen in zip(cases, verdicts, strict=True):
        lineage = {"pseudo_label": seen.label, "confidence": round(seen.confidence, 6)}
        reasons = [
            (code, f"Intended {names[case.label]}, the filter sees {names[seen.label]} ({seen.confidence:.2f}).")
            if code == DISAGREES
            else (code, f"The filter's confidence is {seen.confidence:.2f}, {context.threshold:.2f} is needed.")
            for code in seen.reasons
        ]
        findings.append(Finding(ACCEPT if seen.accepted else REJECT, tuple(reasons), lineage))
    return findings


def copies(context: GateContext, cases: Sequence[Case]) -> list[Finding]:
    """Quarantine images nearer to a training image than 99 % of new ones are."""
    if not cases:
        return []
    ruler = context.ruler
    distances, nearest = ruler.distances(context.synthetic, cases)
    context.copies = copy_report(distances, ruler.threshold)
    findings = []
    for distance, other in zip(distances, nearest, strict=True):
        lineage = {"nearest_training_distance": round(float(distance), 6), "nearest_training_case": other}
        if distance > ruler.threshold:
            findings.append(Finding(ACCEPT, (), lineage))
            continue
        text = f"The distance to training case {other} is {distance:.4f}; new patients' images stay above {ruler.threshold:.4f}."
        findings.append(Finding(QUARANTINE, (("near-copy", text),), lineage))
    return findings


# `usable` always runs, and the others see only what it lets through.
CHECKS: dict[str, Check] = {"usable": usable, "pseudo_label": pseudo_label, "copies": copies}
