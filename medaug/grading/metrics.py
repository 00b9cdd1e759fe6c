"""Metrics of a classifier: short functions on NumPy arrays, no state.

Names: N cases, K classes, R resamples. Anything undefined is NaN in these functions and becomes None with a reason in
`classification_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from medaug.errors import DataError
from medaug.training.classifier import confusion_counts, macro_f1
from medaug.training.temperature import expected_calibration_error

NO_ORDER = "the classes have no order"
_MOST_PAIRS = 10_000_000  # of cases, held at once (80 MB); test sets beyond some 5,000 cases are scored run by run
_LEAST_PROBABILITY = 5e-7  # rows hold six decimals, so a 0 stands for anything below this

__all__ = [
    "BOOTSTRAP_METRICS",
    "COUNT_METRICS",
    "NO_ORDER",
    "RANKING",
    "accuracy",
    "balanced_accuracy",
    "checked_predictions",
    "classification_metrics",
    "grade_error",
    "macro_auc",
    "pair_auc",
    "quadratic_kappa",
    "ratio",
]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    return np.divide(
        numerator,
        denominator,
        out=np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan),
        where=denominator > 0,
    )


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of hits; counts (..., K, K), rows the truth -> (...)."""
    return ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur in the truth; counts (..., K, K) -> (...)."""
    recall = ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1))
    present = ~np.isnan(recall)
    return ratio(np.where(present, recall, 0).sum(-1), present.sum(-1))


def quadratic_kappa(counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa with weights (i-j)^2 / (K-1)^2; counts (..., K, K) -> (...).

    1 - sum w O / sum w E with E from the marginals (Cohen 1968). NaN if truth and predictions are one and the same class.
    """
    num_classes = counts.shape[-1]
    grades = np.arange(num_classes)
    weights = (grades[:, None] - grades[None, :]) ** 2 / max(num_classes - 1, 1) ** 2
    expected = counts.sum(-1)[..., :, None] * counts.sum(-2)[..., None, :]
    return 1 - ratio((weights * counts).sum((-2, -1)) * counts.sum((-2, -1)), (weights * expected).sum((-2, -1)))


def grade_error(counts: np.ndarray) -> np.ndarray:
    """Mean absolute error of the grade, in grades; counts (..., K, K) -> (...)."""
    grades = np.arange(counts.shape[-1])
    return ratio((np.abs(grades[:, None] - grades[None, :]) * counts).sum((-2, -1)), counts.sum((-2, -1)))


def _weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half; weights (R, N) -> (R,), NaN without positives or negatives."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    ordered = weights[:, order]
    up = np.add.reduceat(ordered * positive[order], starts, axis=1)
    down = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    return ratio((up * below).sum(1), up.sum(1) * down.sum(1))


def macro_auc(target: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUC of class 1 for two classes, else the mean one-versus-rest AUC; NaN if a class is absent.

    Args:
        target: (N,) class indices.  probs: (N, K).  weights: (R, N) counts of each case; default once.

    Returns:
        (R,) values.
    """
    weights = np.ones((1, len(target))) if weights is None else weights
    classes = [1] if probs.shape[1] == 2 else range(probs.shape[1])
    return np.mean([_weighted_auc(probs[:, index], target == index, weights) for index in classes], axis=0)


def pair_auc(target: np.ndarray, probs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """How well classes are told apart wherever they are cut, averaged over runs, as a function of how often each case counts.

    The AUC of every pair of classes (Hand and Till 2001, Machine Learning 45), with the cases of both in the order of the odds p_j / p_i: what
    multiplies the odds of a class for all cases alike, as a threshold or another share of classes does, changes no order. (One-versus-rest
    AUCs of three classes and more do change then.) An AUC is the share of pairs of cases in order (Mann and Whitney 1947), which is
    averaged over runs before the cases are weighted.

    Args:
        target: (N,) class indices.  probs: (S, N, K).

    Returns:
        (R, N) weights -> (R,) mean over the pairs of classes that occur, NaN where fewer than two do.
    """
    cases = [np.flatnonzero(target == index) for index in range(probs.shape[2])]
    pairs = [(i, j) for j in range(len(cases)) for i in range(j) if len(cases[i]) and len(cases[j])]
    scores = np.log(np.maximum(probs, _LEAST_PROBABILITY))

    def odds(run: np.ndarray, i: int, j: int) -> np.ndarray:
        return run[:, j] - run[:, i]

    def by_run(weights: np.ndarray, i: int, j: int) -> np.ndarray:
        both = np.concatenate([cases[j], cases[i]])
        positive = np.arange(len(both)) < len(cases[j])
        return np.mean([_weighted_auc(odds(run, i, j)[both], positive, weights[:, both]) for run in scores], axis=0)

    def in_order(i: int, j: int) -> np.ndarray:
        """(N_j, N_i) share of the runs in which the case of class j has the higher odds of it, ties counted half."""
        total = np.zeros((len(cases[j]), len(cases[i])))
        for run in scores:
            up, down = odds(run, i, j)[cases[j], None], odds(run, i, j)[None, cases[i]]
            total += (up > down) + (up == down) / 2
        return total / len(scores)

    few = sum(len(cases[i]) * len(cases[j]) for i, j in pairs) <= _MOST_PAIRS
    shares = {pair: in_order(*pair) for pair in pairs} if few else {}

    def at_once(weights: np.ndarray, i: int, j: int) -> np.ndarray:
        up, down = weights[:, cases[j]], weights[:, cases[i]]
        return ratio(((up @ shares[i, j]) * down).sum(1), up.sum(1) * down.sum(1))

    def mean(weights: np.ndarray) -> np.ndarray:
        of_pairs = np.array([(at_once if few else by_run)(weights, *pair) for pair in pairs]).reshape(len(pairs), len(weights))
        known = ~np.isnan(of_pairs)
        return ratio(np.where(known, of_pairs, 0).sum(0), known.sum(0))

    return mean


COUNT_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "quadratic_kappa": quadratic_kappa,
    "grade_mae": grade_error,
}
RANKING = "pair_auc"
BOOTSTRAP_METRICS = (*COUNT_METRICS, "auc", RANKING)


def classification_metrics(target: np.ndarray, probs: np.ndarray, *, ordinal: bool) -> dict[str, Any]:
    """Every metric of one set of predictions, ready for JSON.

    Args:
        target: (N,) class indices.  probs: (N, K), rows sum to 1.  ordinal: also kappa and the grade's error.

    Returns:
        accuracy, balanced_accuracy, macro_f1, auc, ece, quadratic_kappa and grade_mae (None unless ordinal), per_class
        (precision, recall, f1, support), confusion (rows the truth), undefined (metric -> reason for every None).

    Raises:
        DataError: no cases, or shapes that do not fit.
    """
    target, probs = checked_predictions(target, probs)
    num_classes = probs.shape[1]
    counts = confusion_counts(target, probs.argmax(1), num_classes)
    values = {"accuracy": accuracy(counts), "balanced_accuracy": balanced_accuracy(counts), "macro_f1": macro_f1(counts)}
    values |= {"auc": macro_auc(target, probs)[0], "ece": np.asarray(expected_calibration_error(target, probs))}
    undefined = {} if ordinal else {"quadratic_kappa": NO_ORDER, "grade_mae": NO_ORDER}
    if ordinal:
        values |= {"quadratic_kappa": quadratic_kappa(counts), "grade_mae": grade_error(counts)}
    absent = [index for index in range(num_classes) if counts[index].sum() == 0]
    reasons = {"auc": f"no case of class index {absent}", "quadratic_kappa": "truth and predictions are all one class"}
    undefined |= {name: reasons.get(name, "undefined") for name, value in values.items() if math.isnan(float(value))}
    result: dict[str, Any] = {name: None if math.isnan(float(value)) else float(value) for name, value in values.items()}
    result |= {name: None for name in undefined if name not in result}
    return result | {"per_class": _per_class(counts), "confusion": counts.tolist(), "undefined": undefined}


def checked_predictions(target: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets (N,) and probabilities (N, K) as arrays; DataError `predictions-invalid` for shapes or classes that do not fit."""
    target, probs = np.asarray(target), np.asarray(probs, dtype=float)
    if probs.ndim != 2 or target.shape != (len(probs),) or len(target) == 0 or target.min() < 0 or target.max() >= probs.shape[1]:
        raise DataError(
            "predictions-invalid",
            f"Metrics need targets (N,) inside the K classes and probabilities (N, K), got {target.shape} and {probs.shape}.",
        )
    return target, probs


def _per_class(counts: np.ndarray) -> list[dict[str, float | int | None]]:
    hits, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    columns = {"precision": ratio(hits, predicted), "recall": ratio(hits, truth), "f1": ratio(2 * hits, truth + predicted)}
    return [
        {name: None if np.isnan(values[index]) else float(values[index]) for name, values in columns.items()}
        | {"support": int(truth[index])}
        for index in range(len(counts))
    ]
