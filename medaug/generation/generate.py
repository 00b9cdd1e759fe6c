"""Making the images of a plan: resumable, in bounded memory, every image with its full lineage."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from ignite.engine import Events
from torch import Tensor
from torch.utils.data import Dataset

from medaug import storage
from medaug.cohort import FILE_NAME, Case, Cohort, created_by, fit_sha256, read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError, MedaugError
from medaug.generation.plan import PlannedCase, batches, check_seeds, seed_batches
from medaug.io.raster import read_unit_png, write_unit_png
from medaug.progress import progress
from medaug.replay_record import Generation, machine, write_record
from medaug.tracking import track
from medaug.training.data import read_case
from medaug.training.run_folder import RunRecord
from medaug.transforms.prepare import restore

_log = logging.getLogger(__name__)
PLAN_FILE = "generation.json"
SATURATED = 1.05  # images lie in [-1, 1]
GEOMETRY_FACTS = (
    "original_size", "padding", "spacing_mm", "detector_spacing_mm", "orientation", "position_mm", "slice_thickness_mm",
    "slice_spacing_mm", "slice_index", "series", "lossy", "format",
)  # fmt: skip


class Sampler(Protocol):
    """What a session asks of its evaluator's inferer besides images.

    Attributes:
        keeps_geometry: an image lies where its reference lies in the patient.
        fit_groups: groups that its own guides were trained on, besides those of the generator.
    """

    @property
    def keeps_geometry(self) -> bool:
        """See above."""

    @property
    def fit_groups(self) -> Collection[str]:
        """See above."""

    def settings(self) -> dict[str, Any]:
        """All that decides its images, besides weights and cohort."""

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again; none names a file or a folder."""

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""


class PlanBatches(Dataset[dict[str, Any]]):
    """The batches of a plan, each ready for the sampler; the dataset of the bundle's inference config.

    Args:
        cohort: real cohort; references come from its training split.
        plan: one list per class, see `make_plan`.
        batch_size: images per batch.
        output_dir: synthetic cohort's folder; a batch whose images all exist there is left out.

    Raises:
        LeakageError: a reference is a validation or test case (code `reference-held-out`).
    """

    def __init__(
        self, cohort: Cohort, plan: Sequence[Sequence[PlannedCase]], batch_size: int, output_dir: Path | None = None
    ) -> None:
        self.cohort = cohort
        self.output_dir = None if output_dir is None else Path(output_dir)
        check_seeds(cohort, {case.reference.id for cases in plan for case in cases})
        self.batches = [batch for batch in self.cut(plan, batch_size) if not all(map(self.made, batch))]

    def cut(self, plan: Sequence[Sequence[PlannedCase]], batch_size: int) -> list[list[PlannedCase]]:
        """All batches of a plan; a resumed run must meet the same ones."""
        return batches(plan, batch_size)

    def made(self, case: PlannedCase) -> bool:
        """Whether the image exists."""
        return self.output_dir is not None and (self.output_dir / "images" / f"{case.id}.png").is_file()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cases = self.batches[index]
        return {
            "id": [case.id for case in cases],
            "label": torch.tensor([case.label for case in cases]),
            "reference_id": [case.reference.id for case in cases],
            "reference": lambda i: read_case(self.cohort, cases[i].reference),
            "shape": (self.cohort.image_size, self.cohort.image_size),
            "cases": cases,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


class VariationBatches(PlanBatches):
    """As `PlanBatches`, with the variations of a seed image in one batch, so that it is inverted once.

    Images that the folder's finished cohort already lists are left out before the batches are cut: a larger plan then costs
    what it adds, and a killed run still meets the same batches, since the cohort is written at its end.
    """

    def cut(self, plan: Sequence[Sequence[PlannedCase]], batch_size: int) -> list[list[PlannedCase]]:
        """See `seed_batches`."""
        done: set[str] = set()
        if self.output_dir is not None and (self.output_dir / FILE_NAME).is_file():
            with suppress(MedaugError):  # images are missing: nothing is left out; another cohort: the session refuses it
                done = {case.id for case in read_cohort(self.output_dir).training}
        left = [[case for case in cases if not (case.id in done and self.made(case))] for cases in plan]
        return seed_batches(left, batch_size)


def sample_batch(engine: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """One iteration of the evaluator: samples of one batch of the plan, with the planned cases they belong to."""
    network = engine.network.eval()
    return {"samples": engine.inferer(batch, network), "cases": batch["cases"]}


@dataclass
class GenerationSession:
    """Generates a synthetic cohort from a trained run.

    Attributes:
        cohort: the cohort the run was trained on.
        record: the run's record.
        plan: the images to make, see `make_plan`.
        evaluator: MONAI evaluator over `PlanBatches` whose inferer is a `Sampler` and whose iteration is `sample_batch`.
        output_dir: the synthetic cohort's folder.
        seed: decided references and, with an image's id, every draw.
        tracking: keyword arguments of `medaug.tracking.track`.
        notes: warnings that travel with the images, besides those of the cohort.
        bundle, overlay: names of the config it is part of; None is the bundle of the run, and no overlay.
    """

    cohort: Cohort
    record: RunRecord
    plan: Sequence[Sequence[PlannedCase]]
    evaluator: Any
    output_dir: Path
    seed: int = 0
    tracking: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    bundle: str | None = None
    overlay: str | None = None

    @property
    def sampler(self) -> Sampler:
        """The evaluator's inferer."""
        sampler: Sampler = self.evaluator.inferer
        return sampler

    @property
    def fit_groups(self) -> tuple[str, ...]:
        """Sorted groups that generator and guides were trained on."""
        return tuple(sorted({*self.record.fit_groups, *self.sampler.fit_groups}))

    def identity(self) -> dict[str, Any]:
        """What all images of a folder have in common."""
        return {
            "weights_sha256": self.record.weights_sha256,
            "cohort_sha256": self.cohort.content_sha256,  # other training cases, other references
            "seed": self.seed,
            "sampler": self.sampler.settings(),
        }

    def config_sha256(self) -> str:
        """Of the run and the `identity`, for the lineage."""
        return storage.sha256_json([self.record.config_sha256, self.identity()])

    def run(self) -> Cohort:
        """Make what is missing and write the synthetic cohort.

        Raises:
            LeakageError: the run or a guide was trained on a group that this cohort holds out.
            ConfigError: the folder holds images of another run or other settings.
            StorageError: the folder is in use or the disk is full.
        """
        check_run(self.record, self.cohort)
        check_fit_groups(self.fit_groups, self.cohort)
        folder = Path(self.output_dir)
        with storage.locked(folder):
            _claim(folder, self.identity())
            config_sha = self.config_sha256()
            with track("generation", name=f"generation {self.record.bundle} {config_sha[:8]}", **self.tracking) as run:
                run.log_params({"bundle": self.record.bundle, "weights_sha256": self.record.weights_sha256, "seed": self.seed})
                run.log_params({f"sampler.{name}": value for name, value in self.sampler.settings().items()})
                run.log_metrics(
                    {f"planned.{name}": len(cases) for name, cases in zip(self.cohort.classes, self.plan, strict=True)}, step=0
                )
                self._note(folder, config_sha)
                self._make(folder / "images")
                cohort = self._write(self.plan, folder, config_sha)
                run.log_image(sheet(cohort, self.cohort), "samples", step=0)
                return cohort

    def _note(self, folder: Path, config_sha: str) -> None:
        """Before it is made, which batch an image is made in."""
        todo = [[(case.id, case.label, case.reference.id) for case in batch] for batch in self.evaluator.data_loader.batches]
        if todo:
            device = next(self.evaluator.network.parameters()).device.type
            knobs = self.sampler.knobs() | {"seed": self.seed}
            generation = Generation(self.bundle or self.record.bundle, self.overlay, knobs)
            write_record(folder, config_sha, generation, machine(device), todo)

    def _make(self, images: Path) -> None:
        todo: PlanBatches = self.evaluator.data_loader
        total = sum(len(cases) for cases in self.plan)
        left = sum(len(batch) for batch in todo.batches)
        if not left:
            return

        warned = False

        def save(engine: Any) -> None:
            nonlocal warned
            if not warned and (share := saturation(engine.state.output["samples"])) > 0.5:
                warned = True
                _log.warning(
                    "guidance-saturated: %.0f %% of the pixels of a batch lie outside the range of images and are cut to black or "
                    "white; use a smaller guidance scale.",
                    100 * share,
                )
            save_batch(engine.state.output["samples"], engine.state.output["cases"], images)
            advance(len(engine.state.output["cases"]))

        with progress("generating", total, completed=total - left) as advance:
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, save)
            self.evaluator.run()

    def _write(self, plan: Sequence[Sequence[PlannedCase]], folder: Path, config_sha: str) -> Cohort:
        cases = tuple(self._case(planned, config_sha, folder) for label in plan for planned in label)
        kept = {case.image for case in cases}
        for path in (folder / "images").glob("*.png"):
            if f"images/{path.name}" not in kept:
                path.unlink()  # a smaller plan than last time
        cohort = Cohort(
            name=f"{self.cohort.name} synthetic {self.record.bundle}",
            modality=self.cohort.modality,
            classes=self.cohort.classes,
            ordinal=self.cohort.ordinal,
            image_size=self.cohort.image_size,
            channels=self.cohort.channels,
            intensity=self.cohort.intensity,
            created_by=created_by(f"medaug generate {self.record.bundle}", config_sha, self.seed),
            source=f"synthetic, generated from cohort {self.cohort.content_sha256[:12]}",
            training=cases,
            fit_on={fit_sha256(self.fit_groups): self.fit_groups},
            notes={**self.cohort.notes, **self.notes},
        )
        return write_cohort(cohort, folder)

    def _case(self, planned: PlannedCase, config_sha: str, folder: Path) -> Case:
        lineage = {
            "bundle": self.record.bundle,
            "weights_sha256": self.record.weights_sha256,
            "config_sha256": config_sha,
            "seed": self.seed,
            "reference": planned.reference.id,
            "intended_label": planned.label,
            **self.sampler.lineage(planned),
            "fit_on": fit_sha256(self.fit_groups),
            "image_sha256": storage.sha256_file(folder / "images" / f"{planned.id}.png"),
        }
        return Case(
            id=planned.id,
            image=f"images/{planned.id}.png",
            label=planned.label,
            group=planned.reference.group,
            patient=planned.reference.patient,
            source=self.record.weights_sha256,
            name=planned.id,
            acquisition=geometry_facts(planned.reference) if self.sampler.keeps_geometry else {},
            lineage=lineage,
        )


def geometry_facts(reference: Case) -> dict[str, Any]:
    """What is known of where a reference image lies and how it was stored; a variation of it lies in the same place."""
    return {name: value for name, value in reference.acquisition.items() if name in GEOMETRY_FACTS}


def check_run(record: RunRecord, cohort: Cohort) -> None:
    """Refuse a run that does not belong to this cohort.

    Raises:
        ConfigError: other classes, size or channels.  LeakageError: it saw a group that this cohort holds out.
    """
    if (record.classes, record.image_size, record.channels) != (cohort.classes, cohort.image_size, cohort.channels):
        raise ConfigError(
            "class-mismatch",
            f"The run was trained for classes {list(record.classes)} at {record.image_size} px, "
            f"the cohort has {list(cohort.classes)} at {cohort.image_size} px.",
        )
    check_fit_groups(record.fit_groups, cohort)


def check_fit_groups(groups: Collection[str], cohort: Cohort, what: str = "run") -> None:
    """Refuse groups that a generator or a guide may not have been trained on.

    Raises:
        LeakageError: this cohort holds one out (code `fit-on-held-out`), or does not know one (code `fit-unknown`).
    """
    held_out = (cohort.groups("validation") | cohort.groups("test")) & set(groups)
    if held_out:
        raise LeakageError(
            "fit-on-held-out",
            f"The {what} was trained on {len(held_out)} group(s) that this cohort holds out ({', '.join(sorted(held_out)[:5])}); train again on this cohort.",
        )
    unknown = set(groups) - cohort.groups("training")
    if unknown:
        raise LeakageError(
            "fit-unknown",
            f"The {what} was trained on {len(unknown)} group(s) that are not in this cohort's training split; use the cohort it was trained on.",
        )


def saturation(samples: Tensor) -> float:
    """Share of the pixels that are cut to black or white, in [0, 1]; `SATURATED` lets the rounding of a dark background pass."""
    return float((samples.abs() > SATURATED).float().mean())


def save_batch(samples: Tensor, cases: Sequence[PlannedCase], folder: Path) -> None:
    """Write each sample as ``<id>.png``; an image that exists is left as it is.

    Raises:
        DataError: a sample is not finite (code `sample-not-finite`).
    """
    for case, image in zip(cases, samples, strict=True):
        if not torch.isfinite(image).all():
            raise DataError(
                "sample-not-finite", f"Sample {case.id} holds NaN or infinite values; the weights are not usable, train again."
            )
        path = folder / f"{case.id}.png"
        if not path.is_file():
            write_unit_png(path, restore(image))


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    path = folder / PLAN_FILE
    if not path.is_file():
        if (folder / FILE_NAME).is_file():
            raise ConfigError("folder-not-empty", f"The output folder {folder.name} holds another cohort; choose a new one.")
        storage.write_json(path, dict(identity))
    elif storage.sha256_json(storage.read_json(path)) != storage.sha256_json(identity):
        if not (folder / FILE_NAME).is_file() and not any((folder / "images").glob("*.png")):
            storage.write_json(path, dict(identity))  # the settings of before were refused at the first image
            return
        raise ConfigError(
            "generation-other-config",
            f"{folder.name} holds images of another run or other sampler settings; choose a new output folder.",
        )


def read_synthetic(folder: Path, verify: bool = False) -> Cohort:
    """Read a synthetic cohort, generated or accepted; `verify` as for `read_cohort`.

    Raises:
        DataError: it holds real cases.
    """
    cohort = read_cohort(folder, verify=verify)
    if not all(case.is_synthetic for case in cohort.cases()):
        raise DataError(
            "not-synthetic", f"{Path(folder).name} holds real images; a synthetic cohort from `medaug generate` was expected."
        )
    return cohort


def sheet(synthetic: Cohort, real: Cohort, per_class: int = 12) -> np.ndarray:
    """Per class one row of references and one row of the images made from them, as a unit image."""
    by_id = {case.id: case for case in real.training}
    rows: list[list[np.ndarray]] = []
    for label in range(len(real.classes)):
        cases = [case for case in synthetic.training if case.label == label][:per_class]
        if len(cases) == per_class:
            rows.append([read_unit_png(real.path(by_id[(case.lineage or {})["reference"]])) for case in cases])
            rows.append([read_unit_png(synthetic.path(case)) for case in cases])
    return tile(rows) if rows else np.zeros((real.image_size, real.image_size), np.float32)


def tile(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of equal images as one image."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
