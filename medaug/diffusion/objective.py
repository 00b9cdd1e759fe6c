"""Weights of the training loss over the noise levels.

Every weighting is written as a weight on the noise error, L = E[lambda(SNR) * mean_pixels (eps - eps_hat)^2], whatever
the network predicts: at fixed x_t, |eps err|^2 = SNR |x_0 err|^2 = abar |v err|^2 (Salimans & Ho 2022), and
`parameterisation` multiplies by that factor. So one name means one weighting for all four parameterisations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medaug.errors import ConfigError

Weighting = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Uniform:
    """lambda = 1: the simple loss of Ho et al. 2020, eq. 14."""

    def __call__(self, snr: Tensor) -> Tensor:
        """Weights of the shape of `snr`."""
        return torch.ones_like(snr)


@dataclass(frozen=True)
class P2:
    """lambda = 1 / (k + SNR)^gamma: perception-prioritised weighting (Choi et al. 2022, arXiv 2204.00227).

    gamma = 0 is uniform; k = 1, gamma = 0.5 is sqrt(1 - abar).
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("k of P2", self.k)
        if not 0 <= self.gamma < math.inf:
            raise ConfigError("weighting-option", f"gamma of P2 must be at least 0, got {self.gamma}.")

    def __call__(self, snr: Tensor) -> Tensor:
        """Weights of the shape of `snr`."""
        return (self.k + snr) ** -self.gamma


@dataclass(frozen=True)
class MinSNR:
    """lambda = min(SNR, gamma) / SNR (Hang et al. 2023, arXiv 2303.09556, its form for noise prediction)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive("gamma of MinSNR", self.gamma)

    def __call__(self, snr: Tensor) -> Tensor:
        """Weights of the shape of `snr`."""
        return (self.gamma / snr).clamp(max=1.0)


@dataclass(frozen=True)
class EDMWeight:
    """lambda(sigma) |D - x_0|^2 with lambda = (sigma^2 + sd^2)/(sigma sd)^2 (Karras et al. 2022, table 1).

    As a weight of the noise error, SNR = 1/sigma^2: 1 + sigma^2/sd^2.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _require_positive("sigma_data", self.sigma_data)

    def __call__(self, snr: Tensor) -> Tensor:
        """Weights of the shape of `snr`."""
        return 1 + 1 / (snr * self.sigma_data**2)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError("weighting-option", f"{name} must be positive, got {value}.")


WEIGHTINGS: dict[str, type[Uniform] | type[P2] | type[MinSNR] | type[EDMWeight]] = {
    "uniform": Uniform,
    "p2": P2,
    "min_snr": MinSNR,
    "edm": EDMWeight,
}


def with_weighting(diffusion: Mapping[str, Any], weighting: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain diffusion settings with a weighting laid over them; at most one weighting, and none but its own over EDM.

    P2, MinSNR and uniform weights are meant for t uniform over the timesteps. EDM draws ln(s) from a normal distribution and has the
    weight that fits it: another one over that is the loss of neither paper.

    Args:
        diffusion: ``parameterisation``, ``schedule`` and so on, perhaps with a ``weighting`` of its own.
        weighting: ``weighting`` and ``weighting_options``; None or empty lays nothing over.

    Raises:
        ConfigError: two weightings (code `weighting-twice`), or one that is not EDM's over EDM (code `weighting-edm`).
    """
    first, second = diffusion.get("weighting"), (weighting or {}).get("weighting")
    if first is not None and second is not None:
        raise ConfigError(
            "weighting-twice",
            f"The diffusion settings ask for the weighting {first!r} and weighting_settings for {second!r}; give one of them.",
        )
    chosen = second if first is None else first
    if diffusion.get("parameterisation") == "edm" and chosen not in (None, "edm"):
        raise ConfigError(
            "weighting-edm",
            f"EDM trains with its own weighting, got {chosen!r} over it; set weighting_settings to null, or the parameterisation to "
            "epsilon, sample or v_prediction.",
        )
    return {**diffusion, **(weighting or {})}
