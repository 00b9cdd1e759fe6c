"""From a record and its rows to the verdict: the one way there, be the rows fresh from training or read from a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medaug.grading.curves import Point, curve_points
from medaug.grading.record import GradingRecord
from medaug.grading.rows import Row, predictions_of
from medaug.grading.scores import score_cells
from medaug.grading.variants import at_verdict, choose
from medaug.grading.verdict import BASELINE, judge, primary_metric

__all__ = ["judged_rows", "verdict_and_points"]


def judged_rows(failed: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows that a verdict may rest on: those of networks of which no cell failed."""
    without = {row["network"] for row in failed}
    return [row for row in rows if row["network"] not in without]


def verdict_and_points(record: GradingRecord, rows: Sequence[Row]) -> tuple[dict[str, dict[str, Any]], list[Point]]:
    """Choose ratios on validation and judge the arms at them.

    Args:
        rows: of `judged_rows`, complete for every arm of the record.

    Returns:
        the verdict of `judge` with the choice of each arm that had one and the number of its image sets if every seed had its own, and
        the points of `curve_points`.

    Raises:
        ConfigError, DataError: see `judge` and `predictions_of`.
    """
    metric = primary_metric(record.data.ordinal)
    predictions = predictions_of(record.data, rows)
    scores = score_cells(predictions, metric, num_resamples=record.num_resamples)
    choices = choose(record.arms, rows, metric)
    judged = {arm.name: record.opponents[arm.name] for arm in at_verdict(record.arms, choices) if arm.base != BASELINE}
    verdict = judge(predictions, ordinal=record.data.ordinal, notes=record.notes, opponents=judged, scores=scores)
    bases = {arm.name: arm.base for arm in record.arms}
    for name, entry in verdict.items():
        if count := record.image_sets.get(bases[name]):
            entry |= {"image_sets": count}
            entry["sentence"] += (
                f" Each of {count} seeds trained on images of its own, so the interval covers the luck of making them."
            )
    for choice in choices:
        if choice.arm in verdict:
            verdict[choice.arm] |= {"choice": choice.facts()}
            verdict[choice.arm]["sentence"] += f" {choice.sentence()}"
    return verdict, curve_points(record.arms, choices, scores, record.opponents, predictions.validation)
