"""What a page is written from: the record and rows of a grading, and what is known of how its images were made.

A page keeps it in three files: ``rows.json`` (test labels, groups and every training run with its test probabilities),
``experiment.json`` (everything else) and ``environment.json``. No case id, patient or path is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medaug import sessions, storage
from medaug.errors import DataError, well_formed
from medaug.grading.metrics import classification_metrics
from medaug.grading.record import GradingRecord, record_from_json, record_to_json
from medaug.grading.rows import Row, check_test_cases

PAGE_FORMAT = 1
MILLION = 1_000_000  # rows hold probabilities with six decimals, see `medaug.grading.benchmark`
_KEPT = (
    "sha256", "arm", "base", "per_real", "real_fraction", "network", "seed", "num_training", "num_real", "num_synthetic",
    "num_unlabelled", "ratio", "added_per_class", "per_source", "num_steps", "image_passes", "forward_passes", "best_step",
)  # fmt: skip
_FACTS = ("kind", "name", "title", "asked", "command", "profile", "settings", "cells", "made", "intake", "samples")
_RARE = ("calibrations",)  # facts that a page names only if it has them

__all__ = ["PAGE_FORMAT", "Study", "check_rows", "earlier_format", "page_files", "study_from_files"]


@dataclass(frozen=True)
class Study:
    """One comparison with all that its page says.

    Attributes:
        record, rows: of the grading; rows in the order of the record's cells, as `page_files` keeps them.
        facts: plain values under the names of `_FACTS` and `_RARE`; see `medaug.results.sources`.
        times: see `medaug.sessions.read_sessions`.
    """

    record: GradingRecord
    rows: tuple[Row, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, list[Any]] = field(default_factory=lambda: {"environments": [], "stages": []})


def page_files(study: Study) -> dict[str, str]:
    """The three files of a study by name; the same study gives the same text."""
    record = record_to_json(study.record)
    data = dict(record["data"])
    keys = [row["key"] for row in study.rows]
    shared = {
        name: value for name, value in keys[0].items() if name != "arm" and all(key.get(name, key) == value for key in keys)
    }
    rows = {
        "format": PAGE_FORMAT,
        "probabilities": "millionths, image by image, class by class",
        "test": {name: data.pop(name) for name in ("target", "groups")},
        "key": shared,
        "cells": record.pop("cells"),
        "rows": [_compact(row, shared) for row in study.rows],
    }
    text = _lines(rows)
    facts = {name: study.facts.get(name) for name in _FACTS}
    facts |= {name: study.facts[name] for name in _RARE if study.facts.get(name)}
    content = {"format": PAGE_FORMAT, **facts, "rows_sha256": storage.sha256_bytes(text.encode())}
    return {
        "rows.json": text,
        "experiment.json": _indented(content | {"grading": record | {"data": data}}),
        "environment.json": _indented(dict(study.times)),
    }


def _compact(row: Row, shared: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its course of training, its validation cases and what all rows have in common."""
    kept = {name: row[name] for name in _KEPT if name in row}
    key = {name: value for name, value in row["key"].items() if name not in shared}
    if (teacher := key["arm"].get("teacher")) is not None:  # the groups that it saw are pseudonyms of patients
        key["arm"] = key["arm"] | {"teacher": {name: value for name, value in teacher.items() if name != "fit_groups"}}
    validation = None if row["validation"] is None else {"metrics": _scalars(row["validation"]["metrics"])}
    probs = np.rint(np.asarray(row["test"]["probs"], dtype=float) * MILLION).astype(int)
    test = {"metrics": _scalars(row["test"].get("stated") or row["test"]["metrics"]), "probs": probs.ravel().tolist()}
    labels = {"amst": found} if (found := _relabelling(row.get("amst") or {})) else {}
    return {**kept, **labels, "key": key, "validation": validation, "test": test}


def _relabelling(found: Mapping[str, Any]) -> dict[str, Any]:
    """What AMST made of the labels of the seed images in its last round, see `medaug.training.pseudo_labels.label_report`; empty for an
    arm without synthetic images."""
    last = found["rounds"][-1] if "rounds" in found else found
    return {name: last[name] for name in ("scored", "accepted", "relabelled", "confusion_all")} if "scored" in last else {}


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, int | float)}


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for every row, so that a change of one row shows as such."""
    blocks = []
    for name, value in content.items():
        if isinstance(value, list):
            body = "[\n" + ",\n".join(_dense(entry) for entry in value) + "\n]"
        else:
            body = _dense(value)
        blocks.append(f"{json.dumps(name)}: {body}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _dense(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _indented(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def study_from_files(rows_text: str, content: Any, times: Any) -> Study:
    """The study of `page_files`.

    Args:
        rows_text: of ``rows.json``.  content: of ``experiment.json``.  times: of ``environment.json``.

    Raises:
        DataError: `page-format` for a page of another version, `page-changed` if the rows are not those the page was written
            with, `page-malformed` where a field is missing, and those of `check_rows`.
    """
    with well_formed("page-malformed", "A file of the page", "write the page again"):
        rows = json.loads(rows_text)
        if rows["format"] != PAGE_FORMAT or content["format"] != PAGE_FORMAT:
            raise earlier_format()
        if storage.sha256_bytes(rows_text.encode()) != content["rows_sha256"]:
            raise DataError(
                "page-changed",
                "rows.json is not the file that this page was written with; restore it, or write the page again from the experiment.",
            )
        grading = dict(content["grading"])
        record = record_from_json(grading | {"cells": rows["cells"], "data": {**grading["data"], **rows["test"]}})
        full = tuple(_full(row, rows["key"], record) for row in rows["rows"])
        facts = {name: content[name] for name in _FACTS} | {name: content[name] for name in _RARE if name in content}
        study = Study(record, full, facts, sessions.checked(times))
        check_rows(study.record, study.rows)
    return study


def earlier_format() -> DataError:
    """The refusal of rows that no verdict can be computed from."""
    return DataError(
        "page-format",
        "The rows of this page are of an earlier format, without the test probabilities that a verdict is computed from; write the page "
        "again from the experiment's folder.",
    )


def _full(row: Mapping[str, Any], shared: Mapping[str, Any], record: GradingRecord) -> Row:
    """A row of a page as `medaug.grading` knows rows; what follows from its probabilities is computed again."""
    data = record.data
    probs = np.array(row["test"]["probs"], dtype=float).reshape(len(data.target), len(data.classes)) / MILLION
    metrics = classification_metrics(np.array(data.target), probs, ordinal=data.ordinal)
    stated = row["test"]["metrics"]
    return {**row, "key": {**shared, **row["key"]}, "test": {"metrics": metrics, "stated": stated, "probs": probs.tolist()}}


def check_rows(record: GradingRecord, rows: Sequence[Row]) -> None:
    """Refuse rows that were changed by hand, or that come from different data, as far as they show it.

    Raises:
        DataError: `rows-mixed` for rows of another cohort, `row-changed` where the name of a row, its arm, network or seed, or
            its figures contradict the rest of it; `test-cases-differ`.
    """
    check_test_cases(record.data, rows)
    cells = {(cell.arm, cell.network, cell.seed): cell.sha256 for cell in record.cells}
    bases = {arm.name: arm.base for arm in record.arms}
    target = np.array(record.data.target)
    for row in rows:
        key = row["key"]
        if key["cohort"] != record.data.content_sha256 or tuple(key["classes"]) != record.data.classes:
            raise DataError(
                "rows-mixed",
                f"A row of arm {row['arm']} is of another cohort than the rest ({key['cohort'][:12]} against "
                f"{record.data.content_sha256[:12]}); a page needs the rows of one.",
            )
        same = cells.get((row["arm"], row["network"], row["seed"])) == row["sha256"]
        same &= (key["arm"]["name"], key["network"], key["seed"]) == (bases.get(row["arm"]), row["network"], row["seed"])
        if key["arm"].get("teacher") is None:  # a page does not hold all of what such a row is named after
            same &= storage.sha256_json(key) == row["sha256"]
        probs = np.array(row["test"]["probs"])
        found = classification_metrics(target, probs, ordinal=record.data.ordinal)
        stated = row["test"].get("stated") or row["test"]["metrics"]
        same &= all(name in found and _close(found[name], value) for name, value in _scalars(stated).items())
        if not same:
            raise DataError(
                "row-changed",
                f"The row of arm {row['arm']}, {row['network']}, seed {row['seed']} is not as training left it; restore it, or delete "
                "it and run the same command again.",
            )


def _close(found: float | None, stated: float | None) -> bool:
    return found == stated if found is None or stated is None else abs(found - stated) < 1e-9
