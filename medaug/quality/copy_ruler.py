"""Rulers for copies: a space of features or pixels, the training images in it, and the distance below which an image is a copy.

The distance comes from real images of new patients: validation, or training across groups where validation is small.
Test stays untouched. What starts from a seed image is compared with its seed's patient by another distance: that of a
weakly augmented copy, which is what a variation must differ from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from medaug.cohort import Case, Cohort
from medaug.quality.alignment import PixelIndex, working_images
from medaug.quality.copies import copy_threshold, cross_group_distances, group_codes
from medaug.quality.feature_cache import FeatureCache, NamedExtractor, cached_features
from medaug.quality.fidelity import MINIMUM, features_of
from medaug.quality.images import BATCH_SIZE, image_batches
from medaug.quality.neighbours import nearest, unit_rows
from medaug.transforms.policies import apply_policy

VALIDATION, OTHER_GROUPS = "validation", "other groups of training"

__all__ = ["CopyRuler", "Near", "PixelRuler", "Ruler", "feature_ruler", "near_in", "pixel_ruler", "real_cases", "weak_batches"]


@dataclass(frozen=True)
class Near:
    """The nearest training images of N images.

    Attributes:
        distance: (N,), infinite where nothing was left to compare with.
        index: place in the ruler's `ids`, (N,), -1 where nothing was left.
        second: distance to the nearest image of another group than the nearest one's, (N,).
        similarity: SSIM with the nearest at its best alignment, (N,), or None in a space of features.
    """

    distance: np.ndarray
    index: np.ndarray
    second: np.ndarray
    similarity: np.ndarray | None = None

    @property
    def ratio(self) -> np.ndarray:
        """Nearest to second nearest, (N,) in [0, 1]; small says that one image stands out. NaN without a second."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(self.second > 0, self.distance / self.second, 1.0)
        return np.where(np.isfinite(self.second), ratio, np.nan)


class Ruler(Protocol):
    """What the copies check needs of a space."""

    @property
    def name(self) -> str:
        """Of the space."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Training case ids."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Their groups."""

    @property
    def threshold(self) -> float:
        """At or below it an image is a copy."""

    @property
    def basis(self) -> str:
        """What the threshold was taken from."""

    @property
    def n(self) -> int:
        """Images behind the threshold."""

    def near(self, cohort: Cohort, cases: Sequence[Case], passing_over: Sequence[str] | None = None) -> Near:
        """Nearest training images, those of the group `passing_over` names for each case left out."""

    def apart(self, batches: Iterable[Tensor], indices: np.ndarray) -> np.ndarray:
        """Distance (N,) of each image of the batches to the training image at its index."""


@dataclass(frozen=True, eq=False)
class CopyRuler:
    """Features of the training images and the distance below which an image counts as a copy.

    Attributes:
        extractor: the feature space.
        training: (M, D) features of the real training cases.  ids: their case ids.
        threshold: see `copy_threshold`.
        basis: "validation" or "other groups of training": what the threshold was taken from.
        n: images behind the threshold.
        groups: of the training cases.
        held_out: (H, D) features of the validation cases, or None.
        cache: of features.
    """

    extractor: NamedExtractor
    training: np.ndarray
    ids: tuple[str, ...]
    threshold: float
    basis: str
    n: int
    groups: tuple[str, ...] = ()
    held_out: np.ndarray | None = None
    cache: FeatureCache | None = None

    @property
    def name(self) -> str:
        """Of the feature space."""
        return self.extractor.name

    def features(self, cohort: Cohort, cases: Sequence[Case]) -> np.ndarray:
        """(N, D) float64."""
        return cached_features(self.cache, self.extractor, cohort, cases)

    def distances(self, cohort: Cohort, cases: Sequence[Case]) -> tuple[np.ndarray, list[str]]:
        """Distance to the nearest training image, (N,), and that image's case id."""
        found = self.near(cohort, cases)
        return found.distance, [self.ids[index] for index in found.index]

    def near(self, cohort: Cohort, cases: Sequence[Case], passing_over: Sequence[str] | None = None) -> Near:
        """See `Ruler`."""
        return near_in(self.training, self.groups, self.features(cohort, cases), passing_over)

    def apart(self, batches: Iterable[Tensor], indices: np.ndarray) -> np.ndarray:
        """See `Ruler`."""
        return np.linalg.norm(unit_rows(features_of(self.extractor, batches)) - unit_rows(self.training)[indices], axis=1)


def near_in(training: np.ndarray, groups: Sequence[str], features: np.ndarray, passing_over: Sequence[str] | None = None) -> Near:
    """`Near` of features (N, D) among `training` (M, D), both L2-normalised first; no groups: every image its own."""
    x, y = unit_rows(features), unit_rows(training)
    names = list(groups) or [str(index) for index in range(len(y))]
    known = {name: code for code, name in enumerate(dict.fromkeys(names))}
    y_codes = np.array([known[name] for name in names])
    x_codes = None if passing_over is None else np.array([known.get(name, -1) for name in passing_over])
    first, index = nearest(x, y, x_groups=x_codes, y_groups=y_codes)
    there = index[:, 0] >= 0
    second = np.full(len(x), np.inf)
    if there.any():
        left_out = y_codes[index[there, 0]][:, None]
        if x_codes is not None:
            left_out = np.concatenate([left_out, x_codes[there, None]], axis=1)
        second[there] = nearest(x[there], y, x_groups=left_out, y_groups=y_codes)[0][:, 0]
    return Near(first[:, 0], index[:, 0], second)


@dataclass(frozen=True, eq=False)
class PixelRuler:
    """Pixels of the training images, compared over mirrors, shifts, crops and contrast; attributes as `CopyRuler`'s."""

    index: PixelIndex
    ids: tuple[str, ...]
    threshold: float
    basis: str
    n: int
    groups: tuple[str, ...]
    name: str = "pixels"

    def near(self, cohort: Cohort, cases: Sequence[Case], passing_over: Sequence[str] | None = None) -> Near:
        """See `Ruler`."""
        known = dict(zip(self.groups, self.index.groups, strict=True))
        codes = None if passing_over is None else np.array([known.get(name, -1) for name in passing_over])
        found = self.index.match(working_images(image_batches(cohort, cases)), codes)
        return Near(found.distance, found.index, found.second, found.similarity)

    def apart(self, batches: Iterable[Tensor], indices: np.ndarray) -> np.ndarray:
        """See `Ruler`."""
        return self.index.pairs(working_images(batches), np.asarray(indices, dtype=np.int64))


def real_cases(cohort: Cohort) -> list[Case]:
    """The real training cases."""
    return [case for case in cohort.training if not case.is_synthetic]


def feature_ruler(cohort: Cohort, extractor: NamedExtractor, cache: FeatureCache | None = None) -> CopyRuler:
    """The ruler of a feature space.

    Raises:
        DataError: neither enough validation images nor training images of several groups (code `held-out-empty`).
    """
    real = real_cases(cohort)
    groups = tuple(case.group for case in real)
    training = cached_features(cache, extractor, cohort, real)
    held_out = cached_features(cache, extractor, cohort, cohort.validation) if cohort.validation else None
    if held_out is not None and len(held_out) >= MINIMUM:
        distances, basis = near_in(training, groups, held_out).distance, VALIDATION
    else:
        distances, basis = cross_group_distances(training, groups), OTHER_GROUPS
    ids = tuple(case.id for case in real)
    return CopyRuler(extractor, training, ids, copy_threshold(distances), basis, len(distances), groups, held_out, cache)


def pixel_ruler(cohort: Cohort) -> PixelRuler:
    """The ruler of pixels; arguments and errors as `feature_ruler`."""
    real = real_cases(cohort)
    groups = tuple(case.group for case in real)
    pictures = working_images(image_batches(cohort, real))
    index = PixelIndex(pictures, group_codes(groups))
    if len(cohort.validation) >= MINIMUM:
        distances, basis = index.match(working_images(image_batches(cohort, cohort.validation))).distance, VALIDATION
    else:
        found = index.match(pictures, index.groups).distance
        distances, basis = found[np.isfinite(found)], OTHER_GROUPS
    ids = tuple(case.id for case in real)
    return PixelRuler(index, ids, copy_threshold(distances), basis, len(distances), groups)


def weak_batches(cohort: Cohort, cases: Sequence[Case], seed: int = 0) -> Iterator[Tensor]:
    """Weakly augmented copies of cases, as batches: what a variation of a seed image has to differ from more."""
    names: Iterator[str] = iter([case.id for case in cases])
    for batch in image_batches(cohort, cases, BATCH_SIZE):
        yield apply_policy("weak", batch, [("copies", "weak", seed, next(names)) for _ in range(len(batch))])
