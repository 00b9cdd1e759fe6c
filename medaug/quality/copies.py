"""Near-copies of training images: synthetic images that lie nearer to one than new patients ever do.

The yardstick is the distance from held-out real images to their nearest training image. A synthetic image below its
1st percentile is flagged; about 1 % of honest images are, so the rate over a set tells more than one flag.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import binomtest

from medaug.errors import DataError

PERCENTILE = 1.0
FLAG_RATE = 0.05
CHUNK = 512

__all__ = ["CopyReport", "copy_report", "copy_threshold", "cross_group_distances", "nearest_distances"]


def nearest_distances(features: np.ndarray, train_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and index of, the nearest training image; features are L2-normalised first.

    Args:
        features: (N, D).
        train_features: (M, D), M >= 1.

    Returns:
        distances (N,) in [0, 2] and indices (N,). Memory: `CHUNK` x M distances at once.
    """
    x, train = _unit(features), _unit(train_features)
    distances, indices = np.empty(len(x)), np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), CHUNK):
        block = cdist(x[start : start + CHUNK], train)
        indices[start : start + CHUNK] = block.argmin(axis=1)
        distances[start : start + CHUNK] = block.min(axis=1)
    return distances, indices


def cross_group_distances(features: np.ndarray, groups: list[str]) -> np.ndarray:
    """Distance of each training image to the nearest one of another group: what a new patient's would look like.

    Stands in for held-out images where there are too few. Returns (N,); images of a lone group are left out.
    """
    x, group = _unit(features), np.unique(np.asarray(groups), return_inverse=True)[1]
    nearest = []
    for start in range(0, len(x), CHUNK):
        block = cdist(x[start : start + CHUNK], x)
        block[group[start : start + CHUNK, None] == group[None, :]] = np.inf
        nearest.append(block.min(axis=1))
    distances = np.concatenate(nearest)
    return distances[np.isfinite(distances)]


def copy_threshold(held_out_distances: np.ndarray) -> float:
    """The 1st percentile of the distances from held-out real images to their nearest training image.

    Raises:
        DataError: no distances.
    """
    if len(held_out_distances) == 0:
        raise DataError(
            "held-out-empty", "A copy threshold needs held-out images, or training images of several groups; got none."
        )
    return float(np.percentile(held_out_distances, PERCENTILE))


@dataclass(frozen=True)
class CopyReport:
    """Copy rate of a set.

    Attributes:
        n: images judged.  copies: how many were flagged.
        rate: copies / n, None for n = 0.
        low, high: 95 % interval of the rate (Clopper-Pearson).
        suspicious: the rate is above 5 %.
    """

    n: int
    copies: int
    rate: float | None
    low: float | None
    high: float | None
    suspicious: bool


def copy_report(distances: np.ndarray, threshold: float) -> CopyReport:
    """Count distances at or below `threshold` (an exact copy has 0, and so may the threshold)."""
    n, copies = len(distances), int((np.asarray(distances) <= threshold).sum())
    if n == 0:
        return CopyReport(0, 0, None, None, None, False)
    interval = binomtest(copies, n).proportion_ci(method="exact")
    return CopyReport(n, copies, copies / n, float(interval.low), float(interval.high), copies / n > FLAG_RATE)


def _unit(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0 or not np.isfinite(x).all():
        raise DataError("features-invalid", f"Features must be finite and (N, D) with N of at least 1, got shape {x.shape}.")
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
