"""What AMST (asymmetric multi-head self-training) does beside the optimiser's settings, and its ablations by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from medaug.errors import ConfigError
from medaug.networks.amst import FOUR_HEADS, ONE_HEAD
from medaug.training.softmatch import SoftMatch, momentum_for
from medaug.transforms.views import Views

LABELS = ("amst", "soft", "seed", "teacher")
UNCERTAINTIES = ("predicted", "mean", "max")

__all__ = ["ABLATIONS", "LABELS", "UNCERTAINTIES", "AmstRecipe", "amst_recipe"]


@dataclass(frozen=True)
class AmstRecipe:
    """The choices of AMST. Steps, rates and batch size come from the classifier's recipe, the same for every arm.

    Attributes:
        labels: where the labels of synthetic images come from: "amst" (consensus of the heads under drop-out), "soft" (their
            mean probability, nothing held back), "seed" (what the image was generated for: no AMST), "teacher".
        single_head: one auxiliary head on weak views instead of two each on weak and strong ones.
        consistency: train on unlabelled images; False leaves the first loss alone.
        pretraining_share: share of the optimiser steps spent on stage 1; the sum is the classifier recipe's `num_steps`.
        dropout: before the auxiliary heads, in [0, 1).
        orthogonality: weight of the penalty in eq. 7.
        passes: stochastic passes M per image and head.
        threshold: tau; accepted are uncertainties below it.
        quantile: if given, tau is this quantile of the uncertainties of all images scored, and accepted are those up to it.
        uncertainty: variance over the passes of the predicted class's probability ("predicted"), or the "mean" or "max"
            over classes of the variance.
        teacher_confidence: least probability for a teacher's label to count; the image stays unlabelled below it.
        unlabelled_ratio: unlabelled images per labelled one in a step.
        momentum: of SoftMatch's averages; None follows the steps of a round, see `momentum_for` (the paper's is 0.999).
        n_sigma, lambda_max, uniform_alignment: see `SoftMatch`.
        soft_target: the weak view's probabilities as target of the consistency, not its argmax.
        rounds: of labelling and training; later ones refresh the auxiliary heads by one epoch on real images.
        reinitialise: stage 3 starts from the network's first weights, not from stage 1's.
        views: the weak and the strong view.
    """

    labels: str = "amst"
    single_head: bool = False
    consistency: bool = True
    pretraining_share: float = 0.3
    dropout: float = 0.5
    orthogonality: float = 1e-3
    passes: int = 20
    threshold: float = 0.01
    quantile: float | None = None
    uncertainty: str = "predicted"
    teacher_confidence: float = 0.0
    unlabelled_ratio: float = 1.0
    momentum: float | None = None
    n_sigma: float = 2.0
    lambda_max: float = 1.0
    uniform_alignment: bool = False
    soft_target: bool = False
    rounds: int = 1
    reinitialise: bool = False
    views: Views = field(default_factory=Views)

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, LABELS)
        _one_of("uncertainty", self.uncertainty, UNCERTAINTIES)
        for name in ("passes", "rounds"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("orthogonality", "threshold"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(0 < self.pretraining_share < 1, "pretraining_share", "in (0, 1)", self.pretraining_share)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _require(self.quantile is None or 0 <= self.quantile <= 1, "quantile", "in [0, 1] or none", self.quantile)
        _require(0 <= self.teacher_confidence <= 1, "teacher_confidence", "in [0, 1]", self.teacher_confidence)
        _require(self.unlabelled_ratio > 0, "unlabelled_ratio", "above 0", self.unlabelled_ratio)
        self.softmatch(2, 1)

    @property
    def heads(self) -> tuple[str, ...]:
        """The view of each auxiliary head."""
        return ONE_HEAD if self.single_head else FOUR_HEADS

    @property
    def needs_heads(self) -> bool:
        """True if stage 1 is needed: labels come from the auxiliary heads."""
        return self.labels in ("amst", "soft")

    def softmatch(self, num_classes: int, num_steps: int) -> SoftMatch:
        """Fresh weighting, mean 1 / K and variance 1, for a round of so many steps."""
        return SoftMatch(
            num_classes,
            momentum=momentum_for(num_steps) if self.momentum is None else self.momentum,
            n_sigma=self.n_sigma,
            lambda_max=self.lambda_max,
            uniform_alignment=self.uniform_alignment,
        )

    def content(self) -> dict[str, Any]:
        """Plain values, for content addressing and reports."""
        return asdict(self)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError("amst-invalid", f"AMST: {name} must be {expected}, got {value!r}.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, f"one of {', '.join(known)}", value)


# Name -> the fields that differ. "teacher" needs the teacher itself, so it has no name here.
ABLATIONS: dict[str, dict[str, Any]] = {
    "amst": {},
    "amst-no_cr": {"consistency": False},
    "amst-single_head": {"single_head": True},
    "amst-soft_pseudo_label": {"labels": "soft"},
    "amst-seed_label": {"labels": "seed"},
}


def amst_recipe(name: str = "amst", overrides: Mapping[str, Any] | None = None) -> AmstRecipe:
    """A recipe by the name of its ablation.

    Args:
        name: a key of `ABLATIONS`.
        overrides: further fields of `AmstRecipe`; `views` may be a mapping of fields of `Views`.

    Raises:
        ConfigError: unknown name or field, or a value out of range.
    """
    if name not in ABLATIONS:
        raise ConfigError("amst-unknown", f"An AMST training must be one of {', '.join(ABLATIONS)}, got {name!r}.")
    changes = dict(overrides or {})
    _known_fields(AmstRecipe, changes)
    if isinstance(changes.get("views"), Mapping):
        _known_fields(Views, changes["views"])
        values = dict(changes["views"])
        if values.get("operations") is not None:
            values["operations"] = tuple(values["operations"])
        changes["views"] = Views(**values)
    return replace(AmstRecipe(**ABLATIONS[name]), **changes)


def _known_fields(kind: type, changes: Mapping[str, Any]) -> None:
    known = sorted(entry.name for entry in fields(kind))
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError("amst-unknown-key", f"{kind.__name__} has the fields {', '.join(known)}, got {', '.join(unknown)}.")
