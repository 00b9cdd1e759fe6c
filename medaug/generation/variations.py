"""Variations of training images: inverted once, run back several times with fresh noise on the network's bottleneck.

DreamDA (Fu et al. 2024, arXiv 2403.12803, section 3.2). Without inversion and without perturbation it is SDEdit.
"""

from __future__ import annotations

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
from medaug.generation.inversions import INVERSIONS, Draw, Inversion
from medaug.generation.plan import PlannedCase
from medaug.networks.guided_unet import AfterBlock, Encoded, GuidedUNet
from medaug.training.diffusion import NoiseObjective, build_objective, choose

GRID = ("num_inference_steps", "spacing", "sigma_min", "sigma_max", "guidance_scale")
Second = Callable[[GuidedUNet, Encoded, Callable[[AfterBlock], Encoded], AfterBlock], Tensor]

_log = logging.getLogger(__name__)


def _bottleneck(network: GuidedUNet, encoded: Encoded, again: Callable[[AfterBlock], Encoded], noisy: AfterBlock) -> Tensor:
    return network.decode(encoded, noisy(encoded.h, 0))


def _encoder(network: GuidedUNet, encoded: Encoded, again: Callable[[AfterBlock], Encoded], noisy: AfterBlock) -> Tensor:
    return network.decode(again(noisy))


def _decoder(network: GuidedUNet, encoded: Encoded, again: Callable[[AfterBlock], Encoded], noisy: AfterBlock) -> Tensor:
    return network.decode(encoded, after_block=noisy)


SECOND_PASSES: dict[str, Second] = dict(zip(NETWORK_LOCATIONS, (_bottleneck, _encoder, _decoder), strict=True))


@dataclass
class VariationSampler:
    """Variations of seed images. The `inferer` of the bundles `bottleneck_perturbation` and `sdedit`.

    Attributes:
        objective: parameterisation and schedule the network was trained with, or their plain settings.
        num_inference_steps: N, timesteps of the whole grid.
        spacing, sigma_min, sigma_max: of `spaced_timesteps`.
        guidance_scale: classifier-free scale on the class, of the inversion and of the way back; 1 is off.
        inversion: a name of `INVERSIONS`: "cycle", "ddim" or "none".
        inversion_options: its arguments: ``eta`` (cycle, ddim), ``refinements`` (ddim), ``step`` and ``step_options`` (none).
        strength: share of the grid that is run, in [0, 1]; 0 gives the seed image back.
        scale, mode, location, terms, cfg_noise, skip_last, window: of `Perturbation`.
        clip: cut each predicted x_0 to [-1, 1] on the way back, never in the inversion.
        seed: with the id of an image it decides every draw; with the id of a seed image those of its inversion.

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

    def __post_init__(self) -> None:
        if isinstance(self.objective, Mapping):
            self.objective = build_objective(self.objective)
        grid = spaced_timesteps(self.objective.schedule, self.num_inference_steps, self.spacing, self.sigma_max, self.sigma_min)
        self.timesteps = start_timesteps(grid, self.strength)
        if not self.timesteps:
            _log.warning("strength %s of %d steps runs no step: variations are their seed images.", self.strength, len(grid))
        self.inverter: Inversion = choose("inversion", INVERSIONS, self.inversion, self.inversion_options)
        self.watch: Callable[[int, Tensor], None] | None = None  # (t, output of the middle block), for a calibration
        self._kept: tuple[object, Trajectory] | None = None
        self._check_step(self.perturbation)

    @property
    def perturbation(self) -> Perturbation:
        """Where, when and how strongly; follows `scale` when a calibration sets it."""
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

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "objective"}
        values["window"] = None if self.window is None else list(self.window)
        return values | {"inversion_options": dict(self.inversion_options)}

    keeps_geometry = True  # a variation lies where its seed image lies

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
    def __call__(self, inputs: Mapping[str, Any], network: GuidedUNet) -> Tensor:
        """Sample one variation per entry; seed images that occur several times are inverted once.

        Args:
            inputs: ``id`` (list of str: keys of the noise), ``label`` (B,), ``reference_id`` (list of str: the seed images)
                and ``reference`` (callable i -> (C, H, W) tensor in [-1, 1]). Entries of one seed image have its label.
            network: in evaluation mode.

        Returns:
            Images (B, C, H, W), about [-1, 1].
        """
        objective = self.objective
        assert isinstance(objective, NoiseObjective)
        schedule, weight = objective.schedule, next(network.parameters())
        ids, seeds = list(inputs["id"]), list(dict.fromkeys(inputs["reference_id"]))
        entries = [list(inputs["reference_id"]).index(name) for name in seeds]
        of_seed = torch.tensor([seeds.index(name) for name in inputs["reference_id"]])
        labels = torch.as_tensor(inputs["label"], device=weight.device) if network.num_classes is not None else None

        def denoiser(labels: Tensor | None) -> ConditionalDenoiser:
            return ConditionalDenoiser(network, objective, labels, guidance_scale=self.guidance_scale)

        def invert() -> Trajectory:
            x_0 = torch.stack([inputs["reference"](i) for i in entries]).to(weight)
            plain = denoiser(None if labels is None else labels[entries])
            return self.inverter.invert(plain, x_0, self.timesteps, schedule, self._draw(x_0, seeds))

        key = (id(network), tuple(seeds), None if labels is None else tuple(labels[entries].tolist()))
        found = self._once(key, invert).select(of_seed.to(weight.device))
        draw = self._draw(found.start, ids)
        x, step = self.inverter.begin(found, self.timesteps, schedule, draw)
        perturbation = self.perturbation
        on = perturbation.scale > 0
        if on and self.location == "xT":
            x = perturbation.add(x, draw("perturbation-xT"))
        if on and self.location == "xt":
            step = PerturbedState(step, perturbation, lambda t: draw("perturbation-xt", t))
        if self.timesteps:
            reverse = self._denoiser(denoiser(labels), ids, perturbation)
            x = sample(reverse, x, self.timesteps, step, schedule=schedule, noise=lambda t: draw("step", t))
        return perturbation.add(x, draw("perturbation-x0")) if on and self.location == "x0" else x

    def _draw(self, like: Tensor, keys: list[str]) -> Draw:
        shape = like.shape[1:]
        return lambda *what: randn_batch(shape, keys, self.seed, *what).to(like)

    def _once(self, key: object, invert: Callable[[], Trajectory]) -> Trajectory:
        """The inversion of these seed images: kept for the next batch, which may hold more variations of the same ones."""
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, invert())
        return self._kept[1]

    def _denoiser(self, conditional: ConditionalDenoiser, ids: list[str], perturbation: Perturbation) -> Denoiser:
        """Plain estimates, and where the step is perturbed inside the network, those of a second decoding combined with them."""
        schedule, following = conditional.objective.schedule, dict(pairs(self.timesteps))
        second = SECOND_PASSES.get(perturbation.location)

        def clipped(prediction: Prediction, t: int) -> Prediction:
            return clip_x_0(prediction, schedule.abar(t)) if self.clip else prediction

        def denoise(x_t: Tensor, t: int) -> Prediction:
            query = conditional.ask(x_t, t)
            if self.watch is not None:
                self.watch(t, query.encoded.h)
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
    known = {item.name for item in fields(VariationSampler)} - {"objective", "seed"}
    unknown = set(settings) - known
    if unknown:
        raise ConfigError("setting-unknown", f"Unknown variation setting(s) {sorted(unknown)}; known are {sorted(known)}.")
    inherited = {name: (sampler or {})[name] for name in GRID if name in (sampler or {})}
    given = {name: value for name, value in settings.items() if value is not None}
    return VariationSampler(objective=objective, seed=seed, **(inherited | given))
