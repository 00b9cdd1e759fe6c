"""The part of an unfinished grading that can be judged: networks, or arms, of which every training run is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medaug.errors import DataError
from medaug.grading.record import CellName, GradingRecord
from medaug.grading.rows import Row
from medaug.grading.verdict import BASELINE

__all__ = ["finished_part"]


def finished_part(record: GradingRecord, rows: Sequence[Row]) -> tuple[GradingRecord, list[Row]]:
    """The record and rows of what can be compared already; all of them once nothing is missing.

    A comparison needs every network in every arm. Kept are either all arms with the networks that are whole in each, or all networks with
    the arms that are whole, whichever leaves more training runs; what the runs say has no part in the choice.

    Raises:
        DataError: `page-too-early` as long as no network is whole and the baseline is not among the whole arms.
    """
    missing = record.missing(rows)
    part = max(_of_whole_arms(record, missing), _of_whole_networks(record, missing), key=lambda kept: len(kept.cells))
    if not any(arm.base == BASELINE for arm in part.arms):
        raise DataError(
            "page-too-early",
            f"Of the arm `{BASELINE}` training runs are still missing, so nothing can be compared yet; run the same command again.",
        )
    kept = {(cell.arm, cell.network, cell.seed) for cell in part.cells}
    return part, [row for row in rows if (row["arm"], row["network"], row["seed"]) in kept]


def _of_whole_arms(record: GradingRecord, missing: Sequence[CellName]) -> GradingRecord:
    """Without the arms that miss a run or whose opponents do.

    An arm that is graded at several ratios counts as one: a choice among some of its ratios would be another choice. Without the
    baseline there is nothing to compare, so nothing is kept.
    """
    lacking = {cell.arm for cell in missing}
    torn = {arm.base for arm in record.arms if arm.name in lacking}
    whole = {arm.name for arm in record.arms if arm.base not in torn}
    while lost := {name for name in whole if name in record.opponents and not record.opponents[name].names() <= whole}:
        whole -= lost
    if not any(arm.base == BASELINE for arm in record.arms if arm.name in whole):
        whole = set()
    return replace(
        record,
        arms=tuple(arm for arm in record.arms if arm.name in whole),
        opponents={name: other for name, other in record.opponents.items() if name in whole},
        cells=tuple(cell for cell in record.cells if cell.arm in whole),
    )


def _of_whole_networks(record: GradingRecord, missing: Sequence[CellName]) -> GradingRecord:
    """Without the networks that miss a run."""
    torn = {cell.network for cell in missing}
    return replace(record, cells=tuple(cell for cell in record.cells if cell.network not in torn))
