"""Training sets mixed from real images and synthetic sources: how many of each, which ones, and where each comes from.

Counts are exact by class and source. Everything nests at one seed: a larger fraction, ratio or count contains the smaller
one (for the allocations "balance" and "fill", which look at the real images that are kept, at one fraction only). All draws
belong to (seed, case) or (seed, group), so that arms with the same fraction share their real images.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medaug.cohort import Case, Cohort
from medaug.draws import key_seed
from medaug.errors import ConfigError, DataError
from medaug.splits import in_proportion, level

REAL = "real"

Pair = tuple[Cohort, Case]

__all__ = [
    "ALLOCATIONS",
    "REAL",
    "Pair",
    "Source",
    "TrainingIndex",
    "build_training_set",
    "check_fraction",
    "class_counts",
    "in_proportion",
    "keep_fraction",
    "keyed_order",
    "level",
    "real_cases",
    "source_counts",
]


@dataclass(frozen=True)
class _Numbers:
    """What the counts of a source depend on; lists are by class."""

    available: list[int]
    split: list[int]  # real images of the training split
    kept: list[int]  # those of the arm
    total: int  # images that the ratio asks for
    given: Sequence[int]


_WANTED: dict[str, Callable[[_Numbers], list[int]]] = {
    "as_generated": lambda numbers: in_proportion(numbers.total, numbers.available),
    "proportional": lambda numbers: in_proportion(numbers.total, numbers.split),
    "balance": lambda numbers: level(numbers.total, numbers.kept),
    "fixed": lambda numbers: list(numbers.given),
    "fill": lambda numbers: [whole - kept for whole, kept in zip(numbers.split, numbers.kept, strict=True)],
}
ALLOCATIONS = ("as_generated", "proportional", "balance")  # those that need no further numbers
_ABSOLUTE = ("fixed", "fill")


@dataclass(frozen=True)
class Source:
    """Synthetic images of one origin, and how a training set uses them.

    Attributes:
        name: in provenance, reports and messages; not "real".
        cohort: its training cases are drawn from.
        per_real: how many per real image that the arm keeps (without real images: per real image of the training split);
            None takes all.
        allocation: classes of those: "as_generated" (the source's own mix), "proportional" (the mix of the real training
            split), "balance" (level the classes), "fixed" (`counts`) or "fill" (class by class what is missing to the size
            of the real training split).
        counts: images per class, for "fixed".
        share: of every batch, in (0, 1]; None shares what is left in natural proportion.
        weight: of its images in the loss, beside 1 for real images; 0 leaves the source out.
        of_kept: only images whose reference is among the real images that the arm keeps: copies of those.

    Raises:
        ConfigError: `allocation-unknown`, `ratio-invalid`, `share-invalid`, `weight-invalid`, `source-name`.
    """

    name: str
    cohort: Cohort
    per_real: float | None = None
    allocation: str = "as_generated"
    counts: tuple[int, ...] | None = None
    share: float | None = None
    weight: float = 1.0
    of_kept: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name == REAL:
            raise ConfigError("source-name", f"A synthetic source needs a name other than {REAL!r}, got {self.name!r}.")
        if self.allocation not in _WANTED:
            raise ConfigError("allocation-unknown", f"allocation must be one of {', '.join(_WANTED)}, got {self.allocation!r}.")
        if self.per_real is not None and not (self.per_real > 0 and math.isfinite(self.per_real)):
            raise ConfigError("ratio-invalid", f"synthetic_per_real must be above 0, got {self.per_real!r}.")
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError("share-invalid", f"The batch share of {self.name} must be in (0, 1], got {self.share!r}.")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ConfigError("weight-invalid", f"The loss weight of {self.name} must be 0 or more, got {self.weight!r}.")
        if self.weight == 0 and self.share is not None:
            raise ConfigError(
                "weight-invalid", f"{self.name} has loss weight 0, which leaves it out, and a batch share; give one of both."
            )
        self._check_counts()

    def _check_counts(self) -> None:
        given = self.counts is not None
        if given != (self.allocation == "fixed"):
            raise ConfigError(
                "allocation-unknown", f"{self.name}: counts per class go with the allocation fixed, and only with it."
            )
        if self.counts is not None and (len(self.counts) != len(self.cohort.classes) or min(self.counts) < 0):
            raise ConfigError(
                "ratio-invalid",
                f"{self.name} needs one count of 0 or more for each of {len(self.cohort.classes)} classes, got {list(self.counts)}.",
            )
        if self.per_real is not None and self.allocation in _ABSOLUTE:
            raise ConfigError("ratio-invalid", f"{self.name}: the allocation {self.allocation} takes no ratio.")


@dataclass(frozen=True)
class TrainingIndex:
    """The images of a training set and where each comes from.

    Attributes:
        pairs: (cohort, case), real images first, then source by source, class by class.
        provenance: one name per pair: "real" or the source's.
    """

    pairs: tuple[Pair, ...]
    provenance: tuple[str, ...]

    def counts(self, num_classes: int) -> dict[str, list[int]]:
        """Images per class of every source that occurs, real ones included."""
        cases: dict[str, list[Case]] = defaultdict(list)
        for name, (_, case) in zip(self.provenance, self.pairs, strict=True):
            cases[name].append(case)
        return {name: class_counts(found, num_classes) for name, found in cases.items()}


def real_cases(cohort: Cohort) -> list[Case]:
    """Training cases that are not synthetic."""
    return [case for case in cohort.training if not case.is_synthetic]


def class_counts(cases: Sequence[Case], num_classes: int) -> list[int]:
    """Number of cases per class."""
    counts = Counter(case.label for case in cases)
    return [counts[label] for label in range(num_classes)]


def check_fraction(fraction: float | None) -> None:
    """Refuse a fraction of the real images outside (0, 1]; None stands for no real image.

    Raises:
        ConfigError: `fraction-invalid`.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(
            "fraction-invalid",
            f"real_fraction must be in (0, 1], got {fraction!r}; an arm without real images says so by itself, with `no-real`.",
        )


def keep_fraction(cases: Sequence[Case], fraction: float, seed: int) -> list[Case]:
    """A part of the cases, stratified by class and group, in their order; larger fractions contain smaller ones.

    The unit is the group, taken whole, and belongs to the class of most of its images (ties: the lower). Of every class the
    groups are taken in an order that belongs to (seed, group), as many as come nearest to `fraction` of the class's images:
    ties take fewer, and one group stays. With one image per group the counts are exact: n * fraction, halves down.

    Raises:
        ConfigError: `fraction-invalid`.
    """
    check_fraction(fraction)
    if fraction == 1:
        return list(cases)
    labels: dict[str, Counter[int]] = defaultdict(Counter)
    for case in cases:
        labels[case.group][case.label] += 1
    strata: dict[int, list[str]] = defaultdict(list)
    for group in sorted(labels, key=lambda group: (key_seed("fraction", seed, group), group)):
        strata[min(labels[group], key=lambda label: (-labels[group][label], label))].append(group)
    kept: set[str] = set()
    for groups in strata.values():
        sizes = [labels[group].total() for group in groups]
        reached = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        # A round-off of the product must not decide a tie: 0.7 * 45 is 31.499999999999996.
        wanted = round(fraction * reached[-1], 9)
        nearest = min(range(len(groups)), key=lambda number: (abs(reached[number] - wanted), number))
        kept.update(groups[: nearest + 1])
    return [case for case in cases if case.group in kept]


def keyed_order(cases: Sequence[Case], seed: int) -> list[Case]:
    """The cases in an order that belongs to (seed, case): the first n are among the first n + 1."""
    return sorted(cases, key=lambda case: (key_seed("mix", seed, case.id), case.id))


def _candidates(source: Source, kept: Sequence[Case]) -> list[Case]:
    if not source.of_kept:
        return list(source.cohort.training)
    known = {case.id for case in kept}
    return [case for case in source.cohort.training if (case.lineage or {}).get("reference") in known]


def source_counts(source: Source, real: Cohort, kept: Sequence[Case], what: str = "The training set") -> list[int]:
    """Images per class that a source adds to the `kept` real ones.

    Raises:
        DataError: `synthetic-too-few`, with the class, what the source has and what is wanted.
    """
    available = class_counts(_candidates(source, kept), len(real.classes))
    if source.per_real is None and source.allocation not in _ABSOLUTE:
        return available
    split, present = (class_counts(cases, len(real.classes)) for cases in (real_cases(real), kept))
    asked = (source.per_real or 0) * (sum(present) or sum(split))
    if asked > 100 * (sum(available) + sum(split)):  # images are shared out one by one, which must not go on for ever
        raise DataError(
            "synthetic-too-few",
            f"{what} asks for {asked:.6g} accepted images of {source.name}, which has {sum(available)}; generate more or lower "
            "synthetic_per_real.",
        )
    total = round(asked)
    wanted = _WANTED[source.allocation](_Numbers(available, split, present, total, source.counts or ()))
    short = [f"{name}: {has} of {need}" for name, has, need in zip(real.classes, available, wanted, strict=True) if has < need]
    if short:
        raise DataError(
            "synthetic-too-few",
            f"{what} needs more accepted images of {source.name} ({'; '.join(short)}); generate more or lower synthetic_per_real.",
        )
    return wanted


def build_training_set(
    real: Cohort,
    synthetic_sets: Sequence[Source],
    *,
    real_fraction: float | None = 1.0,
    seed: int = 0,
    what: str = "The training set",
) -> TrainingIndex:
    """The images of a training set: a fraction of the real training split and so many of every source.

    Args:
        real: its training split is used; validation and test are never read.
        synthetic_sets: sources, each with its amount. Check them first, see `medaug.grading.arms.check_arm`.
        real_fraction: in (0, 1], see `keep_fraction`; None takes no real image.
        seed: of the subset and of which images of a source are taken.
        what: subject of messages.

    Raises:
        ConfigError: `fraction-invalid`.  DataError: `synthetic-too-few`.
    """
    check_fraction(real_fraction)
    kept = [] if real_fraction is None else keep_fraction(real_cases(real), real_fraction, seed)
    pairs: list[Pair] = [(real, case) for case in kept]
    provenance = [REAL] * len(kept)
    for source in synthetic_sets:
        wanted = source_counts(source, real, kept, what)
        pool = keyed_order(_candidates(source, kept), seed)
        for label, count in enumerate(wanted):
            pairs += [(source.cohort, case) for case in pool if case.label == label][:count]
        provenance += [source.name] * sum(wanted)
    return TrainingIndex(tuple(pairs), tuple(provenance))
