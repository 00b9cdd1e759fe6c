"""From noise to an image of a class: classifier guidance, classifier-free guidance, autoguidance, condition annealing, any of them together."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from medaug.diffusion.guidance import ConditionAnnealing, Extrapolation, Together
from medaug.diffusion.sampler import Denoiser, Guide, sample
from medaug.diffusion.schedule import spaced_timesteps
from medaug.diffusion.steps import STEPS, Step
from medaug.draws import randn_batch
from medaug.errors import ConfigError
from medaug.generation.class_guidance import AnnealedDenoiser
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.generation.guides import (
    GuidanceTerm,
    GuideClassifiers,
    WeakNetwork,
    build_guidance,
    check_scale,
    make_scale_schedule,
    make_terms,
    rescaled,
)
from medaug.generation.plan import PlannedCase
from medaug.networks.guided_unet import GuidedUNet
from medaug.training.diffusion import NoiseObjective, build_objective, choose

INHERITED = ("step", "step_options", "num_inference_steps", "spacing", "sigma_min", "sigma_max", "clip")


@dataclass(frozen=True, eq=False)
class ClassGuidedSampler:
    """Images of given classes under any number of guides. The `inferer` of the bundle `uncertainty_guidance`, stage 1.

    It does not change: `dataclasses.replace` makes another one and checks it.

    Attributes:
        objective: parameterisation and schedule the network was trained with, or their plain settings.
        guidance: terms whose gradients add up, see `GuidanceTerm`; plain settings will do.
        classifiers: that the terms ask.
        cfg_scale: classifier-free scale w on the class; 1 is off.
        weak: the network of autoguidance, or None.
        annealing: fields of `ConditionAnnealing`, or None.
        step, step_options: name and arguments of a step in `medaug.diffusion.steps.STEPS`.
        num_inference_steps, spacing, sigma_min, sigma_max: of `spaced_timesteps`.
        clip: cut each predicted x_0 to [-1, 1] before guidance.
        spread: each image has a guidance scale of its own, uniform in scale (1 ± spread).
        seed: with the id of an image it decides every draw.

    Raises:
        ConfigError: an unknown name or option, a value out of range, or terms without a classifier.
    """

    objective: NoiseObjective | Mapping[str, Any]
    guidance: Sequence[GuidanceTerm | Mapping[str, Any]] = ()
    classifiers: GuideClassifiers = field(default_factory=GuideClassifiers)
    cfg_scale: float = 1.0
    weak: WeakNetwork | None = None
    annealing: Mapping[str, Any] | None = None
    step: str = "ddim"
    step_options: Mapping[str, Any] = field(default_factory=dict)
    num_inference_steps: int = 250
    spacing: str = "leading"
    sigma_min: float | None = None
    sigma_max: float | None = None
    clip: bool = True
    spread: float = 0.0
    seed: int = 0
    timesteps: tuple[int, ...] = field(init=False, repr=False)
    terms: tuple[GuidanceTerm, ...] = field(init=False, repr=False)
    step_function: Step = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_scale(self.cfg_scale, "cfg_scale")
        check_scale(self.spread, "The spread of the guidance scale")
        objective = build_objective(self.objective) if isinstance(self.objective, Mapping) else self.objective
        grid = spaced_timesteps(objective.schedule, self.num_inference_steps, self.spacing, self.sigma_max, self.sigma_min)
        derived = {
            "objective": objective,
            "timesteps": tuple(grid),
            "terms": make_terms(self.guidance),
            "step_function": choose("step", STEPS, self.step, self.step_options),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the way into a frozen dataclass
        for term in self.terms:
            self.classifiers.votes(term, ["check"], self.seed)  # refuses now, not hours later
        if not 0 <= self.spread < 1:
            raise ConfigError("guidance-scale", f"The spread of the guidance scale must lie in [0, 1), got {self.spread}.")
        self._annealing()

    keeps_geometry = False  # a new image has no place in its reference's patient

    @property
    def fit_groups(self) -> Collection[str]:
        """Groups that classifiers and weak network were trained on."""
        used = self.classifiers.fit_groups if self.terms else ()
        return {*used, *(self.weak.fit_groups if self.weak is not None else ())}

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        names = (*INHERITED, "cfg_scale", "spread", "seed")
        found = {name: copy.deepcopy(getattr(self, name)) for name in names} | {"step_options": dict(self.step_options)}
        return found | {
            "guidance": [term.content() for term in self.terms],
            "classifiers": list(self.classifiers.weights_sha256) if self.terms else [],
            "autoguidance": None if self.weak is None else self.weak.content(),
            "annealing": None if self.annealing is None else dict(self.annealing),
        }

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again, but for the folders of classifiers and weak network."""
        found = {name: value for name, value in self.settings().items() if name not in ("seed", "classifiers")}
        if self.weak is not None:
            weak = {name: value for name, value in self.weak.content().items() if name != "weights_sha256"}
            found["autoguidance"] = weak | {"run_dir": None}
        return {"guidance_settings": found}

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        found = self.settings()
        guidance = {name: found[name] for name in ("cfg_scale", "autoguidance", "annealing", "classifiers")}
        return {"guidance": {"terms": found["guidance"], **guidance}, "noise": {}, "sampler": found}

    def with_scale(self, scale: float) -> ClassGuidedSampler:
        """The same sampler with another scale on every term."""
        return replace(self, guidance=rescaled(self.terms, scale))

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], network: GuidedUNet) -> Tensor:
        """Sample one image per entry.

        Args:
            inputs: ``id`` (list of str: keys of the noise), ``label`` (B,) and ``shape`` (H, W).
            network: in evaluation mode.

        Returns:
            x_0, shape (B, C, H, W), about [-1, 1].
        """
        weight, ids = next(network.parameters()), list(inputs["id"])
        labels = torch.as_tensor(inputs["label"], device=weight.device)
        shape = (network.in_channels, *inputs["shape"])

        def noise(t: int) -> Tensor:
            return randn_batch(shape, ids, self.seed, "step", t).to(weight)

        x_T = randn_batch(shape, ids, self.seed, "start").to(weight)  # noqa: N806 - the paper's name
        denoiser = self.denoiser(network, labels, ids)
        return sample(
            denoiser,
            x_T,
            self.timesteps,
            self.step_function,
            schedule=self._objective().schedule,
            noise=noise,
            guide=self.guide(denoiser, labels, ids),
            clip=self.clip,
        )

    def denoiser(self, network: GuidedUNet, labels: Tensor, ids: Sequence[str]) -> Denoiser:
        """The network with its condition, extrapolated and annealed as the settings say, without gradients of a classifier.

        Args:
            network: in evaluation mode.
            labels: (B,) classes.
            ids: keys of the annealing's noise.
        """
        objective = self._objective()
        conditional = ConditionalDenoiser(network, objective, _known(network, labels), guidance_scale=self.cfg_scale)
        strong: Denoiser = conditional
        annealing = self._annealing()
        if annealing is not None:
            width = int(network.unet.class_embedding.embedding_dim)  # type: ignore[union-attr, arg-type]
            strong = AnnealedDenoiser(conditional, annealing, lambda t: randn_batch((width,), ids, self.seed, "annealing", t))
        if self.weak is None:
            return strong
        weak = ConditionalDenoiser(self.weak.network, self.weak.objective, _known(self.weak.network, labels))
        factor = make_scale_schedule(self.weak.schedule, self.weak.schedule_options)
        return Extrapolation(strong, weak, self.weak.scale, objective.schedule, factor)

    def guide(self, denoiser: Denoiser, labels: Tensor, ids: Sequence[str]) -> Guide | None:
        """The guides of a batch as one; None for none. Arguments as for `build_guidance`."""
        schedule = self._objective().schedule
        guides = [
            build_guidance(term, self.classifiers, denoiser, schedule, labels, ids, self.seed, self.spread) for term in self.terms
        ]
        return Together(guides) if guides else None

    def _annealing(self) -> ConditionAnnealing | None:
        if self.annealing is None:
            return None
        annealing: ConditionAnnealing = choose("annealing", {"cads": ConditionAnnealing}, "cads", self.annealing)
        return annealing

    def _objective(self) -> NoiseObjective:
        assert isinstance(self.objective, NoiseObjective)
        return self.objective


def _known(network: GuidedUNet, labels: Tensor) -> Tensor | None:
    """The labels for a network that knows classes."""
    return labels if network.num_classes is not None else None


SETTINGS = tuple(
    item.name
    for item in fields(ClassGuidedSampler)
    if item.init and item.name not in ("objective", "classifiers", "weak", "seed")
)


def make_class_guided_sampler(
    objective: NoiseObjective | Mapping[str, Any],
    settings: Mapping[str, Any],
    sampler: Mapping[str, Any] | None = None,
    classifiers: GuideClassifiers | None = None,
    weak: WeakNetwork | None = None,
    seed: int = 0,
) -> ClassGuidedSampler:
    """A `ClassGuidedSampler` from the plain settings of a config.

    Args:
        objective: of the run.
        settings: fields of `ClassGuidedSampler`; None leaves the one in `sampler`, else the default. ``autoguidance`` is passed over:
            `load_weak_network` has read it.
        sampler: the sampler settings that the run was trained for: grid, step and clip serve here too.
        classifiers, weak, seed: as there.

    Raises:
        ConfigError: an unknown setting.
    """
    given = {name: value for name, value in settings.items() if value is not None and name != "autoguidance"}
    if unknown := sorted(set(given) - set(SETTINGS)):
        raise ConfigError("setting-unknown", f"Unknown guidance setting(s) {unknown}; known are {sorted(SETTINGS)}.")
    inherited = {name: (sampler or {})[name] for name in INHERITED if name in (sampler or {})}
    if "step" in given:  # another step takes other options
        inherited.pop("step_options", None)
    return ClassGuidedSampler(
        objective=objective, classifiers=classifiers or GuideClassifiers(), weak=weak, seed=seed, **(inherited | given)
    )
