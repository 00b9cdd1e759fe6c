"""Noise schedules and the timesteps that a sampler visits.

A schedule is the table abar_t = prod_{s<=t} (1 - beta_s) of Ho et al. 2020 (arXiv 2006.11239), eq. 4, for t in
{0, ..., T-1}, with abar_{-1} := 1 for the clean image. A sampler visits explicit pairs (t, p), p the next smaller
timestep and -1 at the end, so no step ever guesses its neighbour from the number of steps.

All arithmetic on abar is float64; `coefficient` casts to the dtype of the images at the very end.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medaug.errors import ConfigError

# Karras et al. 2022 (arXiv 2206.00364), table 1 and eq. 5.
KARRAS_SIGMA_MIN, KARRAS_SIGMA_MAX, KARRAS_RHO = 0.002, 80.0, 7.0
# Ho et al. 2020, section 4: betas of the linear schedule for T = 1000.
BETA_START, BETA_END, BETA_TIMESTEPS = 1e-4, 2e-2, 1000
SIGNAL_LEFT = 0.01  # of the variance, at the timestep that sampling from pure noise begins at
MAX_BETA = 0.999  # Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.2


def coefficient(value: Tensor, like: Tensor) -> Tensor:
    """`value` (scalar or (B,)) in the dtype and on the device of `like` (B, C, *spatial), ready to multiply it."""
    return value.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def noise_to_signal(abar: Tensor) -> Tensor:
    """sigma = sqrt((1 - abar) / abar): std of the noise once the image has unit scale (Karras et al. 2022)."""
    return ((1 - abar) / abar).sqrt()


def signal_to_noise(abar: Tensor) -> Tensor:
    """SNR = abar / (1 - abar)."""
    return abar / (1 - abar)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The table abar_t of a discrete diffusion process.

    Args:
        alphas_cumprod: abar_t, shape (T,), strictly decreasing inside (0, 1); kept as float64 on the CPU.

    Raises:
        ConfigError: if the table is not such a sequence.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().to("cpu", torch.float64)
        valid = table.ndim == 1 and len(table) > 0 and bool((table > 0).all() and (table < 1).all() and (table.diff() < 0).all())
        if not valid:
            raise ConfigError(
                "schedule-invalid",
                f"alphas_cumprod must decrease strictly inside (0, 1), got shape {tuple(table.shape)} that does not; "
                "check the betas and the number of timesteps.",
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def abar(self, t: int | Tensor) -> Tensor:
        """abar_t as float64, shape of `t`; 1 at t = -1.

        Raises:
            ConfigError: if a timestep lies outside [-1, T-1].
        """
        index = torch.as_tensor(t)
        if bool((index < -1).any() or (index >= self.num_train_timesteps).any()):
            raise ConfigError("timestep-out-of-range", f"a timestep must lie in [-1, {self.num_train_timesteps - 1}], got {t}.")
        table = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)])  # index -1 finds the final 1
        return table[index.cpu()].to(index.device)

    def sigma(self, t: int | Tensor) -> Tensor:
        """sigma_t = sqrt(1 / abar_t - 1) as float64, shape of `t`; 0 at t = -1."""
        return noise_to_signal(self.abar(t))


def _from_betas(betas: Tensor) -> NoiseSchedule:
    return NoiseSchedule(torch.cumprod(1 - betas, dim=0))


def _beta_range(num_train_timesteps: int, beta_start: float | None, beta_end: float | None) -> tuple[float, float]:
    """Ends of the beta ramp. Defaults are those for T = 1000, scaled so that abar_{T-1} stays near 0 for any T."""
    scale = BETA_TIMESTEPS / num_train_timesteps
    start = min(BETA_START * scale, MAX_BETA) if beta_start is None else beta_start
    end = min(BETA_END * scale, MAX_BETA) if beta_end is None else beta_end
    if not 0 < start <= end < 1:
        raise ConfigError("beta-range", f"betas need 0 < beta_start <= beta_end < 1, got {start} and {end}.")
    return start, end


def linear_beta(num_train_timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
    """beta_t = linspace(beta_start, beta_end, T) (Ho et al. 2020, section 4).

    Args:
        num_train_timesteps: T.
        beta_start: first beta, by default 1e-4 * 1000 / T.
        beta_end: last beta, by default min(0.02 * 1000 / T, 0.999).
    """
    start, end = _beta_range(num_train_timesteps, beta_start, beta_end)
    return _from_betas(torch.linspace(start, end, num_train_timesteps, dtype=torch.float64))


def scaled_linear_beta(num_train_timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
    """beta_t = linspace(sqrt(beta_start), sqrt(beta_end), T)^2 (Rombach et al. 2022); default ends as `linear_beta`."""
    start, end = _beta_range(num_train_timesteps, beta_start, beta_end)
    return _from_betas(torch.linspace(math.sqrt(start), math.sqrt(end), num_train_timesteps, dtype=torch.float64) ** 2)


def sigmoid_beta(
    num_train_timesteps: int, beta_start: float | None = None, beta_end: float | None = None, sig_range: float = 6.0
) -> NoiseSchedule:
    """A sigmoid ramp over [-sig_range, sig_range] between the betas; default ends as `linear_beta`."""
    start, end = _beta_range(num_train_timesteps, beta_start, beta_end)
    ramp = torch.sigmoid(torch.linspace(-sig_range, sig_range, num_train_timesteps, dtype=torch.float64))
    return _from_betas(start + (end - start) * ramp)


def cosine(num_train_timesteps: int, s: float = 0.008) -> NoiseSchedule:
    """abar(u) = cos^2((u/T + s)/(1 + s) * pi/2), betas cut at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    abar = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    return _from_betas((1 - abar[1:] / abar[:-1]).clamp(max=MAX_BETA))


def karras_sigmas(num: int, sigma_min: float, sigma_max: float, rho: float = KARRAS_RHO) -> Tensor:
    """`num` noise levels from sigma_max down to sigma_min, float64 (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, num, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def karras(
    num_train_timesteps: int,
    sigma_min: float = KARRAS_SIGMA_MIN,
    sigma_max: float = KARRAS_SIGMA_MAX,
    rho: float = KARRAS_RHO,
) -> NoiseSchedule:
    """abar = 1 / (1 + sigma^2) over the noise levels of Karras et al. 2022, eq. 5, sigma rising with t."""
    _check_sigmas(sigma_min, sigma_max)
    sigmas = karras_sigmas(num_train_timesteps, sigma_min, sigma_max, rho).flip(0)
    return NoiseSchedule(1 / (1 + sigmas**2))


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ConfigError("sigma-range", f"noise levels need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear_beta": linear_beta,
    "scaled_linear_beta": scaled_linear_beta,
    "sigmoid_beta": sigmoid_beta,
    "cosine": cosine,
    "karras": karras,
}


def make_schedule(name: str, num_train_timesteps: int = 1000, **options: Any) -> NoiseSchedule:
    """Build the schedule `name` of `SCHEDULES` with T = `num_train_timesteps`.

    Raises:
        ConfigError: on an unknown name or option, or values that give no valid schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError("schedule-unknown", f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    if num_train_timesteps < 1:
        raise ConfigError("schedule-invalid", f"num_train_timesteps must be at least 1, got {num_train_timesteps}.")
    known = list(inspect.signature(SCHEDULES[name]).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError("schedule-option", f"schedule {name} takes {', '.join(known)}, got {', '.join(unknown)}.")
    return SCHEDULES[name](num_train_timesteps, **options)


def _linspace_timesteps(schedule: NoiseSchedule, num: int) -> Tensor:
    """Evenly from T-1 to 0, both included."""
    return torch.linspace(schedule.num_train_timesteps - 1, 0, num, dtype=torch.float64).round().long()


def _leading_timesteps(schedule: NoiseSchedule, num: int) -> Tensor:
    """Every (T // N)-th timestep down to 0: 996, 992, ..., 0 for 250 of 1000 (Dhariwal & Nichol 2021's respacing).

    Raises:
        ConfigError: the first timestep, from which noise is sampled, still shows the image (`num-inference-steps`).
    """
    total = schedule.num_train_timesteps
    stride = total // num
    timesteps = torch.arange(num - 1, -1, -1) * stride
    first = int(timesteps[0])
    left = float(schedule.alphas_cumprod[first])
    if total - 1 - first > stride and left > SIGNAL_LEFT:
        raise ConfigError(
            "num-inference-steps",
            f"With spacing leading, {num} of {total} steps begin at timestep {first}, where {left:.1%} of the variance is still the image's, not "
            f"noise; take a number that divides {total}, or spacing linspace.",
        )
    return timesteps


def _karras_timesteps(schedule: NoiseSchedule, num: int, sigma_min: float | None, sigma_max: float | None) -> Tensor:
    """The timesteps nearest to Karras' noise levels in ln(sigma), within the levels the schedule has."""
    grid = schedule.sigma(torch.arange(schedule.num_train_timesteps))
    high = min(KARRAS_SIGMA_MAX if sigma_max is None else sigma_max, float(grid[-1]))
    low = max(KARRAS_SIGMA_MIN if sigma_min is None else sigma_min, float(grid[0]))
    _check_sigmas(low, high)
    sigmas = karras_sigmas(num, low, high)
    nearest = (sigmas.log()[:, None] - grid.log()[None, :]).abs().argmin(dim=1)
    # Neighbours that fell on one timestep move apart: down first, then up again where they would pass below 0.
    ranks = torch.arange(num)
    descending = (nearest + ranks).cummin(dim=0).values - ranks
    return torch.maximum(descending, ranks.flip(0))


def spaced_timesteps(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    spacing: str = "linspace",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
) -> list[int]:
    """The timesteps a sampler visits, strictly descending, exactly `num_inference_steps` of them.

    Args:
        schedule: the training schedule, T timesteps.
        num_inference_steps: N, from 1 to T.
        spacing: "linspace" (T-1 ... 0 evenly), "leading" (multiples of T // N down to 0) or "karras" (noise levels of
            Karras et al. 2022, eq. 5, each mapped to the nearest timestep).
        sigma_max: highest noise level of "karras", default 80; cut to what the schedule reaches.
        sigma_min: lowest noise level of "karras", default 0.002; cut to what the schedule reaches.

    Raises:
        ConfigError: on an unknown spacing, N outside [1, T], or sigmas given for another spacing; where "leading" begins too low.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ConfigError("num-inference-steps", f"num_inference_steps must lie in [1, {total}], got {num_inference_steps}.")
    if spacing != "karras" and (sigma_max is not None or sigma_min is not None):
        raise ConfigError("spacing-option", f"sigma_min and sigma_max belong to spacing 'karras', got spacing {spacing!r}.")
    if spacing == "linspace":
        return list(map(int, _linspace_timesteps(schedule, num_inference_steps)))
    if spacing == "leading":
        return list(map(int, _leading_timesteps(schedule, num_inference_steps)))
    if spacing == "karras":
        return list(map(int, _karras_timesteps(schedule, num_inference_steps, sigma_min, sigma_max)))
    raise ConfigError("spacing-unknown", f"spacing must be linspace, leading or karras, got {spacing!r}.")


def pairs(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """(t, p) for every step of a descending grid, p = -1 for the last."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def check_timesteps(schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
    """Refuse a grid that is empty, not strictly descending, or outside [0, T-1].

    Raises:
        ConfigError: naming what is wrong.
    """
    if not timesteps or timesteps[0] >= schedule.num_train_timesteps or timesteps[-1] < 0:
        raise ConfigError(
            "timesteps-range",
            f"timesteps must lie in [0, {schedule.num_train_timesteps - 1}], got {_ends(timesteps)}.",
        )
    if any(t <= p for t, p in pairs(timesteps)):
        raise ConfigError("timesteps-order", f"timesteps must descend strictly, got {_ends(timesteps)}; see spaced_timesteps.")


def _ends(timesteps: Sequence[int]) -> str:
    return f"{timesteps[0]} ... {timesteps[-1]} ({len(timesteps)} steps)" if timesteps else "none"
