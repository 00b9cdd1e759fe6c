"""Variations of training images: inverted once, run back several times with fresh noise on the network's bottleneck.

DreamDA (Fu et al. 2024, arXiv 2403.12803, section 3.2). Without inversion and without perturbation it is SDEdit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from medaug.diffusion.inversion import Trajectory, start_timesteps
from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.perturbation import NETWORK_LOCATIONS, Perturbation, PerturbedState
from medaug.diffusion.sampler import Denoiser, clip_x_0, sample
from medaug.diffusion.schedule import pairs, spaced_timesteps
from medaug.draws import randn_batch
from medaug.errors import ConfigError
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.generation.inversions import INVERSIONS, Draw, Inversion, InversionMemory
from medaug.generation.plan import PlannedCase
from medaug.networks.guided_unet import AfterBlock, Encoded, GuidedUNet
from medaug.training.diffusion import NoiseObjective, build_objective, choose

GRID = ("num_inference_steps", "spacing", "sigma_min", "sigma_max", "guidance_scale")
Watch = Callable[[int, Tensor], None]  # (t, output of the middle block)
Second = Callable[[GuidedUNet, Encoded, Callable[[AfterBlock], Encoded], AfterBlock], Tensor]

_log = logging.getLogger(__name__)


def _bottleneck(network: GuidedUNet, encoded: Encoded, again: Callable[[AfterBlock], Encoded], noisy: AfterBlock) -> Tensor:
    return network.decode(encoded, noisy(encoded.h, 0))


def _encoder(network: GuidedUNet, encoded: Encoded, again: Callable[[AfterBlock], Encoded], noisy: AfterBlock) -> Tensor:
    return network.decode(again(noisy))


def _decoder(network: GuidedUNet, encoded: Encoded, again: Callable[[AfterBlock], Encoded], noisy: AfterBlock) -> Tensor:
    return network.decode(encoded, after_block=noisy)


SECOND_PASSES: dict[str, Second] = dict(zip(NETWORK_LOCATIONS, (_bottleneck, _encoder, _decoder), strict=True))


@dataclass(frozen=True, eq=False)
class VariationSampler:
    """Variations of seed images. The `inferer` of the bundles `bottleneck_perturbation` and `sdedit`.

    It does not change: `dataclasses.replace` makes another one, checks it, and hands on the inversions made so far.

    Attributes:
        objective: parameterisation and schedule the network was trained with, or their plain settings.
        num_inference_steps: N, timesteps of the whole grid.
        spacing, sigma_min, sigma_max: of `spaced_timesteps`.
        guidance_scale: classifier-free scale on the class, of the inversion and of the way back; 1 is off.
        inversion: a name of `INVERSIONS`: "cycle", "ddim" or "none".
        inversion_options: its arguments: ``eta`` (cycle, ddim), ``refinements`` (ddim), ``step`` and ``step_options`` (none).
        strength: share of the grid that is run, in [0, 1]; 0 gives the seed image back.
        scale, mode, location, terms, cfg_noise, skip_last, window: of `Perturbation`.
        clip: cut each predicted x_0 to [-1, 1] on the way back, never in the inversion; not with "cycle", which would no longer
            lead back to the seed image.
        seed: with the id of an image it decides every draw; with the id of a seed image those of its inversion.
        memory: of the last inversion; no setting.
        timesteps: those of the grid that are run, descending.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """

    objective: NoiseObjective | Mapping[str, Any]
    num_inference_steps: int = 100
    spacing: str = "linspace"
    sigma_min: float | None = None
    sigma_max: float | None = None
    guidance_scale: float = 1.0
    inversion: str = "cycle"
    inversion_options: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 0.8
    scale: float = 0.25
    mode: str = "relative"
    location: str = "bottleneck"
    terms: str = "x0_only"
    cfg_noise: str = "shared"
    skip_last: bool = True
    window: Sequence[int] | None = None
    clip: bool = False
    seed: int = 0
    memory: InversionMemory = field(default_factory=InversionMemory, repr=False)
    timesteps: tuple[int, ...] = field(init=False, repr=False)
    inverter: Inversion = field(init=False, repr=False)

    def __post_init__(self) -> None:
        objective = build_objective(self.objective) if isinstance(self.objective, Mapping) else self.objective
        grid = spaced_timesteps(objective.schedule, self.num_inference_steps, self.spacing, self.sigma_max, self.sigma_min)
        options = copy.deepcopy(dict(self.inversion_options))
        derived = {
            "objective": objective,
            "inversion_options": options,
            "window": None if self.window is None else tuple(self.window),
            "timesteps": tuple(start_timesteps(grid, self.strength)),
            "inverter": choose("inversion", INVERSIONS, self.inversion, options),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the way into a frozen dataclass
        if not self.timesteps:
            _log.warning("strength %s of %d steps runs no step: variations are their seed images.", self.strength, len(grid))
        self._check_step(self.perturbation)

    @property
    def perturbation(self) -> Perturbation:
        """Where, when and how strongly."""
        window = None if self.window is None else (int(self.window[0]), int(self.window[-1]))
        return Perturbation(self.scale, self.mode, self.location, self.terms, self.cfg_noise, self.skip_last, window)

    def _check_step(self, perturbation: Perturbation) -> None:
        splits = self.inversion != "none" or self.inversion_options.get("step", "ddim") == "ddim"
        if not splits and perturbation.scale > 0 and self.location in NETWORK_LOCATIONS and self.terms == "x0_only":
            raise ConfigError(
                "perturbation-step",
                "Perturbing the predicted x_0 alone needs a step that has a direction term of its own: set the step to ddim, "
                "or terms to both.",
            )
        if self.clip and self.inversion == "cycle":
            raise ConfigError(
                "clip-inversion",
                "Clipping on the way back undoes the exact reconstruction of the inversion cycle: set clip to false, or inversion "
                "to ddim or none.",
            )

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        values = {name: getattr(self, name) for name in (*SETTINGS, "seed")}
        values["window"] = None if self.window is None else list(self.window)
        return values | {"inversion_options": copy.deepcopy(dict(self.inversion_options))}

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again."""
        return {"variation_settings": {name: value for name, value in self.settings().items() if name != "seed"}}

    keeps_geometry = True  # a variation lies where its seed image lies
    fit_groups = ()  # nothing guides it

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        noise = {name: getattr(self, name) for name in ("scale", "mode", "location", "terms", "cfg_noise")}
        return {
            "guidance": {"scale": self.guidance_scale},
            "noise": noise,
            "inversion": {"name": self.inversion, "strength": self.strength, **self.inversion_options},
            "variation": planned.variation,
            "sampler": self.settings(),
        }

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], network: GuidedUNet, watch: Watch | None = None) -> Tensor:
        """Sample one variation per entry; a seed image that occurs several times with one label is inverted once.

        Args:
            inputs: ``id`` (list of str: keys of the noise), ``label`` (B,), ``reference_id`` (list of str: the seed images)
                and ``reference`` (callable i -> (C, H, W) tensor in [-1, 1]).
            network: in evaluation mode.
            watch: called at every step of the way back with t and the unperturbed output of the middle block.

        Returns:
            Images (B, C, H, W), about [-1, 1].
        """
        objective = self.objective
        assert isinstance(objective, NoiseObjective)
        schedule, weight, ids = objective.schedule, next(network.parameters()), list(inputs["id"])
        labels = torch.as_tensor(inputs["label"], device=weight.device) if network.num_classes is not None else None
        found = self._invert(inputs, network, labels)
        draw = self._draw(found.start, ids)
        x, step = self.inverter.begin(found, self.timesteps, schedule, draw)
        perturbation = self.perturbation
        on = perturbation.scale > 0
        if on and self.location == "xT":
            x = perturbation.add(x, draw("perturbation-xT"))
        if on and self.location == "xt":
            step = PerturbedState(step, perturbation, lambda t: draw("perturbation-xt", t))
        if self.timesteps:
            conditional = ConditionalDenoiser(network, objective, labels, guidance_scale=self.guidance_scale)
            reverse = self._denoiser(conditional, ids, perturbation, watch)
            x = sample(reverse, x, self.timesteps, step, schedule=schedule, noise=lambda t: draw("step", t))
        return perturbation.add(x, draw("perturbation-x0")) if on and self.location == "x0" else x

    def _draw(self, like: Tensor, keys: list[str]) -> Draw:
        shape = like.shape[1:]
        return lambda *what: randn_batch(shape, keys, self.seed, *what).to(like)

    def _invert(self, inputs: Mapping[str, Any], network: GuidedUNet, labels: Tensor | None) -> Trajectory:
        """One trajectory per entry; each pair of seed image and label is inverted once, or was for the batch before."""
        names = list(inputs["reference_id"])
        wanted = list(zip(names, [None] * len(names) if labels is None else labels.tolist(), strict=True))
        unique = list(dict.fromkeys(wanted))
        entries = [wanted.index(pair) for pair in unique]
        weight, objective = next(network.parameters()), self.objective
        assert isinstance(objective, NoiseObjective)
        x_0 = torch.stack([inputs["reference"](i) for i in entries]).to(weight)

        def invert() -> Trajectory:
            chosen = None if labels is None else labels[entries]
            plain = ConditionalDenoiser(network, objective, chosen, guidance_scale=self.guidance_scale)
            draw = self._draw(x_0, [name for name, _ in unique])
            return self.inverter.invert(plain, x_0, self.timesteps, objective.schedule, draw)

        facts = (unique, self.inverter, self.timesteps, self.guidance_scale, self.seed)
        found = self.memory.recall(facts, objective, network, x_0, invert)
        return found.select(torch.tensor([unique.index(pair) for pair in wanted], device=weight.device))

    def _denoiser(
        self, conditional: ConditionalDenoiser, ids: list[str], perturbation: Perturbation, watch: Watch | None = None
    ) -> Denoiser:
        """Plain estimates, and where the step is perturbed inside the network, those of a second decoding combined with them."""
        schedule, following = conditional.objective.schedule, dict(pairs(self.timesteps))
        second = SECOND_PASSES.get(perturbation.location)

        def clipped(prediction: Prediction, t: int) -> Prediction:
            return clip_x_0(prediction, schedule.abar(t)) if self.clip else prediction

        def denoise(x_t: Tensor, t: int) -> Prediction:
            query = conditional.ask(x_t, t)
            if watch is not None:
                watch(t, query.encoded.h)
            plain = clipped(conditional.answer(query, conditional.network.decode(query.encoded)), t)
            if second is None or not perturbation.acts(t, following[t]):
                return plain
            noisy = self._noisy(perturbation, ids, t, conditional.passes)
            output = second(conditional.network, query.encoded, lambda after: conditional.ask(x_t, t, after).encoded, noisy)
            return perturbation.combine(plain, clipped(conditional.answer(query, output), t))

        return denoise

    def _noisy(self, perturbation: Perturbation, ids: list[str], t: int, passes: int) -> AfterBlock:
        """Adds noise keyed by image, step and block; shared noise has the scale of the pass with the conditions in both."""
        independent = perturbation.cfg_noise == "independent"

        def add(h: Tensor, block: int) -> Tensor:
            draw = randn_batch(h.shape[1:], ids, self.seed, "perturbation", t, block).to(h)
            if passes == 1:
                return perturbation.add(h, draw)
            if independent:
                other = randn_batch(h.shape[1:], ids, self.seed, "perturbation-null", t, block).to(h)
                return perturbation.add(h, torch.cat([draw, other]))
            noise = perturbation.sigma(h[: len(ids)]) * draw
            return h + noise.repeat(2, *[1] * (h.ndim - 1))

        return add


SETTINGS = tuple(item.name for item in fields(VariationSampler) if item.init and item.name not in ("objective", "seed", "memory"))


def make_variation_sampler(
    objective: NoiseObjective | Mapping[str, Any],
    settings: Mapping[str, Any],
    sampler: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> VariationSampler:
    """A `VariationSampler` from the plain settings of a config.

    Args:
        objective: of the run.
        settings: fields of `VariationSampler`; None leaves the one in `sampler`, else the default.
        sampler: the sampler settings that the run was trained for: its grid and its guidance serve here too.
        seed: of every draw.

    Raises:
        ConfigError: an unknown setting.
    """
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise ConfigError("setting-unknown", f"Unknown variation setting(s) {sorted(unknown)}; known are {sorted(SETTINGS)}.")
    inherited = {name: (sampler or {})[name] for name in GRID if name in (sampler or {})}
    given = {name: value for name, value in settings.items() if value is not None}
    return VariationSampler(objective=objective, seed=seed, **(inherited | given))
