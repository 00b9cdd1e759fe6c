"""`medaug report` as one call: a folder with rows in, a page out; from a page the same page again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.errors import DataError, StorageError, well_formed
from medaug.grading.judgement import judged_rows, verdict_and_points
from medaug.grading.report import pictures, write_report
from medaug.results.limits import Outcome
from medaug.results.readme import readme
from medaug.results.samples import SAMPLES_NAME, samples_png
from medaug.results.sources import is_page, read_study, text_of
from medaug.results.study import Study, page_files
from medaug.results.unfinished import finished_part

README_NAME, NOTES_NAME = "README.md", "NOTES.md"
_OF_THE_DESKTOP = ("Thumbs.db", "desktop.ini")
_MARK = "\n<!-- Written by `medaug report`; write to NOTES.md, not here. sha256 {} -->\n"
_MARKED = re.compile(_MARK.format("([0-9a-f]{64})"))

__all__ = ["NOTES_NAME", "README_NAME", "write_page"]


def write_page(folder: Path, out: Path, *, unfinished: bool = False, samples: bool = False) -> dict[str, Any]:
    """Write the page of a result; verdict, tables and figures are computed again from its rows.

    Args:
        folder: of `medaug experiment`, `augment` or `grade`, or a page.
        out: the page: rows.json, experiment.json, environment.json, README.md, report.html, tables and figures. NOTES.md is a
            person's and never written over; without one that of `folder` is taken.
        unfinished: write a page, marked as such, though training runs are missing.
        samples: add a sheet of accepted images; a page keeps the one it has.

    Returns:
        out, verdict, rows (how many), missing (training runs), finished, written (file names).

    Raises:
        DataError: `page-unfinished`; see `read_study` and `finished_part`.
        StorageError: `page-occupied` if `out` holds something else, `page-edited` if its README was changed by hand.
    """
    folder, out = Path(folder), Path(out)
    study = read_study(folder)
    missing = study.record.missing(study.rows)
    finished = study.record.finished and not missing
    if not finished and not unfinished:
        raise DataError(
            "page-unfinished",
            f"{len(missing)} of {len(study.record.cells)} training runs of {folder.name} are missing, or its command has not come to its "
            "end; run that again, or add --unfinished for a page that says so.",
        )
    sheet = (
        samples_png(folder, study.record.data.classes) if samples or (is_page(folder) and study.facts.get("samples")) else None
    )
    if bool(study.facts.get("samples")) != (sheet is not None):
        study = replace(study, facts={**study.facts, "samples": sheet is not None})
    record, rows = finished_part(study.record, study.rows)
    rows = judged_rows(record.failed, rows)
    verdict, points = verdict_and_points(record, rows)
    with storage.locked(out):
        _refuse_occupied(out)
        notes = next((text_of(place) for place in (out / NOTES_NAME, folder / NOTES_NAME) if place.is_file()), "")
        plots = pictures(record, rows, verdict, points)
        text = _marked(_readme(study, Outcome(record, rows, verdict), list(plots), notes))
        files = {**page_files(study), README_NAME: text} | ({NOTES_NAME: notes} if notes else {})
        for name, content in sorted(
            files.items(), key=lambda file: file[0] != "experiment.json"
        ):  # it tells a page from a stranger's
            storage.write_text(out / name, content)
        figures = write_report(out, record, rows, verdict, points=points, plots=plots)
        if sheet is not None:
            storage.write_bytes(out / SAMPLES_NAME, sheet)
        else:
            (out / SAMPLES_NAME).unlink(missing_ok=True)
    return {
        "out": out.name,
        "verdict": {arm: {"verdict": entry["verdict"], "sentence": entry["sentence"]} for arm, entry in verdict.items()},
        "rows": len(study.rows),
        "missing": len(missing),
        "finished": finished,
        "written": sorted([*files, *figures, "report.html", *([SAMPLES_NAME] if sheet else [])]),
    }


def _readme(study: Study, outcome: Outcome, figures: Sequence[str], notes: str) -> str:
    """See `readme`.

    Raises:
        DataError: `page-malformed`: a fact that somebody wrote by hand is of another kind.
    """
    from jinja2 import UndefinedError

    with well_formed("page-malformed", "A fact of the page", "write the page again from its rows", UndefinedError):
        return readme(study, outcome, figures, notes)


def _marked(text: str) -> str:
    """The text with a last line that tells whether a person changed it since."""
    return text + _MARK.format(storage.sha256_bytes(text.encode()))


def _refuse_occupied(out: Path) -> None:
    """Leave alone what this command did not write, or what a person has changed since.

    Raises:
        StorageError: `page-occupied`, `page-edited`.
    """
    path = out / README_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    known = (NOTES_NAME, README_NAME, *_OF_THE_DESKTOP)
    others = [path for path in out.iterdir() if path.name not in known and not path.name.startswith(".")]
    if (text is not None and not _MARKED.search(text)) or (others and not is_page(out)):
        raise StorageError(
            "page-occupied", f"{out.name} holds files that `medaug report` did not write; choose another --out for the page."
        )
    if text is not None and text != _marked(_MARKED.sub("", text)):
        raise StorageError(
            "page-edited",
            f"{README_NAME} of {out.name} was changed by hand; move what was added to {NOTES_NAME}, which is appended to the page, and "
            f"delete {README_NAME}.",
        )
