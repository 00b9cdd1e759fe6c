"""The grading stage as one call: cohort, arms and networks in; rows, tables, report and verdict out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medaug import storage
from medaug.cohort import FILE_NAME, Cohort, read_cohort
from medaug.errors import ConfigError
from medaug.grading.arm_terms import term_names
from medaug.grading.arms import Arm, parse_arm
from medaug.grading.benchmark import run_benchmark
from medaug.grading.graded_data import graded_data
from medaug.grading.image_sets import at_place, image_sets, join_sets, own_seeds
from medaug.grading.judgement import judged_rows, verdict_and_points
from medaug.grading.notes import arm_notes, data_notes, pretrained_notes, run_notes
from medaug.grading.options import ALL_NETWORKS, GradingOptions
from medaug.grading.presets import named_sources
from medaug.grading.recipe import grading_recipe
from medaug.grading.record import GradingRecord, RecordKeeper, acceptance_of
from medaug.grading.report import write_report
from medaug.grading.rows import CellSink, Row, summary_of
from medaug.grading.variants import amounts, check_choosable, opponents_of, spread_arms
from medaug.grading.verdict import BASELINE
from medaug.networks.grading import NETWORKS, build_network
from medaug.training.classifier import seeded
from medaug.training.steps import check_precision

DEFAULTS = GradingOptions()
VERDICT_NAME = "verdict.json"
COPIES_FOLDER = "copies"

__all__ = ["grade"]


def grade(
    cohort_dir: Path,
    out: Path,
    arm_specs: Sequence[str],
    options: GradingOptions = DEFAULTS,
    *,
    executor: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    device: str | torch.device = "cpu",
    num_resamples: int = 10_000,
    command: str = "",
    progress: bool = False,
    on_row: Callable[[Row], None] | None = None,
    tracking: CellSink | None = None,
) -> dict[str, Any]:
    """Compare arms on a cohort's real test split. Run again after a kill, it goes on where it stopped.

    Args:
        arm_specs: "none" (needed), "crop_rotate", "weak", "oversample" (the control), "NAME=FOLDER" of accepted images,
            "NAME=FOLDER:amst" to train on them by AMST, with its control "weak_view" added; "NAME=FOLDER + FOLDER" to mix
            several, with options; a cell of `PRESETS` such as "orig50+syn1_50"; see `parse_arm`. ``{seed}`` in a folder gives every
            seed images of its own, see `medaug.grading.image_sets`.
        options: networks, seeds, recipe and amounts, the same for every arm.
        executor, workers, ray_address: where cells are computed, see `medaug.grading.executors`; the rows do not depend on it.
        command: what the report says it was made with; no personal paths.
        tracking: a run that takes `log_child`.

    Returns:
        {"rows": [one flat summary per cell], "verdict": {arm: {...}}, "failed": [arm, network, seed, code and reason of every
        cell without a row]}; out/ holds rows/, verdict.json and the files of `write_report`.
        A network with a failed cell is left out of the verdict, and the verdict's warnings say so.

    Raises:
        ConfigError: unknown arm, network, profile; no `none` arm.  DataError: unusable cohort.  LeakageError: an arm saw
        held-out groups.  StorageError: the folder is in use or cannot be written.
    """
    out = Path(out)
    if (out / FILE_NAME).is_file():
        raise ConfigError("out-is-input", f"{out.name} holds a cohort; choose another --out for the results.")
    cohort = read_cohort(Path(cohort_dir), verify=True)
    asked, which = options.listed_networks, options.listed_seeds
    names = list(NETWORKS) if options.networks == ALL_NETWORKS else asked
    arms = _read_arms(arm_specs, options, cohort, out / COPIES_FOLDER)
    check_precision(str((options.overrides or {}).get("precision", "float32")), device)
    weights = _checked_weights(options.pretrained, names)
    recipes = {name: grading_recipe(options.profile, name, options.overrides, pretrained=name in weights) for name in names}
    unfit = _unfit_networks(names, cohort, weights, arms, which)
    fit = [name for name in names if name not in {row["network"] for row in unfit}]
    known = [*data_notes(cohort), *arm_notes(cohort, arms), *pretrained_notes(weights)]
    record = GradingRecord(
        data=graded_data(cohort),
        arms=tuple(arms),
        opponents=opponents_of(arms),
        notes=tuple(known),
        failed=tuple(unfit),
        acceptance=acceptance_of(arms, cohort),
        image_sets=image_sets(arms),
        command=command,
        profile=options.profile,
        num_resamples=num_resamples,
    )
    failed = list(unfit)
    with RecordKeeper(out, record, on_row) as keeper:
        graded = run_benchmark(
            cohort,
            arms,
            fit,
            which,
            {name: recipes[name] for name in fit},
            out,
            weights=weights,
            executor=executor,
            workers=workers,
            ray_address=ray_address,
            progress=progress,
            on_plan=keeper.planned,
            on_row=keeper.row,
            on_failed=failed.append,
            tracking=tracking,
            device=device,
        )
    if not judged_rows(failed, graded):
        raise ConfigError(
            "nothing-graded", f"No network could be graded in every arm; arm {failed[0]['arm']}: {failed[0]['reason']}"
        )
    verdict = _report(out, keeper, known, failed, graded)
    return {"rows": [summary_of(row) for row in graded], "verdict": verdict, "failed": failed}


def _read_arms(specs: Sequence[str], options: GradingOptions, cohort: Cohort, copies: Path) -> list[Arm]:
    """The arms of a comparison, each at every ratio and fraction and with the images of every seed; see `grade` and `parse_arm`.

    Raises:
        ConfigError: `baseline-missing`, and see `parse_arm` and `check_choosable`.
    """
    own = own_seeds([*specs, *options.sources], options.listed_seeds)
    given = {seed: [at_place(text, seed) for text in options.sources] for seed in own}
    cohorts = {seed: named_sources(given[seed], _asked_for(specs), cohort, copies) for seed in own}
    shared = {"allocation": options.allocation, "allow_untrusted": options.allow_untrusted, "amst": options.amst}

    def read(ratio: float | None, fraction: float) -> list[Arm]:
        chosen: dict[str, Any] = {**shared, "synthetic_per_real": ratio, "real_fraction": fraction}
        return join_sets(lambda seed: [parse_arm(at_place(spec, seed), named=cohorts[seed], **chosen) for spec in specs], own)

    ratios, fractions = amounts(options.synthetic_per_real, "--per-real"), amounts(options.real_fraction, "--real-fraction")
    arms = spread_arms(read, ratios, fractions, cohort)
    if BASELINE not in [arm.base for arm in arms]:
        raise ConfigError("baseline-missing", f"A verdict compares with the arm `{BASELINE}`; add --arm {BASELINE}.")
    check_choosable(arms, cohort)
    return arms


def _report(
    out: Path, keeper: RecordKeeper, known: Sequence[str], failed: Sequence[Row], graded: Sequence[Row]
) -> dict[str, Any]:
    """Complete the record, judge, and write verdict and report. Returns the verdict."""
    rows = judged_rows(failed, graded)
    record = keeper.finish([*known, *run_notes(out, rows, failed)], failed)
    verdict, points = verdict_and_points(record, rows)
    storage.write_json(out / VERDICT_NAME, verdict)
    write_report(out, record, rows, verdict, points=points)
    return verdict


def _checked_weights(pretrained: Mapping[str, Path] | None, names: Sequence[str]) -> dict[str, Path]:
    """Checkpoint files by network.

    Raises:
        ConfigError: `pretrained-unused`, `weights-missing`.
    """
    weights = {name: Path(path) for name, path in (pretrained or {}).items()}
    unused = sorted(weights.keys() - set(names))
    if unused:
        raise ConfigError("pretrained-unused", f"Weights are given for {', '.join(unused)}, but --networks does not name it.")
    for name, path in weights.items():
        if not path.is_file():
            raise ConfigError("weights-missing", f"The weights file {path.name} of {name} is not there; check --pretrained.")
    return weights


def _asked_for(arm_specs: Sequence[str]) -> list[str]:
    """The names of cells and sources in the texts of arms."""
    return [place for spec in arm_specs for place in term_names(spec.partition("=")[2] or spec)]


def _unfit_networks(
    names: Sequence[str], cohort: Cohort, weights: Mapping[str, Path], arms: Sequence[Arm], seeds: Sequence[int]
) -> list[Row]:
    """Build every network once before the first hour of training; a failed row for each cell of one that this image size does not suit.

    Raises:
        ConfigError: any other fault, such as a wrong name or a checkpoint of another network, or no network is left.
    """
    failed: list[Row] = []
    for name in names:
        try:
            with seeded("check", name):
                build_network(name, len(cohort.classes), cohort.channels, cohort.image_size, pretrained=weights.get(name))
        except ConfigError as error:
            if error.code != "network-image-size" or len(names) == 1:
                raise
            fault: Row = {"network": name, "code": error.code, "reason": error.message}
            failed += [{"arm": arm.name, "seed": seed} | fault for arm in arms for seed in seeds]
    if names and len({row["network"] for row in failed}) == len(names):
        raise ConfigError("network-image-size", f"No network can take these images: {failed[0]['reason']}")
    return failed
