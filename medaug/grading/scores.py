"""What the test predictions of a benchmark score, on the test set and on resamples of its groups, the same ones for every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medaug.grading.metrics import RANKING
from medaug.grading.statistics import (
    TIE_DECIMALS,
    PairedDifference,
    bootstrap_recalls,
    bootstrap_scores,
    compare_scores,
    with_training_luck,
)

__all__ = ["Predictions", "Scores", "score_cells"]


@dataclass(frozen=True)
class Predictions:
    """What the rows of a benchmark say about the test set.

    Attributes:
        target: (N,) true classes.  groups: (N,) group of each case.
        probs: (arm, network) -> (S, N, K), one entry per seed, seeds in the same order everywhere.
        validation: (arm, network) -> primary metric on validation, mean over seeds; None where undefined.
    """

    target: np.ndarray
    groups: Sequence[str]
    probs: Mapping[tuple[str, str], np.ndarray]
    validation: Mapping[tuple[str, str], float | None]

    @property
    def arms(self) -> list[str]:
        """Arm names in first-seen order."""
        return list(dict.fromkeys(arm for arm, _ in self.probs))

    @property
    def networks(self) -> list[str]:
        """Network names in first-seen order."""
        return list(dict.fromkeys(network for _, network in self.probs))


@dataclass(frozen=True)
class Scores:
    """One metric of every arm.

    Attributes:
        metric: its name.
        cells: (arm, network) -> (1 + R,): on the test set and on R resamples of its groups, mean over seeds.
        pooled: arm -> (1 + R,), mean over networks.
        by_seed: arm -> S values on the test set, mean over networks.
        num_groups: of the test set.
        recalls: arm -> (1 + R, K) recall of every class, mean over networks and seeds.
        recalls_by_seed: arm -> (S, K) on the test set, mean over networks.
        ranking: the same of `pair_auc`, which does not depend on where the classes are cut.
    """

    metric: str
    cells: Mapping[tuple[str, str], np.ndarray]
    pooled: Mapping[str, np.ndarray]
    by_seed: Mapping[str, Sequence[float]]
    num_groups: int
    recalls: Mapping[str, np.ndarray] = field(default_factory=dict)
    recalls_by_seed: Mapping[str, np.ndarray] = field(default_factory=dict)
    ranking: Scores | None = None

    def seed_differences(self, arm: str, other: str) -> list[float]:
        """Arm minus other for each seed: how much a verdict owes to chance in training."""
        pairs = zip(self.by_seed[arm], self.by_seed[other], strict=True)
        return [round(score - against, TIE_DECIMALS) for score, against in pairs]

    def compare(self, arm: str, other: str) -> PairedDifference:
        """Arm minus other over all networks; the interval covers the choice of test groups and the luck of training."""
        result = compare_scores(self.pooled[arm], self.pooled[other])
        return with_training_luck(result, self.seed_differences(arm, other), self.num_groups)

    def compare_networks(self, arm: str, other: str) -> dict[str, PairedDifference]:
        """Arm minus other for each network; the intervals cover the choice of test groups alone."""
        networks = dict.fromkeys(network for _, network in self.cells)
        return {network: compare_scores(self.cells[arm, network], self.cells[other, network]) for network in networks}

    def compare_classes(self, arm: str, other: str) -> list[PairedDifference]:
        """Arm minus other in the recall of each class over all networks; the intervals cover what those of `compare` do."""
        ours, theirs = self.recalls[arm], self.recalls[other]
        seeds = np.round(self.recalls_by_seed[arm] - self.recalls_by_seed[other], TIE_DECIMALS)
        return [
            with_training_luck(compare_scores(ours[:, index], theirs[:, index]), list(seeds[:, index]), self.num_groups)
            for index in range(ours.shape[1])
        ]

    def interval(self, arm: str) -> tuple[float, float, float]:
        """The arm's score over all networks and its 95 % percentile interval over the test groups; NaN where it is undefined."""
        known = self.pooled[arm][1:][~np.isnan(self.pooled[arm][1:])]
        low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
        return float(self.pooled[arm][0]), float(low), float(high)


def score_cells(predictions: Predictions, metric: str, *, num_resamples: int = 10_000, seed: int = 0) -> Scores:
    """Score every cell of a benchmark, with the recall of every class and the ranking; see `bootstrap_scores`."""
    target, groups = predictions.target, predictions.groups
    runs = _runs(predictions)

    def recalls(own: Sequence[np.ndarray], resamples: int) -> np.ndarray:
        return bootstrap_recalls(target, groups, np.stack(own), num_resamples=resamples, seed=seed)

    of_seeds = {arm: [[one[index] for one in own] for index in range(len(own[0]))] for arm, own in runs.items()}
    return replace(
        _scored(predictions, metric, num_resamples, seed),
        recalls={arm: recalls(list(np.concatenate(own)), num_resamples) for arm, own in runs.items()},
        recalls_by_seed={arm: np.stack([recalls(own, 0)[0] for own in by_seed]) for arm, by_seed in of_seeds.items()},
        ranking=_scored(predictions, RANKING, num_resamples, seed),
    )


def _runs(predictions: Predictions) -> dict[str, list[np.ndarray]]:
    """Arm -> (S, N, K) of every network."""
    return {arm: [predictions.probs[arm, network] for network in predictions.networks] for arm in predictions.arms}


def _scored(predictions: Predictions, metric: str, num_resamples: int, seed: int) -> Scores:
    """The scores of one metric alone."""
    target, groups = predictions.target, predictions.groups
    cells = {
        cell: bootstrap_scores(target, groups, probs, metric, num_resamples=num_resamples, seed=seed)
        for cell, probs in predictions.probs.items()
    }

    def by_seed(own: Sequence[np.ndarray]) -> list[float]:
        seeds = [np.stack([one[index] for one in own]) for index in range(len(own[0]))]
        return [float(bootstrap_scores(target, groups, one, metric, num_resamples=0)[0]) for one in seeds]

    return Scores(
        metric,
        cells,
        {arm: np.mean([cells[arm, network] for network in predictions.networks], axis=0) for arm in predictions.arms},
        {arm: by_seed(own) for arm, own in _runs(predictions).items()},
        len(set(groups)),
    )
