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
_MOST_PAIRS = 10_000_000  # of cases held at once (80 MB); test sets beyond some 5,000 cases are scored run by run

__all__ = [
    "BOOTSTRAP_METRICS",
    "COUNT_METRICS",
    "NO_ORDER",
    "accuracy",
    "balanced_accuracy",
    "checked_predictions",
    "classification_metrics",
    "grade_error",
    "macro_auc",
    "mean_auc",
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


def mean_auc(target: np.ndarray, probs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`macro_auc`, averaged over runs, as a function of how often each case counts.

    The AUC is the share of pairs of a positive and a negative case that are in order (Mann and Whitney 1947), and the share can be averaged
    over runs before the cases are weighted: one matrix for all of them.

    Args:
        target: (N,) class indices.  probs: (S, N, K).

    Returns:
        (R, N) weights -> (R,) values, NaN where a class is absent.
    """
    classes = [1] if probs.shape[2] == 2 else range(probs.shape[2])
    positives = [np.flatnonzero(target == index) for index in classes]
    negatives = [np.flatnonzero(target != index) for index in classes]
    if max(len(ours) * len(rest) for ours, rest in zip(positives, negatives, strict=True)) > _MOST_PAIRS:
        return lambda weights: np.mean([macro_auc(target, run, weights) for run in probs], axis=0)

    def in_order(index: int, ours: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """(P, Q) share of the runs in which the positive case scores above the negative one, ties counted half."""
        total = np.zeros((len(ours), len(rest)))
        for run in probs:
            up, down = run[ours, index][:, None], run[rest, index][None, :]
            total += (up > down) + (up == down) / 2
        return total / len(probs)

    shares = [in_order(index, ours, rest) for index, ours, rest in zip(classes, positives, negatives, strict=True)]

    def of(weights: np.ndarray) -> np.ndarray:
        parts = []
        for share, ours, rest in zip(shares, positives, negatives, strict=True):
            up, down = weights[:, ours], weights[:, rest]
            parts.append(ratio(((up @ share) * down).sum(1), up.sum(1) * down.sum(1)))
        return np.mean(parts, axis=0)

    return of


COUNT_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "quadratic_kappa": quadratic_kappa,
    "grade_mae": grade_error,
}
BOOTSTRAP_METRICS = (*COUNT_METRICS, "auc")


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
