"""Where a page can be written from: an experiment, the main job, a grading, or a page that was written before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medaug import sessions, storage
from medaug.errors import DataError, well_formed
from medaug.evidence.shown import HIDDEN
from medaug.grading.benchmark import ROWS_FOLDER
from medaug.grading.record import RECORD_NAME, GradingRecord, read_record, recorded_rows
from medaug.results.study import Study, check_rows, earlier_format, page_files, study_from_files

BENCHMARK = "benchmark"
PAGE_FILES = ("rows.json", "experiment.json", "environment.json")
EXPERIMENT, JOB, GRADING = "experiment", "augment", "grading"
_MADE = ("arm", "generated", "accepted", "label_agreement")

__all__ = ["BENCHMARK", "EXPERIMENT", "GRADING", "JOB", "PAGE_FILES", "is_page", "read_study", "text_of"]


def is_page(folder: Path) -> bool:
    """True for a folder that `medaug report` wrote."""
    path = Path(folder) / "experiment.json"
    content = storage.read_json(path) if path.is_file() else None
    return isinstance(content, dict) and "rows_sha256" in content


def read_study(folder: Path) -> Study:
    """The study that a folder holds, with nothing in it that a page must not show.

    Raises:
        DataError: `rows-missing` for a folder without any; `record-missing` and `page-format` for those of an earlier medaug; see
            `medaug.results.study`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            "rows-missing", f"There is no folder {folder.name}; give one of `medaug experiment`, augment or grade, or a page."
        )
    if is_page(folder):
        rows, content, times = (folder / name for name in PAGE_FILES)
        if not rows.is_file():
            raise DataError("rows-missing", f"The page {folder.name} has lost its rows.json; restore it.")
        return study_from_files(text_of(rows), storage.read_json(content), storage.read_json(times))
    study = _graded(folder)
    with well_formed("row-malformed", f"A row of {folder.name}", "delete it and grade again"):
        files = page_files(study)  # what is written is what a reader of the page has, whichever way it came here
    return study_from_files(*(files[name] if name == PAGE_FILES[0] else json.loads(files[name]) for name in PAGE_FILES))


def text_of(path: Path) -> str:
    """A file of a page as text, which a person may have written.

    Raises:
        DataError: `page-malformed`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("page-malformed", f"{path.name} of {path.parent.name} is not UTF-8 text; save it as UTF-8.") from error


def _graded(folder: Path) -> Study:
    """The study of a folder that rows were made in."""
    several = (folder / BENCHMARK).is_dir()
    bench = folder / BENCHMARK if several else folder
    if not (bench / RECORD_NAME).is_file() and not (bench / ROWS_FOLDER).is_dir():
        if (folder / "rows.json").is_file():
            raise earlier_format()
        raise DataError(
            "rows-missing",
            f"{folder.name} holds no rows; give a folder of `medaug experiment`, augment or grade whose grading has begun, or a page.",
        )
    record = read_record(bench)
    with well_formed("row-malformed", f"A row of {folder.name}", "delete it and grade again"):
        rows = tuple(recorded_rows(bench, record))
        check_rows(record, rows)
    if not rows:
        raise DataError("rows-missing", f"No training run of {folder.name} is finished yet; run its command again.")
    experiment = _object(folder / "experiment.json") if several else None
    if experiment is not None and "table" not in experiment:  # it has been started again and has not come to its end
        record = replace(record, finished=False)
    times = sessions.joined(sessions.read_sessions(place) for place in dict.fromkeys([folder, bench]))
    with well_formed(
        "experiment-malformed",
        f"experiment.json or augment.json of {folder.name}",
        "run its command again, finished rows are kept",
    ):
        return Study(record, rows, _facts(record, experiment, _object(folder / "augment.json")), times)


def _facts(record: GradingRecord, experiment: Mapping[str, Any] | None, job: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known beside the grading; a path in it is hidden."""
    common = {"command": record.command}
    if experiment is not None:
        names = ("name", "title", "asked", "command", "profile", "settings", "cells", "intake", "calibrations")
        known = {name: experiment[name] for name in names if experiment.get(name)}
        table = [line for line in experiment.get("table", ()) if line.get("generated")]
        rows = {str(line["arm"]).partition("@")[0]: line for line in reversed(table)}  # variants of a row share its images
        made = [{name: line.get(name) for name in _MADE} | {"arm": row} | _lacking(line) for row, line in reversed(rows.items())]
        hidden: dict[str, Any] = {name: _public(known[name]) for name in ("settings", "intake") if name in known}
        return {"kind": EXPERIMENT, **common, **known, **hidden, "made": made}
    if job is not None:
        return {"kind": JOB, "name": str(job.get("bundle", "")), **common}
    return {"kind": GRADING, **common}


def _lacking(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a row without images, at all or at some seeds, lacks: those seeds, and the images of rounds of feedback that did not help."""
    if not line.get("seeds_without"):
        return {}
    seeds = {"seeds_without": line["seeds_without"]} if line["accepted"] else {}
    return seeds | ({"unkept": line["unkept"]} if line.get("unkept") else {})


def _object(path: Path) -> dict[str, Any] | None:
    content = storage.read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else None


def _public(value: Any) -> Any:
    """Settings without what may be a path."""
    if isinstance(value, Mapping):
        return {key: Path(inner).name if key == "bundle" else _public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(entry) for entry in value]
    hidden = isinstance(value, str) and ("/" in value or "\\" in value) and not value.startswith("$")  # $DATA/x names nobody
    return HIDDEN if hidden else value
