"""The guided DDPM's way from noise to an image: reference features once, then the sampling loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from medaug.diffusion.parameterisation import Prediction
from medaug.diffusion.perturbation import bottleneck_noise
from medaug.diffusion.sampler import Denoiser, sample
from medaug.diffusion.schedule import spaced_timesteps
from medaug.diffusion.steps import STEPS
from medaug.draws import randn_batch
from medaug.errors import ConfigError
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.generation.plan import PlannedCase
from medaug.networks.guided_unet import GuidedUNet
from medaug.training.diffusion import NoiseObjective, build_objective, choose

CACHE_BYTES = 256 * 2**20


class ReferenceCache:
    """Features of reference images, each computed once and kept while they fit in `CACHE_BYTES`."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.features: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, network: GuidedUNet, ids: Sequence[str], images: Callable[[int], Tensor]) -> Tensor:
        """Features (B, C, h, w) of the references `ids`; `images(i)` reads the i-th one only if it is new."""
        found = {name: self.features[name] for name in ids if name in self.features}
        for i, name in enumerate(ids):
            if name not in found:  # one by one: a feature must not depend on which others are new, to the last bit
                found[name] = network.reference_features(images(i)[None])[0]
        for name in dict.fromkeys(ids):
            self.features[name] = found[name]
            self.features.move_to_end(name)
        size = next(iter(found.values())).numel() * 4
        while len(self.features) > max(1, self.max_bytes // size):
            self.features.popitem(last=False)
        return torch.stack([found[name] for name in ids])


@dataclass
class GuidedSampler:
    """Images from references and labels. The `inferer` of the guided DDPM bundle.

    Attributes:
        objective: parameterisation and schedule the network was trained with, or their plain settings.
        step: name of a step in `medaug.diffusion.steps.STEPS`.
        step_options: its arguments.
        num_inference_steps: visited timesteps.
        spacing, sigma_min, sigma_max: of `spaced_timesteps`.
        guidance_scale: classifier-free scale on reference and label together; 1 is off.
        bottleneck_scale: strength of the fresh Gaussian noise on the bottleneck at every step; 0 is off.
        bottleneck_mode: "relative" (to the std of the bottleneck, per image) or "absolute".
        clip: cut the predicted x_0 to [-1, 1] at every step.
        seed: with the id of an image it decides every draw.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """

    objective: NoiseObjective | Mapping[str, Any]
    step: str = "dpm_solver_pp_2m"
    step_options: Mapping[str, Any] = field(default_factory=dict)
    num_inference_steps: int = 18
    spacing: str = "linspace"
    sigma_min: float | None = None
    sigma_max: float | None = None
    guidance_scale: float = 1.0
    bottleneck_scale: float = 0.1
    bottleneck_mode: str = "relative"
    clip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.objective, Mapping):
            self.objective = build_objective(self.objective)
        bottleneck_noise(
            torch.zeros(1, 1), torch.zeros(1, 1), self.bottleneck_scale, self.bottleneck_mode
        )  # refuses now, not hours later
        schedule = self.objective.schedule
        self.timesteps = spaced_timesteps(schedule, self.num_inference_steps, self.spacing, self.sigma_max, self.sigma_min)
        self.step_function = choose("step", STEPS, self.step, self.step_options)
        self.cache = ReferenceCache()

    keeps_geometry = False  # a new image has no place in its reference's patient
    fit_groups = ()  # nothing guides it

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        names = (
            "step",
            "num_inference_steps",
            "spacing",
            "sigma_min",
            "sigma_max",
            "guidance_scale",
            "bottleneck_scale",
            "bottleneck_mode",
            "clip",
            "seed",
        )
        return {name: getattr(self, name) for name in names} | {"step_options": dict(self.step_options)}

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again."""
        return {"sampler_settings": {name: value for name, value in GuidedSampler.settings(self).items() if name != "seed"}}

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        return {
            "guidance": {"scale": self.guidance_scale},
            "noise": {"bottleneck_scale": self.bottleneck_scale, "bottleneck_mode": self.bottleneck_mode},
            "sampler": self.settings(),
        }

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], network: GuidedUNet) -> Tensor:
        """Sample one image per entry.

        Args:
            inputs: ``id`` (list of str: keys of the noise), ``label`` (B,), ``reference_id`` (list of str) and
                ``reference`` (callable i -> (C, H, W) tensor in [-1, 1], called once per new reference).
            network: in evaluation mode.

        Returns:
            x_0, shape (B, C, H, W), about [-1, 1].
        """
        weight, ids = next(network.parameters()), list(inputs["id"])
        shape = (network.in_channels, *inputs["shape"])

        def noise(t: int) -> Tensor:
            return randn_batch(shape, ids, self.seed, "step", t).to(weight.device)

        # The start of a variance-preserving process is x_T ~ N(0, I), whatever the schedule's last abar.
        x_T = randn_batch(shape, ids, self.seed, "start").to(weight.device)  # noqa: N806 - the paper's name
        denoiser = self._perturbed(self.conditional(inputs, network), ids)
        schedule = self._objective().schedule
        return sample(denoiser, x_T, self.timesteps, self.step_function, schedule=schedule, noise=noise, clip=self.clip)

    def conditional(self, inputs: Mapping[str, Any], network: GuidedUNet) -> ConditionalDenoiser:
        """The network with the conditions of a batch; arguments as for a call."""
        device, labels, features = next(network.parameters()).device, None, None
        if network.num_classes is not None:
            labels = torch.as_tensor(inputs["label"], device=device)
        if network.with_fusion:
            features = self.cache(network, list(inputs["reference_id"]), lambda i: inputs["reference"](i).to(device))
        return ConditionalDenoiser(network, self._objective(), labels, features, self.guidance_scale)

    def _perturbed(self, conditional: ConditionalDenoiser, ids: list[str]) -> Denoiser:
        def denoise(x_t: Tensor, t: int) -> Prediction:
            query = conditional.ask(x_t, t)
            h = query.encoded.h
            if self.bottleneck_scale > 0:
                draw = randn_batch(h.shape[1:], ids, self.seed, "bottleneck", t).to(h)
                h = bottleneck_noise(h, draw.repeat(conditional.passes, 1, 1, 1), self.bottleneck_scale, self.bottleneck_mode)
            return conditional.answer(query, conditional.network.decode(query.encoded, h))

        return denoise

    def _objective(self) -> NoiseObjective:
        assert isinstance(self.objective, NoiseObjective)
        return self.objective


def make_sampler(objective: NoiseObjective | Mapping[str, Any], settings: Mapping[str, Any], seed: int = 0) -> GuidedSampler:
    """A `GuidedSampler` from the plain settings of a config.

    Raises:
        ConfigError: an unknown setting.
    """
    known = {item.name for item in fields(GuidedSampler)} - {"objective", "seed"}
    check_settings(settings, known)
    return GuidedSampler(objective=objective, seed=seed, **settings)


def check_settings(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse sampler settings that are not known.

    Raises:
        ConfigError: code `setting-unknown`.
    """
    unknown = set(settings) - set(known)
    if unknown:
        raise ConfigError("setting-unknown", f"Unknown sampler setting(s) {sorted(unknown)}; known are {sorted(known)}.")
