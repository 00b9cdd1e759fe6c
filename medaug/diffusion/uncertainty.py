"""Measures of class probabilities that a guide drives up: how likely a class is, or how unsure a classifier is between them.

First the pure functions of log-probabilities, then the classifiers that give them at (x, t), then both together as the measure
(x, t) -> (B,) that `medaug.diffusion.guidance.GradientGuidance` takes. Probabilities come as votes, (M, B, K): one classifier is one vote,
an ensemble or drop-out gives several; every measure but BALD sees the mean of the votes. Gradients flow through all of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medaug.diffusion.sampler import Denoiser
from medaug.errors import ConfigError

Measure = Callable[[Tensor, int], Tensor]  # (x (B, C, *spatial), t) -> (B,); element i depends on image i alone
Classifier = Callable[[Tensor, Tensor], Tensor]  # (x, original timesteps (B,) float32) -> logits (B, K)
Votes = Callable[[Tensor, int], Tensor]  # (x, t) -> log-probabilities (M, B, K)
VoteMeasure = Callable[[Tensor, Tensor | None], Tensor]  # (log-probabilities (M, B, K), labels (B,)) -> (B,)


def mixture(votes: Tensor) -> Tensor:
    """log of the mean probability of votes (M, B, K): (B, K)."""
    return votes.logsumexp(dim=0) - math.log(len(votes))


def entropy(log_probs: Tensor) -> Tensor:
    """H = -sum_k p_k log p_k in nats, (..., K) -> (...), in [0, log K]; its gradient by logit k is -p_k (log p_k + H)."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def margin(log_probs: Tensor) -> Tensor:
    """-(p_(1) - p_(2)), the two largest probabilities, (..., K) -> (...), in [-1, 0]."""
    first, second = log_probs.exp().topk(2, dim=-1).values.unbind(dim=-1)
    return second - first


def least_confidence(log_probs: Tensor) -> Tensor:
    """-max_k p_k, (..., K) -> (...), in [-1, -1/K]."""
    return -log_probs.amax(dim=-1).exp()


def log_likelihood(log_probs: Tensor, labels: Tensor | None) -> Tensor:
    """log p_y (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4): (B, K) and labels (B,) -> (B,).

    Raises:
        ConfigError: no labels, not one per image, or one outside [0, K-1].
    """
    if labels is None:
        raise ConfigError("measure-labels", "this measure needs a label for each image: give labels, or choose entropy.")
    if labels.shape != log_probs.shape[:1]:
        raise ConfigError(
            "measure-labels", f"a measure needs one label for each of {len(log_probs)} images, got shape {tuple(labels.shape)}."
        )
    if bool((labels < 0).any() or (labels >= log_probs.shape[-1]).any()):
        raise ConfigError(
            "label-out-of-range", f"labels must lie in [0, {log_probs.shape[-1] - 1}], the classes of the classifier."
        )
    return log_probs.gather(1, labels.to(log_probs.device)[:, None])[:, 0]


def bald(votes: Tensor) -> Tensor:
    """H(mean of the votes) - mean of H(vote): what the votes disagree on (Houlsby et al. 2011, arXiv 1112.5745, eq. 2).

    Args:
        votes: log-probabilities (M, B, K), M at least 2.

    Returns:
        Mutual information (B,) in nats, in [0, log min(M, K)].

    Raises:
        ConfigError: a single vote, which cannot disagree.
    """
    if len(votes) < 2:
        raise ConfigError("measure-votes", f"BALD needs at least 2 votes, got {len(votes)}: give an ensemble or drop-out votes.")
    return entropy(mixture(votes)) - entropy(votes).mean(dim=0)


def _classifier(votes: Tensor, labels: Tensor | None) -> Tensor:
    return log_likelihood(mixture(votes), labels)


def _entropy(votes: Tensor, labels: Tensor | None) -> Tensor:
    return entropy(mixture(votes))


def _margin(votes: Tensor, labels: Tensor | None) -> Tensor:
    return margin(mixture(votes))


def _least_confidence(votes: Tensor, labels: Tensor | None) -> Tensor:
    return least_confidence(mixture(votes))


def _entropy_class(votes: Tensor, labels: Tensor | None, class_weight: float = 1.0) -> Tensor:
    """H + class_weight log p_y: unsure, but not of another class."""
    mean = mixture(votes)
    return entropy(mean) + class_weight * log_likelihood(mean, labels)


def _bald(votes: Tensor, labels: Tensor | None) -> Tensor:
    return bald(votes)


MEASURES: dict[str, Callable[..., Tensor]] = {
    "classifier": _classifier,
    "entropy": _entropy,
    "margin": _margin,
    "least_confidence": _least_confidence,
    "entropy_class": _entropy_class,
    "bald": _bald,
}


def make_measure(name: str, **options: Any) -> VoteMeasure:
    """The entry `name` of `MEASURES` with its options set (``class_weight`` of entropy_class).

    Raises:
        ConfigError: an unknown name or option.
    """
    if name not in MEASURES:
        raise ConfigError("measure-unknown", f"measure must be one of {', '.join(MEASURES)}, got {name!r}.")
    known = list(inspect.signature(MEASURES[name]).parameters)[2:]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(
            "measure-option", f"measure {name} takes {', '.join(known) or 'no option'}, got {', '.join(map(str, unknown))}."
        )
    return partial(MEASURES[name], **options)


@contextmanager
def evaluating(*networks: object) -> Iterator[None]:
    """Modules in evaluation mode inside the block, each submodule's own mode put back after it; other callables are left alone."""
    modules = [module for network in networks if isinstance(network, nn.Module) for module in network.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Timeless(nn.Module):
    """A classifier of clean images, images -> logits, that is told a time like the others: for `OnPredictedX0`.

    Args:
        network: images (B, C, *spatial) in about [-1, 1] -> logits (B, K), such as a grading network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Logits (B, K); `time` is not used."""
        logits: Tensor = self.network(x)
        return logits


def original_time(t: int, x: Tensor) -> Tensor:
    """t for each image of x, (B,) float32: the timestep of the training schedule, also where the sampler visits few of them."""
    return torch.full((len(x),), float(t), device=x.device)


@dataclass(frozen=True, eq=False)
class EnsembleVotes:
    """One vote for each classifier. Modules are asked in evaluation mode; their parameters get no gradient from a guide.

    Args:
        classifiers: at least one, each (x, timesteps (B,)) -> logits (B, K).
        num_classes: K that they must have, at least 2.

    Raises:
        ConfigError: no classifier, or fewer than 2 classes; when called, logits that are not (B, K).
    """

    classifiers: Sequence[Classifier]
    num_classes: int

    def __post_init__(self) -> None:
        if not self.classifiers:
            raise ConfigError("measure-votes", "guidance by a classifier needs at least one classifier, got none.")
        check_classes(self.num_classes)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """Log-probabilities (M, B, K) of images x (B, C, *spatial) at timestep t."""
        with evaluating(*self.classifiers):
            logits = [classifier(x, original_time(t, x)) for classifier in self.classifiers]
        for vote in logits:
            check_logits(vote, (len(x), self.num_classes))
        return torch.stack(logits).log_softmax(dim=-1)


@dataclass(frozen=True, eq=False)
class DropoutVotes:
    """Votes of one classifier under drop-out, the trunk run once (Gal & Ghahramani 2016, arXiv 1506.02142).

    Args:
        classifier: (x, timesteps (B,), kept (M, B, D)) -> logits (M, B, K), see `TimeClassifier.vote_logits`.
        kept: t -> (M, B, D), 1 for a feature that is kept and 0 for one that is dropped. Key it per image, and an image does not depend
            on its neighbours in the batch; the same for all t, and M sub-networks are followed through the whole run.
        num_classes: K that it must have, at least 2.

    Raises:
        ConfigError: fewer than 2 classes; when called, logits that are not (M, B, K).
    """

    classifier: Callable[[Tensor, Tensor, Tensor], Tensor]
    kept: Callable[[int], Tensor]
    num_classes: int

    def __post_init__(self) -> None:
        check_classes(self.num_classes)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """Log-probabilities (M, B, K) of images x (B, C, *spatial) at timestep t."""
        kept = self.kept(t)
        with evaluating(getattr(self.classifier, "__self__", self.classifier)):  # of a bound method, its module
            logits = self.classifier(x, original_time(t, x), kept)
        check_logits(logits, (len(kept), len(x), self.num_classes))
        return logits.log_softmax(dim=-1)


def check_classes(num_classes: int) -> None:
    """Refuse K below 2: with one class nothing is ever uncertain, and no gradient points anywhere.

    Raises:
        ConfigError: code `guidance-classes`.
    """
    if num_classes < 2:
        raise ConfigError("guidance-classes", f"guidance by a classifier needs at least 2 classes, got {num_classes}.")


def check_logits(logits: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse logits of another shape.

    Raises:
        ConfigError: code `class-mismatch` for another number of classes, `classifier-output` for anything else.
    """
    if logits.shape == expected:
        return
    if logits.shape[:-1] == expected[:-1]:
        raise ConfigError(
            "class-mismatch",
            f"the classifier tells {logits.shape[-1]} classes apart, the images have {expected[-1]}; train one on this cohort.",
        )
    raise ConfigError("classifier-output", f"the classifier must return logits of shape {expected}, got {tuple(logits.shape)}.")


@dataclass(frozen=True, eq=False)
class ClassMeasure:
    """A measure of a classifier's probabilities at (x, t).

    Args:
        of: one of `make_measure`, or any (log-probabilities (M, B, K), labels) -> (B,).
        votes: the classifier, see `EnsembleVotes` and `DropoutVotes`.
        labels: (B,) class of each image, for measures that need one.
    """

    of: VoteMeasure
    votes: Votes
    labels: Tensor | None = None

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """M (B,) of images x (B, C, *spatial) at timestep t."""
        return self.of(self.votes(x, t), self.labels)


@dataclass(frozen=True, eq=False)
class OnPredictedX0:
    """A measure of the predicted clean image, for classifiers that know no noise: M(x_0(x_t, t)).

    The gradient flows through the denoiser: one more pass of the network, and only here an autograd graph of it, freed after each step.

    Args:
        measure: of a clean image (x_0, t).
        denoiser: the sampler's, unclipped.
    """

    measure: Measure
    denoiser: Denoiser

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """M (B,) of what images x (B, C, *spatial) at timestep t become."""
        return self.measure(self.denoiser(x, t).x_0, t)
