"""How far synthetic images lie from their nearest training image, beside the threshold below which one counts as a near-copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medaug.quality.finding import ACCEPT, QUARANTINE, REJECT

FIGURE_NAME = "nearest_training_distance.png"
BINS = 40
_COLOURS = {ACCEPT: "#1a7f37", QUARANTINE: "#bf8700", REJECT: "#8c959f"}

__all__ = ["FIGURE_NAME", "distance_figure", "distances_by_verdict"]


def distances_by_verdict(summary: Mapping[str, Any], space: str) -> dict[str, list[float]]:
    """Distances to the nearest training image in one space, listed by the verdict on the image."""
    found: dict[str, list[float]] = {verdict: [] for verdict in _COLOURS}
    for row in summary["verdicts"]:
        distance = row.get("nearest_by_space", {}).get(space, {}).get("distance")
        if distance is not None:
            found[row["verdict"]].append(distance)
    return found


def distance_figure(summary: Mapping[str, Any]) -> Figure | None:
    """One stacked histogram per space that the copies were looked for in; None if they were not.

    Args:
        summary: the content of ``gate.json``.
    """
    spaces = summary.get("copy_spaces") or {}
    if not spaces:
        return None
    figure = Figure(figsize=(5.2 * len(spaces), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (space, facts) in zip(figure.subplots(1, len(spaces), squeeze=False)[0], spaces.items(), strict=True):
        found = distances_by_verdict(summary, space)
        largest = max([facts["threshold"], *(value for values in found.values() for value in values)])
        edges = np.linspace(0, 1.02 * largest or 1.0, BINS + 1)
        labels = [f"{verdict} ({len(values)})" for verdict, values in found.items()]
        axis.hist(list(found.values()), bins=edges, stacked=True, color=list(_COLOURS.values()), label=labels)
        axis.axvline(facts["threshold"], color="black", linewidth=1, linestyle="--", label="near-copy below")
        axis.set(xlabel=f"distance to the nearest training image ({space})", ylabel="synthetic images")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return figure
