"""Guidance: a change of the predicted noise, of a step's mean, or of a condition; the sampling loop knows nothing of it.

Scale 1 is off where two predictions are set against each other (classifier-free guidance, autoguidance), 0 where a gradient is followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.sampler import Denoiser, Guide
from medaug.diffusion.schedule import NoiseSchedule, coefficient
from medaug.diffusion.steps import Ancestral, NoiseSource, ddpm_variance
from medaug.diffusion.uncertainty import Measure
from medaug.errors import ConfigError

# --- how the scale changes with t ------------------------------------------------------------------------------------


class ScaleSchedule(Protocol):
    """Factor on a guidance scale."""

    def __call__(self, t: int, schedule: NoiseSchedule) -> float:
        """The factor at timestep t."""


@dataclass(frozen=True)
class Constant:
    """The scale as it is, at every t."""

    def __call__(self, t: int, schedule: NoiseSchedule) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class SqrtAbar:
    """sqrt(abar_t), for a measure made for clean images but asked about noisy ones.

    For a linear energy a x over N(0, 1) it makes the diffused energy of the clean one, log E[exp(a x_0) | x_t] = a sqrt(abar_t) x_t;
    without it the tilt is about five times too strong on the linear schedule.
    """

    def __call__(self, t: int, schedule: NoiseSchedule) -> float:
        """sqrt(abar_t)."""
        return math.sqrt(float(schedule.abar(t)))


@dataclass(frozen=True)
class Interval:
    """Guidance only for t_low <= t <= t_high (Kynkäänniemi et al. 2024, arXiv 2404.07724); outside it costs nothing.

    Args:
        t_high, t_low: first and last guided timestep of the training schedule.
        inside: the factor within.

    Raises:
        ConfigError: an empty interval.
    """

    t_high: int
    t_low: int
    inside: ScaleSchedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        if not self.t_high >= self.t_low >= 0:
            raise ConfigError(
                "guidance-interval",
                f"a guidance interval needs t_high >= t_low >= 0, got t_high {self.t_high} and t_low {self.t_low}.",
            )

    def __call__(self, t: int, schedule: NoiseSchedule) -> float:
        """The factor within the interval, 0 outside."""
        return self.inside(t, schedule) if self.t_low <= t <= self.t_high else 0.0


SCALE_SCHEDULES: dict[str, type[Constant] | type[SqrtAbar] | type[Interval]] = {
    "constant": Constant,
    "sqrt_abar": SqrtAbar,
    "interval": Interval,
}


def _scale(value: float | Tensor) -> Tensor:
    """A guidance scale as float64, scalar or (B,)."""
    scale = torch.as_tensor(value, dtype=torch.float64)
    if scale.ndim > 1 or not bool(scale.isfinite().all()):
        raise ConfigError("guidance-scale", f"a guidance scale must be a finite number, or one for each image, got {value}.")
    return scale


# --- one prediction against another ----------------------------------------------------------------------------------


def classifier_free_noise(noise_cond: Tensor, noise_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """e_u + w (e_c - e_u) (Ho & Salimans 2022, arXiv 2207.12598, eq. 6 with w one larger).

    Args:
        noise_cond: prediction e_c with the condition, shape (B, C, *spatial).
        noise_uncond: prediction e_u without it, same shape.
        scale: w, one number or one per image (B,); 1 gives e_c, 0 gives e_u.
    """
    w = coefficient(torch.as_tensor(scale, dtype=torch.float64, device=noise_cond.device), noise_cond)
    return torch.lerp(noise_uncond, noise_cond, w.expand_as(noise_cond))  # lerp is exact at w = 0 and w = 1


def classifier_free(cond: Prediction, uncond: Prediction, scale: float | Tensor) -> Prediction:
    """`classifier_free_noise` on the noise and, since x_0 is affine in it, on x_0."""
    return Prediction(*(classifier_free_noise(c, u, scale) for c, u in zip(cond, uncond, strict=True)))


@dataclass(frozen=True, eq=False)
class Extrapolation:
    """A denoiser that goes from the estimate of a weak one through that of a strong one and beyond: D_w + w (D_s - D_w).

    The weak one is the same network without its condition in classifier-free guidance (Ho & Salimans 2022), a smaller or less trained
    network with the condition in autoguidance (Karras et al. 2024, arXiv 2406.02507). Each may have its own parameterisation.

    Args:
        strong, weak: the denoisers.
        guidance_scale: w, one number or one per image (B,); at 1 the weak one is not asked.
        schedule: the schedule of the sampler.
        scale_schedule: factor on w - 1.

    Raises:
        ConfigError: a scale that is not finite.
    """

    strong: Denoiser
    weak: Denoiser
    guidance_scale: float | Tensor
    schedule: NoiseSchedule
    scale_schedule: ScaleSchedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _scale(self.guidance_scale)

    def __call__(self, x_t: Tensor, t: int) -> Prediction:
        """The extrapolated estimates, (B, C, *spatial) each."""
        strong = self.strong(x_t, t)
        w = 1 + (_scale(self.guidance_scale) - 1) * self.scale_schedule(t, self.schedule)
        if bool((w == 1).all()):
            return strong
        return classifier_free(strong, self.weak(x_t, t), w)


# --- along the gradient of a measure ---------------------------------------------------------------------------------


def score_guided_noise(noise_pred: Tensor, gradient: Tensor, abar_t: Tensor, scale: float | Tensor) -> Tensor:
    """e - sqrt(1 - abar_t) s grad M (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2).

    Args:
        noise_pred: predicted noise, shape (B, C, *spatial).
        gradient: gradient of the measure M with respect to x_t, same shape; M is driven up.
        abar_t: abar at t, scalar or (B,).
        scale: s, one number or one per image (B,); 0 is off, below 0 drives M down.
    """
    return noise_pred - coefficient(scale * (1 - abar_t).sqrt(), noise_pred) * gradient


def measure_gradient(measure: Measure, x_t: Tensor, t: int) -> Tensor:
    """grad_x M(x, t) for each image, shape of x_t; its graph is gone when this returns, and nothing else gets a gradient.

    Args:
        measure: (x_t, t) -> (B,).
        x_t: noisy images (B, C, *spatial).
        t: their timestep.

    Raises:
        ConfigError: M is not (B,), or does not follow from x_t by differentiable operations.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        value = measure(x, t)
        if value.shape != x.shape[:1]:
            raise ConfigError(
                "measure-shape",
                f"a measure must return one number for each of {len(x)} images, shape ({len(x)},), got {tuple(value.shape)}.",
            )
        # The sum keeps images apart: element i depends on image i alone.
        found = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise ConfigError(
            "measure-gradient",
            "a measure must be differentiable with respect to the image; use no argmax, numpy, detach or no_grad in it.",
        )
    return found


@dataclass(frozen=True, eq=False)
class GradientGuidance:
    """A guide that drives a measure of the noisy image up, for example log p(y | x_t) or its entropy.

    Called by the sampling loop it is the score form; `MeanGuided` takes the same object for the mean form.

    Args:
        measure: (x_t, t) -> (B,); element i may depend on image i alone.
        guidance_scale: s, one number or one per image (B,); 0 is off, below 0 drives the measure down.
        schedule: the schedule of the sampler.
        scale_schedule: factor on s.

    Raises:
        ConfigError: a scale that is not finite; when called, see `measure_gradient`, and a gradient that is not finite.
    """

    measure: Measure
    guidance_scale: float | Tensor
    schedule: NoiseSchedule
    scale_schedule: ScaleSchedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _scale(self.guidance_scale)

    def force(self, x_t: Tensor, t: int) -> Tensor | None:
        """s(t) grad M, shape (B, C, *spatial); None where s(t) is 0, so that no classifier is asked in vain.

        Raises:
            ConfigError: a gradient that is not finite (code `guidance-diverged`).
        """
        scale = _scale(self.guidance_scale) * self.scale_schedule(t, self.schedule)
        if not bool(scale.any()):
            return None
        force = coefficient(scale, x_t) * measure_gradient(self.measure, x_t, t)
        if not bool(force.isfinite().all()):
            strongest = float(scale.flatten()[scale.abs().argmax()])
            raise ConfigError(
                "guidance-diverged",
                f"the gradient of the guidance is not finite at timestep {t} with guidance_scale {strongest:g}; "
                "use a smaller scale, or clip the predicted image.",
            )
        return force

    def __call__(self, noise_pred: Tensor, x_t: Tensor, t: int) -> Tensor:
        """Return the guided noise, shape (B, C, *spatial)."""
        force = self.force(x_t, t)
        return noise_pred if force is None else score_guided_noise(noise_pred, force, self.schedule.abar(t), 1.0)


@dataclass(frozen=True, eq=False)
class Together:
    """Several guides one after the other, all at the same x_t: gradient guidances add up.

    Args:
        guides: any number; none leaves the noise as it is.
    """

    guides: Sequence[Guide]

    def __call__(self, noise_pred: Tensor, x_t: Tensor, t: int) -> Tensor:
        """Return the guided noise, shape (B, C, *spatial)."""
        for guide in self.guides:
            noise_pred = guide(noise_pred, x_t, t)
        return noise_pred


@dataclass(frozen=True, eq=False)
class MeanGuided:
    """The ancestral step with its mean moved: mean + var s grad M (Dhariwal & Nichol 2021, algorithm 1).

    To first order the kernel N(mean, var) tilted by exp(s M). The last step, p = -1, has no variance and is not moved.

    Args:
        step: the step itself; its variance is the one used.
        guidances: their forces add up.
    """

    step: Ancestral
    guidances: Sequence[GradientGuidance]

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
        """See `medaug.diffusion.steps.Step`."""
        x_p = self.step(prediction, x_t, t, p, schedule=schedule, noise=noise, previous=previous)
        variance = ddpm_variance(schedule.abar(t), schedule.abar(p), self.step.variance)
        forces = [guidance.force(x_t, t) for guidance in self.guidances] if p >= 0 else []
        return x_p + coefficient(variance, x_t) * sum(force for force in forces if force is not None)


# --- a condition under noise -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConditionAnnealing:
    """CADS: a condition starts as noise and becomes itself on the way down (Sadat et al. 2024, arXiv 2310.17347).

    y_hat = sqrt(g) y + s sqrt(1 - g) n, with g = 1 for u <= tau_low, 0 for u >= tau_high, falling linearly between, u = t / (T - 1);
    then brought back to mean and std of y per image, in the share `mixing`. More diverse images at high classifier-free scales.

    Args:
        tau_low, tau_high: 0 <= tau_low < tau_high <= 1.
        noise_scale: s, at least 0; 0 leaves y but for the fading.
        mixing: psi in [0, 1]; 1 brings mean and std back wholly.

    Raises:
        ConfigError: a value out of range.
    """

    tau_low: float = 0.6
    tau_high: float = 0.9
    noise_scale: float = 0.25
    mixing: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.tau_low < self.tau_high <= 1 and 0 <= self.noise_scale < math.inf and 0 <= self.mixing <= 1):
            raise ConfigError(
                "annealing-option",
                "condition annealing needs 0 <= tau_low < tau_high <= 1, noise_scale of at least 0 and mixing in [0, 1], got "
                f"{self.tau_low}, {self.tau_high}, {self.noise_scale} and {self.mixing}.",
            )

    def kept(self, t: int, schedule: NoiseSchedule) -> float:
        """g in [0, 1]: the share of the condition at timestep t."""
        u = t / max(1, schedule.num_train_timesteps - 1)
        return min(1.0, max(0.0, (self.tau_high - u) / (self.tau_high - self.tau_low)))

    def __call__(self, condition: Tensor, draw: Tensor, t: int, schedule: NoiseSchedule) -> Tensor:
        """The condition as the network shall see it at t.

        Args:
            condition: y, shape (B, ...), such as class embeddings or reference features.
            draw: standard normal, same shape.
            t: timestep.
            schedule: of the sampler.
        """
        kept = self.kept(t, schedule)
        if kept == 1:
            return condition
        noised = math.sqrt(kept) * condition + self.noise_scale * math.sqrt(1 - kept) * draw
        per_image = tuple(range(1, condition.ndim))
        mean, std = condition.mean(dim=per_image, keepdim=True), condition.std(dim=per_image, correction=0, keepdim=True)
        own_mean, own_std = noised.mean(dim=per_image, keepdim=True), noised.std(dim=per_image, correction=0, keepdim=True)
        # A constant, such as all zeros, has no std to divide by.
        rescaled = (noised - own_mean) / own_std.clamp(min=torch.finfo(noised.dtype).eps) * std + mean
        return torch.lerp(noised, rescaled, self.mixing)
