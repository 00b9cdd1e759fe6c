"""The sampling loop: state, step, guidance and noise are separate, and each extension is a callable given to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medaug.diffusion.parameterisation import Prediction, with_noise, with_x_0
from medaug.diffusion.schedule import NoiseSchedule, check_timesteps, pairs
from medaug.diffusion.steps import NoiseSource, Step

Denoiser = Callable[[Tensor, int], Prediction]  # (x_t, t) -> estimates of x_0 and the noise
Guide = Callable[[Tensor, Tensor, int], Tensor]  # (noise_pred, x_t, t) -> noise_pred


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    step: Step,
    *,
    schedule: NoiseSchedule,
    noise: NoiseSource,
    guide: Guide | None = None,
    clip: bool = False,
    clip_after_guidance: bool = False,
    on_step: Callable[[int, Tensor, Prediction], None] | None = None,
) -> Tensor:
    """Run the reverse process from x_T over `timesteps` to x_0 (Ho et al. 2020, algorithm 2).

    Args:
        denoiser: (x_t, t) -> Prediction; condition, classifier-free guidance and perturbation live inside it.
        x_T: start at noise level timesteps[0], shape (B, C, *spatial).
        timesteps: strictly descending inside [0, T-1]; the step after the last one reaches x_0.
        step: one of `steps`.
        schedule: the schedule the network was trained with.
        noise: t -> standard normal of the shape of x_T; called once for every step that needs noise. Key it per image,
            and an image does not depend on its neighbours in the batch.
        guide: changes the predicted noise; x_0 follows.
        clip: cut the predicted x_0 to [-1, 1] before guidance; the noise follows (Dhariwal & Nichol 2021).
        clip_after_guidance: cut it after guidance.
        on_step: called after every step with the t it left, the new x and the prediction it used.

    Returns:
        x_0, shape of x_T, not cut to [-1, 1] unless a clip is on.

    Raises:
        ConfigError: if the timesteps are not strictly descending inside [0, T-1].
    """
    check_timesteps(schedule, timesteps)
    x_t, previous = x_T, None
    for t, p in pairs(timesteps):
        prediction = denoiser(x_t, t)
        if clip:
            prediction = clip_x_0(prediction, schedule.abar(t))
        if guide is not None:
            prediction = with_noise(prediction, guide(prediction.noise, x_t, t), schedule.abar(t))
        if clip_after_guidance:
            prediction = clip_x_0(prediction, schedule.abar(t))
        x_t = step(prediction, x_t, t, p, schedule=schedule, noise=noise, previous=previous)
        previous = (t, prediction)
        if on_step is not None:
            on_step(t, x_t, prediction)
    return x_t


def clip_x_0(prediction: Prediction, abar: Tensor) -> Prediction:
    """Cut x_0 to [-1, 1] and recompute the noise from it, so that both still explain x_t."""
    return with_x_0(prediction, prediction.x_0.clamp(-1, 1), abar)
