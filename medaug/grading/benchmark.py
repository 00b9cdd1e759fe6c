"""Train and test every (arm, network, seed) once; a finished cell is a file named by what went into it.

A cell's file is written in one piece, so a benchmark that was killed goes on where it stopped and never trains a cell
twice; a changed image, recipe or arm has another name and is trained anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from medaug import __version__, storage
from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError, DataError
from medaug.grading.arms import Arm, Pair, arm_mixture, build_training_set, prepare_arms, training_facts, training_sha256
from medaug.grading.recipe import recipe_content
from medaug.grading.statistics import classification_metrics
from medaug.grading.verdict import Predictions, primary_metric
from medaug.networks.grading import build_network
from medaug.progress import progress as progress_bar
from medaug.training.amst import fit_amst
from medaug.training.classifier import (
    ClassifierRecipe,
    FitResult,
    LabelledImages,
    fit_classifier,
    predict_logits,
    seeded,
)
from medaug.training.data import CaseImages

ROW_FORMAT = 1
ROWS_FOLDER = "rows"
_PROBABILITY_DECIMALS = 6

Row = dict[str, Any]

__all__ = ["Cell", "Row", "plan_cells", "predictions_of", "run_benchmark", "summary_of"]


class MetricSink(Protocol):
    """Where figures go while the benchmark runs: a run of `medaug.tracking`."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record scalars."""


@dataclass(frozen=True)
class Cell:
    """One training run and the name of its row."""

    arm: Arm
    network: str
    seed: int
    recipe: ClassifierRecipe
    pairs: tuple[Pair, ...]
    key: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The name of the row: sha256 of everything that decides it."""
        return storage.sha256_json(self.key)


def plan_cells(
    cohort: Cohort, arms: Sequence[Arm], networks: Sequence[str], seeds: Sequence[int], recipes: Mapping[str, ClassifierRecipe]
) -> list[Cell]:
    """All cells, arm by arm; `recipes` maps a network to the recipe that every arm of it shares.

    Raises:
        ConfigError: no network, no seed, repeats, or a network without a recipe.  DataError: an empty training or test split.
        LeakageError: see `medaug.grading.arms.check_arm`.
    """
    for name, values in (("network", list(networks)), ("seed", list(seeds))):
        if not values or len(set(values)) != len(values):
            raise ConfigError("cells-invalid", f"A benchmark needs at least one {name} and each only once, got {values}.")
    missing = [network for network in networks if network not in recipes]
    if missing:
        raise ConfigError("recipe-missing", f"No recipe is given for {', '.join(missing)}.")
    if not cohort.test or not cohort.training:
        raise DataError("split-empty", "A benchmark needs training and test cases; run intake with another --split.")
    prepared = prepare_arms(arms, cohort)
    cells = []
    for arm in prepared:
        for seed in seeds:
            pairs = tuple(build_training_set(arm, cohort, seed))
            mixture = arm_mixture(arm, pairs)
            for network in networks:
                recipe = replace(recipes[network], policy=arm.policy)
                if mixture is not None:
                    mixture.batch_counts(recipe.batch_size)  # a batch too small for its shares shows before the first hour
                cells.append(Cell(arm, network, seed, recipe, pairs, _cell_key(cohort, arm, pairs, network, seed, recipe)))
    return cells


def _cell_key(
    cohort: Cohort, arm: Arm, pairs: Sequence[Pair], network: str, seed: int, recipe: ClassifierRecipe
) -> dict[str, Any]:
    return {
        "format": ROW_FORMAT,
        "version": __version__,
        "cohort": cohort.content_sha256,
        "classes": list(cohort.classes),
        "ordinal": cohort.ordinal,
        "arm": arm.content(),
        "training": training_sha256(pairs),
        "network": network,
        "seed": seed,
        "recipe": recipe_content(recipe),
    }


def run_benchmark(
    cohort: Cohort,
    arms: Sequence[Arm],
    networks: Sequence[str],
    seeds: Sequence[int],
    recipes: Mapping[str, ClassifierRecipe],
    out: Path,
    *,
    progress: bool = False,
    on_row: Callable[[Row], None] | None = None,
    tracking: MetricSink | None = None,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Fill ``out/rows`` with one file per cell and return all rows, finished earlier or now, in the order of the cells.

    Every arm meets the same initial weights per (network, seed), the same validation and test images, real ones only, and
    the same number of optimiser steps; arms that train by AMST bring their control with them (`with_view_controls`). The best
    weights on validation are tested once.

    Args:
        recipes: network -> recipe; the arm sets its policy.
        progress: show a bar on stderr with the time left, counted in optimiser steps.
        on_row: called with every row as soon as it is there.

    Raises:
        see `plan_cells`; StorageError: the folder is in use, the disk is full.
    """
    cells = plan_cells(cohort, arms, networks, seeds, recipes)
    with storage.locked(out):
        finished = {cell.sha256: _finished_row(out, cell) for cell in cells}
        done = sum(cell.recipe.num_steps for cell in cells if finished[cell.sha256])
        total = sum(cell.recipe.num_steps for cell in cells)
        bar = progress_bar("grading (steps)", total, done) if progress else nullcontext(lambda steps: None)
        with bar as advance:
            images, rows = _Images(cohort), []
            for cell in cells:
                row = finished[cell.sha256] or _run_cell(cell, images, out, device, advance)
                rows.append(row)
                if tracking is not None:
                    tracking.log_metrics(_tracked(row), row["seed"])
                if on_row is not None:
                    on_row(row)
    return rows


def _finished_row(out: Path, cell: Cell) -> Row | None:
    path = out / ROWS_FOLDER / f"{cell.sha256}.json"
    if not path.is_file():
        return None
    row = storage.read_json(path)
    if not isinstance(row, dict) or row.get("sha256") != cell.sha256:
        raise DataError("row-malformed", f"{path.name} is not the row its name says; delete it and run the same command again.")
    return row


class _Images:
    """The images of one arm at a time, each decoded once."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self._held_out: dict[str, LabelledImages] = {}
        self._unlabelled: tuple[str, LabelledImages] | None = None
        self._pool: tuple[tuple[str, ...], dict[tuple[str, str], int], LabelledImages] | None = None

    def split(self, name: str) -> LabelledImages | None:
        cases = self.cohort.split(name)
        if cases and name not in self._held_out:
            self._held_out[name] = LabelledImages(CaseImages(self.cohort, cases))
        return self._held_out.get(name)

    def unlabelled(self, cohort: Cohort | None) -> LabelledImages | None:
        if cohort is None:
            return None
        if self._unlabelled is None or self._unlabelled[0] != cohort.content_sha256:
            self._unlabelled = cohort.content_sha256, LabelledImages(CaseImages(cohort, cohort.training))
        return self._unlabelled[1]

    def training(self, pairs: Sequence[Pair]) -> LabelledImages:
        unique = {(owner.content_sha256, case.id): (owner, case) for owner, case in pairs}
        signature = tuple(sorted(f"{sha}/{case_id}" for sha, case_id in unique))
        if self._pool is None or self._pool[0] != signature:
            self._pool = None  # free the last arm's images before this one's are read
            by_owner: dict[str, tuple[Cohort, list[Case]]] = {}
            for owner, case in unique.values():
                by_owner.setdefault(owner.content_sha256, (owner, []))[1].append(case)
            parts = [CaseImages(owner, cases) for owner, cases in by_owner.values()]
            names = [(sha, case.id) for sha, (_, cases) in by_owner.items() for case in cases]
            self._pool = signature, {name: place for place, name in enumerate(names)}, LabelledImages(ConcatDataset(parts))
        _, places, images = self._pool
        return images.select([places[owner.content_sha256, case.id] for owner, case in pairs])


def _run_cell(cell: Cell, images: _Images, out: Path, device: str | torch.device, advance: Callable[[int], None]) -> Row:
    cohort, key = images.cohort, ("grading", cell.network, cell.seed)
    with seeded(*key, "init"):
        network = build_network(cell.network, len(cohort.classes), cohort.channels, cohort.image_size)
    reached = 0

    def report(entry: Mapping[str, Any]) -> None:
        nonlocal reached
        advance(entry["step"] - reached)
        reached = entry["step"]

    fitted, facts = _train(cell, network, images, key, device, report)
    row: Row = {"sha256": cell.sha256, "arm": cell.arm.name, "network": cell.network, "seed": cell.seed}
    row |= training_facts(cell.arm, cell.pairs, len(cohort.classes)) | {"num_steps": cell.recipe.num_steps}
    row |= facts
    row |= {"best_step": fitted.best_step, "history": fitted.history, "key": dict(cell.key)}
    for split in ("test", "validation"):
        held_out = images.split(split)
        row[split] = None if held_out is None else _score(cohort, split, predict_logits(network, held_out, device=device))
    storage.write_json(out / ROWS_FOLDER / f"{cell.sha256}.json", row)
    return row


def _train(
    cell: Cell,
    network: torch.nn.Module,
    images: _Images,
    key: tuple[str | int, ...],
    device: str | torch.device,
    report: Callable[[Mapping[str, Any]], None],
) -> tuple[FitResult, Row]:
    """Train the cell's network by its arm's way of training; further facts for the row.

    Equal optimiser steps are not equal work: ``image_passes`` counts images that went forward and backward, every view of
    one, ``forward_passes`` those that went forward only; scoring on validation and test is not counted.
    """
    training, validation = images.training(cell.pairs), images.split("validation")
    synthetic = [case.is_synthetic for _, case in cell.pairs]
    if cell.arm.amst is None:
        options: dict[str, Any] = {"key": key, "synthetic": synthetic, "device": device, "on_eval": report}
        if cell.arm.views is not None:
            options["augment"] = cell.arm.views.weak
        if (mixture := arm_mixture(cell.arm, cell.pairs)) is not None:
            options["mixture"] = mixture
        fitted = fit_classifier(network, training, validation, cell.recipe, **options)
        return fitted, {"image_passes": cell.recipe.num_steps * cell.recipe.batch_size, "forward_passes": 0}
    real = synthetic.count(False)  # the real images come first
    unlabelled = images.unlabelled(cell.arm.unlabelled)
    result = fit_amst(
        network,
        training.select(range(real)),
        training.select(range(real, len(training))) if real < len(training) else None,
        validation,
        cell.recipe,
        cell.arm.amst,
        key=key,
        names=[case.id for _, case in cell.pairs[real:]],
        unlabelled=unlabelled,
        teacher=cell.arm.teacher,
        device=device,
        on_eval=report,
    )
    facts: Row = {"num_unlabelled": 0 if unlabelled is None else len(unlabelled) - result.repeated, "amst": result.report()}
    facts |= {"image_passes": result.image_passes, "forward_passes": result.forward_passes}
    if cell.arm.teacher is not None:
        facts["teacher"] = cell.arm.teacher.content()
    return result.fit, facts


def _score(cohort: Cohort, split: str, logits: Tensor) -> Row:
    """Metrics of the rounded probabilities that the row holds, so that the row explains itself."""
    probs = np.round(torch.softmax(logits.double(), 1).numpy(), _PROBABILITY_DECIMALS)
    if not np.isfinite(probs).all():
        raise ConfigError("prediction-not-finite", "A trained network answers with NaN; lower the learning rate of its recipe.")
    cases = cohort.split(split)
    metrics = classification_metrics(np.array([case.label for case in cases]), probs, ordinal=cohort.ordinal)
    return {"metrics": metrics, "ids": [case.id for case in cases], "probs": probs.tolist()}


def _tracked(row: Row) -> dict[str, float]:
    prefix = f"{row['arm']}/{row['network']}"
    metrics = row["test"]["metrics"]
    return {f"{prefix}/{name}": value for name, value in metrics.items() if isinstance(value, float) and math.isfinite(value)}


def summary_of(row: Row) -> Row:
    """A row without its per-case lists: arm, network, seed, ratio and counts, test metrics at the top, validation below."""
    kept = {name: value for name, value in row.items() if name not in ("test", "validation", "key", "history")}
    validation = None if row["validation"] is None else _scalars(row["validation"]["metrics"])
    return kept | _scalars(row["test"]["metrics"]) | {"validation": validation, "undefined": row["test"]["metrics"]["undefined"]}


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, (int, float))}


def predictions_of(cohort: Cohort, rows: Sequence[Row]) -> Predictions:
    """Collect the test probabilities of rows for the verdict.

    Raises:
        DataError: a row was scored on other test cases than the cohort's.
    """
    ids = [case.id for case in cohort.test]
    if any(row["test"]["ids"] != ids for row in rows):
        raise DataError(
            "test-cases-differ", "A row was scored on other test cases than this cohort has; grade into a new folder."
        )
    metric = primary_metric(cohort.ordinal)
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["arm"], row["network"]), []).append(row)
    probs = {
        cell: np.array([row["test"]["probs"] for row in sorted(runs, key=lambda row: row["seed"])])
        for cell, runs in cells.items()
    }
    validation: dict[tuple[str, str], float | None] = {}
    for cell, runs in cells.items():
        values = [row["validation"]["metrics"][metric] for row in runs if row["validation"] is not None]
        known = [value for value in values if value is not None]
        validation[cell] = float(np.mean(known)) if known else None
    return Predictions(np.array([case.label for case in cohort.test]), [case.group for case in cohort.test], probs, validation)
