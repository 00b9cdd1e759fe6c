"""Stage 2 of AMST: what the auxiliary heads say of an image under drop-out, and whether that is to be believed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from medaug.errors import ConfigError, DataError
from medaug.networks.amst import AuxiliaryHeads, mc_probabilities
from medaug.training.classifier import confusion_counts

HISTOGRAM_EDGES = (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.25)  # a variance in [0, 1] is at most 1/4
BATCH_SIZE = 32

__all__ = ["HISTOGRAM_EDGES", "HeadScores", "PseudoLabels", "accept", "head_scores", "label_report", "score_batches"]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What J heads say of N images.

    Attributes:
        labels: (N, J) argmax of each head's mean probability.
        uncertainty: (N, J) variance over the passes, in [0, 1/4].
        probs: (N, K) mean over passes and heads.
    """

    labels: np.ndarray
    uncertainty: np.ndarray
    probs: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """Labels for N images and which of them are believed.

    Attributes:
        label: (N,) the heads' common label; where they differ, argmax of their mean.
        uncertainty: (N,) the largest of the heads'.
        consensus: (N,) all heads agree.
        accepted: (N,) consensus and uncertainty within the threshold.
        threshold: tau, as given or as the quantile made it.
        probs: (N, K).
    """

    label: np.ndarray
    uncertainty: np.ndarray
    consensus: np.ndarray
    accepted: np.ndarray
    threshold: float
    probs: np.ndarray


def head_scores(probs: Tensor | np.ndarray, measure: str = "predicted") -> HeadScores:
    """Labels and uncertainties from stochastic passes.

    Args:
        probs: (J, B, M, K) of `mc_probabilities`.
        measure: "predicted": u_j = Var_m P_j[m, argmax]; "mean" or "max": over the classes' variances.

    Raises:
        ConfigError: an unknown measure.
    """
    values = np.asarray(probs, dtype=np.float64)
    mean = values.mean(axis=2)  # (J, B, K)
    labels = mean.argmax(axis=2)
    # Shifted by the first pass: the variance is the same, and exactly 0 where all passes are equal.
    variance = (values - values[:, :, :1]).var(axis=2)
    if measure == "predicted":
        uncertainty = np.take_along_axis(variance, labels[..., None], axis=2)[..., 0]
    elif measure in ("mean", "max"):
        uncertainty = variance.mean(axis=2) if measure == "mean" else variance.max(axis=2)
    else:
        raise ConfigError("uncertainty-unknown", f"The uncertainty must be one of predicted, mean, max, got {measure!r}.")
    return HeadScores(labels.T, uncertainty.T, mean.mean(axis=0))


def score_batches(
    network: nn.Module,
    heads: AuxiliaryHeads,
    batches: Iterable[tuple[Tensor, Sequence[Hashable]]],
    *,
    key: Sequence[Hashable],
    passes: int = 20,
    measure: str = "predicted",
) -> HeadScores:
    """Score images as they are, without augmentation; the backbone sees each once.

    Args:
        batches: (images (B, C, H, W) on the network's device, B names); drop-out is keyed by (key, name).

    Raises:
        DataError: no image.
    """
    parts = []
    for images, names in batches:
        drawn = [(*key, "mc", name) for name in names]
        parts.append(head_scores(mc_probabilities(network, heads, images, drawn, passes).cpu(), measure))
    if not parts:
        raise DataError("images-missing", "There is no image to label; generate some or give unlabelled ones.")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "uncertainty", "probs")}
    return HeadScores(**joined)


def accept(scores: HeadScores, threshold: float = 0.01, quantile: float | None = None) -> PseudoLabels:
    """Believe a label iff all heads agree on it and the largest uncertainty is below tau.

    Args:
        threshold: tau.
        quantile: if given, tau is this quantile of the uncertainty of all images, itself included.

    Raises:
        ConfigError: a negative threshold or a quantile outside [0, 1].
    """
    if not threshold >= 0 or (quantile is not None and not 0 <= quantile <= 1):
        raise ConfigError("threshold-invalid", f"AMST needs tau >= 0 and a quantile in [0, 1], got {threshold!r}, {quantile!r}.")
    largest = scores.uncertainty.max(axis=1)
    consensus = (scores.labels == scores.labels[:, :1]).all(axis=1)
    if quantile is None:
        certain, tau = largest < threshold, float(threshold)
    else:
        tau = float(np.quantile(largest, quantile, method="lower"))
        certain = largest <= tau
    label = np.where(consensus, scores.labels[:, 0], scores.probs.argmax(axis=1))
    return PseudoLabels(label, largest, consensus, consensus & certain, tau, scores.probs)


def label_report(found: PseudoLabels, seed_labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Plain values: rates, pseudo-label against seed label, distribution of the uncertainty.

    Args:
        found: labels of N images.
        seed_labels: (N,) what they were generated for; rows of the confusion.

    Returns:
        scored, accepted, acceptance_rate, consensus_rate, threshold, relabelled (accepted with another label than the
        seed's), confusion (accepted) and confusion_all, both (K, K) with the seed label as row; histogram of u by
        `HISTOGRAM_EDGES` (the last bin is closed) and u_quantiles at 0, 5, 25, 50, 75, 95 and 100 %.
    """
    seeds, yes = np.asarray(seed_labels), found.accepted
    counts, _ = np.histogram(found.uncertainty, bins=HISTOGRAM_EDGES)
    return {
        "scored": len(seeds),
        "accepted": int(yes.sum()),
        "acceptance_rate": float(yes.mean()),
        "consensus_rate": float(found.consensus.mean()),
        "threshold": found.threshold,
        "relabelled": int((yes & (found.label != seeds)).sum()),
        "confusion": confusion_counts(seeds[yes], found.label[yes], num_classes).tolist(),
        "confusion_all": confusion_counts(seeds, found.label, num_classes).tolist(),
        "histogram": {"edges": list(HISTOGRAM_EDGES), "counts": counts.tolist()},
        "u_quantiles": np.quantile(found.uncertainty, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist(),
    }
