"""One arm at several mixing ratios and fractions of the real images: its variants, what each is compared with, and the choice.

The ratio is an amount that somebody has to choose, so it is chosen on validation, like every other setting, and the verdict
speaks about the chosen one alone. The test images play no part in the choice, so the arm enters the verdict, and Holm's
correction, once. The choice does prefer runs that were lucky in training, and the test meets the same runs: the difference of a
chosen ratio is somewhat flattered, while false verdicts stay as rare as they were (`test_verdict_simulation.py`).
The other ratios are shown and carry no verdict. The fraction of the real images is no
setting but a question, so nothing is chosen: the verdict is that of the largest fraction, smaller ones show how the
result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medaug.cohort import Cohort
from medaug.errors import ConfigError
from medaug.grading.arm import Arm, Variant
from medaug.grading.arms import own_controls, prepare_arms
from medaug.grading.controls import view_controls, with_count_controls, with_view_controls
from medaug.grading.rows import Row
from medaug.grading.statistics import TIE_DECIMALS
from medaug.grading.verdict import BASELINE, CONTROL, Opponents

__all__ = ["Choice", "amounts", "at_verdict", "check_choosable", "choose", "opponents_of", "spread_arms"]

Reader = Callable[[float | None, float], Sequence[Arm]]


def amounts(given: float | Sequence[float] | None, what: str) -> list[float]:
    """One amount or several, ascending, each once; empty for None.

    Raises:
        ConfigError: `amounts-invalid`.
    """
    values = [] if given is None else [given] if isinstance(given, (int, float)) else list(given)
    if len(set(values)) != len(values) or (given is not None and not values):
        raise ConfigError("amounts-invalid", f"{what} takes one amount, or several different ones; got {values}.")
    return sorted(float(value) for value in values)


def spread_arms(read: Reader, ratios: Sequence[float], fractions: Sequence[float], real: Cohort) -> list[Arm]:
    """The arms, those that depend on the ratio or the fraction once for each.

    A variant is named ``guided_ddpm@2.5``, ``none@real0.5`` or ``guided_ddpm@2.5@real0.5``. With one ratio and one fraction at
    most, the arms are as they are read. The control repeats real images to the count of the largest synthetic arm at the
    same ratio and fraction; arms of another count or mix of classes have one of their own.

    Args:
        read: (ratio, fraction) -> arms; ratio None takes all images.
        ratios, fractions: ascending; no ratio stands for all images.

    Returns:
        arms with their controls; variants of one arm ascending in fraction, then in ratio.

    Raises:
        see `prepare_arms`.
    """
    taken: Sequence[float | None] = list(ratios) or [None]
    points = {(ratio, part): with_view_controls(read(ratio, part)) for part in fractions for ratio in taken}
    served = own_controls(list(points.values()), real)
    points = {point: with_count_controls(arms, served) for point, arms in points.items()}
    if len(points) == 1:
        return points[taken[0], fractions[0]]
    grid = {point: prepare_arms(arms, real) for point, arms in points.items()}
    spread: list[Arm] = []
    for place, first in enumerate(grid[taken[0], fractions[0]]):
        content = {point: arms[place].content() for point, arms in grid.items()}
        by_ratio = any(content[ratio, part] != content[taken[0], part] for ratio, part in grid)
        by_fraction = any(content[ratio, part] != content[ratio, fractions[0]] for ratio, part in grid)
        for part in fractions if by_fraction else fractions[:1]:
            for ratio in taken if by_ratio else taken[:1]:
                arm = grid[ratio, part][place]
                spread.append(_variant(arm, first.name, ratio if by_ratio else None, part if by_fraction else None))
    return spread


def _variant(arm: Arm, base: str, ratio: float | None, part: float | None) -> Arm:
    if ratio is None and part is None:
        return arm
    name = base + ("" if ratio is None else f"@{ratio:g}") + ("" if part is None else f"@real{part:g}")
    return replace(arm, name=name, variant=Variant(base, ratio, part))


def check_choosable(arms: Sequence[Arm], real: Cohort) -> None:
    """Refuse several ratios without validation images to choose by, before anything is trained.

    Raises:
        ConfigError: `ratio-choice`.
    """
    if not real.validation and any(arm.variant.per_real is not None for arm in arms):
        raise ConfigError(
            "ratio-choice",
            "The ratio is chosen on validation images, and this cohort has none; give one --per-real, or run intake with a validation "
            "part in --split.",
        )


@dataclass(frozen=True)
class Choice:
    """The ratio of one arm at one fraction of the real images.

    Attributes:
        base: name of the arm.  arm: name of the chosen variant.
        per_real: the chosen ratio.  real_fraction: None if the arm is graded at one fraction.
        scores: ratio -> mean primary metric on validation over networks and seeds; None where it is undefined.
    """

    base: str
    arm: str
    per_real: float
    real_fraction: float | None
    scores: Mapping[float, float | None]

    def sentence(self) -> str:
        """What a reader of the verdict has to know."""
        ratios = ", ".join(f"{ratio:g}" for ratio in self.scores)
        if all(score is None for score in self.scores.values()):
            return f"Nothing is known on validation, so of the ratios {ratios} the smallest was taken."
        return f"Its ratio {self.per_real:g} was chosen on validation among {ratios}; test images had no part in that."

    def facts(self) -> dict[str, Any]:
        """As plain values for the verdict's file."""
        return asdict(self) | {"scores": {f"{ratio:g}": score for ratio, score in self.scores.items()}}


def choose(arms: Sequence[Arm], rows: Sequence[Row], metric: str) -> list[Choice]:
    """The ratio of every arm and fraction with the best mean on validation; of equals the smallest, which costs least.

    Args:
        rows: complete rows: every variant with the same networks and seeds. Nothing of their test part is read.
        metric: the primary one.
    """
    places: dict[tuple[str, float | None], list[Arm]] = {}
    for arm in arms:
        if arm.variant.per_real is not None:
            places.setdefault((arm.base, arm.variant.real_fraction), []).append(arm)
    choices = []
    for (base, part), variants in places.items():
        scores = {arm.variant.per_real or 0.0: _on_validation(rows, arm.name, metric) for arm in variants}
        known = {ratio: score for ratio, score in sorted(scores.items()) if score is not None}
        best = max(known, key=known.__getitem__, default=min(scores))
        name = next(arm.name for arm in variants if arm.variant.per_real == best)
        choices.append(Choice(base, name, best, part, scores))
    return choices


def _on_validation(rows: Sequence[Row], arm: str, metric: str) -> float | None:
    values = [row["validation"]["metrics"][metric] for row in rows if row["arm"] == arm and row["validation"]]
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), TIE_DECIMALS) if known else None


def at_verdict(arms: Sequence[Arm], choices: Sequence[Choice]) -> list[Arm]:
    """The arms that the verdict speaks about: the baseline and one variant of every other arm, at the largest fraction."""
    largest = max((arm.variant.real_fraction for arm in arms if arm.variant.real_fraction is not None), default=None)
    chosen = {choice.arm for choice in choices}
    return [
        arm
        for arm in arms
        if arm.variant.real_fraction in (None, largest) and (arm.variant.per_real is None or arm.name in chosen)
    ]


def opponents_of(arms: Sequence[Arm]) -> dict[str, Opponents]:
    """Name of every arm but the baselines -> what it is compared with: variants at its own ratio and fraction."""
    views = view_controls(arms)
    baselines, controls = ([arm for arm in arms if arm.base == base] for base in (BASELINE, CONTROL))
    return {
        arm.name: Opponents(
            _counterpart(baselines, arm) or BASELINE,
            None if arm.oversample else _counterpart([other for other in arms if arm.base in other.serves] or controls, arm),
            views.get(arm.name),
        )
        for arm in arms
        if arm.base != BASELINE
    }


def _counterpart(found: Sequence[Arm], of: Arm) -> str | None:
    """The variant at the ratio and fraction of an arm; where there is none, at the largest."""
    for place in ("per_real", "real_fraction"):
        found = [arm for arm in found if getattr(arm.variant, place) == getattr(of.variant, place)] or found
    return found[-1].name if found else None
