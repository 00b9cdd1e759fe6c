"""Temperature scaling: one number makes confidence honest and changes no decision (Guo et al. 2017, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

CALIBRATION_BINS = 15
LOWEST, HIGHEST = 0.05, 20.0  # temperatures; a network without an error would go to 0

__all__ = [
    "CALIBRATION_BINS",
    "Calibration",
    "expected_calibration_error",
    "fit_temperature",
    "measure_calibration",
    "negative_log_likelihood",
    "softmax",
]


def softmax(logits: Tensor | np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) as (N, K) float64."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    exp = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def negative_log_likelihood(logits: Tensor | np.ndarray, target: Sequence[int] | np.ndarray, temperature: float = 1.0) -> float:
    """Mean of -log softmax(logits / temperature) at the true class, in nats; logits (N, K), target (N,)."""
    scaled, classes = np.asarray(logits, dtype=np.float64) / temperature, np.asarray(target)
    peak = scaled.max(axis=1)
    log_sum = peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1))
    return float(np.mean(log_sum - scaled[np.arange(len(classes)), classes]))


def expected_calibration_error(target: np.ndarray, probs: np.ndarray, num_bins: int = CALIBRATION_BINS) -> float:
    """Mean |confidence - accuracy| over equal bins of the confidence, weighted by their size (Guo et al. 2017, eq. 3)."""
    confidence = probs.max(1)
    correct = probs.argmax(1) == target
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gap = np.bincount(bins, weights=confidence - correct, minlength=num_bins)
    return float(np.abs(gap).sum() / len(target))


def fit_temperature(logits: Tensor | np.ndarray, target: Sequence[int] | np.ndarray) -> float:
    """The temperature in [`LOWEST`, `HIGHEST`] with the smallest negative log-likelihood.

    A golden-section search on its logarithm. The loss is convex in 1/T, so it has one minimum; argmax, and so accuracy and
    agreement, do not change. Where no temperature does better than 1 on these images, it is 1.
    """

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, target, math.exp(log_temperature))

    low, high, ratio = math.log(LOWEST), math.log(HIGHEST), (math.sqrt(5) - 1) / 2
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    found = (low + high) / 2
    return math.exp(found) if loss(found) < loss(0.0) else 1.0


@dataclass(frozen=True)
class Calibration:
    """What a temperature does to the images it was fitted to; the errors after it flatter, as they are of the same images.

    Attributes:
        n: images.
        temperature: with the smallest negative log-likelihood.
        nll_before, nll_after: mean negative log-likelihood at temperature 1 and at `temperature`, in nats.
        ece_before, ece_after: expected calibration error in `CALIBRATION_BINS` bins, in [0, 1].
        at_lowest: the fit ran into `LOWEST`: hardly an error is among the images, so they cannot say how sure is too sure.
    """

    n: int
    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    at_lowest: bool


def measure_calibration(logits: Tensor | np.ndarray, target: Sequence[int] | np.ndarray) -> Calibration:
    """Fit a temperature to logits (N, K) of held-out images and their classes (N,); measure both errors before and after."""
    classes = np.asarray(target)
    fitted = fit_temperature(logits, classes)
    return Calibration(
        n=len(classes),
        temperature=fitted,
        nll_before=negative_log_likelihood(logits, classes),
        nll_after=negative_log_likelihood(logits, classes, fitted),
        ece_before=expected_calibration_error(classes, softmax(logits)),
        ece_after=expected_calibration_error(classes, softmax(logits, fitted)),
        at_lowest=fitted < 1.001 * LOWEST,
    )
