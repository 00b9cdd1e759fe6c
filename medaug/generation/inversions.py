"""How a variation starts from its seed image: inverted with the noise that leads back, inverted without, or only noised."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medaug.diffusion.inversion import Replay, Trajectory, cycle_inversion, ddim_inversion
from medaug.diffusion.parameterisation import add_noise
from medaug.diffusion.sampler import Denoiser
from medaug.diffusion.schedule import NoiseSchedule
from medaug.diffusion.steps import DDIM, STEPS, Step
from medaug.errors import ConfigError
from medaug.training.diffusion import choose

Draw = Callable[..., Tensor]  # (what the draw is for) -> standard normal (B, C, H, W), keyed per image


class Inversion(Protocol):
    """From seed images to starts and steps of reverse runs."""

    def invert(
        self, denoiser: Denoiser, x_0: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw
    ) -> Trajectory:
        """Once per seed image, whatever the number of variations; `draw` is keyed by the seed image."""

    def begin(self, found: Trajectory, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw) -> tuple[Tensor, Step]:
        """Start and step of the reverse runs; `found` holds one entry per variation, `draw` is keyed by the variation."""


def _eta(value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError("eta-range", f"eta must lie in [0, 1], got {value}.")


@dataclass(frozen=True)
class Cycle:
    """CycleDiffusion: a random start, and the noise of every step recovered (see `cycle_inversion`).

    Args:
        eta: of the steps.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _eta(self.eta)

    def invert(
        self, denoiser: Denoiser, x_0: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw
    ) -> Trajectory:
        """See `Inversion`."""
        return cycle_inversion(
            denoiser,
            x_0,
            timesteps,
            schedule=schedule,
            start=draw("inversion-start"),
            noise=lambda t: draw("inversion-step", t),
            eta=self.eta,
        )

    def begin(self, found: Trajectory, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw) -> tuple[Tensor, Step]:
        """See `Inversion`."""
        return found.start, Replay(found.noise, self.eta)


@dataclass(frozen=True)
class Deterministic:
    """DDIM inversion (see `ddim_inversion`).

    Args:
        refinements: fixed-point iterations per level.
        eta: of the steps back; above 0 they draw fresh noise.
    """

    refinements: int = 0
    eta: float = 0.0

    def __post_init__(self) -> None:
        _eta(self.eta)
        if isinstance(self.refinements, bool) or not isinstance(self.refinements, int) or self.refinements < 0:
            raise ConfigError("refinements-range", f"refinements must be a whole number of at least 0, got {self.refinements!r}.")

    def invert(
        self, denoiser: Denoiser, x_0: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw
    ) -> Trajectory:
        """See `Inversion`."""
        return Trajectory(ddim_inversion(denoiser, x_0, timesteps, schedule=schedule, refinements=self.refinements), {})

    def begin(self, found: Trajectory, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw) -> tuple[Tensor, Step]:
        """See `Inversion`."""
        return found.start, DDIM(self.eta)


@dataclass(frozen=True)
class Noised:
    """No inversion: the seed image noised anew for each variation (SDEdit, Meng et al. 2022, arXiv 2108.01073).

    Args:
        step: name of a step in `medaug.diffusion.steps.STEPS`.
        step_options: its arguments.
    """

    step: str = "ddim"
    step_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose("step", STEPS, self.step, self.step_options)  # refuses now, not hours later

    def invert(
        self, denoiser: Denoiser, x_0: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw
    ) -> Trajectory:
        """See `Inversion`."""
        return Trajectory(x_0, {})

    def begin(self, found: Trajectory, timesteps: Sequence[int], schedule: NoiseSchedule, draw: Draw) -> tuple[Tensor, Step]:
        """See `Inversion`."""
        step: Step = choose("step", STEPS, self.step, self.step_options)
        if not timesteps:
            return found.start, step
        return add_noise(found.start, draw("start"), schedule.abar(timesteps[0])), step


INVERSIONS: dict[str, type[Cycle] | type[Deterministic] | type[Noised]] = {
    "cycle": Cycle,
    "ddim": Deterministic,
    "none": Noised,
}


@dataclass(eq=False)
class InversionMemory:
    """The inversion of one batch of seed images, for the next batch, which may hold more variations of the same ones.

    It is met again only if all that decides it is the same: settings, objective, network and its weights, pixels.
    """

    _known: tuple[object, object, weakref.ref[nn.Module], object, Tensor] | None = None
    _found: Trajectory | None = None

    def recall(
        self, facts: object, objective: object, network: nn.Module, x_0: Tensor, invert: Callable[[], Trajectory]
    ) -> Trajectory:
        """What `invert` returned for the same arguments the last time, else what it returns now.

        Args:
            facts: whatever else decides, compared by ==.
            objective: compared as an object.
            network: compared as an object and by `weights_state`; it is not kept alive.
            x_0: seed images (B, C, H, W), compared pixel by pixel.
            invert: makes the trajectory.
        """
        state = weights_state(network)
        if self._known is not None and self._found is not None:
            old_facts, old_objective, old_network, old_state, old_x_0 = self._known
            same_parts = old_facts == facts and old_objective is objective and old_network() is network and old_state == state
            if same_parts and old_x_0.device == x_0.device and torch.equal(old_x_0, x_0):
                return self._found
        self._known, self._found = None, invert()
        self._known = (facts, objective, weakref.ref(network), state, x_0)
        return self._found


@torch.no_grad()
def weights_state(network: nn.Module) -> tuple[object, ...]:
    """What tells changed weights: place, version and norm of each parameter; a change through `.data` counts no version."""
    parameters = [parameter.detach() for parameter in network.parameters()]
    norms = torch.stack([parameter.float().norm() for parameter in parameters]).tolist()
    versions = [None if parameter.is_inference() else parameter._version for parameter in parameters]
    return tuple(zip((parameter.data_ptr() for parameter in parameters), versions, norms, strict=True))
