"""What a comparison does not show: sentences that follow from its settings and figures, on every page alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medaug.evidence.shown import counted, listed, unknown_patients
from medaug.grading.classic_copies import COPIES
from medaug.grading.mixing import REAL
from medaug.grading.record import GradingRecord
from medaug.grading.rows import Row
from medaug.grading.verdict import FEW_GROUPS, FEWEST_SEEDS, METRIC_LABELS

__all__ = ["Outcome", "limits"]


@dataclass(frozen=True)
class Outcome:
    """What was judged.

    Attributes:
        record, rows: complete for every arm of the record, see `medaug.results.unfinished`.
        verdict: of `medaug.grading.verdict.judge`.
    """

    record: GradingRecord
    rows: Sequence[Row]
    verdict: Mapping[str, Mapping[str, Any]]


def _generator(outcome: Outcome) -> str | None:
    made = dict.fromkeys(row["arm"] for row in outcome.rows if row["num_synthetic"] and not _copies_alone(row))
    bases = {arm.name: arm.base for arm in outcome.record.arms}
    shared = [arm for arm in made if bases[arm] not in outcome.record.image_sets]
    if not shared:
        return None
    which = "each synthetic arm" if len(shared) == len(made) else f"the arm(s) {listed(shared)}"
    return (
        f"One set of images for {which}: all seeds are of the graders and train on the same images. No interval covers "
        "another run of the generator, which may deserve another verdict."
    )


def _copies_alone(row: Row) -> bool:
    """True if what a run adds is turned or mirrored real images: nobody generated them."""
    sources = set(row.get("per_source") or ()) - {REAL}
    return bool(sources) and sources <= set(COPIES)


def _image_size(outcome: Outcome) -> str:
    side = outcome.record.data.image_size
    return f"Images of {side} x {side} px: nothing is said of larger ones."


def _test_split(outcome: Outcome) -> str:
    test = outcome.record.data.splits["test"]
    text = f"One test split: {counted(test['images'], 'image')} of {counted(test['groups'], 'group')}"
    few = f", fewer than {FEW_GROUPS} groups, so intervals are rough" if test["groups"] < FEW_GROUPS else ""
    return f"{text}{few}. Other hospitals, devices and patients were not looked at."


def _patients(outcome: Outcome) -> str | None:
    return unknown_patients(outcome.record.data.group_origins)


def _runs(outcome: Outcome) -> str:
    networks = list(dict.fromkeys(row["network"] for row in outcome.rows))
    seeds = len({row["seed"] for row in outcome.rows})
    few = f", too few for a verdict (at least {FEWEST_SEEDS})" if seeds < FEWEST_SEEDS else ""
    return f"{counted(len(networks), 'network')} ({listed(networks)}) and {counted(seeds, 'seed')}{few}: others may answer otherwise."


def _widths(outcome: Outcome) -> str | None:
    found = [entry["against_none"] for entry in outcome.verdict.values() if entry["against_none"]["low"] is not None]
    if not found:
        return None
    widths = sorted(result["high"] - result["low"] for result in found)
    metric = METRIC_LABELS[next(iter(outcome.verdict.values()))["metric"]]
    span = " to ".join(dict.fromkeys(f"{width:.3f}" for width in (widths[0], widths[-1])))
    return (
        f"The 95 % intervals of the differences to none are {span} wide in {metric}: effects smaller than about half of that cannot be "
        "told from nothing here."
    )


def _ratio(outcome: Outcome) -> str | None:
    """Whether the amount of synthetic images was a choice."""
    if any("choice" in entry for entry in outcome.verdict.values()):
        return (
            "The ratio of synthetic to real images was chosen on validation. Validation and test share the trained networks, so the "
            "difference of a chosen ratio is somewhat flattered."
        )
    ratios = sorted({row["ratio"] for row in outcome.rows if row["num_synthetic"] and row["ratio"] is not None})
    if not ratios:
        return None
    if len({round(ratio, 2) for ratio in ratios}) == 1:
        return f"One amount of synthetic images, {ratios[0]:.3g} per real one; it was set, not chosen on validation."
    return (
        f"Amounts of {ratios[0]:.3g} to {ratios[-1]:.3g} synthetic images per real one; they were set, not chosen on validation."
    )


def _selection(outcome: Outcome) -> str:
    if any(row["validation"] is None for row in outcome.rows):
        return "There was no validation split: the last weights of every run were tested."
    images = outcome.record.data.splits["validation"]["images"]
    return (
        f"In every arm the weights with the best macro F1 on {counted(images, 'real validation image')} were tested, also where an arm "
        "trains on few real images or none."
    )


_LIMITS: Sequence[Callable[[Outcome], str | None]] = (
    _generator,
    _ratio,
    _widths,
    _runs,
    _test_split,
    _patients,
    _selection,
    _image_size,
)


def limits(outcome: Outcome) -> list[str]:
    """One sentence or two for each limit that applies."""
    return [text for limit in _LIMITS if (text := limit(outcome)) is not None]
