"""Pictures of a comparison: every run's score, the differences of the networks, the confusion matrices."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from medaug.grading.rows import Row
from medaug.grading.verdict import BASELINE, METRIC_LABELS

VERDICT_COLOURS = {"helps": "#1a7f37", "harms": "#b42318", "no evidence": "#57606a"}
_MOST_ANNOTATED = 20  # classes; beyond, colours alone
_NAME_WIDTH = 26

__all__ = ["VERDICT_COLOURS", "comparison_figure", "confusion_figure", "forest_figure", "literal", "new_figure", "png"]


def new_figure(width: float, height: float, pad: float = 0.04) -> Figure:
    """An empty figure, in inches, with `pad` around every panel, that needs no display."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=pad, w_pad=pad))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()


def network_mark(index: int) -> tuple[str, str]:
    """Colour and marker of a network by its place: ten colours, then the same ones with the next marker."""
    return f"C{index % 10}", "osD^v"[index // 10 % 5]


def comparison_figure(rows: Sequence[Row], verdict: Mapping[str, Any], metric: str) -> Figure:
    """Left: every run's score by arm, one marker per network. Right: differences to `none` with 95 % intervals."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lanes = len(networks) + 1
    figure = new_figure(13, 1.8 + len(arms) * max(0.3 * min(lanes, 4), 0.18 * lanes))
    scores, differences = figure.subplots(1, 2, sharey=True)
    offsets = {name: 0.8 * ((index + 0.5) / lanes - 0.5) for index, name in enumerate([*networks, ""])}
    for index, network in enumerate(networks):
        colour, marker = network_mark(index)
        for place, arm in enumerate(arms):
            values = [run["test"]["metrics"][metric] for run in rows if (run["arm"], run["network"]) == (arm, network)]
            known = [value for value in values if value is not None]
            height = place + offsets[network]
            label = network if place == 0 else None  # the dots: of more than ten networks only their shape tells some apart
            scores.plot(known, [height] * len(known), marker, linestyle="", color=colour, alpha=0.45, markersize=5, label=label)
            if known:
                scores.plot([np.mean(known)], [height], "|", color=colour, markersize=13, markeredgewidth=2.5)
            result = verdict.get(arm, {}).get("per_network", {}).get(network)
            if result is not None:
                _whisker(differences, result, height, colour, 1.2)
    for place, arm in enumerate(arms):
        if arm in verdict:
            colour = VERDICT_COLOURS[verdict[arm]["verdict"]]
            _whisker(differences, verdict[arm]["against_none"], place + offsets[""], colour, 3.0)
    label = METRIC_LABELS[metric]
    scores.set(
        yticks=range(len(arms)), yticklabels=arms, xlabel=f"{label} on the test split; bar = mean over seeds", title="Scores"
    )
    scores.set_ylim(len(arms) - 0.5, -0.5)
    differences.axvline(0, color="black", linewidth=0.8)
    differences.set(
        xlabel=f"{label}: arm − {BASELINE}, 95 % interval",
        title="Differences\nthin: over test groups; thick: all networks, luck of training too",
    )
    for axis in (scores, differences):
        axis.grid(axis="x", alpha=0.3)
        for place in range(1, len(arms)):
            axis.axhline(place - 0.5, color="black", linewidth=0.4, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(networks), 5), frameon=False)
    return figure


def _whisker(axis: Any, result: Mapping[str, Any], height: float, colour: str, width: float) -> None:
    if result["difference"] is None:
        return
    axis.plot([result["low"], result["high"]], [height, height], color=colour, linewidth=width, solid_capstyle="butt")
    axis.plot([result["difference"]], [height], "o", color=colour, markersize=3 + width)


def forest_figure(verdict: Mapping[str, Any], metric: str) -> Figure:
    """Every network's difference with its interval, and that of all networks: left against `none`, right against the control."""
    networks = list(next(iter(verdict.values()))["per_network"])
    columns = 2 if any(entry["against_control"] for entry in verdict.values()) else 1
    figure = new_figure(6.5 * columns + 1, 0.6 + len(verdict) * (1.0 + 0.24 * (len(networks) + 1)), pad=0.1)
    panels = figure.subplots(len(verdict), columns, squeeze=False, sharex=True, sharey=True)
    for line, (arm, entry) in zip(panels, verdict.items(), strict=True):
        names = entry["opponents"]
        _forest(line[0], f"{arm} − {names['baseline']}", entry["per_network"], entry["against_none"], entry)
        if names["control"] is not None:
            _forest(line[1], f"{arm} − {names['control']}", entry["per_network_control"], entry["against_control"], entry)
        elif columns == 2:
            line[1].set_axis_off()
            line[1].text(0.5, 0.5, f"no control for {arm}", ha="center", transform=line[1].transAxes, color="#57606a")
    last = len(networks)
    panels[0][0].set(ylim=(last + 0.6, -0.6), yticks=range(last + 1), yticklabels=[*networks, "all networks"])
    figure.supxlabel(
        f"difference in {METRIC_LABELS[metric]} on the test split with its 95 % interval\n"
        "of one network: over test groups alone; of all networks: the luck of training too",
        fontsize=10,
    )
    return figure


def _forest(axis: Any, title: str, networks: Mapping[str, Any], overall: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """One panel: a line per network, the one of all networks below in the colour of the verdict."""
    known = [one["difference"] for one in networks.values() if one["difference"] is not None]
    wins = f"{sum(value > 0 for value in known)} of {len(known)} networks won"
    axis.set_title(f"{_short(title, 72)}\n{wins}", fontsize=9, loc="left")
    for place, result in enumerate([*networks.values(), overall]):
        last = place == len(networks)
        _whisker(axis, result, place, VERDICT_COLOURS[entry["verdict"]] if last else "#0a5ea8", 3.0 if last else 1.4)
        weight = "bold" if last else "normal"
        text = _numbers(result)
        axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8, fontweight=weight)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axhline(len(networks) - 0.5, color="black", linewidth=0.5, alpha=0.4)
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _numbers(result: Mapping[str, Any]) -> str:
    if result["difference"] is None:
        return "undefined"
    return f"{result['difference']:+.3f} ({result['low']:+.3f} to {result['high']:+.3f})".replace("-", "−")


def confusion_figure(rows: Sequence[Row], arms: Iterable[str], classes: Sequence[str]) -> Figure:
    """How the real test images of each class were called, by arm: shares of the class, and mean number of images per run."""
    counts = {arm: mean_confusion(rows, arm) for arm in arms}
    columns = min(3 if len(classes) <= 8 else 2, len(counts))
    lines = math.ceil(len(counts) / columns)
    size = max(2.4, 0.6 * len(classes))
    figure = new_figure((size + 0.4) * columns + 3.2, (size + 0.4) * lines + 1.4)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    names = [literal(_short(name.replace("_", " "), _NAME_WIDTH)) for name in classes]
    places = range(len(classes))
    for number, (axis, (arm, matrix)) in enumerate(zip(panels, counts.items(), strict=False)):
        support = matrix.sum(1, keepdims=True)
        shares = np.divide(matrix, support, out=np.zeros_like(matrix), where=support > 0)
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(_short(arm, 34), fontsize=10)
        _annotate(axis, matrix, shares)
        first, lowest = number % columns == 0, number + columns >= len(counts)
        sizes = [f"{name} (n = {total:g})" for name, total in zip(names, support[:, 0], strict=True)]
        axis.set_yticks(places, sizes if first else [""] * len(classes), fontsize=8)
        axis.set_xticks(
            places, names if lowest else [""] * len(classes), rotation=35, ha="right", rotation_mode="anchor", fontsize=8
        )
    for axis in panels[len(counts) :]:
        axis.set_axis_off()
    figure.supxlabel("predicted", fontsize=10)
    figure.supylabel("true class", fontsize=10)
    figure.colorbar(image, ax=list(panels), label="share of the class", shrink=0.6, aspect=30)
    return figure


def literal(text: str) -> str:
    """Text that a figure shows as it is: two dollar signs in a name are no formula."""
    return text.replace("$", r"\$")


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _annotate(axis: Any, matrix: np.ndarray, shares: np.ndarray) -> None:
    """Share and count in every cell, where there are not too many."""
    if len(matrix) > _MOST_ANNOTATED:
        return
    for (truth, called), count in np.ndenumerate(matrix):
        colour = "white" if shares[truth, called] > 0.55 else "black"
        text = f"{100 * shares[truth, called]:.0f} %\n{count:.1f}"
        axis.text(called, truth, text, ha="center", va="center", fontsize=7, color=colour)


def mean_confusion(rows: Sequence[Row], arm: str) -> np.ndarray:
    """(K, K) number of test images, rows the truth, mean over the runs of an arm: every network and seed counts alike."""
    return np.mean([row["test"]["metrics"]["confusion"] for row in rows if row["arm"] == arm], axis=0).astype(float)
