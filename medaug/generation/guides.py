"""Guides from plain settings: which measure of which classifiers drives the samples, how strongly, and at which noise levels."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medaug.cohort import Cohort
from medaug.diffusion.guidance import SCALE_SCHEDULES, GradientGuidance, ScaleSchedule
from medaug.diffusion.sampler import Denoiser
from medaug.diffusion.schedule import NoiseSchedule
from medaug.diffusion.uncertainty import ClassMeasure, EnsembleVotes, Measure, OnPredictedX0, Votes, make_measure
from medaug.draws import numpy_generator
from medaug.errors import ConfigError
from medaug.generation.class_guidance import dropout_votes
from medaug.generation.generate import check_fit_groups, check_run
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.time_classifier import TimeClassifier
from medaug.training.diffusion import NoiseObjective, build_objective, choose
from medaug.training.run_folder import load_network, read_run
from medaug.training.time_classifier import load_time_classifier

PLACES = ("x_t", "x0hat")


def is_finite(value: Any) -> bool:
    """Whether a setting is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_scale(value: Any, what: str) -> None:
    """Refuse a scale that is not a finite number.

    Raises:
        ConfigError: code `guidance-scale`.
    """
    if not is_finite(value):
        raise ConfigError("guidance-scale", f"{what} must be a finite number, got {value!r}.")


def make_scale_schedule(name: str, options: Mapping[str, Any] | None = None) -> ScaleSchedule:
    """The entry `name` of `SCALE_SCHEDULES`; ``inside`` of an interval is a name too.

    Raises:
        ConfigError: an unknown name or option.
    """
    given = dict(options or {})
    if "inside" in given:
        given["inside"] = make_scale_schedule(given["inside"])
    schedule: ScaleSchedule = choose("scale-schedule", SCALE_SCHEDULES, name, given)
    return schedule


@dataclass(frozen=True)
class GuidanceTerm:
    """One guidance by gradient, as a config says it.

    Attributes:
        measure: a name of `MEASURES`: classifier, entropy, margin, least_confidence, entropy_class, bald.
        scale: s; 0 is off, below 0 drives the measure down.
        schedule: factor on s over t, a name of `SCALE_SCHEDULES`: constant, sqrt_abar, interval.
        schedule_options: of an interval: ``t_high``, ``t_low`` and ``inside``, the name of the schedule within.
        on: "x_t", the noisy image, or "x0hat", the predicted clean one, with the classifier asked at t = 0 and the gradient taken through
            the network.
        measure_options: ``class_weight`` of entropy_class.
        votes: drop-out votes of bald with a single classifier.

    Raises:
        ConfigError: an unknown name or option, or a scale that is not finite.
    """

    measure: str = "entropy"
    scale: float = 5.0
    schedule: str = "constant"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    on: str = "x_t"
    measure_options: Mapping[str, Any] = field(default_factory=dict)
    votes: int = 8

    def __post_init__(self) -> None:
        make_measure(self.measure, **self.measure_options)
        make_scale_schedule(self.schedule, self.schedule_options)
        if self.on not in PLACES:
            raise ConfigError("guidance-place", f"Guidance acts on one of {', '.join(PLACES)}, got {self.on!r}.")
        check_scale(self.scale, "The scale of a guidance")
        for name, value in self.measure_options.items():
            check_scale(value, f"{name} of {self.measure}")

    def content(self) -> dict[str, Any]:
        """What a lineage records; options that say nothing are left out."""
        found = {"measure": self.measure, "scale": self.scale, "schedule": self.schedule, "on": self.on}
        found |= {name: dict(value) for name in ("schedule_options", "measure_options") if (value := getattr(self, name))}
        return found | ({"votes": self.votes} if self.measure == "bald" else {})


def make_terms(settings: Sequence[GuidanceTerm | Mapping[str, Any]] | None) -> tuple[GuidanceTerm, ...]:
    """Terms from a list of plain settings.

    Raises:
        ConfigError: not a list of mappings, an unknown setting, or see `GuidanceTerm`.
    """
    terms = settings or ()
    known = {item.name for item in fields(GuidanceTerm)}
    if not isinstance(terms, list | tuple) or not all(isinstance(term, GuidanceTerm | Mapping) for term in terms):
        raise ConfigError(
            "setting-unknown", f"guidance takes a list of mappings such as {{measure: entropy, scale: 5}}, got {terms!r}."
        )
    made = []
    for term in terms:
        if isinstance(term, Mapping):
            term = {"on" if key is True else key: value for key, value in term.items()}  # YAML 1.1 reads the key `on` as true
            if unknown := sorted(set(map(str, term)) - known):
                raise ConfigError("setting-unknown", f"Unknown guidance setting(s) {unknown}; known are {sorted(known)}.")
            term = GuidanceTerm(**copy.deepcopy(dict(term)))
        made.append(term)
    return tuple(made)


@dataclass(frozen=True, eq=False)
class GuideClassifiers:
    """Classifiers of noisy images, all trained on one cohort; several are an ensemble whose mean is asked.

    Attributes:
        networks: in evaluation mode, without gradients.
        weights_sha256: of each.
        fit_groups: sorted groups that they were trained on.
    """

    networks: tuple[TimeClassifier, ...] = ()
    weights_sha256: tuple[str, ...] = ()
    fit_groups: tuple[str, ...] = ()

    def votes(self, term: GuidanceTerm, ids: Sequence[str], seed: int) -> Votes:
        """What the measure of a term is taken of.

        Raises:
            ConfigError: no classifier (code `guidance-classifier`), or drop-out votes of one without drop-out.
        """
        if not self.networks:
            raise ConfigError(
                "guidance-classifier",
                f"Guidance by {term.measure} needs a classifier of noisy images; train one, see classifier.yaml.",
            )
        if term.measure == "bald" and len(self.networks) == 1:
            return dropout_votes(self.networks[0], ids, seed, term.votes)
        return EnsembleVotes(self.networks, self.networks[0].num_classes)


def load_classifiers(
    folders: Sequence[str], cohort: Cohort, diffusion: Mapping[str, Any], device: torch.device | str, terms: Any = True
) -> GuideClassifiers:
    """The classifiers of finished runs, for guiding images of this cohort.

    Args:
        folders: of the runs.
        cohort: whose images are made.
        diffusion: settings of the generator: the classifiers must know its noise levels.
        device: where they shall be.
        terms: what they are needed for; empty loads none.

    Raises:
        ConfigError: other classes, size, channels or noise schedule; one twice.  DataError: no finished run.
        LeakageError: one saw a group that this cohort holds out, or does not know.
    """
    if not terms:
        return GuideClassifiers()
    table = build_objective(diffusion).schedule.alphas_cumprod
    networks, shas = [], []
    groups: set[str] = set()
    for folder in [folders] if isinstance(folders, str) else folders:
        record = read_run(Path(folder))
        network = load_time_classifier(Path(folder), record, cohort)
        check_fit_groups(record.fit_groups, cohort, "classifier")
        if not torch.equal(build_objective(record.settings["diffusion"]).schedule.alphas_cumprod, table):
            raise ConfigError(
                "classifier-schedule",
                f"The classifier in {Path(folder).name} was trained on other noise levels than the generator; train it with the "
                "generator's diffusion_settings.",
            )
        if record.weights_sha256 in shas:
            raise ConfigError(
                "classifier-twice",
                f"The classifier in {Path(folder).name} is given twice, and equal ones never disagree; name each one once.",
            )
        networks.append(network.to(device))
        shas.append(record.weights_sha256)
        groups |= set(record.fit_groups)
    return GuideClassifiers(tuple(networks), tuple(shas), tuple(sorted(groups)))


@dataclass(frozen=True, eq=False)
class WeakNetwork:
    """The weaker generator of autoguidance (Karras et al. 2024, arXiv 2406.02507).

    Attributes:
        network: in evaluation mode.
        objective: that it was trained with; same noise levels as the generator's.
        scale: w; 1 is off.
        schedule, schedule_options: factor on w - 1, see `GuidanceTerm`.
        weights_sha256, fit_groups: of its run.
    """

    network: GuidedUNet
    objective: NoiseObjective
    scale: float
    schedule: str
    schedule_options: Mapping[str, Any]
    weights_sha256: str
    fit_groups: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """What a lineage records."""
        found = {"weights_sha256": self.weights_sha256, "scale": self.scale, "schedule": self.schedule}
        return found | ({"schedule_options": dict(self.schedule_options)} if self.schedule_options else {})


def load_weak_network(
    settings: Mapping[str, Any] | None, cohort: Cohort, diffusion: Mapping[str, Any], device: torch.device | str
) -> WeakNetwork | None:
    """The network that autoguidance leads away from; None for no settings.

    Args:
        settings: ``run_dir`` (a run of the same cohort, trained for less time or with fewer channels), ``scale`` (2),
            ``schedule`` and ``schedule_options``.
        cohort, diffusion, device: as for `load_classifiers`.

    Raises:
        ConfigError: an unknown setting, no ``run_dir``, a scale that is not finite, other classes, size, channels or noise schedule.
        LeakageError: see `check_run`.
    """
    if not settings:
        return None
    given: dict[str, Any] = {"scale": 2.0, "schedule": "constant", "schedule_options": {}} | dict(settings)
    folder = given.pop("run_dir", None)
    if folder is None or set(given) != {"scale", "schedule", "schedule_options"}:
        raise ConfigError(
            "setting-unknown", f"autoguidance takes run_dir, scale, schedule and schedule_options, got {sorted(settings)}."
        )
    make_scale_schedule(given["schedule"], given["schedule_options"])
    check_scale(given["scale"], "The scale of autoguidance")
    record = read_run(Path(folder))
    check_run(record, cohort)
    objective = build_objective(record.settings["diffusion"])
    if not torch.equal(objective.schedule.alphas_cumprod, build_objective(diffusion).schedule.alphas_cumprod):
        raise ConfigError(
            "autoguidance-schedule",
            f"The run {Path(folder).name} was trained on other noise levels than the generator; autoguidance needs the same.",
        )
    network = load_network(Path(folder), record, cohort.classes).to(device)
    assert isinstance(network, GuidedUNet)
    return WeakNetwork(network, objective, **given, weights_sha256=record.weights_sha256, fit_groups=record.fit_groups)


def build_guidance(
    term: GuidanceTerm,
    classifiers: GuideClassifiers,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    labels: Tensor,
    ids: Sequence[str],
    seed: int,
    spread: float = 0.0,
) -> GradientGuidance:
    """The guide of one batch.

    Args:
        term: what is driven, and how strongly.
        classifiers: that measure.
        denoiser: of the batch, unclipped; asked only with ``on: x0hat``.
        schedule: of the sampler.
        labels: (B,) intended classes, on the classifiers' device.
        ids: of the images, keys of drop-out and spread.
        seed: of the sampler.
        spread: each image has a scale of its own, uniform in s (1 ± spread).
    """
    votes = classifiers.votes(term, ids, seed)
    of = make_measure(term.measure, **term.measure_options)
    measure: Measure = ClassMeasure(of, votes, labels)
    if term.on == "x0hat":
        measure = OnPredictedX0(ClassMeasure(of, lambda x, t: votes(x, 0), labels), denoiser)
    scale: float | Tensor = term.scale
    if spread:
        factors = [numpy_generator(seed, "guidance-scale", name).uniform(1 - spread, 1 + spread) for name in ids]
        scale = term.scale * torch.tensor(factors, dtype=torch.float64)
    return GradientGuidance(measure, scale, schedule, make_scale_schedule(term.schedule, term.schedule_options))


def rescaled(terms: Sequence[GuidanceTerm], scale: float) -> tuple[GuidanceTerm, ...]:
    """The terms at another scale, the same for all."""
    return tuple(replace(term, scale=scale) for term in terms)
