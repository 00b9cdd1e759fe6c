"""The evidence pack as one call: folders of earlier stages in, cards, Croissant and checklists out."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.errors import StorageError, well_formed
from medaug.evidence.cards import dataset_card, model_card
from medaug.evidence.checklist_items import Answer
from medaug.evidence.checklists import answers_of, counts_of, html_page, markdown_page
from medaug.evidence.croissant import CASES_NAME, FOR_AUTHORS, cases_json, croissant_json
from medaug.evidence.records import Records, missing, read_records

FILES = (CASES_NAME, "croissant.json", "DATASET_CARD.md", "MODEL_CARD.md", "checklists.md", "checklists.html")

__all__ = ["FILES", "write_evidence"]


def write_evidence(
    folder: Path, out: Path, *, cohort: Path | None = None, run: Path | None = None, benchmark: Path | None = None
) -> dict[str, Any]:
    """Write every paper that the records suffice for. The same records make the same bytes.

    Args:
        folder: the cohort to describe, see `read_records` for it and the others.
        out: where the papers go; the cohort's own folder makes it a Croissant data set that loads as it is.

    Returns:
        written (file names), missing (records that were not there), for_authors (fields of Croissant that no record knows)
        and checklists (name -> how many items are from records, in part, blank).

    Raises:
        DataError, LeakageError: see `read_records`; `record-malformed` for a record that lacks a field.
        StorageError: `evidence-edited` if `out` holds other papers, which may have been filled in by hand.
    """
    with well_formed("record-malformed", "A record", "make it again with this medaug", ZeroDivisionError, csv.Error):
        records = read_records(folder, cohort, run, benchmark)
        answers = answers_of(records)
        papers = _papers(records, answers)
    out = Path(out)
    with storage.locked(out):
        edited = [name for name in FILES if (out / name).exists() and not _same(out / name, papers.get(name))]
        if edited:
            raise StorageError(
                "evidence-edited",
                f"{out.name} holds another {edited[0]}, maybe filled in by hand; move it away or choose another --out.",
            )
        for name, text in papers.items():
            storage.write_text(out / name, text)
    return {
        "out": out.name,
        "written": list(papers),
        "missing": missing(records),
        "for_authors": list(FOR_AUTHORS),
        "checklists": counts_of(answers),
    }


def _papers(records: Records, answers: Mapping[str, Sequence[Answer]]) -> dict[str, str]:
    """File name -> text."""
    cases = cases_json(records)
    papers = {
        CASES_NAME: cases,
        "croissant.json": croissant_json(records, cases),
        "DATASET_CARD.md": dataset_card(records),
        "checklists.md": markdown_page(records, answers),
        "checklists.html": html_page(records, answers),
    }
    return papers if records.run is None else papers | {"MODEL_CARD.md": model_card(records)}


def _same(path: Path, text: str | None) -> bool:
    return text is not None and path.is_file() and path.read_bytes() == text.encode()
