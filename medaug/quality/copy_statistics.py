"""Whether a whole set lies nearer to the training images than new real ones do: what single flags do not show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, mannwhitneyu

from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.quality.neighbours import nearest, unit_rows

REPEATS = 10

__all__ = ["Closeness", "closeness", "closer_to_training"]


@dataclass(frozen=True)
class Closeness:
    """Synthetic images against equally large sets of training and held-out real ones.

    Attributes:
        n: synthetic images.  n_training, n_held_out: images of each set behind one comparison.
        repeats: subsets of the larger set that were averaged over.
        share: of synthetic images nearer to training than to held-out (a tie counts half); 0.5 without copying.
        low, high: 95 % interval of the share (Clopper-Pearson on the mean count).
        auc: probability that a synthetic image lies nearer to the whole training split than a held-out one does.
        p: of the one-sided Mann-Whitney test of that.
    """

    n: int
    n_training: int
    n_held_out: int
    repeats: int
    share: float
    low: float
    high: float
    auc: float
    p: float


def closer_to_training(
    synthetic: np.ndarray, training: np.ndarray, held_out: np.ndarray, key: object = 0, repeats: int = REPEATS
) -> tuple[float, int, int]:
    """Mean share of `synthetic` (N, D) nearer to `training` than to `held_out`, the larger one subsampled to the smaller's size.

    Returns:
        share in [0, 1], size of either set, number of subsets.
    """
    size = min(len(training), len(held_out))
    rounds = 1 if len(training) == len(held_out) else repeats
    to_smaller = _nearest(synthetic, held_out if len(held_out) == size else training)
    larger = training if len(held_out) == size else held_out
    shares = []
    for index in range(rounds):
        chosen = np.sort(numpy_generator("closer", key, index).permutation(len(larger))[:size])
        to_larger = _nearest(synthetic, larger[chosen])
        to_training, to_held_out = (to_larger, to_smaller) if len(held_out) == size else (to_smaller, to_larger)
        shares.append(float((to_training < to_held_out).mean() + 0.5 * (to_training == to_held_out).mean()))
    return float(np.mean(shares)), size, rounds


def _nearest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return nearest(x, y)[0][:, 0]


def closeness(synthetic: np.ndarray, training: np.ndarray, held_out: np.ndarray, key: object = 0) -> Closeness:
    """Measure a set in one feature space; rows are L2-normalised first.

    Args:
        synthetic, training, held_out: (N, D), (M, D), (H, D).
        key: of the subsets.

    Raises:
        DataError: an empty set, or features that are not finite.
    """
    if not min(len(synthetic), len(training), len(held_out)):
        raise DataError("held-out-empty", "Closeness needs synthetic, training and held-out images; one of them has none.")
    x, train, held = unit_rows(synthetic), unit_rows(training), unit_rows(held_out)
    share, size, rounds = closer_to_training(x, train, held, key)
    interval = binomtest(round(share * len(x)), len(x)).proportion_ci(method="exact")
    auc, p = nearer_than(_nearest(x, train), _nearest(held, train))
    return Closeness(len(x), size, size, rounds, share, float(interval.low), float(interval.high), auc, p)


def nearer_than(distances: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Mann-Whitney: probability that one of `distances` (N,) is below one of `others` (M,), and the one-sided p."""
    test: Callable[..., tuple[float, float]] = mannwhitneyu
    statistic, p = test(distances, others, alternative="less")
    return 1 - float(statistic) / (len(distances) * len(others)), float(p)
