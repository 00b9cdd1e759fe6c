"""What a person decided on images that the gate had judged, and what that may change.

A reader's word wins over the checks, with one exception: an image that the check for usable images or the check for copies did
not accept is never accepted by a reader, since neither a broken file nor somebody's near-copy is a matter of taste.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medaug.errors import DataError
from medaug.quality.finding import ACCEPT, REJECT
from medaug.quality.reader_csv import read_reader_csv
from medaug.quality.verdicts import Verdict

READER_REJECTED = "reader-rejected"
LOCKING = ("usable", "copies")  # checks that no reader overrules
COLUMNS = ("id", "verdict", "reader")  # of the CSV

__all__ = ["COLUMNS", "LOCKING", "READER_REJECTED", "Decision", "apply_review", "read_reviews", "review_facts", "standing"]


@dataclass(frozen=True)
class Decision:
    """A reader's word on one image.

    Attributes:
        verdict: "accept" or "reject".
        reader: pseudonym, as the reader gave it.
        csv_sha256: of the file that says so.
    """

    verdict: str
    reader: str
    csv_sha256: str


def read_reviews(paths: Sequence[Path], known: Collection[str]) -> dict[str, Decision]:
    """Decisions by case id.

    Args:
        paths: CSV files with the columns id, verdict, reader, as ``review.html`` exports them.
        known: ids of the synthetic cases under judgement.

    Raises:
        DataError: see `read_reader_csv`; an image in two files (code `reader-csv-id-twice`).
    """
    decisions: dict[str, Decision] = {}
    for path in paths:
        table = read_reader_csv(path, {"verdict": (ACCEPT, REJECT)}, known, "gate")
        twice = sorted(set(table.rows) & set(decisions))
        if twice:
            text = f"Two review files decide on {len(twice)} image(s), such as {twice[0]}; leave one row for each image."
            raise DataError("reader-csv-id-twice", text)
        decisions |= {key: Decision(row["verdict"], row["reader"], table.sha256) for key, row in table.rows.items()}
    return decisions


def standing(by_check: Mapping[str, str]) -> list[str]:
    """The checks against this image that no reader overrules; empty if a reader may accept it."""
    return [name for name in LOCKING if by_check.get(name, ACCEPT) != ACCEPT]


def apply_review(verdicts: Sequence[Verdict], decisions: Mapping[str, Decision]) -> list[Verdict]:
    """The verdicts with a reader's word in the place of the checks' where there is one.

    Raises:
        DataError: a reader accepts an image that stands locked (code `review-locked`).
    """
    wished = [verdict for verdict in verdicts if verdict.case.id in decisions and decisions[verdict.case.id].verdict == ACCEPT]
    locked = [verdict.case.id for verdict in wished if standing(verdict.by_check)]
    if locked:
        raise DataError(
            "review-locked",
            f"The review accepts {len(locked)} image(s), such as {locked[0]}, that are unusable or too near to a real image; no reader "
            "can accept these, so take the rows out of the CSV.",
        )
    return [_reviewed(verdict, decisions.get(verdict.case.id)) for verdict in verdicts]


def _reviewed(verdict: Verdict, decision: Decision | None) -> Verdict:
    if decision is None:
        return verdict
    codes = [code for code, _ in verdict.reasons]
    word: dict[str, Any] = {"reader": decision.reader, "verdict": decision.verdict, "csv_sha256": decision.csv_sha256}
    word |= {"gate_verdict": verdict.verdict, "gate_reasons": codes}
    lineage = {**verdict.lineage, "reviewed_by": word}
    if decision.verdict == ACCEPT:
        return replace(verdict, verdict=ACCEPT, reasons=(), lineage=lineage, unlabelled=False)
    reasons = ((READER_REJECTED, "A reader rejected the image."), *verdict.reasons)
    return replace(verdict, verdict=REJECT, reasons=reasons, lineage=lineage, unlabelled=False)


def review_facts(judged: Sequence[Verdict], decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """Counts for ``gate.json``: decisions by verdict, and how many of them differ from the gate's."""
    counts = Counter(decision.verdict for decision in decisions.values())
    before = {verdict.case.id: verdict.verdict for verdict in judged}
    changed = sum(before[key] != decision.verdict for key, decision in decisions.items())
    readers = sorted({decision.reader for decision in decisions.values()})
    files = sorted({decision.csv_sha256 for decision in decisions.values()})
    return {"accepted": counts[ACCEPT], "rejected": counts[REJECT], "changed": changed, "readers": readers, "csv_sha256": files}
