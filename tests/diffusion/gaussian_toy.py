"""Data N(mean, std^2) per pixel: the perfect network and the exact probability flow are formulas."""

from __future__ import annotations

import torch

from medaug.diffusion import Prediction, noise_from_x_0
from medaug.diffusion.schedule import coefficient


def posterior_mean(x_t, abar, mean=0.2, std=0.3):
    """E[x_0 | x_t] for x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
    gain = coefficient(abar.sqrt() * std**2 / (abar * std**2 + 1 - abar), x_t)
    return mean + gain * (x_t - coefficient(abar.sqrt(), x_t) * mean)


def gaussian_denoiser(schedule, mean=0.2, std=0.3):
    def denoise(x_t, t):
        abar = schedule.abar(t)
        x_0 = posterior_mean(x_t, abar, mean, std)
        return Prediction(x_0, noise_from_x_0(x_t, x_0, abar))

    return denoise


def exact_flow(x, abar_from, abar_to, mean=0.2, std=0.3):
    """The probability flow ODE keeps the standardised value of a Gaussian."""
    standard = (x - abar_from.sqrt() * mean) / (abar_from * std**2 + 1 - abar_from).sqrt()
    return abar_to.sqrt() * mean + (abar_to * std**2 + 1 - abar_to).sqrt() * standard


def seeded(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step_noise(like, seed=1):
    """A noise source as `sample` takes it: its own stream for every timestep."""
    return lambda t: seeded(like.shape, 1000 * seed + t, like.dtype)


def no_noise(t):
    raise AssertionError(f"noise drawn at {t}")
