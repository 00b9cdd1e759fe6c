"""What a row of a benchmark says: as a summary, as predictions for the verdict, and as a record for MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from medaug import storage
from medaug.errors import DataError
from medaug.grading.arm import Arm
from medaug.grading.graded_data import GradedData
from medaug.grading.verdict import Predictions, primary_metric

Row = dict[str, Any]
_SETTINGS = ("arm", "base", "per_real", "real_fraction", "network", "seed", "num_training", "num_synthetic", "ratio", "num_steps")

__all__ = ["CellSink", "Row", "check_test_cases", "named", "predictions_of", "summary_of", "tracked"]


class CellSink(Protocol):
    """Where rows go while the benchmark runs: a run of `medaug.tracking`."""

    def log_child(
        self,
        name: str,
        content: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        curve: Sequence[tuple[int, Mapping[str, float]]],
    ) -> None:
        """Record one cell, once."""


def named(row: Row, arm: Arm) -> Row:
    """A stored row under the name that its arm has in this benchmark; the file knows the arm without ratio and fraction alone."""
    known = {name: value for name, value in asdict(arm.variant).items() if value not in (None, "")}
    return row | {"arm": arm.name} | known


def tracked(row: Row) -> dict[str, Any]:
    """What the tracking run of a cell holds: its settings, the row's own figures, and the course of training."""
    params = {name: row[name] for name in _SETTINGS if name in row} | {"recipe": row["key"]["recipe"]}
    metrics = {
        f"{split}/{name}": value
        for split in ("test", "validation")
        for name, value in (_scalars(row[split]["metrics"]) if row[split] else {}).items()
        if value is not None
    }
    metrics |= {"best_step": row["best_step"]}
    curve = [
        (entry["step"], {f"curve/{name}": value for name, value in entry.items() if name != "step" and _is_number(value)})
        for entry in row["history"]
    ]
    return {"params": params, "metrics": metrics, "curve": curve}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def summary_of(row: Row) -> Row:
    """A row without its per-case lists: arm, network, seed, ratio and counts, test metrics at the top, validation below."""
    kept = {name: value for name, value in row.items() if name not in ("test", "validation", "key", "history")}
    validation = None if row["validation"] is None else _scalars(row["validation"]["metrics"])
    return kept | _scalars(row["test"]["metrics"]) | {"validation": validation, "undefined": row["test"]["metrics"]["undefined"]}


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, (int, float))}


def check_test_cases(data: GradedData, rows: Sequence[Row]) -> None:
    """Refuse rows of other test cases; those of a page do not name theirs and were checked when it was written.

    Raises:
        DataError: `test-cases-differ`.
    """
    if any("ids" in row["test"] and storage.sha256_json(row["test"]["ids"]) != data.ids_sha256 for row in rows):
        raise DataError(
            "test-cases-differ", "A row was scored on other test cases than this cohort has; grade into a new folder."
        )


def predictions_of(data: GradedData, rows: Sequence[Row]) -> Predictions:
    """Collect the test probabilities of rows for the verdict.

    Raises:
        DataError: a row was scored on other test cases than the data's.
    """
    check_test_cases(data, rows)
    metric = primary_metric(data.ordinal)
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
    return Predictions(np.array(data.target), data.group_names, probs, validation)
