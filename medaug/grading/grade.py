"""The grading stage as one call: cohort, arms and networks in; rows, tables, report and verdict out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medaug import storage
from medaug.cohort import Cohort, read_cohort
from medaug.errors import ConfigError
from medaug.grading.arms import Arm, parse_arm, view_controls, with_view_controls
from medaug.grading.benchmark import MetricSink, Row, predictions_of, run_benchmark, summary_of
from medaug.grading.recipe import grading_recipe
from medaug.grading.report import write_report
from medaug.grading.verdict import BASELINE, judge
from medaug.networks.grading import NETWORKS, build_network
from medaug.training.classifier import seeded
from medaug.training.teacher import check_origin

DEFAULT_NETWORKS = ("simple_cnn", "resnet18")
VERDICT_NAME = "verdict.json"

__all__ = ["DEFAULT_NETWORKS", "grade"]


def grade(
    cohort_dir: Path,
    out: Path,
    arm_specs: Sequence[str],
    networks: Sequence[str] | str = DEFAULT_NETWORKS,
    seeds: int | Sequence[int] = 3,
    profile: str = "cpu32",
    *,
    overrides: Mapping[str, Any] | None = None,
    synthetic_per_real: float | None = None,
    allocation: str = "as_generated",
    allow_untrusted: bool = False,
    amst: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    num_resamples: int = 10_000,
    command: str = "",
    progress: bool = False,
    on_row: Callable[[Row], None] | None = None,
    tracking: MetricSink | None = None,
) -> dict[str, Any]:
    """Compare arms on a cohort's real test split. Run again after a kill, it goes on where it stopped.

    Args:
        arm_specs: "none" (needed), "crop_rotate", "weak", "oversample" (the control), "NAME=FOLDER" of accepted images,
            "NAME=FOLDER:amst" to train on them by AMST, with its control "weak_view" added; see `parse_arm`.
        networks: names, or "all" for the ten and simple_cnn; any further model of timm by its name.
        seeds: how many, or which.
        profile: a key of `GRADING_PROFILES`; `overrides` change its recipes for every arm alike.
        synthetic_per_real, allocation: how many synthetic images per real one, and of which classes; None takes all.
        amst: fields of `AmstRecipe` to change, for all arms that train by it.
        command: what the report says it was made with; no personal paths.
        tracking: a run that takes `log_metrics`.

    Returns:
        {"rows": [one flat summary per cell], "verdict": {arm: {...}}}; out/ holds rows/, rows.csv, table.csv, table.md,
        verdict.json, comparison.png and report.html.

    Raises:
        ConfigError: unknown arm, network, profile; no `none` arm.  DataError: unusable cohort.  LeakageError: an arm saw
        held-out groups.  StorageError: the folder is in use or cannot be written.
    """
    out = Path(out)
    cohort = read_cohort(Path(cohort_dir), verify=True)
    names = list(NETWORKS) if networks == "all" else [networks] if isinstance(networks, str) else list(networks)
    which = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    options: dict[str, Any] = {
        "synthetic_per_real": synthetic_per_real,
        "allocation": allocation,
        "allow_untrusted": allow_untrusted,
        "amst": amst,
    }
    arms = with_view_controls([parse_arm(spec, **options) for spec in arm_specs])
    if BASELINE not in [arm.name for arm in arms]:
        raise ConfigError("baseline-missing", f"A verdict compares with the arm `{BASELINE}`; add --arm {BASELINE}.")
    recipes = {name: grading_recipe(profile, name, overrides) for name in names}
    _check_networks(names, cohort)
    rows = run_benchmark(
        cohort, arms, names, which, recipes, out, progress=progress, on_row=on_row, tracking=tracking, device=device
    )
    predictions = predictions_of(cohort, rows)
    notes = [*_notes(cohort, arms), *_inert(rows)]
    verdict = judge(
        predictions, ordinal=cohort.ordinal, notes=notes, view_controls=view_controls(arms), num_resamples=num_resamples
    )
    storage.write_json(out / VERDICT_NAME, verdict)
    write_report(out, cohort, rows, verdict, command=command, profile=profile)
    return {"rows": [summary_of(row) for row in rows], "verdict": verdict}


def _notes(cohort: Cohort, arms: Sequence[Arm]) -> list[str]:
    """What a reader must know before the verdict: a split that leaks, images nobody can vouch for."""
    leak = (cohort.notes.get("leak") or {}).get("warning")
    notes = [str(leak)] if leak else []
    for arm in arms:
        unknown = [case for case in (arm.synthetic.training if arm.synthetic else ()) if not (case.lineage or {}).get("fit_on")]
        if unknown:
            notes.append(
                f"Nothing shows that the maker of {len(unknown)} image(s) of arm {arm.name} never saw the test patients."
            )
        if arm.teacher is not None and check_origin(arm.teacher.fit_groups, cohort, arm.name, trusted=True):
            notes.append(f"Nothing shows that the teacher of arm {arm.name} never saw the test patients.")
        given = arm.synthetic.training if arm.synthetic else ()
        if any((case.lineage or {}).get("weights_trusted") for case in given):
            notes.append(f"The labels of arm {arm.name} come from a network that began from weights of unknown origin.")
        if any((case.lineage or {}).get("generator_trusted") for case in given):
            notes.append(f"The images of arm {arm.name} come from a generator that began from weights of unknown origin.")
    return notes


def _inert(rows: Sequence[Row]) -> list[str]:
    """Arms whose weighting of unlabelled images did nothing, in how many runs."""
    found: dict[str, int] = {}
    for row in rows:
        if any(note.startswith("amst-softmatch-inert") for note in row.get("amst", {}).get("notes", ())):
            found[row["arm"]] = found.get(row["arm"], 0) + 1
    return [
        f"In {count} run(s) of arm {arm} the weights of unlabelled images stayed near 1: its consistency was plain pseudo-labelling."
        for arm, count in found.items()
    ]


def _check_networks(names: Sequence[str], cohort: Cohort) -> None:
    """Build every network once before the first hour of training: a wrong name or image size shows now.

    Raises:
        ConfigError: see `medaug.networks.grading.build_network`.
    """
    for name in names:
        with seeded("check", name):
            build_network(name, len(cohort.classes), cohort.channels, cohort.image_size)
