"""One step of the reverse process over an explicit pair (t, p), p < t, p = -1 for the clean image.

First the pure functions, which take abar_t and abar_p (scalar or (B,), float64), then the objects that `sample` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medaug.diffusion.parameterisation import Prediction, x_0_from_noise
from medaug.diffusion.schedule import NoiseSchedule, coefficient
from medaug.errors import ConfigError

NoiseSource = Callable[[int], Tensor]  # timestep t -> standard normal (B, C, *spatial) for the step that leaves t
VARIANCES = ("fixed_small", "fixed_large")


def ddpm_variance(abar_t: Tensor, abar_p: Tensor, variance: str = "fixed_small") -> Tensor:
    """Variance of the ancestral step t -> p (Ho et al. 2020, section 3.2), shape of `abar_t`; 0 at p = -1.

    With b = 1 - abar_t / abar_p, the beta of the whole jump: b (1 - abar_p)/(1 - abar_t) for "fixed_small" (eq. 7),
    b for "fixed_large".
    """
    b = 1 - abar_t / abar_p
    small = b * (1 - abar_p) / (1 - abar_t)
    return small if variance == "fixed_small" else torch.where(abar_p < 1, b, small)


def ddpm_mean(x_t: Tensor, x_0: Tensor, abar_t: Tensor, abar_p: Tensor) -> Tensor:
    """Mean of q(x_p | x_t, x_0) (Ho et al. 2020, eq. 7, with b for beta), shape of `x_t`."""
    b = 1 - abar_t / abar_p
    weight_x_0 = abar_p.sqrt() * b / (1 - abar_t)
    weight_x_t = (abar_t / abar_p).sqrt() * (1 - abar_p) / (1 - abar_t)
    return coefficient(weight_x_0, x_t) * x_0 + coefficient(weight_x_t, x_t) * x_t


def ddpm_step(
    x_t: Tensor, x_0: Tensor, abar_t: Tensor, abar_p: Tensor, z: Tensor | None = None, variance: str = "fixed_small"
) -> Tensor:
    """Draw x_p from q(x_p | x_t, x_0) (Ho et al. 2020, eq. 6-7).

    Args:
        x_t: sample at t, shape (B, C, *spatial).
        x_0: estimate of the clean image, same shape.
        abar_t: abar at t, scalar or (B,).
        abar_p: abar at p, 1 for the clean image.
        z: standard normal, shape of `x_t`; None gives the mean.
        variance: "fixed_small" or "fixed_large".
    """
    mean = ddpm_mean(x_t, x_0, abar_t, abar_p)
    return mean if z is None else mean + coefficient(ddpm_variance(abar_t, abar_p, variance).sqrt(), x_t) * z


def ddim_sigma(abar_t: Tensor, abar_p: Tensor, eta: float) -> Tensor:
    """sigma(eta) (Song et al. 2021, arXiv 2010.02502, eq. 16); eta = 1 has the variance of the ancestral step."""
    return eta * ((1 - abar_p) / (1 - abar_t)).sqrt() * (1 - abar_t / abar_p).sqrt()


def ddim_update(x_0: Tensor, noise: Tensor, abar_t: Tensor, abar_p: Tensor, eta: float = 0.0, z: Tensor | None = None) -> Tensor:
    """x_p = sqrt(abar_p) x_0 + sqrt(1 - abar_p - sigma^2) eps + sigma z (Song et al. 2021, eq. 12).

    Args:
        x_0: predicted clean image, shape (B, C, *spatial).
        noise: predicted noise, which gives the direction, same shape.
        abar_t: abar at t, scalar or (B,).
        abar_p: abar at p, 1 for the clean image.
        eta: 0 deterministic, 1 ancestral.
        z: standard normal, same shape; None leaves the last term out.
    """
    sigma = ddim_sigma(abar_t, abar_p, eta)
    # At eta = 1 and p = 0 rounding can bring this to -1e-17.
    direction = (1 - abar_p - sigma**2).clamp(min=0).sqrt()
    x_p = coefficient(abar_p.sqrt(), x_0) * x_0 + coefficient(direction, x_0) * noise
    return x_p if z is None else x_p + coefficient(sigma, x_0) * z


def ddim_step(
    x_t: Tensor,
    noise_s: Tensor,
    noise_d: Tensor,
    abar_t: Tensor,
    abar_p: Tensor,
    eta: float = 0.0,
    z: Tensor | None = None,
) -> Tensor:
    """DDIM with the predicted x_0 (S) and the direction (D) taken from two noise predictions.

    x_p = S(noise_s) + D(noise_d) + sigma z, S = sqrt(abar_p) (x_t - sqrt(1 - abar_t) noise_s) / sqrt(abar_t),
    D = sqrt(1 - abar_p - sigma^2) noise_d (DreamDA, Fu et al. 2024, arXiv 2403.12803, eq. 3-4 and 6). With noise_s =
    noise_d it is the plain step. Arguments as for `ddim_update`.
    """
    return ddim_update(x_0_from_noise(x_t, noise_s, abar_t), noise_d, abar_t, abar_p, eta, z)


def dpm_solver_pp_2m_step(
    x_t: Tensor,
    x_0: Tensor,
    abar_t: Tensor,
    abar_p: Tensor,
    x_0_last: Tensor | None = None,
    abar_last: Tensor | None = None,
) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = ln(alpha/sigma), h = lambda_p - lambda_t and
    r = (lambda_t - lambda_last) / h:
    x_p = (sigma_p/sigma_t) x_t - alpha_p (e^{-h} - 1) D,  D = (1 + 1/(2r)) x_0 - 1/(2r) x_0_last.

    Args:
        x_t: sample at t, shape (B, C, *spatial).
        x_0: estimate of the clean image at t, same shape.
        abar_t: abar at t, scalar or (B,).
        abar_p: abar at p, 1 for the clean image.
        x_0_last: estimate at the timestep visited before t; None makes the step first order, D = x_0.
        abar_last: abar there.
    """
    ratio = ((1 - abar_p) / (1 - abar_t)).sqrt()  # sigma_p / sigma_t
    exp_minus_h = ratio * (abar_t / abar_p).sqrt()  # defined at p = -1, where h is infinite
    d = x_0
    if x_0_last is not None and abar_last is not None:
        half_over_r = 0.5 * (_half_log_snr(abar_p) - _half_log_snr(abar_t)) / (_half_log_snr(abar_t) - _half_log_snr(abar_last))
        d = x_0 + coefficient(half_over_r, x_0) * (x_0 - x_0_last)
    return coefficient(ratio, x_t) * x_t + coefficient(abar_p.sqrt() * (1 - exp_minus_h), x_t) * d


def _half_log_snr(abar: Tensor) -> Tensor:
    """lambda = ln(sqrt(abar) / sqrt(1 - abar))."""
    return 0.5 * (abar.log() - (1 - abar).log())


class Step(Protocol):
    """What `sample` calls to go from t to p."""

    def __call__(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        p: int,
        *,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        previous: tuple[int, Prediction] | None,
    ) -> Tensor:
        """Return x_p. `noise(t)` is called only if the step needs it; `previous` is the last visited t and its prediction."""


@dataclass(frozen=True)
class Ancestral:
    """Ancestral DDPM step over any jump (Ho et al. 2020, algorithm 2).

    Args:
        variance: "fixed_small" or "fixed_large".
    """

    variance: str = "fixed_small"

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise ConfigError("variance-unknown", f"variance must be one of {', '.join(VARIANCES)}, got {self.variance!r}.")

    def __call__(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        p: int,
        *,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        previous: tuple[int, Prediction] | None,
    ) -> Tensor:
        """See `Step`."""
        z = noise(t) if p >= 0 else None
        return ddpm_step(x_t, prediction.x_0, schedule.abar(t), schedule.abar(p), z, self.variance)


@dataclass(frozen=True)
class DDIM:
    """DDIM step (Song et al. 2021).

    Args:
        eta: 0 deterministic, 1 ancestral variance, in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError("eta-range", f"eta must lie in [0, 1], got {self.eta}.")

    def __call__(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        p: int,
        *,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        previous: tuple[int, Prediction] | None,
    ) -> Tensor:
        """See `Step`."""
        z = noise(t) if self.eta > 0 and p >= 0 else None
        return ddim_update(prediction.x_0, prediction.noise, schedule.abar(t), schedule.abar(p), self.eta, z)


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M) (Lu et al. 2022); the first and the last step are first order."""

    def __call__(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        p: int,
        *,
        schedule: NoiseSchedule,
        noise: NoiseSource,
        previous: tuple[int, Prediction] | None,
    ) -> Tensor:
        """See `Step`."""
        abar_t, abar_p = schedule.abar(t), schedule.abar(p)
        if previous is None or p < 0:  # at p = -1 lambda is infinite: the step returns x_0
            return dpm_solver_pp_2m_step(x_t, prediction.x_0, abar_t, abar_p)
        last, last_prediction = previous
        return dpm_solver_pp_2m_step(x_t, prediction.x_0, abar_t, abar_p, last_prediction.x_0, schedule.abar(last))


STEPS: dict[str, type[Ancestral] | type[DDIM] | type[DPMSolverPP2M]] = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "dpm_solver_pp_2m": DPMSolverPP2M,
}
