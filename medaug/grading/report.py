"""Rows and verdict as files people read: rows.csv, table.csv, table.md, table.tex, classes.csv, curves.csv, pictures, report.html."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from medaug import storage
from medaug.cohort import SPLITS
from medaug.grading.curves import Point, learning_figure, mixing_figure
from medaug.grading.figures import VERDICT_COLOURS, comparison_figure, confusion_figure, forest_figure, png
from medaug.grading.graded_data import GradedData
from medaug.grading.metrics import NO_ORDER
from medaug.grading.record import GradingRecord
from medaug.grading.rows import Row, summary_of
from medaug.grading.tables import METRICS, class_rows, interval, latex_table, markdown_table, number, table_rows, won
from medaug.grading.verdict import METRIC_LABELS, primary_metric

PLOT_NAME = "comparison.png"
# Written only where there is something to show; a picture of an earlier run with other arms does not stay behind.
FIGURES = (PLOT_NAME, "forest.png", "mixing.png", "learning.png", "confusion.png")
TABLES = ("table.md", "table.tex", "table.csv", "rows.csv")
CURVES, CLASSES = "curves.csv", "classes.csv"

__all__ = ["CLASSES", "CURVES", "FIGURES", "PLOT_NAME", "TABLES", "pictures", "write_report"]


def write_report(
    out: Path,
    record: GradingRecord,
    rows: Sequence[Row],
    verdict: Mapping[str, Any],
    *,
    points: Sequence[Point] = (),
    plots: Mapping[str, bytes] | None = None,
) -> list[str]:
    """Write every file of the report into `out`. Returns the names of its pictures.

    Args:
        record: of the grading; its command is shown as it is.
        rows: full rows of `run_benchmark`.  verdict: of `judge`.
        points: of `curve_points`, where an arm was graded at several ratios or fractions.
        plots: of `pictures`, where they are there already.

    Raises:
        StorageError: the folder cannot be written.
    """
    metric = primary_metric(record.data.ordinal)
    table = table_rows(rows, verdict)
    summaries = [_flat(summary_of(row)) for row in rows]
    columns = dict.fromkeys(name for summary in summaries for name in summary)  # arms may know more than others
    storage.write_csv(out / "rows.csv", summaries, list(columns))
    storage.write_csv(out / "table.csv", table, list(table[0]))
    storage.write_text(out / "table.md", markdown_table(table, metric))
    storage.write_text(out / "table.tex", latex_table(table, metric))
    by_class = class_rows(verdict, record.data.classes, record.data.splits["test"]["per_class"])
    for name, lines in ((CURVES, points), (CLASSES, by_class)):
        if lines:
            storage.write_csv(out / name, lines, list(lines[0]))
        else:
            (out / name).unlink(missing_ok=True)
    plots = pictures(record, rows, verdict, points) if plots is None else plots
    for name in FIGURES:
        if name in plots:
            storage.write_bytes(out / name, plots[name])
        else:
            (out / name).unlink(missing_ok=True)
    storage.write_text(out / "report.html", _html(record, rows, table, by_class, verdict, metric, plots, points))
    return list(plots)


def pictures(record: GradingRecord, rows: Sequence[Row], verdict: Mapping[str, Any], points: Sequence[Point]) -> dict[str, bytes]:
    """The pictures of a report as PNG files, by name; arguments as of `write_report`."""
    figures = _figures(record.data, rows, verdict, points, primary_metric(record.data.ordinal))
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def _figures(
    data: GradedData, rows: Sequence[Row], verdict: Mapping[str, Any], points: Sequence[Point], metric: str
) -> dict[str, Figure | None]:
    """All pictures by file name; those of single arms show the arms of the verdict and what they are compared with."""
    named = {name for entry in verdict.values() for name in (*entry["opponents"].values(), *verdict)}
    shown = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm in named or not verdict]
    return {
        PLOT_NAME: comparison_figure([row for row in rows if row["arm"] in shown], verdict, metric),
        "forest.png": forest_figure(verdict, metric) if verdict else None,
        "mixing.png": mixing_figure(points, metric),
        "learning.png": learning_figure(points, metric),
        "confusion.png": confusion_figure(rows, shown, data.classes),
    }


def _surprises(rows: Sequence[Row]) -> set[str]:
    """Metrics without a value that a reader would expect to have one, with the reason."""
    entries = {(name, reason) for row in rows for name, reason in row["test"]["metrics"]["undefined"].items()}
    return {f"{name}: {reason}" for name, reason in entries if reason != NO_ORDER}


def _flat(summary: Row) -> Row:
    """A summary without nested values, for CSV."""
    validation = {f"validation_{name}": value for name, value in (summary["validation"] or {}).items()}
    plain = {name: value for name, value in summary.items() if not isinstance(value, (dict, list)) and name != "validation"}
    return plain | validation


def _html(
    record: GradingRecord,
    rows: Sequence[Row],
    table: Sequence[Mapping[str, Any]],
    by_class: Sequence[Mapping[str, Any]],
    verdict: Mapping[str, Any],
    metric: str,
    plots: Mapping[str, bytes],
    points: Sequence[Point],
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("medaug.grading")
    )
    environment.filters["number"] = lambda value: "undefined" if value is None else f"{value:.3f}"
    environment.filters["signed"] = lambda value: "undefined" if value is None else f"{value:+.3f}"
    environment.filters["amount"] = lambda value: "–" if value is None else f"{value:g}"
    data = record.data
    return environment.get_template("report.html.j2").render(
        cohort=data,
        counts={split: (data.splits[split]["images"], data.splits[split]["groups"]) for split in SPLITS},
        class_counts={split: data.splits[split]["per_class"] for split in SPLITS},
        leak=data.leak,
        warnings=list(dict.fromkeys(note for entry in verdict.values() for note in entry["warnings"])),
        verdict=verdict,
        colours=VERDICT_COLOURS,
        table=table,
        by_class=by_class,
        metric=metric,
        metric_label=METRIC_LABELS[metric],
        metrics=[name for name in METRICS if any(line[name] is not None for line in table)],
        cell=number,
        interval=interval,
        won=won,
        plots={name: base64.b64encode(plot).decode() for name, plot in plots.items()},
        points=points,
        several_ratios=any(point["chosen"] is not None for point in points),
        command=record.command,
        profile=record.profile,
        networks=list(dict.fromkeys(row["network"] for row in rows)),
        seeds=sorted({row["seed"] for row in rows}),
        best=max((line["balanced_accuracy"] for line in table if line["balanced_accuracy"] is not None), default=None),
        undefined=sorted(_surprises(rows)),
    )
