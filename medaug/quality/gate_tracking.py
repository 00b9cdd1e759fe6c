"""The gate's MLflow records: tables, rates, contact sheets, distances to training images, and the report as a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaug.quality.distance_figure import FIGURE_NAME, distance_figure
from medaug.quality.report import REPORT_NAME, class_sheets

if TYPE_CHECKING:
    from medaug.quality.context import GateContext
    from medaug.quality.verdicts import Verdict
    from medaug.tracking import Run

SHEETS = "gate/real accepted quarantined rejected"  # one step per class, in the cohort's order

__all__ = ["SHEETS", "log_gate", "reason_rows"]


def reason_rows(verdicts: Sequence[Verdict], classes: Sequence[str]) -> list[dict[str, Any]]:
    """How often each reason was given: one row per verdict and code with the images of each class, most frequent first."""
    counts: dict[tuple[str, str], Counter[int]] = {}
    for verdict in verdicts:
        for code in dict.fromkeys(code for code, _ in verdict.reasons):
            counts.setdefault((verdict.verdict, code), Counter())[verdict.case.label] += 1
    rows = [
        {"verdict": word, "reason": code, "images": count.total()} | {name: count[label] for label, name in enumerate(classes)}
        for (word, code), count in counts.items()
    ]
    return sorted(rows, key=lambda row: (-row["images"], row["verdict"], row["reason"]))


def log_gate(run: Run | None, context: GateContext, verdicts: Sequence[Verdict], summary: Mapping[str, Any], out: Path) -> None:
    """Record a gate; class names are labels, so no patient is named.

    Args:
        run: what takes it; None does nothing.
        context: the cohorts.
        verdicts: of all images.  summary: the content of ``gate.json``.
        out: the gate's folder, where the report lies already.
    """
    if run is None:
        return
    classes = context.cohort.classes
    run.log_params(summary["config"])
    run.log_cohort(context.cohort, "reference")
    run.log_cohort(context.synthetic, "synthetic")
    metrics = {f"acceptance.{row['name']}": row["rate"] for row in summary["acceptance"]}
    metrics |= {f"reasons.{code}": count for code, count in summary["reasons"].items()}
    metrics["accepted"] = sum(row["accepted"] for row in summary["acceptance"])
    metrics["copy_rate"] = (summary.get("copies") or {}).get("rate")
    metrics["filter_accuracy"] = ((summary.get("filter") or {}).get("validation") or {}).get("accuracy")
    run.log_metrics(metrics)
    run.log_table(summary["acceptance"], "gate_acceptance")
    run.log_table(reason_rows(verdicts, classes), "gate_reasons")
    run.log_table([{**row, "reasons": " ".join(row["reasons"])} for row in summary["verdicts"]], "gate_verdicts")
    for step, sheet in enumerate(class_sheets(context.cohort, context.synthetic, summary["verdicts"])):
        run.log_image(sheet, SHEETS, step)
    if (figure := distance_figure(summary)) is not None:
        run.log_figure(figure, FIGURE_NAME)
    run.log_artifact(out / REPORT_NAME)
