"""Disturbed images: generated or real ones, inverted and run back under a guide that makes a classifier less sure of them.

Stage 2 of two-stage sampling (MGDM). With another label on the way back it is a translation between classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medaug.cohort import Case, Cohort, check_against
from medaug.diffusion.inversion import start_timesteps
from medaug.diffusion.two_stage import disturb
from medaug.errors import ConfigError, DataError
from medaug.generation.class_guided import ClassGuidedSampler, make_class_guided_sampler
from medaug.generation.generate import PlanBatches, read_synthetic
from medaug.generation.guides import is_finite
from medaug.generation.plan import PlannedCase, check_counts, check_seeds, plan_for, quotas, variation_plan
from medaug.networks.guided_unet import GuidedUNet
from medaug.training.data import read_case
from medaug.training.diffusion import NoiseObjective
from medaug.training.run_folder import RunRecord

GENERATED, REAL, COHORT = "generated", "real", "cohort"
OWN_SETTINGS = ("strength", "refinements")
FINE_GRID = 100  # steps; on coarser grids the bare round trip changes an image more than guidance does


@dataclass(frozen=True)
class DisturbancePlan:
    """Which images are disturbed.

    Attributes:
        plan: the images to make, one list per (target) class.
        kind: "generated" (stage 1 makes them on the way), "real" (training images) or "cohort" (a finished stage 1).
        images: id of an image to make -> the image it starts from; empty for "generated".
        fit_groups: groups behind the images of a finished stage 1.
        facts: what a lineage records of the source.
    """

    plan: list[list[PlannedCase]]
    kind: str
    images: Mapping[str, tuple[Cohort, Case]]
    fit_groups: tuple[str, ...]
    facts: Mapping[str, Any]


def disturbance_plan(
    cohort: Cohort,
    record: RunRecord,
    seed: int,
    source: str | None = GENERATED,
    target_label: str | int | None = None,
    spread: float = 0.0,
    synthetic_per_real: float | None = None,
    allocation: str | None = None,
    fixed: Mapping[str, int] | None = None,
    counts: Sequence[int] | None = None,
    seeds: Collection[str] | None = None,
) -> DisturbancePlan:
    """Choose the images to disturb.

    Args:
        cohort, record, seed: of the run.
        source: "generated" makes them by stage 1, with the noise that a run of stage 1 with this seed has; "real" takes training images; else
            the folder of a synthetic cohort, all of it unless `counts` are given.
        target_label: name or index of a class: every image of another class is translated to it.
        spread: of the sampler. Without one, equal images give equal results, so no source may be used twice.
        synthetic_per_real, allocation, fixed, counts: how many of which class, see `quotas`; of the `seeds` where they are given.
        seeds: ids of the training cases to disturb; None is all.

    Raises:
        ConfigError: a source twice (code `disturb-repeats`), an unknown class, counts that fit nothing.
        DataError: nothing to disturb (code `disturb-empty`), or fewer images than asked for (code `source-too-few`).
        LeakageError: a held-out case among `seeds`; a synthetic cohort whose generator saw a held-out group.
    """
    if source is None:
        raise ConfigError("disturb-source", "Nothing names the images to disturb: set source to generated, real or a folder.")
    if (source == REAL or seeds is not None) and allocation is None:
        allocation = "proportional"  # balancing would take images of small classes twice
    if seeds is not None and source in (GENERATED, REAL):
        seeds = seed_ids(seeds)
        check_seeds(cohort, seeds)
        _refuse_empty(seeds)
        if counts is None:
            chosen = cohort.with_cases(training=[case for case in cohort.training if case.id in seeds])
            counts = quotas(chosen, synthetic_per_real, allocation, fixed)
    amounts = (synthetic_per_real, allocation, fixed, counts)
    target = None if target_label is None else _class_index(cohort, target_label)
    if source not in (GENERATED, REAL):
        return _from_cohort(cohort, record, seed, Path(source), target, counts)
    if source == GENERATED and seeds is None:
        plan = plan_for(cohort, record, seed, *amounts)
    else:
        plan = variation_plan(cohort, record, seed, *amounts, seeds=seeds)
    if target is not None:
        plan = _translated(plan, target, record, seed)
    cases = [case for label in plan for case in label]
    _refuse_empty(cases)
    if source == GENERATED:
        return DisturbancePlan(plan, GENERATED, {}, (), {"kind": GENERATED, "target_label": target})
    if not spread and len({case.reference.id for case in cases}) < len(cases):
        raise ConfigError(
            "disturb-repeats",
            "The same image disturbed twice gives the same result: ask for at most one per training image (synthetic_per_real 1, "
            "allocation proportional), or set disturbance_settings#spread above 0.",
        )
    images = {case.id: (cohort, case.reference) for case in cases}
    return DisturbancePlan(plan, REAL, images, (), {"kind": REAL, "target_label": target})


def seed_ids(seeds: str | Collection[str]) -> set[str]:
    """Ids of a config: several, or one as a word.

    Raises:
        ConfigError: anything else (code `seeds-invalid`).
    """
    given = [seeds] if isinstance(seeds, str) else seeds
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in given):
        raise ConfigError("seeds-invalid", f"seeds takes a list of case ids, got {seeds!r}.")
    return set(given)


def _class_index(cohort: Cohort, label: str | int) -> int:
    if label in cohort.classes:
        return cohort.classes.index(str(label))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(cohort.classes):
        return label
    raise ConfigError("class-unknown", f"target_label must be one of {', '.join(cohort.classes)}, got {label!r}.")


def _refuse_empty(cases: Collection[Any]) -> None:
    if not cases:
        raise DataError(
            "disturb-empty", "There is no image to disturb; generate first, or take training images of another class."
        )


def _id(record: RunRecord, seed: int, *what: object) -> str:
    return "d" + hashlib.sha256("/".join(map(str, (record.weights_sha256, seed, *what))).encode()).hexdigest()[:15]


def _translated(plan: Sequence[Sequence[PlannedCase]], target: int, record: RunRecord, seed: int) -> list[list[PlannedCase]]:
    """The images of all other classes, made into `target`."""
    moved = [
        replace(case, id=_id(record, seed, case.id, target), label=target)
        for label, cases in enumerate(plan)
        for case in cases
        if label != target
    ]
    return [moved if label == target else [] for label in range(len(plan))]


def _from_cohort(
    cohort: Cohort, record: RunRecord, seed: int, folder: Path, target: int | None, counts: Sequence[int] | None
) -> DisturbancePlan:
    """All images of a finished stage 1, or the first of each class."""
    stage_1 = read_synthetic(folder, verify=True)
    check_against(stage_1, cohort)
    references = {case.id: case for case in cohort.training if not case.is_synthetic}
    plan: list[list[PlannedCase]] = []
    images: dict[str, tuple[Cohort, Case]] = {}
    for label, wanted in enumerate([None] * len(cohort.classes) if counts is None else check_counts(cohort, counts)):
        there = [case for case in stage_1.training if case.label == label and case.is_synthetic]
        if wanted is not None and wanted > len(there):
            raise DataError(
                "source-too-few",
                f"{folder.name} holds {len(there)} image(s) of {cohort.classes[label]}, {wanted} are wanted; generate more of them first.",
            )
        plan.append([])
        for number, case in enumerate(there[:wanted]):
            reference = references.get((case.lineage or {}).get("reference", ""))
            if reference is None:
                raise DataError(
                    "seed-unknown",
                    f"Case {case.id} of {folder.name} has no training case of this cohort as its reference; name a folder that was generated "
                    "from this cohort, or give the cohort it was generated from.",
                )
            planned = PlannedCase(_id(record, seed, case.id), label, number, reference)
            plan[-1].append(planned)
            images[planned.id] = (stage_1, case)
    if target is not None:
        before = [case for label, cases in enumerate(plan) for case in cases if label != target]
        plan = _translated(plan, target, record, seed)
        images = {case.id: images[old.id] for case, old in zip(plan[target], before, strict=True)}
    _refuse_empty(images)
    groups = tuple(sorted(set().union(*map(set, stage_1.fit_on.values()))))
    facts = {"kind": COHORT, "cohort_sha256": stage_1.content_sha256, "target_label": target}
    return DisturbancePlan(plan, COHORT, images, groups, facts)


class DisturbanceBatches(PlanBatches):
    """As `PlanBatches`, with the image and label that each starts from: ``source`` (callable i -> (C, H, W)) and ``source_label`` (B,).

    Args:
        cohort, plan, batch_size, output_dir: see `PlanBatches`.
        images: of the `DisturbancePlan`.
    """

    def __init__(
        self,
        cohort: Cohort,
        plan: Sequence[Sequence[PlannedCase]],
        batch_size: int,
        output_dir: Path | None = None,
        images: Mapping[str, tuple[Cohort, Case]] | None = None,
    ) -> None:
        self.images = images or {}
        super().__init__(cohort, plan, batch_size, output_dir)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = super().__getitem__(index)
        starts = [self.images.get(case.id, (self.cohort, case.reference)) for case in batch["cases"]]
        labels = torch.tensor([case.label for _, case in starts])
        return batch | {"source_label": labels, "source": lambda i: read_case(*starts[i])}


@dataclass(frozen=True, eq=False)
class DisturbanceSampler:
    """Inverts images and runs them back under a guide. The `inferer` of the overlay ``disturbance.yaml``.

    Attributes:
        way: denoiser, guide and grid of the inversion and of the way back; its step is DDIM with eta 0.
        plan: what is disturbed.
        first: stage 1 that makes the images on the way; asked for a plan of kind "generated" only.
        strength: share of the grid that is run, in [0, 1].
        refinements: fixed-point iterations per level of the inversion; each costs a pass of the network.

    Raises:
        ConfigError: a value out of range; a strength that leaves no step for images that are there (code `strength-empty`).
    """

    way: ClassGuidedSampler
    plan: DisturbancePlan
    first: ClassGuidedSampler
    strength: float = 1.0
    refinements: int = 0

    def __post_init__(self) -> None:
        if not is_finite(self.strength):
            raise ConfigError("strength-range", f"strength must be a number in [0, 1], got {self.strength!r}.")
        if not start_timesteps(self.way.timesteps, self.strength) and self.plan.kind != GENERATED:
            raise ConfigError(
                "strength-empty",
                f"strength {self.strength:g} leaves none of the {len(self.way.timesteps)} steps, and the images would come out as they "
                f"went in; use at least {1 / len(self.way.timesteps):.2g}.",
            )
        if isinstance(self.refinements, bool) or not isinstance(self.refinements, int) or self.refinements < 0:
            raise ConfigError("refinements-range", f"refinements must be a whole number of at least 0, got {self.refinements!r}.")

    @property
    def keeps_geometry(self) -> bool:
        """A disturbed real image lies where it lay."""
        return self.plan.kind == REAL

    @property
    def fit_groups(self) -> Collection[str]:
        """Groups that the classifiers of both stages and the generator of a finished stage 1 were trained on."""
        first = self.first.fit_groups if self.plan.kind == GENERATED else ()
        return {*self.way.fit_groups, *first, *self.plan.fit_groups}

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        found = {**self.way.settings(), "step": "ddim", "step_options": {"eta": 0.0}, "strength": self.strength}
        found |= {"refinements": self.refinements, "source": dict(self.plan.facts)}
        return found | ({"first": self.first.settings()} if self.plan.kind == GENERATED else {})

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again, but for folders: those of `ClassGuidedSampler.knobs`, and the one of a finished stage 1."""
        own = {"strength": self.strength, "refinements": self.refinements}
        source = None if self.plan.kind == COHORT else self.plan.kind
        return {
            **self.first.knobs(),
            "disturbance_settings": self.way.knobs()["guidance_settings"] | own,
            "source": source,
            "target_label": self.plan.facts["target_label"],
        }

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        start = self.plan.images.get(planned.id)
        source = dict(self.plan.facts) | ({} if start is None else {"case": start[1].id})
        return {**self.way.lineage(planned), "source": source, "sampler": self.settings()}

    def with_scale(self, scale: float) -> DisturbanceSampler:
        """The same sampler with another scale on every term of the way back."""
        return replace(self, way=self.way.with_scale(scale))

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], network: GuidedUNet) -> Tensor:
        """Disturb one image per entry.

        Args:
            inputs: as for `ClassGuidedSampler`, with ``source`` and ``source_label`` of `DisturbanceBatches`.
            network: in evaluation mode.

        Returns:
            Images (B, C, H, W), about [-1, 1].
        """
        weight, ids, objective = next(network.parameters()), list(inputs["id"]), self.way.objective
        assert isinstance(objective, NoiseObjective)
        labels, before = (torch.as_tensor(inputs[name], device=weight.device) for name in ("label", "source_label"))
        if self.plan.kind == GENERATED:
            x_0 = self.first({**inputs, "label": before}, network).clamp(-1, 1)
        else:
            x_0 = torch.stack([inputs["source"](i) for i in range(len(ids))]).to(weight)
        back = self.way.denoiser(network, labels, ids)
        return disturb(
            self.way.denoiser(network, before, ids),
            x_0,
            start_timesteps(self.way.timesteps, self.strength),
            schedule=objective.schedule,
            guide=self.way.guide(back, labels, ids),
            target=back,
            clip=self.way.clip,
            refinements=self.refinements,
        )


def make_disturbance_sampler(
    settings: Mapping[str, Any], plan: DisturbancePlan, first: ClassGuidedSampler, **parts: Any
) -> DisturbanceSampler:
    """A `DisturbanceSampler` from the plain settings of a config.

    Args:
        settings: ``strength``, ``refinements`` (None: 0 from `FINE_GRID` steps on, 1 below) and those of `make_class_guided_sampler` for the way back.
        plan, first: see `DisturbanceSampler`.
        parts: of `make_class_guided_sampler`.

    Raises:
        ConfigError: an unknown setting.
    """
    own = {name: settings[name] for name in OWN_SETTINGS if settings.get(name) is not None}
    way = make_class_guided_sampler(
        settings={name: value for name, value in settings.items() if name not in OWN_SETTINGS}, **parts
    )
    own.setdefault("refinements", 0 if len(way.timesteps) >= FINE_GRID else 1)
    return DisturbanceSampler(way, plan, first, **own)
