"""Two-stage sampling: images generated from noise, or real ones, then disturbed: inverted and run again under another guide.

Generation with classifier or classifier-free guidance draws typical images; the disturbance with uncertainty guidance moves each towards the
decision boundary and keeps what it shows (MGDM's two stages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medaug.diffusion.inversion import ddim_inversion
from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.sampler import Denoiser, Guide, sample
from medaug.diffusion.schedule import NoiseSchedule
from medaug.diffusion.steps import DDIM
from medaug.errors import ConfigError, DataError

OnStep = Callable[[int, Tensor, Prediction], None]


@torch.no_grad()
def disturb(
    denoiser: Denoiser,
    x_0: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    guide: Guide | None,
    target: Denoiser | None = None,
    clip: bool = True,
    refinements: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Stage 2: DDIM inversion without guidance, then DDIM with eta = 0 under `guide` over the same grid.

    Without a guide, and with the target the source, it is the round trip of `ddim_inversion`, which errs by about 1/N. With another
    target and no guide it is the translation of dual diffusion implicit bridges (Su et al. 2023, arXiv 2203.08382).

    Args:
        denoiser: (x_t, t) -> Prediction, unclipped, with the label of x_0.
        x_0: images (B, C, *spatial) in about [-1, 1], generated or real training images.
        timesteps: grid, descending; empty gives x_0 back.
        schedule: of the network.
        guide: of the way back; None is off.
        target: denoiser of the way back, for a target label; None keeps the label.
        clip: cut the predicted x_0 to [-1, 1] on the way back, before guidance; never in the inversion.
        refinements: see `ddim_inversion`.
        on_step: see `sample`.

    Returns:
        Disturbed images, shape of x_0.

    Raises:
        DataError: no image (code `disturb-empty`).  ConfigError: a grid that does not descend inside [0, T-1].
    """
    if len(x_0) == 0:
        raise DataError(
            "disturb-empty", "disturbance needs at least one image, got none; generate first, or take training images."
        )
    if not timesteps:
        return x_0
    x_top = ddim_inversion(denoiser, x_0, timesteps, schedule=schedule, refinements=refinements)
    back = denoiser if target is None else target
    return sample(back, x_top, timesteps, DDIM(), schedule=schedule, noise=_no_noise, guide=guide, clip=clip, on_step=on_step)


@torch.no_grad()
def two_stage(
    denoiser: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    generation: Guide | None,
    disturbance: Guide | None,
    inverter: Denoiser | None = None,
    clip: bool = True,
    refinements: int = 0,
) -> tuple[Tensor, Tensor]:
    """Stage 1 from noise, DDIM with eta = 0 under `generation`, then `disturb` under `disturbance`, same label.

    Args:
        denoiser: of stage 1; classifier-free guidance and autoguidance live inside it.
        x_T: standard normal (B, C, *spatial).
        timesteps: grid of both stages, descending.
        schedule: of the network.
        generation, disturbance: guides of the stages, for example by the class and by its entropy; None is off.
        inverter: denoiser of stage 2, both ways, with the condition but without guidance; None takes that of stage 1.
        clip: cut the predicted x_0 to [-1, 1] before guidance, never in the inversion.
        refinements: see `ddim_inversion`.

    Returns:
        Images of stage 1 and of stage 2, shape of x_T.

    Raises:
        DataError: no image.  ConfigError: a grid that does not descend inside [0, T-1].
    """
    first = sample(denoiser, x_T, timesteps, DDIM(), schedule=schedule, noise=_no_noise, guide=generation, clip=clip)
    plain = denoiser if inverter is None else inverter
    return first, disturb(plain, first, timesteps, schedule=schedule, guide=disturbance, clip=clip, refinements=refinements)


def _no_noise(t: int) -> Tensor:
    raise ConfigError("noise-unexpected", f"DDIM with eta = 0 draws no noise, but did at timestep {t}.")
