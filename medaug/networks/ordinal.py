"""An ordinal head: one direction in feature space and K-1 ordered thresholds (CORAL, Cao et al. 2020).

CORAL asks K-1 yes-or-no questions, "is the grade above k?", with one weight vector for all and a bias each. Its paper shows
that the biases are ordered at the optimum; here they are ordered always, as differences that cannot be negative, so the answers
never contradict each other and the probability of every grade is positive.

The head answers with log-probabilities of the K grades. Softmax leaves those as they are, so whatever reads logits reads this head
too: prediction, metrics, features in front of the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from medaug.errors import ConfigError
from medaug.networks.heads import last_linear, replace_head

_SMALLEST_GAP = 1e-3  # between neighbouring thresholds, in logits: keeps every log-probability finite

__all__ = ["HEADS", "LOSSES", "CoralHead", "coral_loss", "cumulative_logits", "cumulative_to_log_probs", "weighted_cross_entropy"]


class CoralHead(nn.Module):
    """Features (B, D) -> log-probabilities (B, K) of ordered grades.

    Args:
        in_features: D.
        num_classes: K, at least 2.

    Raises:
        ConfigError: `head-classes`: fewer than two grades.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError("head-classes", f"An ordinal head needs at least 2 ordered classes, got {num_classes}.")
        self.in_features, self.num_classes = in_features, num_classes
        self.direction = nn.Linear(in_features, 1, bias=False)
        # At the start, features of 0 give every grade the same probability: P(y > k) = (K - 1 - k) / K.
        start = torch.tensor([math.log((num_classes - 1 - k) / (k + 1)) for k in range(num_classes - 1)])
        gaps = start[:-1] - start[1:] - _SMALLEST_GAP
        self.first = nn.Parameter(start[:1].clone())
        self.gaps = nn.Parameter(torch.log(torch.expm1(gaps)))

    def biases(self) -> Tensor:
        """Thresholds (K-1,), strictly falling."""
        return torch.cat([self.first, self.first - torch.cumsum(functional.softplus(self.gaps) + _SMALLEST_GAP, 0)])

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities (B, K)."""
        return cumulative_to_log_probs(self.direction(features) + self.biases())


def cumulative_to_log_probs(cumulative: Tensor) -> Tensor:
    """Log-probabilities (B, K) of the grades from logits (B, K-1) of "above k", strictly falling over k.

    P(y = k) = P(y > k-1) - P(y > k), with sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)) so that no digits cancel.
    """
    above, not_above = functional.logsigmoid(cumulative), functional.logsigmoid(-cumulative)
    between = torch.log(-torch.expm1(cumulative[:, 1:] - cumulative[:, :-1]))
    return torch.cat([not_above[:, :1], above[:, :-1] + not_above[:, 1:] + between, above[:, -1:]], dim=1)


def cumulative_logits(logits: Tensor) -> Tensor:
    """Logits (B, K-1) of "above k" from logits (B, K) of the grades: the inverse of `cumulative_to_log_probs`, for any logits."""
    above = torch.flip(torch.logcumsumexp(torch.flip(logits, [1]), 1), [1])
    return above[:, 1:] - torch.logcumsumexp(logits, 1)[:, :-1]


def coral_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    importance: Tensor | None = None,
) -> Tensor:
    """Mean over images and over the K-1 questions of the binary cross-entropy (Cao et al. 2020, eq. 4, all questions alike).

    Args:
        logits: (B, K), of `CoralHead` or of any other head.  target: (B,) grades.
        weight: (K,) of the grades, as in `torch.nn.functional.cross_entropy`.
        label_smoothing: the share of "yes" moves towards one half by it.
        importance: (B,), how much each image counts; None: all alike.
    """
    questions = cumulative_logits(logits)
    yes = (target[:, None] > torch.arange(questions.shape[1], device=target.device)).to(questions)
    yes = yes * (1 - label_smoothing) + label_smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(questions, yes, reduction="none").mean(1)
    weights = torch.ones_like(losses) if weight is None else weight[target]
    if importance is not None:
        weights = weights * importance
    return (weights * losses).sum() / weights.sum()


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    importance: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in which image i counts `importance[i]` times; with equal importance torch's own mean.

    Args:
        logits: (B, K).  target: (B,) int64.
        weight: (K,), `label_smoothing`: as in `torch.nn.functional.cross_entropy`.
        importance: (B,), not negative, not all 0; None: all alike.
    """
    if importance is None:
        return functional.cross_entropy(logits, target, weight=weight, label_smoothing=label_smoothing)
    losses = functional.cross_entropy(logits, target, weight=weight, label_smoothing=label_smoothing, reduction="none")
    counted = importance if weight is None else importance * weight[target]
    return torch.sum(importance * losses) / counted.sum()


def _linear(network: nn.Module, num_classes: int) -> nn.Module:
    return network


def _coral(network: nn.Module, num_classes: int) -> nn.Module:
    return replace_head(network, CoralHead(last_linear(network).in_features, num_classes))


# name -> how a network with a linear head gets this one.
HEADS: dict[str, Callable[[nn.Module, int], nn.Module]] = {"linear": _linear, "coral": _coral}
# The loss that each head is trained by: (logits, target, weight, label_smoothing, importance) -> scalar.
LOSSES: dict[str, Callable[..., Tensor]] = {"linear": weighted_cross_entropy, "coral": coral_loss}
