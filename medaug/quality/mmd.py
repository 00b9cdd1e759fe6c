"""Maximum mean discrepancy with Gaussian kernels, and its permutation test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.quality.neighbours import checked_features

FACTORS = (0.5, 1.0, 2.0)
MOST = 1000  # images of either side: the kernel is held whole
PERMUTATIONS = 200

__all__ = ["GaussianMmd", "gaussian_mmd", "intraclass_diversity"]


@dataclass(frozen=True)
class GaussianMmd:
    """Unbiased squared MMD.

    Attributes:
        value: may be negative.
        p: share of relabellings with a value at least as large (Phipson and Smyth 2010: never 0).
        bandwidth: median distance between images of both sets.
        n, m: images behind it, at most `MOST` of either side.
    """

    value: float
    p: float
    bandwidth: float
    n: int
    m: int


def gaussian_mmd(
    x: np.ndarray, y: np.ndarray, *, factors: Sequence[float] = FACTORS, permutations: int = PERMUTATIONS, key: object = 0
) -> GaussianMmd:
    """Mean over bandwidths, the median distance times `factors`, of the unbiased estimate (Gretton et al. 2012, eq. 3).

    Args:
        x, y: features (N, D) and (M, D), at least 2 rows each.
        factors: of the bandwidth sigma in exp(-|a - b|^2 / (2 sigma^2)).
        permutations: relabellings of the test.
        key: of subsets and relabellings.

    Raises:
        DataError: fewer than two images on a side, or features that are all the same (code `features-constant`).
    """
    x, y = (_some(checked_features(part), key, side) for side, part in enumerate((x, y)))
    if min(len(x), len(y)) < 2:
        raise DataError("features-empty", f"An MMD needs two images on either side, got {len(x)} and {len(y)}.")
    squares = _squared_distances(np.concatenate([x, y]))
    median = float(np.median(squares[np.triu_indices(len(squares), 1)]))
    if median <= 0:
        raise DataError("features-constant", "More than half of the images have the same features; an MMD has no bandwidth.")
    kernel = np.zeros_like(squares)
    for factor in factors:
        kernel += np.exp(-squares / (2 * factor**2 * median)) / len(factors)
    np.fill_diagonal(kernel, 0)
    n = len(x)
    draw = numpy_generator("mmd", key)
    side = np.zeros(len(kernel))
    side[:n] = 1
    value = _value(kernel, side)
    # Relabelled all at once: two matrix products.
    labels = np.stack([draw.permutation(side) for _ in range(permutations)], axis=1) if permutations else np.zeros((len(side), 0))
    larger = int((_value(kernel, labels) >= value).sum())
    return GaussianMmd(float(value), (larger + 1) / (permutations + 1), median**0.5, n, len(y))


def _some(x: np.ndarray, key: object, side: int) -> np.ndarray:
    """At most `MOST` rows; sorted first, so that the draw belongs to the set and not to its order."""
    x = x[np.lexsort(x.T[::-1])]
    return x if len(x) <= MOST else x[np.sort(numpy_generator("mmd-rows", key, side).permutation(len(x))[:MOST])]


def _squared_distances(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=0)
    lengths = (x**2).sum(axis=1)
    squares = np.maximum(lengths[:, None] + lengths[None, :] - 2 * x @ x.T, 0)
    np.fill_diagonal(squares, 0)
    return squares


def _value(kernel: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Unbiased estimate for each column of `side`, 1 for the first set; the kernel's diagonal is 0."""
    n, m = side.sum(axis=0), (1 - side).sum(axis=0)
    first = kernel @ side
    within_x, cross = (side * first).sum(axis=0), ((1 - side) * first).sum(axis=0)
    within_y = kernel.sum() - within_x - 2 * cross
    found: np.ndarray = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * cross / (n * m)
    return found


def intraclass_diversity(features: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean Euclidean distance between two images of one class, averaged over the classes; None if no class has two."""
    x, target = checked_features(features), np.asarray(labels)
    means = []
    for label in np.unique(target):
        own = _some(x[target == label], "diversity", int(label))
        if len(own) > 1:
            means.append(float(np.sqrt(_squared_distances(own)).sum() / (len(own) * (len(own) - 1))))
    return float(np.mean(means)) if means else None
