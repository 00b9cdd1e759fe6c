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
from medaug.quality.amst_labels import AmstLabels, train_amst_labels
from medaug.quality.copies import (
    CopyReport,
    copy_report,
    copy_threshold,
    cross_group_distances,
    nearest_distances,
)
from medaug.quality.fidelity import MINIMUM, RandomConvFeatures, features_of
from medaug.quality.images import image_batches
from medaug.quality.label_source import LabelSource
from medaug.quality.pseudo_label import LabelFilter, train_filter
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.classifier import ClassifierRecipe

ACCEPT, QUARANTINE, REJECT = "accept", "quarantine", "reject"
VERDICTS = (ACCEPT, QUARANTINE, REJECT)  # from the mildest to the strictest
CONSTANT_STD = 1 / 255  # a picture with less contrast than one 8-bit level shows nothing

__all__ = ["CHECKS", "LABEL_SOURCES", "Check", "CopyRuler", "Finding", "GateContext", "worst"]


@dataclass(frozen=True)
class Finding:
    """What one check says of one case.

    Attributes:
        verdict: "accept", "quarantine" (a person may look at it) or "reject".
        reasons: (code, sentence) pairs; empty when accepted.
        lineage: numbers to keep with the case.
        label: the class an accepted case is to carry; None keeps the one it was generated for.
        unlabelled: True if only the label is in doubt, not the image.
    """

    verdict: str = ACCEPT
    reasons: tuple[tuple[str, str], ...] = ()
    lineage: Mapping[str, Any] = field(default_factory=dict)
    label: int | None = None
    unlabelled: bool = False


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
        label: the source of labels, a name in `LABEL_SOURCES`.
        amst: settings of the source "amst".
        weights, replace_head, weights_trusted: checkpoint that its backbone starts from, and the user's word for it.
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
    label: str = "filter"
    amst: AmstRecipe | None = None
    weights: Path | None = None
    replace_head: bool = False
    weights_trusted: bool = False

    @cached_property
    def label_filter(self) -> LabelSource:
        """The source of labels, trained or read from its cache."""
        return LABEL_SOURCES[self.label](self)

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


def _filter(context: GateContext) -> LabelFilter:
    return train_filter(
        context.cohort,
        context.filter_dir,
        recipe=context.recipe,
        network=context.network,
        seed=context.seed,
        calibrate=context.calibrate,
    )


def _amst(context: GateContext) -> AmstLabels:
    return train_amst_labels(
        context.cohort,
        context.filter_dir,
        recipe=context.recipe,
        amst=context.amst,
        network=context.network,
        seed=context.seed,
        weights=context.weights,
        replace_head=context.replace_head,
        weights_trusted=context.weights_trusted,
    )


# filter: a CNN must confirm the intended label. amst: the heads' consensus is the label, whatever was intended.
LABEL_SOURCES: dict[str, Callable[[GateContext], LabelSource]] = {"filter": _filter, "amst": _amst}

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
    """Reject images whose label the source does not confirm, or not surely enough."""
    findings = []
    for seen in context.label_filter.verdicts(context.synthetic, cases, context.threshold):
        label = seen.label if seen.relabel and not seen.reasons else None
        findings.append(Finding(REJECT if seen.reasons else ACCEPT, seen.reasons, seen.lineage, label, seen.relabel))
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
