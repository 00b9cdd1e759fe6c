"""Inversion: from a real image to a noisy start, and to the noise that leads back from it to that image.

Each inversion goes over the explicit pairs (t, p) of a sampler's grid. It asks the same denoiser as the sampler, so it works with
every parameterisation and with classifier-free guidance. Clipping must be off: a clipped estimate cannot be undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medaug.diffusion.parameterisation import Prediction, add_noise, noise_from_x_0, x_0_from_noise
from medaug.diffusion.sampler import Denoiser
from medaug.diffusion.schedule import NoiseSchedule, check_timesteps, coefficient, pairs
from medaug.diffusion.steps import NoiseSource, ddim_sigma, ddim_update
from medaug.errors import ConfigError


def start_timesteps(timesteps: Sequence[int], strength: float) -> list[int]:
    """The part of a descending grid that is run for an image that is noised by `strength`.

    Args:
        timesteps: N timesteps, descending.
        strength: share of the grid in [0, 1]; the first N - floor(N strength) timesteps are left out. 1 is the whole grid, 0
            leaves nothing: the image stays as it is.

    Raises:
        ConfigError: a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ConfigError("strength-range", f"strength must lie in [0, 1], got {strength}.")
    # 0.29 * 100 is 28.999999999999996: the floor is meant of the decimal number that was written.
    return list(timesteps[len(timesteps) - math.floor(len(timesteps) * strength + 1e-9) :])


@torch.no_grad()
def ddim_inversion(
    denoiser: Denoiser, x_0: Tensor, timesteps: Sequence[int], *, schedule: NoiseSchedule, refinements: int = 0
) -> Tensor:
    """x at timesteps[0] from which DDIM with eta = 0 over the same grid leads back to x_0 (DreamDA, Fu et al. 2024, eq. 5).

    Upward from level c (first c = -1 with abar 1) to the next one n:
    x_n = sqrt(abar_n) (x_c - sqrt(1 - abar_c) e) / sqrt(abar_c) + sqrt(1 - abar_n) e,  e = eps(x_c, max(c, 0)).
    The way back asks for e at (x_n, n), so the round trip errs by about 1/N.

    Args:
        denoiser: (x_t, t) -> Prediction, unclipped.
        x_0: images (B, C, *spatial).
        timesteps: the sampler's grid, descending; empty gives x_0.
        schedule: of the network.
        refinements: fixed-point iterations per level: e is asked again at (x_n, n), which is where the way back asks.

    Raises:
        ConfigError: a grid that does not descend inside [0, T-1]; negative refinements.
    """
    if refinements < 0:
        raise ConfigError("refinements-range", f"refinements must be at least 0, got {refinements}.")
    if not timesteps:
        return x_0
    check_timesteps(schedule, timesteps)
    x_c = x_0
    for n, c in reversed(pairs(timesteps)):
        abar_c, abar_n = schedule.abar(c), schedule.abar(n)

        def moved(noise: Tensor, x_c: Tensor = x_c, abar_c: Tensor = abar_c, abar_n: Tensor = abar_n) -> Tensor:
            return add_noise(x_0_from_noise(x_c, noise, abar_c), noise, abar_n)

        x_n = moved(denoiser(x_c, max(c, 0)).noise)
        for _ in range(refinements):
            x_n = moved(denoiser(x_n, n).noise)
        x_c = x_n
    return x_c


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A known image as a start and the noise of every step: what `cycle_inversion` recovers.

    Attributes:
        start: x at timesteps[0], shape (B, C, *spatial).
        noise: t -> z_t of the step that leaves t, same shape; where sigma is 0 the residual r instead.
    """

    start: Tensor
    noise: Mapping[int, Tensor]

    def select(self, index: Tensor) -> Trajectory:
        """The trajectories of these images; repeats serve several variations of one image."""
        return Trajectory(self.start[index], {t: z[index] for t, z in self.noise.items()})


@torch.no_grad()
def cycle_inversion(
    denoiser: Denoiser,
    x_0: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    start: Tensor,
    noise: NoiseSource,
    eta: float = 1.0,
) -> Trajectory:
    """Recover the noise with which DDIM(eta) would have drawn x_0 (CycleDiffusion, Wu & De la Torre 2023, arXiv 2210.05559).

    The source x_t is drawn from its exact posterior, x_p = sqrt(abar_p) x_0 + sqrt(1 - abar_p - sigma^2) e* + sigma u with
    e* = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t), and ends at x_0. What the network's own step misses of it is the noise:
    z_t = (x_p - S(e) - D(e)) / sigma, or r = x_p - S(e) - D(e) where sigma = 0. `Replay` gives it back, so with the
    same denoiser x_0 is reconstructed exactly, whatever the network predicts.

    Args:
        denoiser: (x_t, t) -> Prediction, unclipped, with the source's condition.
        x_0: images (B, C, *spatial).
        timesteps: the sampler's grid, descending; empty gives a trajectory of no step.
        schedule: of the network.
        start: standard normal, shape of x_0: x at timesteps[0] is x_0 noised by it.
        noise: t -> standard normal u, shape of x_0, for every step with sigma > 0.
        eta: of the steps, in [0, 1].

    Raises:
        ConfigError: a grid that does not descend inside [0, T-1].
    """
    if not timesteps:
        return Trajectory(x_0, {})
    check_timesteps(schedule, timesteps)
    x_t = first = add_noise(x_0, start, schedule.abar(timesteps[0]))
    recovered: dict[int, Tensor] = {}
    for t, p in pairs(timesteps):
        abar_t, abar_p = schedule.abar(t), schedule.abar(p)
        sigma = ddim_sigma(abar_t, abar_p, eta)
        u = noise(t) if sigma > 0 else None
        x_p = ddim_update(x_0, noise_from_x_0(x_t, x_0, abar_t), abar_t, abar_p, eta, u) if p >= 0 else x_0
        prediction = denoiser(x_t, t)
        residual = x_p - ddim_update(prediction.x_0, prediction.noise, abar_t, abar_p, eta)
        recovered[t] = residual / coefficient(sigma, residual) if sigma > 0 else residual
        x_t = x_p
    return Trajectory(first, recovered)


@dataclass(frozen=True, eq=False)
class Replay:
    """The DDIM step that takes its noise from a `Trajectory`: x_p = S + D + sigma z_t, or + r where sigma = 0.

    Args:
        noise: of the trajectory.
        eta: as for the inversion.
    """

    noise: Mapping[int, Tensor]
    eta: float = 1.0

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
        """See `medaug.diffusion.steps.Step`; `noise` is not asked."""
        abar_t, abar_p = schedule.abar(t), schedule.abar(p)
        sigma = ddim_sigma(abar_t, abar_p, self.eta)
        if sigma > 0:
            return ddim_update(prediction.x_0, prediction.noise, abar_t, abar_p, self.eta, self.noise[t])
        return ddim_update(prediction.x_0, prediction.noise, abar_t, abar_p, self.eta) + self.noise[t]
