"""The part of an unfinished grading that can be judged: arms of which every training run is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medaug.errors import DataError
from medaug.grading.record import GradingRecord
from medaug.grading.rows import Row
from medaug.grading.verdict import BASELINE

__all__ = ["finished_part"]


def finished_part(record: GradingRecord, rows: Sequence[Row]) -> tuple[GradingRecord, list[Row]]:
    """The record and rows of the arms that are whole, and whose opponents are; all of them once nothing is missing.

    An arm that is graded at several ratios counts as one: a choice among some of its ratios would be another choice.

    Raises:
        DataError: `page-too-early` as long as the baseline is not among them.
    """
    missing = {cell.arm for cell in record.missing(rows)}
    torn = {arm.base for arm in record.arms if arm.name in missing}
    whole = {arm.name for arm in record.arms if arm.base not in torn}
    while lost := {name for name in whole if name in record.opponents and not record.opponents[name].names() <= whole}:
        whole -= lost
    if not any(arm.base == BASELINE for arm in record.arms if arm.name in whole):
        raise DataError(
            "page-too-early",
            f"Of the arm `{BASELINE}` training runs are still missing, so nothing can be compared yet; run the same command again.",
        )
    part = replace(
        record,
        arms=tuple(arm for arm in record.arms if arm.name in whole),
        opponents={name: other for name, other in record.opponents.items() if name in whole},
        cells=tuple(cell for cell in record.cells if cell.arm in whole),
    )
    return part, [row for row in rows if row["arm"] in whole]
