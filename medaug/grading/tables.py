"""Rows and verdict as tables: CSV lines, Markdown, LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medaug.grading.rows import Row
from medaug.grading.statistics import TIE_DECIMALS
from medaug.grading.verdict import METRIC_LABELS

METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "auc", "quadratic_kappa", "grade_mae", "ece")
ALL = "all"  # in the place of a network's name
# What a table's numbers are, for its caption.
_KEY = (
    "After the mean stands the standard deviation over seeds.",
    "Intervals of one network are over test groups alone and hold its runs fixed; those of all networks cover the luck of training too.",
)
_ONE_PAGE = 45  # lines of a LaTeX table that fit on it
# Names are letters, digits and a few signs, but classes and metrics may come from anywhere.
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}

__all__ = [
    "ALL",
    "METRICS",
    "class_rows",
    "interval",
    "latex_escape",
    "latex_table",
    "markdown_table",
    "number",
    "table_rows",
    "won",
]


def table_rows(rows: Sequence[Row], verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per arm and network, and one per arm for all networks where there are several.

    Metrics are means and standard deviations over seeds; differences to `none` and to the control have their intervals; `won`
    counts the networks with a higher score than `none`. Only arms with a verdict have differences.
    """
    table = []
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for name in [*networks, ALL][: len(networks) + (len(networks) > 1)]:
            runs = [row for row in rows if row["arm"] == arm and name in (row["network"], ALL)]
            if runs:
                table.append(_line(arm, name, runs, verdict.get(arm)))
    return table


def _line(arm: str, network: str, runs: Sequence[Row], entry: Mapping[str, Any] | None) -> dict[str, Any]:
    seeds = sorted({run["seed"] for run in runs})
    passes = {run.get("image_passes") for run in runs}  # rows of earlier versions do not count them
    line: dict[str, Any] = {"arm": arm, "network": network, "seeds": len(seeds)}
    line |= {"num_training": round(_mean(runs, "num_training")), "ratio": _mean(runs, "ratio")}
    line["image_passes"] = passes.pop() if len(passes) == 1 else None
    for metric in METRICS:
        line |= _mean_and_spread(metric, [_of_seed(runs, seed, "test", metric) for seed in seeds])
    for metric in ("balanced_accuracy", "quadratic_kappa"):
        line |= _mean_and_spread(f"validation_{metric}", [_of_seed(runs, seed, "validation", metric) for seed in seeds])
    for name, overall, single in (
        ("difference", "against_none", "per_network"),
        ("control_difference", "against_control", "per_network_control"),
    ):
        found = {} if entry is None else entry[overall] if network == ALL else entry[single].get(network)
        line |= {name: (found or {}).get("difference")}
        line |= {f"{name}_{part}": (found or {}).get(part) for part in ("low", "high", "p_value")}
    return line | _wins(network, entry)


def _mean(runs: Sequence[Row], name: str) -> Any:
    """The mean of a number that only images of their own let differ between seeds; None if it is undefined."""
    values = {run[name] for run in runs}
    return values.pop() if len(values) == 1 else float(np.mean([run[name] for run in runs]))


def _wins(network: str, entry: Mapping[str, Any] | None) -> dict[str, int | None]:
    differences = (
        [] if entry is None else [one["difference"] for name, one in entry["per_network"].items() if network in (name, ALL)]
    )
    known = [value for value in differences if value is not None]
    return {"won": sum(value > 0 for value in known) if known else None, "num_networks": len(known) or None}


def class_rows(verdict: Mapping[str, Any], classes: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """One line per arm and class: the recall, that of `none`, and the differences to `none` and the control with their intervals.

    Args:
        verdict: of `judge`.  classes: names.  counts: test images of each.
    """
    lines = []
    for arm, entry in verdict.items():
        for name, images, found in zip(classes, counts, entry.get("per_class", ()), strict=False):
            none, control = found["against_none"], found["against_control"] or {}
            line = {"arm": arm, "class": name, "images": images, "recall": none["score_a"], "recall_none": none["score_b"]}
            for key, result in (("difference", none), ("control_difference", control)):
                line |= {key: result.get("difference")} | {
                    f"{key}_{part}": result.get(part) for part in ("low", "high", "p_value")
                }
            lines.append(line)
    return lines


def _of_seed(runs: Sequence[Row], seed: int, split: str, metric: str) -> float | None:
    """The mean over networks; None where one of them has no value."""
    values = [run[split]["metrics"][metric] if run[split] else None for run in runs if run["seed"] == seed]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _mean_and_spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        name: float(np.mean(known)) if known else None,
        f"{name}_std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def markdown_table(table: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The table for a README: the primary metric, its companions and the differences to `none` and the control."""
    others = [name for name in METRICS if name != metric and any(line[name] is not None for line in table)]
    head = ["arm", "network", "training images", METRIC_LABELS[metric], "difference to none (95 %)"]
    head += ["difference to repeated real images (95 %)", "networks won", "on validation"]
    head += [name.replace("_", " ") for name in others]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in table:
        values = [line["arm"], line["network"], str(line["num_training"]), number(line[metric], line[f"{metric}_std"])]
        values += [interval(line), interval(line, "control_difference"), won(line)]
        values += [number(line[f"validation_{metric}"], line[f"validation_{metric}_std"])]
        values += [number(line[name], line[f"{name}_std"]) for name in others]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join([*lines, "", *_KEY]) + "\n"


def number(mean: float | None, spread: float | None) -> str:
    """Mean and standard deviation; a mean halfway between two figures is rounded as in the verdict's sentence."""
    if mean is None:
        return "undefined"
    return f"{round(mean, TIE_DECIMALS):.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def interval(line: Mapping[str, Any], name: str = "difference") -> str:
    """A difference of a table's line with its interval, a dash where it has none."""
    if line[name] is None:
        return "–"
    return f"{line[name]:+.3f} ({line[f'{name}_low']:+.3f} to {line[f'{name}_high']:+.3f})"


def won(line: Mapping[str, Any]) -> str:
    """How many networks a line's arm won, a dash where nothing was compared."""
    return "–" if line["won"] is None else f"{line['won']} of {line['num_networks']}"


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def latex_table(table: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The table for a paper: `tabular`, or `longtable` if it is longer than a page, with the rules of booktabs."""
    head = ["Arm", "Network", "Images", METRIC_LABELS[metric].capitalize(), r"$\Delta$ to none", r"$\Delta$ to repeats", "Won"]
    environment = "tabular" if len(table) <= _ONE_PAGE else "longtable"
    packages = "booktabs" if environment == "tabular" else "booktabs,longtable"
    lines = [
        f"% \\usepackage{{{packages}}}",
        *(f"% {line}" for line in _KEY),
        f"\\begin{{{environment}}}{{@{{}}llrcccc@{{}}}}",
        r"\toprule",
    ]
    lines.append(" & ".join(head) + r" \\")
    before = None
    for line in table:
        if line["arm"] != before:
            lines.append(r"\midrule")
        values = [latex_escape(line["arm"]) if line["arm"] != before else "", latex_escape(line["network"])]
        values += [str(line["num_training"]), _in_latex(number(line[metric], line[f"{metric}_std"]))]
        values += [_in_latex(interval(line)), _in_latex(interval(line, "control_difference")), _in_latex(won(line))]
        lines.append(" & ".join(values) + r" \\")
        before = line["arm"]
    return "\n".join([*lines, r"\bottomrule", f"\\end{{{environment}}}", ""])


def _in_latex(text: str) -> str:
    """Numbers in mathematics, so that a minus is as long as a plus."""
    signs = latex_escape(text).replace("±", r"$\pm$").replace("–", "--")
    return re.sub(r"([+-]\d+\.\d+)", r"$\1$", signs)
