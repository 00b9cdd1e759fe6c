"""A table of arms from one YAML file: every row is trained, generated and gated, then all are graded together.

The file says what the rows share and what each changes; rows that train alike share one training run. Each stage goes
on where it stopped, so an experiment that was killed is continued by the same command.

With ``cells`` the rows are no arms but sources, and the arms are mixed from them and the real images, see
`medaug.grading.presets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from medaug import assets, storage
from medaug.errors import ConfigError
from medaug.grading.presets import ALL_REAL, check_presets
from medaug.grading.verdict import BASELINE
from medaug.sessions import Sessions
from medaug.stages import gate_synthetic, grade_arms
from medaug.workflow import read_yaml, run_stage, run_training

KEYS = ("name", "title", "profile", "arms", "grading", "shared", "rows", "cells")
ROW_KEYS = ("name", "bundle", "training", "overlay", "generating", "gate", "trainer")
FACTS = ("generated", "accepted", "label_agreement")
GRADING = {"networks": ["simple_cnn", "resnet18"], "seeds": 3, "profile": "cpu32"}


@dataclass(frozen=True)
class ExperimentRow:
    """One arm of the table.

    Attributes:
        name: of the arm.
        bundle: name or folder of the bundle that makes its images.
        training, generating: overrides of these stages, as for `run_stage`; a `seed` of generating is added to the experiment's,
            so that rows of one run draw images of their own.
        overlay: of the bundle, for generating; empty for none.
        gate: keyword arguments of `medaug.stages.gate_synthetic`.
        trainer: how the graders use its images, as in ``NAME=FOLDER:trainer``; empty for plain training.
    """

    name: str
    bundle: str
    training: Mapping[str, Any] = field(default_factory=dict)
    generating: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    trainer: str = ""
    overlay: str = ""

    def run_name(self) -> str:
        """Name of the training run: rows of the same bundle and training settings have the same one."""
        return storage.sha256_json([Path(self.bundle).name, dict(self.training)])[:12]


@dataclass(frozen=True)
class Experiment:
    """What a file of ``configs/experiments`` says.

    Attributes:
        name, title: for people.
        rows: the arms with synthetic images.
        arms: real-only arms beside them; `none` is always there.
        profile: overlay for all bundles.
        grading: networks, seeds and profile of the benchmark.
        cells: mixtures of real images and the rows' images; where there are any, the rows are no arms of their own.
    """

    name: str
    title: str
    rows: tuple[ExperimentRow, ...]
    arms: tuple[str, ...] = ("none", "oversample")
    profile: str | None = None
    grading: Mapping[str, Any] = field(default_factory=lambda: dict(GRADING))
    cells: tuple[str, ...] = ()

    def arm_specs(self, accepted: Path, facts: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """Arms and named sources as `medaug grade` takes them; all real images alone are the arm `none`."""
        if self.cells:
            sources = [f"{row.name}={accepted / row.name}" for row in self.rows]
            return [*self.arms, *(cell for cell in self.cells if cell != ALL_REAL)], sources
        made = [row for row in self.rows if facts[row.name]["accepted"]]  # the others stay in the table, without a score
        specs = [f"{row.name}={accepted / row.name}" + (f":{row.trainer}" if row.trainer else "") for row in made]
        return [*self.arms, *specs], []


def read_experiment(file: str, profile: str | None = None) -> Experiment:
    """Read an experiment by its name in ``configs/experiments``, or by path.

    Args:
        file: name or path.
        profile: replaces the file's own.

    Raises:
        ConfigError: not there, an unknown key, no row, two rows of one name, or a cell that is unknown or lacks its row.
    """
    content = read_yaml(assets.experiment_path(file))
    _check_keys("experiment", content, KEYS)
    shared, rows = content.get("shared") or {}, content.get("rows") or []
    _check_keys("shared settings", shared, ROW_KEYS)
    if not isinstance(rows, list) or not rows:
        raise ConfigError("experiment-empty", f"{file} must list at least one row under `rows`.")
    made = tuple(_row(shared, row) for row in rows)
    names = [row.name for row in made]
    if len(set(names)) != len(names):
        raise ConfigError("experiment-rows", f"The rows of an experiment need different names, got {names}.")
    grading = dict(content.get("grading") or {})
    _check_keys("grading settings", grading, tuple(GRADING))
    arms = tuple(dict.fromkeys(["none", *(content.get("arms") or ["oversample"])]))
    name, title = str(content.get("name") or Path(file).stem), str(content.get("title", ""))
    cells = tuple(map(str, content.get("cells") or ()))
    check_presets(cells, names)
    return Experiment(name, title, made, arms, profile or content.get("profile"), GRADING | grading, cells)


def _check_keys(what: str, content: Any, known: Sequence[str]) -> None:
    unknown = set(content) - set(known) if isinstance(content, Mapping) else {"(not a mapping)"}
    if unknown:
        raise ConfigError(
            "config-key-unknown", f"The {what} know {', '.join(known)}; got {', '.join(sorted(map(str, unknown)))}."
        )


def _row(shared: Mapping[str, Any], row: Any) -> ExperimentRow:
    """The shared settings with a row's own laid over them, mapping by mapping."""
    _check_keys("rows of an experiment", row, ROW_KEYS)
    merged: dict[str, Any] = {
        key: {**(shared.get(key) or {}), **(row.get(key) or {})} if key in ("training", "generating", "gate") else value
        for key, value in {**shared, **row}.items()
    }
    missing = [key for key in ("name", "bundle") if not merged.get(key)]
    if missing:
        raise ConfigError("experiment-rows", f"A row of an experiment needs {' and '.join(missing)}.")
    return ExperimentRow(**merged)


def run_experiment(
    file: str,
    cohort_dir: Path,
    out: Path,
    *,
    profile: str | None = None,
    seed: int = 0,
    tracking: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run every row of an experiment and grade them together.

    Args:
        file: name in ``configs/experiments`` or path.
        cohort_dir: real cohort.
        out: folder: runs/, synthetic/, accepted/, benchmark/, table.md, experiment.json; with cells also NAME.png and rows.json.
        profile: replaces the file's own.
        seed: of every stage.
        tracking: keyword arguments of `medaug.tracking.track`.

    Returns:
        {"rows": of the benchmark, "verdict", "table": one line per arm}, and what `_head` says; see `table_lines`.

    Raises:
        ConfigError, DataError, LeakageError, StorageError: see the stages.
    """
    experiment = read_experiment(file, profile)
    out = Path(out)
    tracking = dict(tracking or {"enabled": False})
    with storage.locked(out):
        head = _head(experiment, file, profile, seed)
        storage.write_json(out / "experiment.json", head)  # what a report of an unfinished experiment can say
        facts = {}
        for row in experiment.rows:
            with Sessions(out).stage(f"images of {row.name}", needed=not (out / "accepted" / row.name / "gate.json").is_file()):
                facts[row.name] = _make(experiment, row, Path(cohort_dir), out, seed, tracking)
        specs, sources = experiment.arm_specs(out / "accepted", facts)
        result = grade_arms(
            Path(cohort_dir),
            out / "benchmark",
            specs,
            sources=sources,
            command=head["command"],
            tracking=tracking,
            **experiment.grading,
        )
        table = table_lines(result["rows"], result["verdict"], facts)
        if experiment.cells:
            _write_cells(experiment, out, result["rows"], table)
        summary = head | {"rows": result["rows"], "verdict": result["verdict"], "table": table}
        storage.write_json(out / "experiment.json", summary)
        storage.write_text(out / "table.md", markdown(experiment.title, table))
    return summary


def _head(experiment: Experiment, file: str, profile: str | None, seed: int) -> dict[str, Any]:
    """What is known before anything is made: what the file asks, its settings, and the command with the cohort as a variable."""
    path = assets.experiment_path(file)
    comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    shipped = file in assets.list_experiments()
    command = f'medaug experiment {file if shipped else path.name} --cohort "$COHORT" --out runs/{experiment.name}'
    command += (f" --profile {Path(profile).name}" if profile else "") + f" --seed {seed}"
    return {
        "name": experiment.name,
        "title": experiment.title,
        "asked": " ".join(line.lstrip("# ").strip() for line in comment),
        "command": command,
        "profile": experiment.profile,
        "seed": seed,
        "settings": [asdict(row) for row in experiment.rows],
        "cells": list(experiment.cells),
    }


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


def _make(
    experiment: Experiment, row: ExperimentRow, cohort: Path, out: Path, seed: int, tracking: Mapping[str, Any]
) -> dict[str, Any]:
    """Train, generate and gate one row. Returns what its images were like."""
    run, synthetic = out / "runs" / row.run_name(), out / "synthetic" / row.name
    common = {"dataset_dir": str(cohort), "seed": seed, "tracking": dict(tracking)}
    run_training(row.bundle, experiment.profile, {**row.training, **common, "output_dir": str(run)})
    paths = {"run_dir": str(run), "output_dir": str(synthetic)}
    overrides = {**row.generating, **common, **paths, "seed": seed + int(row.generating.get("seed", 0))}
    made = run_stage(row.bundle, "generating", experiment.profile, overrides, overlay=row.overlay or None)
    gated = gate_synthetic(
        synthetic,
        cohort,
        out / "accepted" / row.name,
        seed=seed,
        allow_short=True,
        filter_dir=out / "filter",
        tracking=tracking,
        **row.gate,
    )
    accepted = gated.accepted.training
    lineages = [case.lineage or {} for case in accepted]
    agree = [entry["pseudo_label"] == entry["intended_label"] for entry in lineages if entry.get("pseudo_label") is not None]
    return {
        "generated": len(made.training),
        "accepted": len(accepted),
        "label_agreement": float(np.mean(agree)) if agree else None,
    }


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
        lines.append(line | {key: facts.get(arm, {}).get(key) for key in FACTS})
    empty: dict[str, Any] = dict.fromkeys(lines[0])
    return lines + [{**empty, "arm": name, **fact} for name, fact in facts.items() if not fact["accepted"]]


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
        cells += [number(line["difference"], "+.3f"), interval, line["verdict"] or ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Mean and spread over networks and seeds; the interval covers the test groups and the luck of training.", ""]
    )
