"""What a comparison of two arms can claim: the paired bootstrap by group, the luck of training, Holm, Wilcoxon.

Names: N cases, K classes, S runs (seeds, or seeds x networks), R resamples. Anything undefined is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.grading.metrics import BOOTSTRAP_METRICS, COUNT_METRICS, RANKING, checked_predictions, macro_auc, pair_auc, ratio

TIE_DECIMALS = 12  # of a score: equal counts summed in another order differ in the last bit, which is no difference
_CHUNK_ELEMENTS = 4_000_000  # resamples x cases held at once (32 MB)

__all__ = [
    "PairedDifference",
    "bootstrap_recalls",
    "bootstrap_scores",
    "compare_scores",
    "holm",
    "paired_bootstrap",
    "wilcoxon_networks",
    "with_training_luck",
]


@dataclass(frozen=True)
class PairedDifference:
    """Arm a minus arm b.

    Attributes:
        difference: on the test set as it is.  low, high: 95 % percentile interval over the resamples.
        p_value: two-sided, (1 + hits) / (1 + R) so never 0; 1 for identical predictions.
        score_a, score_b: the two values on the test set as it is.
        num_undefined: resamples in which the metric did not exist (a class was not drawn) and which were left out.
        patient_std: standard deviation over the resamples: the luck of the test patients.
    """

    difference: float
    low: float
    high: float
    p_value: float
    score_a: float
    score_b: float
    num_resamples: int
    num_undefined: int = 0
    patient_std: float = math.nan


def bootstrap_scores(
    target: np.ndarray, groups: Sequence[str], probs: np.ndarray, metric: str, *, num_resamples: int = 10_000, seed: int = 0
) -> np.ndarray:
    """A metric on the test set and on resamples of its groups, averaged over the runs.

    The draws depend on (seed, number of groups) alone, so two arms on one test set meet the same resamples.

    Args:
        target: (N,).  groups: (N,) patient or near-duplicate group of each case.  probs: (S, N, K).
        metric: one of `BOOTSTRAP_METRICS`.

    Returns:
        (1 + num_resamples,): entry 0 is the test set itself.

    Raises:
        ConfigError: unknown metric.  DataError: shapes that do not fit.
    """
    if metric not in BOOTSTRAP_METRICS:
        raise ConfigError("metric-unknown", f"A bootstrap metric must be one of {', '.join(BOOTSTRAP_METRICS)}, got {metric!r}.")
    probs = np.asarray(probs, dtype=float)
    if probs.ndim != 3 or len(groups) != probs.shape[1]:
        raise DataError(
            "predictions-invalid",
            f"The bootstrap needs probabilities (S, N, K) and N groups, got {probs.shape} and {len(groups)}.",
        )
    target = checked_predictions(target, probs[0])[0]
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    score = _scorer(target, member, probs, metric, len(names))
    return np.concatenate([score(drawn) for drawn in _multiplicities(len(names), len(target), num_resamples, seed)])


def bootstrap_recalls(
    target: np.ndarray, groups: Sequence[str], probs: np.ndarray, *, num_resamples: int = 10_000, seed: int = 0
) -> np.ndarray:
    """The recall of every class on the test set and on the resamples of `bootstrap_scores`, averaged over the runs.

    Args:
        target: (N,).  groups: (N,).  probs: (S, N, K).

    Returns:
        (1 + num_resamples, K): entry 0 is the test set itself; NaN where a class is absent.
    """
    probs = np.asarray(probs, dtype=float)
    target = checked_predictions(target, probs[0])[0]
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    support, hits = np.zeros((2, len(names), probs.shape[2]))
    np.add.at(support, (member, target), 1)
    np.add.at(hits, (member, target), (probs.argmax(2) == target).mean(0))
    drawn = _multiplicities(len(names), len(target), num_resamples, seed)
    return np.concatenate([ratio(weights @ hits, weights @ support) for weights in drawn])


def _multiplicities(num_groups: int, num_cases: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(R, G) how often each group is drawn: first once each, which is the test set itself, then the resamples in chunks."""
    yield np.ones((1, num_groups))
    chunk = max(1, _CHUNK_ELEMENTS // max(num_cases, num_groups))
    generator = numpy_generator("bootstrap", seed, num_groups)
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        yield generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=size).astype(float)


def _scorer(
    target: np.ndarray, member: np.ndarray, probs: np.ndarray, metric: str, num_groups: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The function (R, G) multiplicities of the groups -> (R,) metric, mean over the runs."""
    if metric == "auc":
        return lambda weights: np.mean([macro_auc(target, run, weights[:, member]) for run in probs], axis=0)
    if metric == RANKING:
        of_cases = pair_auc(target, probs)
        return lambda weights: of_cases(weights[:, member])
    num_runs, _, num_classes = probs.shape
    # Confusion counts add up over groups, so a resample is one row of a matrix product.
    per_group = np.zeros((num_groups, num_runs, num_classes, num_classes))
    for run in range(num_runs):
        np.add.at(per_group[:, run], (member, target, probs[run].argmax(1)), 1)
    flat = per_group.reshape(num_groups, -1)
    function = COUNT_METRICS[metric]
    return lambda weights: function((weights @ flat).reshape(-1, num_runs, num_classes, num_classes)).mean(-1)


def compare_scores(scores_a: np.ndarray, scores_b: np.ndarray) -> PairedDifference:
    """The paired difference of two outputs of `bootstrap_scores` on the same test set and seed."""
    differences = np.round(scores_a[1:] - scores_b[1:], TIE_DECIMALS)
    known = differences[~np.isnan(differences)]
    num_undefined = len(differences) - len(known)
    score_a, score_b = (round(float(scores[0]), TIE_DECIMALS) for scores in (scores_a, scores_b))
    if not len(known) or math.isnan(score_a - score_b):
        return PairedDifference(math.nan, math.nan, math.nan, 1.0, score_a, score_b, len(differences), num_undefined)
    low, high = np.percentile(known, [2.5, 97.5])
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    p_value = min(1.0, 2 * (1 + tail) / (1 + len(known)))
    difference = round(float(scores_a[0] - scores_b[0]), TIE_DECIMALS)
    return PairedDifference(
        difference,
        float(low),
        float(high),
        p_value,
        score_a,
        score_b,
        len(differences),
        num_undefined,
        float(known.std()),
    )


def with_training_luck(result: PairedDifference, seed_differences: Sequence[float], num_groups: int) -> PairedDifference:
    """The same difference with an interval that covers the luck of training too.

    The bootstrap holds the trained networks fixed, so its interval says nothing about another seed. Its variance and that of the mean
    over the seeds add up, and the critical value is that of Cochran and Cox (1950, Experimental Designs) for two variances of few and of
    many degrees of freedom. The usual approximation by one number of degrees of freedom (Satterthwaite 1946) is too narrow
    for so few seeds. The interval is never narrower and the p-value never smaller than the bootstrap's. One seed
    shows no luck, so nothing is added.

    Args:
        result: of the bootstrap.  seed_differences: (S,) arm minus arm for each seed, mean over networks.
        num_groups: groups of the test set.
    """
    num_seeds = len(seed_differences)
    if num_seeds < 2 or math.isnan(result.difference) or math.isnan(result.patient_std):
        return result
    of_seeds = float(np.var(seed_differences, ddof=1)) / num_seeds
    of_patients = result.patient_std**2
    deviation = math.sqrt(of_seeds + of_patients)
    if deviation < 1e-12:
        return result
    parts = ((of_seeds, num_seeds - 1), (of_patients, max(num_groups - 1, 1)))
    half = _critical_value(0.05, parts) * deviation
    return replace(
        result,
        low=min(result.low, result.difference - half),
        high=max(result.high, result.difference + half),
        p_value=max(result.p_value, _two_sided_p(abs(result.difference) / deviation, parts)),
    )


def _critical_value(p_value: float, parts: Sequence[tuple[float, int]]) -> float:
    """The mean of the two-sided critical values of t with each part's degrees of freedom, weighted by its variance."""
    weighted = sum(variance * -float(special.stdtrit(freedom, p_value / 2)) for variance, freedom in parts)
    return weighted / sum(variance for variance, _ in parts)


def _two_sided_p(statistic: float, parts: Sequence[tuple[float, int]]) -> float:
    """The p-value at which `statistic` is the critical value; none is given below 1e-15."""

    def excess(log_p: float) -> float:
        return _critical_value(math.exp(log_p), parts) - statistic

    lowest = math.log(1e-15)
    if excess(0.0) >= 0:
        return 1.0
    return 1e-15 if excess(lowest) <= 0 else math.exp(float(optimize.brentq(excess, lowest, 0.0)))


def paired_bootstrap(
    target: np.ndarray,
    groups: Sequence[str],
    probs_a: np.ndarray,
    probs_b: np.ndarray,
    metric: str,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Difference a - b of a metric with its interval over resampled groups, the same groups in both arms.

    The interval says what another draw of test patients could have shown; it holds the trained networks fixed.

    Args:
        target: (N,).  groups: (N,).  probs_a, probs_b: (S, N, K), averaged over S after scoring each run.
    """
    scores = [
        bootstrap_scores(target, groups, probs, metric, num_resamples=num_resamples, seed=seed) for probs in (probs_a, probs_b)
    ]
    return compare_scores(*scores)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of a family of p-values (Holm 1979)."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted


def wilcoxon_networks(differences: Sequence[float]) -> dict[str, Any]:
    """Signed-rank test over networks: are the seed-averaged differences of one sign?

    Networks share one test set, so this speaks about consistency, not about other patients. Five networks can never reach
    0.05, ten reach 0.002 at best.

    Returns:
        num_networks, wins (differences above 0), median, p_value (exact; None with `reason` if all differences are 0 or none is
        given).
    """
    values = np.round(np.asarray(differences, dtype=float), TIE_DECIMALS)
    values = values[~np.isnan(values)]
    summary: dict[str, Any] = {"num_networks": len(values), "wins": int((values > 0).sum())}
    summary["median"] = float(np.median(values)) if len(values) else None
    if not np.any(values):
        return summary | {"p_value": None, "reason": "every difference is 0" if len(values) else "no difference is defined"}
    return summary | {"p_value": _signed_rank_p(values[values != 0]), "reason": None}


def _signed_rank_p(values: np.ndarray) -> float:
    """Two-sided p of the signed-rank statistic over all 2^n signs, ties at their mean rank (Wilcoxon 1945); no value is 0.

    Scores of small test sets tie often, and the usual normal approximation then goes below what n signs can show.
    """
    ranks = np.rint(2 * stats.rankdata(np.abs(values))).astype(int)  # doubled, so that mean ranks are whole
    counts = np.zeros(ranks.sum() + 1)  # number of sign patterns by doubled sum of the positive ranks
    counts[0] = 1
    for rank in ranks:
        counts[rank:] = counts[rank:] + counts[:-rank]
    reached = ranks[values > 0].sum()
    tail = min(counts[: reached + 1].sum(), counts[reached:].sum()) / counts.sum()
    return float(min(1.0, 2 * tail))
