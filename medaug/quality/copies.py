"""Near-copies of training images: synthetic images that lie nearer to one than new patients ever do.

The yardstick is the distance from held-out real images to their nearest training image. A synthetic image below its
1st percentile is flagged; about 1 % of honest images are, so the rate over a set tells more than one flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from medaug.errors import DataError
from medaug.quality.neighbours import nearest, unit_rows

PERCENTILE = 1.0
FLAG_RATE = 0.05

__all__ = ["CopyReport", "copy_report", "copy_threshold", "cross_group_distances", "group_codes", "nearest_distances"]


def nearest_distances(features: np.ndarray, train_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and index of, the nearest training image; features are L2-normalised first.

    Args:
        features: (N, D).
        train_features: (M, D), M >= 1.

    Returns:
        distances (N,) in [0, 2] and indices (N,).
    """
    distances, indices = nearest(unit_rows(features), unit_rows(train_features))
    return distances[:, 0], indices[:, 0]


def cross_group_distances(features: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Distance of each training image to the nearest one of another group: what a new patient's would look like.

    Stands in for held-out images where there are too few. Returns (N,); images of a lone group are left out.
    """
    x, codes = unit_rows(features), group_codes(groups)
    distances = nearest(x, x, x_groups=codes, y_groups=codes)[0][:, 0]
    return distances[np.isfinite(distances)]


def group_codes(groups: Sequence[str]) -> np.ndarray:
    """Integers (N,), equal where the groups are."""
    return np.unique(np.asarray(groups), return_inverse=True)[1]


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
