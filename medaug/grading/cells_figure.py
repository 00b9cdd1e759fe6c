"""The picture of a mixing experiment: the score of every cell and network, with its spread over seeds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medaug.grading.figures import network_mark
from medaug.grading.verdict import METRIC_LABELS

WIDTH = 0.8  # of a cell's lane that its networks share

__all__ = ["cells_figure", "cells_png"]


def cells_figure(rows: Sequence[Mapping[str, Any]], cells: Sequence[str], metric: str, title: str = "") -> Figure:
    """Dots for the runs, a bar from the lowest to the highest and a dash for the mean over seeds.

    Args:
        rows: summaries of a benchmark: arm, network, seed and the metric; runs without a value are left out.
        cells: arms to show, in this order.
        metric: a key of the rows.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(max(6.4, 1.6 + 0.85 * len(cells)), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for index, network in enumerate(networks):
        offset = WIDTH * ((index + 0.5) / len(networks) - 0.5)
        (colour, marker), label = network_mark(index), network
        for place, cell in enumerate(cells):
            values = [row[metric] for row in rows if (row["arm"], row["network"]) == (cell, network) and row[metric] is not None]
            if not values:
                continue
            x = place + offset
            axis.plot([x, x], [min(values), max(values)], color=colour, linewidth=4, alpha=0.25, solid_capstyle="butt")
            axis.plot([x] * len(values), values, marker, linestyle="", color=colour, alpha=0.6, markersize=4)
            axis.plot([x], [np.mean(values)], "_", color=colour, markersize=13, markeredgewidth=2.5, label=label)
            label = "_nolegend_"
    for place in range(1, len(cells)):
        axis.axvline(place - 0.5, color="black", linewidth=0.4, alpha=0.25)
    axis.set(
        xticks=range(len(cells)), xlim=(-0.5, len(cells) - 0.5), ylabel=f"{METRIC_LABELS.get(metric, metric)} on the test split"
    )
    axis.set_xticklabels(cells, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_title(f"{title}\ndash: mean over seeds; bar: lowest to highest" if title else "", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(max(len(networks), 1), 6), frameon=False)
    return figure


def cells_png(rows: Sequence[Mapping[str, Any]], cells: Sequence[str], metric: str, title: str = "") -> bytes:
    """`cells_figure` as a PNG file, the same bytes for the same rows."""
    picture = io.BytesIO()
    cells_figure(rows, cells, metric, title).savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return picture.getvalue()
