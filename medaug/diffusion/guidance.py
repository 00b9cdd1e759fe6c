"""Guidance: a change of the predicted noise. Scale 1 is off for classifier-free guidance, 0 for gradient guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.schedule import NoiseSchedule, coefficient


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


def score_guided_noise(noise_pred: Tensor, gradient: Tensor, abar_t: Tensor, scale: float) -> Tensor:
    """e - sqrt(1 - abar_t) s grad M (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2).

    Args:
        noise_pred: predicted noise, shape (B, C, *spatial).
        gradient: gradient of the measure M with respect to x_t, same shape; M is driven up.
        abar_t: abar at t, scalar or (B,).
        scale: s; 0 is off.
    """
    return noise_pred - coefficient(scale * (1 - abar_t).sqrt(), noise_pred) * gradient


@dataclass(frozen=True, eq=False)
class GradientGuidance:
    """A guide that drives a measure of the noisy image up, for example log p(y | x_t).

    Args:
        measure: (x_t, t) -> (B,); element i may depend on image i alone.
        guidance_scale: s; 0 is off.
        schedule: the schedule of the sampler.
    """

    measure: Callable[[Tensor, int], Tensor]
    guidance_scale: float
    schedule: NoiseSchedule

    def __call__(self, noise_pred: Tensor, x_t: Tensor, t: int) -> Tensor:
        """Return the guided noise, shape (B, C, *spatial)."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.measure(x, t).sum(), x)
        return score_guided_noise(noise_pred, gradient, self.schedule.abar(t), self.guidance_scale)
