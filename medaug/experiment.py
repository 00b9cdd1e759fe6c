"""A table of arms from one YAML file: every row is trained, generated and gated, then all are graded together.

The file says what the rows share and what each changes, and may say how the cohort is made; rows that train alike share one
training run, rows that make the same images share these. Each stage goes on where it stopped, so an experiment that was killed
is continued by the same command.

With ``cells`` the rows are no arms but sources, and the arms are mixed from them and the real images, see
`medaug.grading.presets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from medaug import assets, storage
from medaug.cohort import read_cohort
from medaug.errors import ConfigError, StorageError
from medaug.experiment_checks import check_experiment
from medaug.experiment_file import Experiment, ExperimentRow, read_experiment
from medaug.feedback import run_feedback
from medaug.generation.calibration import RESULT_FILE
from medaug.grading.options import GradingOptions
from medaug.grading.presets import ALL_REAL
from medaug.grading.verdict import BASELINE
from medaug.intake.section import publishable, section_options
from medaug.sessions import Sessions
from medaug.stages import gate_synthetic, grade_arms, take_in
from medaug.workflow import load_config, run_stage, run_training

FACTS = ("generated", "accepted", "label_agreement")
SEEDS_APART = 1000  # of generators for the graders' seeds 0, 1, ..., so that another --seed shares none with this one
CALIBRATION = "calibration"
_PILOT = ("scale", "rows", "weak_distance", "least_agreement", "seed_images")  # of a calibration's result
COUNTS = ("generated", "accepted", "labelled", "agreeing", "unkept")  # of one set of images


def run_experiment(
    file: str,
    cohort_dir: Path | None,
    out: Path,
    *,
    profile: str | None = None,
    seed: int = 0,
    executor: str = "local",
    workers: int | None = None,
    tracking: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run every row of an experiment and grade them together.

    Args:
        file: name in ``configs/experiments`` or path.
        cohort_dir: real cohort; None makes it in ``out/cohort`` as the file's section ``intake`` says.
        out: folder: cohort/, runs/, synthetic/, accepted/, calibration/, feedback/, benchmark/, table.md, experiment.json; with cells also
            NAME.png and rows.json.
        profile: replaces the file's own.
        seed: of every stage but intake, whose split the file fixes, and grading, which has seeds of its own.
        executor, workers: of the grading; no row depends on them.
        tracking: keyword arguments of `medaug.tracking.track`.

    Returns:
        {"rows": of the benchmark, "verdict", "table": one line per arm}, and what `_head` says; see `table_lines`.

    Raises:
        ConfigError, DataError, LeakageError, StorageError: see the stages.
    """
    experiment = read_experiment(file, profile)
    check_experiment(experiment)
    out = Path(out)
    tracking = dict(tracking or {"enabled": False})
    options = None
    if cohort_dir is None:
        options = section_options(_intake(experiment), out / "cohort")
    else:
        read_cohort(Path(cohort_dir))  # before anything is written
    with storage.locked(out):
        _refuse_another(out, experiment)
        head = _head(experiment, file, profile, seed, with_intake=options is not None)
        storage.write_json(out / "experiment.json", head)  # what a report of an unfinished experiment can say
        sessions = Sessions(out)
        if options is not None:
            with sessions.stage("intake", needed=not (out / "cohort" / "cohort.json").is_file()):
                take_in(options, tracking=tracking)
        cohort = Path(cohort_dir or out / "cohort")
        facts = _make_rows(experiment, cohort, out, seed, sessions, tracking)
        specs, sources = experiment.arm_specs(out, facts)
        result = grade_arms(
            cohort,
            out / "benchmark",
            specs,
            GradingOptions(**experiment.grading, sources=sources),
            command=head["command"],
            executor=executor,
            workers=workers,
            tracking=tracking,
        )
        table = table_lines(result["rows"], result["verdict"], facts)
        if experiment.cells:
            _write_cells(experiment, out, result["rows"], table)
        pilots = _calibrations(experiment, out)
        summary = head | {"rows": result["rows"], "verdict": result["verdict"], "table": table} | pilots
        storage.write_json(out / "experiment.json", summary)
        storage.write_text(out / "table.md", markdown(experiment.title, table))
    return summary


def _refuse_another(out: Path, experiment: Experiment) -> None:
    """Leave a page, and what another experiment made, alone.

    Raises:
        StorageError: `folder-not-empty`.
    """
    path = out / "experiment.json"
    known = storage.read_json(path) if path.is_file() else None
    if known is None:
        return
    page = not isinstance(known, dict) or "rows_sha256" in known
    if page or known.get("name") != experiment.name:
        what = "a page of medaug report" if page else f"the experiment {known.get('name')}"
        raise StorageError(
            "folder-not-empty",
            f"{out.name} holds {what}, not {experiment.name}; choose another --out, or give the file its old name by the key `name`.",
        )


def _head(experiment: Experiment, file: str, profile: str | None, seed: int, *, with_intake: bool) -> dict[str, Any]:
    """What is known before anything is made: what the file asks, its settings, and the command with the cohort as a variable."""
    path = assets.experiment_path(file)
    comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    shipped = file in assets.list_experiments()
    command = f"medaug experiment {file if shipped else path.name}" + ("" if with_intake else ' --cohort "$COHORT"')
    command += f" --out runs/{experiment.name}" + (f" --profile {Path(profile).name}" if profile else "") + f" --seed {seed}"
    return {
        "name": experiment.name,
        "title": experiment.title,
        "asked": " ".join(line.lstrip("# ").strip() for line in comment),
        "command": command,
        "profile": experiment.profile,
        "seed": seed,
        "intake": publishable(_intake(experiment)) if with_intake else None,
        "grading": dict(experiment.grading),
        "settings": [asdict(row) for row in experiment.rows],
        "cells": list(experiment.cells),
    } | ({"generator_per_seed": True} if experiment.generator_per_seed else {})


def _intake(experiment: Experiment) -> Mapping[str, Any]:
    """The section that makes the cohort.

    Raises:
        ConfigError: there is none (code `cohort-missing`).
    """
    if experiment.intake is None:
        raise ConfigError(
            "cohort-missing",
            f"The experiment {experiment.name} does not say which images it is about; give --cohort, or add a section `intake`.",
        )
    return experiment.intake


def _write_cells(experiment: Experiment, out: Path, rows: Sequence[Mapping[str, Any]], table: Sequence[dict[str, Any]]) -> None:
    """Call the arm of all real images by the name of its cell, in the table too; write rows.json and the picture."""
    from medaug.grading.cells_figure import cells_png

    named = [{**row, "arm": ALL_REAL if row["arm"] == BASELINE else row["arm"]} for row in rows]
    for line in table:
        line["arm"] = ALL_REAL if line["arm"] == BASELINE else line["arm"]
    storage.write_json(out / "rows.json", named)
    cells = list(dict.fromkeys([ALL_REAL, *experiment.cells]))
    others = [arm for arm in dict.fromkeys(row["arm"] for row in named) if arm not in cells]
    picture = cells_png(named, [*others, *cells], str(table[0]["metric"]), experiment.title)
    storage.write_bytes(out / f"{experiment.name}.png", picture)


def _make_rows(
    experiment: Experiment, cohort: Path, out: Path, seed: int, sessions: Sessions, tracking: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Make the images of every row, at every place they are asked for. Returns row -> what its images were like, see `_together`."""
    facts: dict[str, dict[str, Any]] = {}
    for row in experiment.rows:
        if experiment.maker(row).name in facts:
            facts[row.name] = facts[experiment.maker(row).name]
            continue
        found = {}
        for own, place in experiment.places(out).items():
            stage = f"images of {row.name}" + (f", seed {own}" if experiment.generator_per_seed else "")
            with sessions.stage(stage, needed=not (row.accepted_folder(place) / "gate.json").is_file()):
                found[own] = _make(experiment, row, cohort, place, seed + own * SEEDS_APART, tracking)
        facts[row.name] = _together(found)
    return facts


def _together(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The images of all seeds: generated, accepted, the share whose label a filter agrees with, the seeds without any, and how many of
    these were accepted in rounds of feedback that did not help."""
    total = {key: sum(made[key] for made in found.values()) for key in COUNTS}
    without = {seed: made for seed, made in found.items() if not made["accepted"]}
    return {
        "generated": total["generated"],
        "accepted": total["accepted"],
        "label_agreement": total["agreeing"] / total["labelled"] if total["labelled"] else None,
        "seeds_without": list(without),
        "unkept": sum(made["unkept"] for made in without.values()),
    }


def _make(
    experiment: Experiment, row: ExperimentRow, cohort: Path, out: Path, seed: int, tracking: Mapping[str, Any]
) -> dict[str, int]:
    """Train, generate and gate one row. Returns `COUNTS`: of the accepted images, how many a filter has labelled and agrees with; and
    the accepted ones of rounds that were not kept."""
    run, synthetic = out / "runs" / row.run_name(), out / "synthetic" / row.name
    common = {"dataset_dir": str(cohort), "seed": seed, "tracking": dict(tracking)}
    run_training(row.bundle, experiment.profile, {**row.training, **common, "output_dir": str(run)})
    if row.feedback is not None:
        return _make_in_rounds(experiment, row, cohort, run, out, seed)
    paths = {"run_dir": str(run), "output_dir": str(synthetic)}
    if row.generating.get("calibrate"):  # rows of one run may calibrate other samplers
        paths["calibration_dir"] = str(out / CALIBRATION / row.name)
    overrides = {**row.generating, **common, **paths, "seed": seed + int(row.generating.get("seed", 0))}
    made = run_stage(row.bundle, "generating", experiment.profile, overrides, overlay=row.overlay or None)
    gated = gate_synthetic(
        synthetic,
        cohort,
        row.accepted_folder(out),
        seed=seed,
        allow_short=True,
        filter_dir=out / "filter",
        tracking=tracking,
        **row.gate,
    )
    accepted = gated.accepted.training
    lineages = [case.lineage or {} for case in accepted]
    agree = [entry["pseudo_label"] == entry["intended_label"] for entry in lineages if entry.get("pseudo_label") is not None]
    return dict(zip(COUNTS, (len(made.training), len(accepted), len(agree), sum(agree), 0), strict=True))


def _calibrations(experiment: Experiment, out: Path) -> dict[str, list[dict[str, Any]]]:
    """What the pilots found, a line for each row that had one and each place: the scales, and how well the judge knows real images."""
    lines = []
    calibrating = [row for row in experiment.rows if row.generating.get("calibrate") and experiment.maker(row) is row]
    for row in calibrating:
        for own, place in experiment.places(out).items():
            path = place / CALIBRATION / row.name / RESULT_FILE
            if path.is_file():
                found = storage.read_json(path)
                judge = {key: (found.get("judge_validation") or {}).get(key) for key in ("n", "balanced_accuracy")}
                seed = {"seed": own} if experiment.generator_per_seed else {}
                lines.append({"row": row.name, **seed, "judge": judge} | {key: found[key] for key in _PILOT})
    return {"calibrations": lines} if lines else {}


def _make_in_rounds(experiment: Experiment, row: ExperimentRow, cohort: Path, run: Path, out: Path, seed: int) -> dict[str, int]:
    """Generate and gate one row where a grader doubts; in all as many images as the row would make at once."""
    settings = load_config(row.bundle, "generating", experiment.profile, row.overlay or None) | dict(row.generating)
    real = sum(not case.is_synthetic for case in read_cohort(cohort).training)
    budget = max(1, round(settings["synthetic_per_real"] * real))
    result = run_feedback(
        row.bundle,
        cohort,
        run,
        row.accepted_folder(out).parent,
        row.feedback_options(budget),
        overlay=row.overlay or None,
        profile=experiment.profile,
        overrides=row.generating,
        seed=seed + int(row.generating.get("seed", 0)),
    )
    unkept = sum(entry["accepted"] for entry in result["rounds"] if not entry["kept"])
    return dict(zip(COUNTS, (result["saving"]["generated"], result["accepted"] or 0, 0, 0, unkept), strict=True))


def table_lines(
    rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One line per arm: images used, mean score over networks and seeds with its spread, difference to `none`, verdict."""
    metric = next((entry["metric"] for entry in verdict.values()), "balanced_accuracy")
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        scores = [row[metric] for row in rows if row["arm"] == arm and row[metric] is not None]
        entry = verdict.get(arm, {})
        against = entry.get("against_none", {})
        line = {
            "arm": arm,
            "runs": len(scores),
            "metric": metric,
            "score": float(np.mean(scores)),
            "spread": float(np.std(scores)),
        }
        line |= {key: against.get(key) for key in ("difference", "low", "high", "p_value", "p_holm")}
        line |= {"verdict": entry.get("verdict")}
        of_row = facts.get(arm.split("@")[0], {})  # several ratios or fractions of one row, see `medaug.grading.variants`
        lines.append(line | {key: of_row.get(key) for key in FACTS})
    empty: dict[str, Any] = dict.fromkeys(lines[0])
    return lines + [{**empty, "arm": name, **fact} for name, fact in facts.items() if fact["seeds_without"]]


def _why_ungraded(line: Mapping[str, Any]) -> str:
    """Why a row has no score: it has no images, or none at some seeds."""
    what = "no round of feedback helped" if line.get("unkept") else "no image was accepted"
    return f"not graded: {what}" + (f" for seed {', '.join(map(str, line['seeds_without']))}" if line["accepted"] else "")


def markdown(title: str, table: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""

    def number(value: Any, style: str = ".3f") -> str:
        return "" if value is None else f"{value:{style}}" if isinstance(value, float) else str(value)

    head = ["arm", "generated", "accepted", "label agreement", table[0]["metric"].replace("_", " "), "difference to none"]
    head += ["95 % interval", "verdict"]
    lines = [f"# {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line in table:
        interval = "" if line["low"] is None else f"{line['low']:+.3f} to {line['high']:+.3f}"
        score = "" if line["score"] is None else f"{line['score']:.3f} ± {line['spread']:.3f}"
        cells = [line["arm"], *(number(line[key]) for key in FACTS), score]
        nothing = _why_ungraded(line) if line["score"] is None else ""
        cells += [number(line["difference"], "+.3f"), interval, line["verdict"] or nothing]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Mean and spread over networks and seeds; the interval covers the test groups and the luck of training.", ""]
    )
