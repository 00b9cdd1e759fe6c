"""Rows and verdict as files people read: rows.csv, table.csv, table.md, comparison.png, report.html."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medaug import storage
from medaug.cohort import Cohort
from medaug.grading.benchmark import Row, summary_of
from medaug.grading.statistics import NO_ORDER
from medaug.grading.verdict import BASELINE, METRIC_LABELS, primary_metric

PLOT_NAME = "comparison.png"
METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "auc", "quadratic_kappa", "grade_mae", "ece")
_COLOURS = {"helps": "#1a7f37", "harms": "#b42318", "no evidence": "#57606a"}

__all__ = ["METRICS", "PLOT_NAME", "comparison_figure", "markdown_table", "table_rows", "write_report"]


def table_rows(rows: Sequence[Row], verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per arm and network: mean and spread over seeds of the metrics, and the difference to `none` with its interval."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["arm"], row["network"]), []).append(row)
    table = []
    for (arm, network), runs in cells.items():
        line: dict[str, Any] = {
            "arm": arm,
            "network": network,
            "seeds": len(runs),
            "num_training": runs[0]["num_training"],
            "ratio": runs[0]["ratio"],
            "image_passes": runs[0].get("image_passes"),  # rows of earlier versions do not count them
        }
        for metric in METRICS:
            line |= _mean_and_spread(metric, [run["test"]["metrics"][metric] for run in runs])
        for metric in ("balanced_accuracy", "quadratic_kappa"):
            line |= _mean_and_spread(
                f"validation_{metric}", [run["validation"]["metrics"][metric] for run in runs if run["validation"]]
            )
        difference = verdict.get(arm, {}).get("per_network", {}).get(network, {})
        line |= {"difference": difference.get("difference")}
        line |= {f"difference_{name}": difference.get(name) for name in ("low", "high", "p_value")}
        table.append(line)
    return table


def _mean_and_spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        name: float(np.mean(known)) if known else None,
        f"{name}_std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def markdown_table(table: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The table for a README: the primary metric, its companions and the difference to `none`."""
    others = [name for name in METRICS if name != metric and any(line[name] is not None for line in table)]
    head = [
        "arm",
        "network",
        "training images",
        METRIC_LABELS[metric],
        "difference to none (95 %)",
        "on validation",
        *(name.replace("_", " ") for name in others),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in table:
        values = [line["arm"], line["network"], str(line["num_training"]), _number(line[metric], line[f"{metric}_std"])]
        values += [_interval(line), _number(line[f"validation_{metric}"], line[f"validation_{metric}_std"])]
        values += [_number(line[name], line[f"{name}_std"]) for name in others]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _number(mean: float | None, spread: float | None) -> str:
    return "undefined" if mean is None else f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _interval(line: Mapping[str, Any]) -> str:
    if line["difference"] is None:
        return "–"
    return f"{line['difference']:+.3f} ({line['difference_low']:+.3f} to {line['difference_high']:+.3f})"


def comparison_figure(rows: Sequence[Row], verdict: Mapping[str, Any], metric: str) -> Figure:
    """Left: every run's score by arm, one marker per network. Right: differences to `none` with 95 % intervals."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lanes = len(networks) + 1
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(arms) * lanes), layout="constrained")
    FigureCanvasAgg(figure)
    scores, differences = figure.subplots(1, 2, sharey=True)
    offsets = {name: 0.8 * ((index + 0.5) / lanes - 0.5) for index, name in enumerate([*networks, ""])}
    for index, network in enumerate(networks):
        colour = f"C{index % 10}"
        for place, arm in enumerate(arms):
            values = [run["test"]["metrics"][metric] for run in rows if (run["arm"], run["network"]) == (arm, network)]
            known = [value for value in values if value is not None]
            height = place + offsets[network]
            scores.plot(known, [height] * len(known), "o", color=colour, alpha=0.45, markersize=5)
            if known:
                scores.plot(
                    [np.mean(known)],
                    [height],
                    "|",
                    color=colour,
                    markersize=13,
                    markeredgewidth=2.5,
                    label=network if place == 0 else None,
                )
            result = verdict.get(arm, {}).get("per_network", {}).get(network)
            if result is not None:
                _whisker(differences, result, height, colour, 1.2)
    for place, arm in enumerate(arms):
        if arm in verdict:
            _whisker(differences, verdict[arm]["against_none"], place + offsets[""], _COLOURS[verdict[arm]["verdict"]], 3.0)
    label = METRIC_LABELS[metric]
    scores.set(
        yticks=range(len(arms)), yticklabels=arms, xlabel=f"{label} on the test split; bar = mean over seeds", title="Scores"
    )
    scores.invert_yaxis()
    differences.axvline(0, color="black", linewidth=0.8)
    differences.set(
        xlabel=f"{label}: arm − {BASELINE}, 95 % interval over test groups", title="Differences (thick: all networks together)"
    )
    for axis in (scores, differences):
        axis.grid(axis="x", alpha=0.3)
        for place in range(1, len(arms)):
            axis.axhline(place - 0.5, color="black", linewidth=0.4, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(networks), 6), frameon=False)
    return figure


def _whisker(axis: Any, result: Mapping[str, Any], height: float, colour: str, width: float) -> None:
    if result["difference"] is None:
        return
    axis.plot([result["low"], result["high"]], [height, height], color=colour, linewidth=width, solid_capstyle="butt")
    axis.plot([result["difference"]], [height], "o", color=colour, markersize=3 + width)


def write_report(
    out: Path, cohort: Cohort, rows: Sequence[Row], verdict: Mapping[str, Any], *, command: str = "", profile: str = ""
) -> None:
    """Write every file of the report into `out`.

    Args:
        rows: full rows of `run_benchmark`.  verdict: of `judge`.
        command: the command line that made it, without personal paths; shown as it is.

    Raises:
        StorageError: the folder cannot be written.
    """
    metric = primary_metric(cohort.ordinal)
    table = table_rows(rows, verdict)
    summaries = [_flat(summary_of(row)) for row in rows]
    columns = dict.fromkeys(name for summary in summaries for name in summary)  # arms may know more than others
    storage.write_csv(out / "rows.csv", summaries, list(columns))
    storage.write_csv(out / "table.csv", table, list(table[0]))
    storage.write_text(out / "table.md", markdown_table(table, metric))
    picture = io.BytesIO()
    comparison_figure(rows, verdict, metric).savefig(picture, format="png", dpi=130, metadata={"Software": None})
    storage.write_bytes(out / PLOT_NAME, picture.getvalue())
    storage.write_text(out / "report.html", _html(cohort, rows, table, verdict, metric, picture.getvalue(), command, profile))


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
    cohort: Cohort,
    rows: Sequence[Row],
    table: Sequence[Mapping[str, Any]],
    verdict: Mapping[str, Any],
    metric: str,
    plot: bytes,
    command: str,
    profile: str,
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("medaug.grading")
    )
    environment.filters["number"] = lambda value: "undefined" if value is None else f"{value:.3f}"
    environment.filters["signed"] = lambda value: "undefined" if value is None else f"{value:+.3f}"
    counts = {split: (len(cohort.split(split)), len(cohort.groups(split))) for split in ("training", "validation", "test")}
    return environment.get_template("report.html.j2").render(
        cohort=cohort,
        counts=counts,
        class_counts={split: cohort.class_counts(split) for split in counts},
        leak=cohort.notes.get("leak") or {},
        warnings=list(dict.fromkeys(note for entry in verdict.values() for note in entry["warnings"])),
        verdict=verdict,
        colours=_COLOURS,
        table=table,
        metric=metric,
        metric_label=METRIC_LABELS[metric],
        metrics=[name for name in METRICS if any(line[name] is not None for line in table)],
        cell=_number,
        interval=_interval,
        plot=base64.b64encode(plot).decode(),
        command=command,
        profile=profile,
        networks=list(dict.fromkeys(row["network"] for row in rows)),
        seeds=sorted({row["seed"] for row in rows}),
        best=max((line["balanced_accuracy"] for line in table if line["balanced_accuracy"] is not None), default=None),
        undefined=sorted(_surprises(rows)),
    )
