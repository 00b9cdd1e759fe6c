"""Train and test every (arm, network, seed) once; a finished cell is a file named by what went into it.

A cell's file is written in one piece, so a benchmark that was killed goes on where it stopped and never trains a cell
twice; a changed image, recipe or arm has another name and is trained anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medaug import __version__, storage
from medaug.cohort import Cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading.arms import Arm, Pair, arm_mixture, at_seed, build_training_set, prepare_arms, training_facts, training_sha256
from medaug.grading.executors import Failure, check_executor, usable_cores
from medaug.grading.images import CACHE_FOLDER, GradedImages
from medaug.grading.metrics import classification_metrics
from medaug.grading.recipe import recipe_content
from medaug.grading.rows import CellSink, Row, named, tracked
from medaug.io.pixels import held_out_pixels, shared_pixels
from medaug.networks.grading import build_network
from medaug.progress import progress as progress_bar
from medaug.training.amst import fit_amst
from medaug.training.classifier import (
    ClassifierRecipe,
    FitResult,
    fit_classifier,
    predict_logits,
    seeded,
)
from medaug.training.steps import one_thread

ROW_FORMAT = 2  # 2: channels last, which rounds otherwise
ROWS_FOLDER = "rows"
WORTH_PROCESSES = 1000  # optimiser steps in all
_PROBABILITY_DECIMALS = 6

__all__ = ["Cell", "plan_cells", "run_benchmark"]


@dataclass(frozen=True)
class Cell:
    """One training run and the name of its row."""

    arm: Arm
    network: str
    seed: int
    recipe: ClassifierRecipe
    pairs: tuple[Pair, ...]
    key: Mapping[str, Any]
    weights: Path | None = None

    @property
    def sha256(self) -> str:
        """The name of the row: sha256 of everything that decides it."""
        return storage.sha256_json(self.key)


def plan_cells(
    cohort: Cohort,
    arms: Sequence[Arm],
    networks: Sequence[str],
    seeds: Sequence[int],
    recipes: Mapping[str, ClassifierRecipe],
    weights: Mapping[str, Path] | None = None,
) -> list[Cell]:
    """All cells, arm by arm; `recipes` maps a network to the recipe that every arm of it shares, `weights` to its checkpoint.

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
    _check_splits(cohort)
    prepared = prepare_arms(arms, cohort)
    _check_heads(prepared, recipes.values(), cohort.ordinal)
    digests = {network: storage.sha256_file(path) for network, path in (weights or {}).items()}
    cells = []
    for planned in prepared:
        for seed in seeds:
            arm = at_seed(planned, cohort, seed)
            pairs = tuple(build_training_set(arm, cohort, seed))
            mixture = arm_mixture(arm, pairs)
            for network in networks:
                recipe = replace(recipes[network], policy=arm.policy)
                if mixture is not None:
                    mixture.batch_counts(recipe.batch_size)  # a batch too small for its shares shows before the first hour
                key = _cell_key(cohort, arm, pairs, network, seed, recipe)
                key |= {"weights": digests[network]} if network in digests else {}
                cells.append(Cell(arm, network, seed, recipe, pairs, key, (weights or {}).get(network)))
    return cells


def _check_splits(cohort: Cohort) -> None:
    """Refuse a cohort whose training images are test or validation images under another name, whatever its groups say.

    Raises:
        LeakageError: `pixels-held-out`.
    """
    shared = shared_pixels(cohort, [case for case in cohort.training if not case.is_synthetic], held_out_pixels(cohort))
    if shared:
        raise LeakageError(
            "pixels-held-out",
            f"{len(shared)} training image(s) have the very pixels of a validation or test image ({', '.join(shared[:5])}); "
            "make the cohort anew with medaug intake, which keeps copies in one split.",
        )


def _check_heads(arms: Sequence[Arm], recipes: Iterable[ClassifierRecipe], ordinal: bool) -> None:
    """AMST trains heads of its own; ordered heads need ordered classes.

    Raises:
        ConfigError: `head-amst`, `head-nominal`.
    """
    recipes = list(recipes)
    trained = [arm.name for arm in arms if arm.amst is not None]
    if trained and any(recipe.head != "linear" for recipe in recipes):
        raise ConfigError(
            "head-amst", f"Arm {', '.join(trained)} trains by AMST, whose heads are linear; leave out the arm or the other head."
        )
    if not ordinal and any(recipe.head == "coral" for recipe in recipes):
        raise ConfigError(
            "head-nominal",
            "The head coral learns thresholds between ordered classes, and these are not ordered; use --head linear.",
        )


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
    weights: Mapping[str, Path] | None = None,
    executor: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    progress: bool = False,
    on_plan: Callable[[Sequence[Cell], int], None] = lambda cells, missing: None,
    on_row: Callable[[Row], None] | None = None,
    on_failed: Callable[[Row], None] = lambda row: None,
    tracking: CellSink | None = None,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Fill ``out/rows`` with one file per cell and return all rows, finished earlier or now, in the order of the cells.

    The rows do not depend on the executor, the number of workers or the order in which cells were finished.

    Every arm meets the same initial weights per (network, seed), the same validation and test images, real ones only, and
    the same number of optimiser steps; arms that train by AMST bring their control with them (`with_view_controls`). The best
    weights on validation are tested once.

    Args:
        recipes: network -> recipe; the arm sets its policy.
        weights: network -> file that all its weights but the head's come from.
        executor, ray_address: see `medaug.grading.executors`.
        workers: training runs side by side; None takes all cores for a comparison that is worth it, see `chosen_workers`.
        progress: show a bar on stderr with the time left, counted in optimiser steps.
        on_plan: called before the first cell with all cells and the number of those without a row.
        on_row: called with every row as soon as it is there.
        on_failed: called with arm, network, seed, code and reason of a cell that has no row because its network or recipe
            failed; the others go on, and another run tries it again.

    Raises:
        see `plan_cells`; StorageError: the folder is in use, the disk is full.
    """
    execute = check_executor(executor, workers, ray_address)
    cells = plan_cells(cohort, arms, networks, seeds, recipes, weights)
    with storage.locked(out):
        rows = [_finished_row(out, cell) for cell in cells]
        on_plan(cells, rows.count(None))
        done = sum(cell.recipe.num_steps for cell, row in zip(cells, rows, strict=True) if row)
        total = sum(cell.recipe.num_steps for cell in cells)
        bar = progress_bar("grading (steps)", total, done) if progress else nullcontext(lambda steps: None)
        with bar as advance:
            for row in filter(None, rows):
                _tell(row, on_row, tracking)
            missing = [number for number, row in enumerate(rows) if row is None]
            task = _Cells(cells, cohort, out / CACHE_FOLDER, device)
            steps = total - done
            options = {
                "workers": workers or chosen_workers(steps, device),
                "ray_address": ray_address,
                "advance": lambda number, steps: advance(steps),
            }
            with closing(execute(task, missing, **options)) as outcomes:  # type: ignore[type-var]
                for number, outcome in outcomes:
                    if isinstance(outcome, Failure):
                        on_failed(_failed_row(cells[number], outcome))
                        continue
                    storage.write_json(out / ROWS_FOLDER / f"{cells[number].sha256}.json", outcome)
                    rows[number] = row = named(outcome, cells[number].arm)
                    _tell(row, on_row, tracking)
    return [row for row in rows if row is not None]


def chosen_workers(steps: int, device: str | torch.device = "cpu") -> int:
    """Every usable core for many optimiser steps; one worker for few, since a process takes longer to start, and for one GPU."""
    return len(usable_cores()) if steps >= WORTH_PROCESSES and torch.device(device).type == "cpu" else 1


def _tell(row: Row, on_row: Callable[[Row], None] | None, tracking: CellSink | None) -> None:
    if tracking is not None:
        tracking.log_child(f"{row['arm']} {row['network']} seed {row['seed']}", row["sha256"], **tracked(row))
    if on_row is not None:
        on_row(row)


def _failed_row(cell: Cell, failure: Failure) -> Row:
    return {"arm": cell.arm.name, "network": cell.network, "seed": cell.seed, "code": failure.code, "reason": failure.reason}


def _finished_row(out: Path, cell: Cell) -> Row | None:
    path = out / ROWS_FOLDER / f"{cell.sha256}.json"
    if not path.is_file():
        return None
    row = storage.read_json(path)
    if not isinstance(row, dict) or row.get("sha256") != cell.sha256:
        raise DataError("row-malformed", f"{path.name} is not the row its name says; delete it and run the same command again.")
    return named(row, cell.arm)


@dataclass(frozen=True)
class _Cells:
    """The task of an executor: compute the row of one cell. What it has decoded it keeps for the next, and never sends."""

    cells: Sequence[Cell]
    cohort: Cohort
    cache: Path
    device: str | torch.device
    images: list[GradedImages] = field(default_factory=list, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": []}

    def __call__(self, number: int, advance: Callable[[int], None]) -> Row:
        if not self.images:
            self.images.append(GradedImages(self.cohort, self.cache))
        with one_thread():  # so that rows do not depend on the cores; cells side by side use those better than threads do
            return _run_cell(self.cells[number], self.images[0], self.device, advance)


def _run_cell(cell: Cell, images: GradedImages, device: str | torch.device, advance: Callable[[int], None]) -> Row:
    cohort, key = images.cohort, ("grading", cell.network, cell.seed)
    with seeded(*key, "init"):
        network = build_network(
            cell.network,
            len(cohort.classes),
            cohort.channels,
            cohort.image_size,
            head=cell.recipe.head,
            pretrained=cell.weights,
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the same network, up to twice as fast on a CPU
    reached = 0

    def report(entry: Mapping[str, Any]) -> None:
        nonlocal reached
        advance(entry["step"] - reached)
        reached = entry["step"]

    fitted, facts = _train(cell, network, images, key, device, report)
    row: Row = {"sha256": cell.sha256, "arm": cell.arm.base, "network": cell.network, "seed": cell.seed}
    row |= training_facts(cell.arm, cell.pairs, len(cohort.classes)) | {"num_steps": cell.recipe.num_steps}
    row |= facts
    row |= {"best_step": fitted.best_step, "history": fitted.history, "key": dict(cell.key)}
    for split in ("test", "validation"):
        held_out = images.split(split)
        row[split] = None if held_out is None else _score(cohort, split, predict_logits(network, held_out, device=device))
    return row


def _train(
    cell: Cell,
    network: torch.nn.Module,
    images: GradedImages,
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
