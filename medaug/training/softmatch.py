"""SoftMatch: how much an unlabelled image counts, by how sure the network is of it (Chen et al. 2023, arXiv:2301.10921)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medaug.errors import ConfigError

_SMALLEST_VARIANCE = 1e-12  # all images equally sure: the weight becomes a step at the mean, not 0 / 0

PAPER_MOMENTUM = 0.999

__all__ = ["PAPER_MOMENTUM", "SoftMatch", "momentum_for", "truncated_gaussian"]


def momentum_for(num_steps: int) -> float:
    """min(0.999, 1 - 10 / num_steps), at least 0: a momentum that has left its start behind after a tenth of the steps.

    The published 0.999 belongs to trainings of a hundred thousand steps and more. The variance starts at 1, far above any that a
    probability can have, and in a few hundred steps at 0.999 it never comes down, so that every weight stays at its largest.
    """
    return max(0.0, min(PAPER_MOMENTUM, 1 - 10 / num_steps))


def truncated_gaussian(confidence: Tensor, mean: float, variance: float, n_sigma: float = 2.0, lambda_max: float = 1.0) -> Tensor:
    """Weights lambda_max exp(-min(c - mu, 0)^2 / (2 sigma^2 / n_sigma^2)) in (0, lambda_max], `lambda_max` from the mean up.

    Args:
        confidence: largest probability per image, (B,).
        mean, variance: of the confidence over unlabelled images.
        n_sigma: narrows the Gaussian; 1 is the paper's formula, 2 its authors' setting.
        lambda_max: largest weight.
    """
    below = (confidence - mean).clamp(max=0.0)
    return lambda_max * torch.exp(-(below**2) * n_sigma**2 / (2 * max(variance, _SMALLEST_VARIANCE)))


class SoftMatch:
    """Moving mean and variance of the confidence, and the weights that follow from them.

    Args:
        num_classes: K; the mean starts at 1 / K, the variance at 1.
        momentum: of the moving averages, in [0, 1); see `momentum_for`.
        n_sigma, lambda_max: see `truncated_gaussian`.
        uniform_alignment: rescale probabilities by (1 / K) / their moving mean before taking the confidence, so that
            a class the network favours does not get all the weight; the target stays as it was.

    Attributes:
        mean, variance: mu and sigma^2 now.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        momentum: float = PAPER_MOMENTUM,
        n_sigma: float = 2.0,
        lambda_max: float = 1.0,
        uniform_alignment: bool = False,
    ) -> None:
        if not (0 <= momentum < 1 and n_sigma > 0 and 0 < lambda_max <= 1):
            raise ConfigError(
                "softmatch-invalid",
                "SoftMatch needs momentum in [0, 1), n_sigma above 0 and lambda_max in (0, 1], "
                f"got {momentum!r}, {n_sigma!r} and {lambda_max!r}.",
            )
        self.mean, self.variance = 1 / num_classes, 1.0
        self._momentum, self._n_sigma, self._lambda_max = momentum, n_sigma, lambda_max
        self._marginal = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64) if uniform_alignment else None

    def __call__(self, probs: Tensor) -> Tensor:
        """Update mean and variance by this batch, then weigh it: (B, K) -> (B,), without gradient."""
        confidence = self._confidence(probs.detach().double())
        self.mean = self._average(self.mean, float(confidence.mean()))
        if len(confidence) > 1:  # the unbiased variance of one image does not exist
            self.variance = self._average(self.variance, float(confidence.var(correction=1)))
        if not math.isfinite(self.mean + self.variance):
            raise ConfigError("training-diverged", "The probabilities of unlabelled images are not finite; lower learning_rate.")
        weights = truncated_gaussian(confidence, self.mean, self.variance, self._n_sigma, self._lambda_max)
        return weights.to(probs.dtype)

    def _average(self, old: float, new: float) -> float:
        return self._momentum * old + (1 - self._momentum) * new

    def _confidence(self, probs: Tensor) -> Tensor:
        if self._marginal is not None:
            self._marginal = self._marginal.to(probs.device)
            self._marginal = self._momentum * self._marginal + (1 - self._momentum) * probs.mean(0)
            probs = probs / self._marginal.clamp_min(torch.finfo(probs.dtype).tiny) / probs.shape[1]  # 0 where every image has 0
            probs = probs / probs.sum(1, keepdim=True)
        return probs.max(dim=1).values
