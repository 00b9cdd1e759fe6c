"""Curves over the amount of synthetic and of real images: one point per variant of an arm, with its intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from medaug.grading.arm import Arm
from medaug.grading.figures import new_figure
from medaug.grading.scores import Scores
from medaug.grading.variants import Choice
from medaug.grading.verdict import BASELINE, METRIC_LABELS, Opponents

Point = dict[str, Any]

__all__ = ["Point", "curve_points", "learning_curve", "learning_figure", "mixing_curve", "mixing_figure"]


def curve_points(
    arms: Sequence[Arm],
    choices: Sequence[Choice],
    scores: Scores,
    opponents: Mapping[str, Opponents],
    validation: Mapping[tuple[str, str], float | None],
) -> list[Point]:
    """One line per arm: where it stands, what it scores and how it differs from plain training on the same real images.

    Args:
        scores, opponents: of all arms.  validation: (arm, network) -> mean over seeds.

    Returns:
        arm, base, per_real, real_fraction, validation (mean over networks), chosen (None if there was no choice), score with
        low and high (95 % over the test groups), difference with its low and high (also over the luck of training). None
        stands for undefined. Empty if no arm has variants.
    """
    chosen = {choice.arm for choice in choices}
    points = []
    for arm in arms:
        score, low, high = scores.interval(arm.name)
        point: Point = {"arm": arm.name, "base": arm.base, "per_real": arm.variant.per_real}
        point |= {"real_fraction": arm.variant.real_fraction, "validation": _mean(validation, arm.name)}
        point |= {"chosen": None if arm.variant.per_real is None else arm.name in chosen}
        point |= {"score": score, "low": low, "high": high}
        point |= dict.fromkeys(("difference", "difference_low", "difference_high"))
        if arm.name in opponents:
            result = scores.compare(arm.name, opponents[arm.name].baseline)
            point |= {"difference": result.difference, "difference_low": result.low, "difference_high": result.high}
        points.append({name: None if isinstance(value, float) and math.isnan(value) else value for name, value in point.items()})
    return points if any(arm.variant.base for arm in arms) else []


def _mean(validation: Mapping[tuple[str, str], float | None], arm: str) -> float | None:
    known = [value for (name, _), value in validation.items() if name == arm and value is not None]
    return sum(known) / len(known) if known else None


def mixing_curve(points: Sequence[Point], base: str, fraction: float | None) -> list[Point]:
    """The points of an arm at one fraction, ascending in the ratio; the baseline is the ratio 0."""
    found = [point for point in points if point["base"] in (base, BASELINE) and point["real_fraction"] == fraction]
    placed = [point | {"per_real": 0.0} if point["base"] == BASELINE else point for point in found]
    return sorted((point for point in placed if point["per_real"] is not None), key=lambda point: float(point["per_real"]))


def learning_curve(points: Sequence[Point], base: str) -> list[Point]:
    """The points of an arm at its chosen ratios, ascending in the fraction of the real images."""
    found = [point for point in points if point["base"] == base and point["chosen"] is not False]
    placed = [point for point in found if point["real_fraction"] is not None]
    return sorted(placed, key=lambda point: float(point["real_fraction"]))


def mixing_figure(points: Sequence[Point], metric: str) -> Figure | None:
    """Validation, test and difference to `none` over the ratio, a row of panels per fraction; None without several ratios."""
    bases = list(dict.fromkeys(point["base"] for point in points if point["per_real"] is not None))
    fractions = list(dict.fromkeys(point["real_fraction"] for point in points if point["per_real"] is not None))
    if not bases:
        return None
    figure = new_figure(14, 0.9 + 3.4 * len(fractions))
    panels = figure.subplots(len(fractions), 3, squeeze=False, sharex=True, sharey="col")
    rows = {part: {base: mixing_curve(points, base, part) for base in bases} for part in fractions}
    ticks = sorted({point["per_real"] for curves in rows.values() for curve in curves.values() for point in curve})
    for line, (part, curves) in zip(panels, rows.items(), strict=True):
        suffix = "" if part is None else f", {part:g} of the real images"
        for axis, values, title in zip(line, _COLUMNS, ("validation: the choice", "test", "test, minus none"), strict=True):
            _draw(axis, curves, values, "per_real", ticks)
            axis.set(title=f"{title}{suffix}", xticks=range(len(ticks)), xticklabels=[f"{tick:g}" for tick in ticks])
    figure.supxlabel("synthetic images per real one; 0 = none; star: the ratio chosen on validation", fontsize=10)
    return _finish(figure, panels, metric)


def learning_figure(points: Sequence[Point], metric: str) -> Figure | None:
    """Test score and difference to `none` over the fraction of the real images; None without several fractions."""
    bases = list(dict.fromkeys(point["base"] for point in points if point["real_fraction"] is not None))
    ticks = sorted({point["real_fraction"] for point in points if point["real_fraction"] is not None})
    if not ticks:
        return None
    figure = new_figure(12, 4.6)
    panels = figure.subplots(1, 2, squeeze=False, sharex=True)
    curves = {base: learning_curve(points, base) for base in bases}
    for axis, values, title in zip(panels[0], _COLUMNS[1:], ("test", "test, minus none at the same fraction"), strict=True):
        _draw(axis, curves, values, "real_fraction", ticks, star=False)
        axis.set(title=title, xticks=range(len(ticks)), xticklabels=[f"{tick:g}" for tick in ticks])
    figure.supxlabel("fraction of the real training images", fontsize=10)
    return _finish(figure, panels, metric)


_COLUMNS = (
    ("validation", "", ""),
    ("score", "low", "high"),
    ("difference", "difference_low", "difference_high"),
)


def _draw(
    axis: Any,
    curves: Mapping[str, Sequence[Point]],
    values: tuple[str, str, str],
    amount: str,
    ticks: Sequence[float],
    star: bool = True,
) -> None:
    """Every curve beside the others, so that no interval hides another."""
    middle, low, high = values
    if middle == "difference":
        axis.axhline(0, color="black", linewidth=0.8)
    for index, (base, curve) in enumerate(curves.items()):
        shown = [point for point in curve if point[middle] is not None and (not low or point[low] is not None)]
        shift = 0.36 * ((index + 0.5) / len(curves) - 0.5)
        x = [ticks.index(point[amount]) + shift for point in shown]
        y = [point[middle] for point in shown]
        colour = f"C{index % 10}"
        if low:
            # A percentile interval need not hold the value itself.
            ranges = [[max(0.0, one[middle] - one[low]), max(0.0, one[high] - one[middle])] for one in shown]
            axis.errorbar(
                x,
                y,
                yerr=list(zip(*ranges, strict=True)),
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=base,
            )
        else:
            axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.2, label=base)
        chosen = [number for number, point in enumerate(shown) if star and point["chosen"]]
        axis.plot(
            [x[number] for number in chosen],
            [y[number] for number in chosen],
            "*",
            color=colour,
            markersize=15,
            markeredgecolor="black",
            zorder=5,
        )


def _finish(figure: Figure, panels: Any, metric: str) -> Figure:
    """Labels and one legend for all panels."""
    for line in panels:
        for axis in line:
            axis.grid(axis="y", alpha=0.3)
            axis.title.set_fontsize(10)
            axis.tick_params(labelleft=True, labelbottom=True)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(METRIC_LABELS[metric])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(max(len(labels), 1), 6), frameon=False)
    return figure
