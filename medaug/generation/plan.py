"""How many images of which class, and which training image each one refers to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.splits import in_proportion, level
from medaug.training.run_folder import RunRecord

Allocation = Literal["balance", "proportional", "fixed"]
ALLOCATIONS = ("proportional", "balance", "fixed")


@dataclass(frozen=True)
class PlannedCase:
    """One image to be made.

    Attributes:
        id: from the weights, the seed, the class and the running number: stable when a plan is extended.
        label: intended class index.
        number: running number within its class.
        reference: the training case whose features guide it, or whose variation it is; its group is inherited.
        variation: how many images of the plan have the same reference and a smaller number.
    """

    id: str
    label: int
    number: int
    reference: Case
    variation: int = 0


def quotas(
    cohort: Cohort,
    synthetic_per_real: float | None = None,
    allocation: str | None = "proportional",
    fixed: Mapping[str, int] | None = None,
) -> list[int]:
    """Number of images per class.

    Args:
        cohort: its training split is counted.
        synthetic_per_real: N_synthetic / N_real; 2.5 is the published "original-to-synthetic ratio 0.4" taken literally.
        allocation: "proportional" keeps the class shares; "balance" spends the same total on the smallest classes
            first; "fixed" takes `fixed`; None balances ordinal classes and keeps the shares of others.
        fixed: class name -> count.

    Raises:
        ConfigError: unknown allocation or class, a ratio that is not positive.
    """
    real = cohort.class_counts("training")
    if allocation is None:
        allocation = "balance" if cohort.ordinal else "proportional"
    if allocation not in ALLOCATIONS:
        raise ConfigError("allocation-unknown", f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}.")
    if allocation == "fixed":
        unknown = set(fixed or {}) - set(cohort.classes)
        if not fixed or unknown:
            raise ConfigError(
                "allocation-fixed", f"Fixed counts need class names of {list(cohort.classes)}, got {sorted(fixed or {})}."
            )
        return check_counts(cohort, [fixed.get(name, 0) for name in cohort.classes])
    if not sum(real):
        raise DataError(
            "training-empty",
            "The training split holds no image, so no share of it can be made; use a cohort with training images.",
        )
    if synthetic_per_real is None or not 0 < synthetic_per_real < math.inf:
        raise ConfigError("ratio-invalid", f"synthetic_per_real must be a positive number, got {synthetic_per_real!r}.")
    total = round(synthetic_per_real * sum(real))
    if allocation == "balance":
        return level(total, real)
    return in_proportion(total, real)


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Integers that sum to `total` and lie nearest to `shares` (Hamilton's method; ties go to the earlier class)."""
    floors = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda label: (floors[label] - shares[label], label))
    for label in order[: total - sum(floors)]:
        floors[label] += 1
    return floors


def make_plan(
    cohort: Cohort, counts: Sequence[int], seed: int, weights_sha256: str, seeds: Collection[str] | None = None
) -> list[list[PlannedCase]]:
    """The images to make, one list per class; a larger count only adds to the end of its list.

    References are the class's own training cases in keyed order, so that every one is used once before any is used
    twice. A real validation or test case can never be one. `seeds` names the cases to choose from; None is all.

    Raises:
        DataError: a class with a quota has no training case.  LeakageError, DataError: see `check_seeds`.
    """
    if seeds is not None:
        check_seeds(cohort, seeds)
    plan: list[list[PlannedCase]] = []
    for label, count in enumerate(counts):
        cases = sorted(
            (
                case
                for case in cohort.training
                if case.label == label and not case.is_synthetic and (seeds is None or case.id in seeds)
            ),
            key=lambda case: case.id,
        )
        if count and not cases:
            what = "training image" if seeds is None else "image among the seeds"
            raise DataError(
                "class-empty",
                f"Class {cohort.classes[label]!r} has no {what} to refer to; add some or set its count to 0.",
            )
        order = numpy_generator(seed, "reference", label).permutation(len(cases))
        plan.append(
            [
                PlannedCase(
                    _case_id(weights_sha256, seed, label, n), label, n, cases[int(order[n % len(cases)])], n // len(cases)
                )
                for n in range(count)
            ]
        )
    return plan


def plan_for(
    cohort: Cohort,
    record: RunRecord,
    seed: int,
    synthetic_per_real: float | None = None,
    allocation: str | None = "proportional",
    fixed: Mapping[str, int] | None = None,
    counts: Sequence[int] | None = None,
) -> list[list[PlannedCase]]:
    """The plan of a run: `make_plan` over `quotas`, or over `counts` (one per class) when they are given."""
    if counts is None:
        counts = quotas(cohort, synthetic_per_real, allocation, fixed)
    if sum(counts) == 0:
        raise ConfigError("counts-invalid", "The plan asks for no image at all; raise --per-real or the counts.")
    return make_plan(cohort, check_counts(cohort, counts), seed, record.weights_sha256)


def check_seeds(cohort: Cohort, seeds: Collection[str]) -> None:
    """Refuse case ids that cannot be seeds or references.

    Raises:
        LeakageError: a validation or test case (code `reference-held-out`).
        DataError: no real training case of this cohort (code `seed-unknown`).
    """
    held_out = sorted(set(seeds) & {case.id for case in cohort.validation + cohort.test})
    if held_out:
        raise LeakageError(
            "reference-held-out",
            f"{len(held_out)} seed image(s) belong to the validation or test split ({', '.join(held_out[:5])}); "
            "images may be made from training images only.",
        )
    unknown = sorted(set(seeds) - {case.id for case in cohort.training if not case.is_synthetic})
    if unknown:
        raise DataError(
            "seed-unknown", f"{len(unknown)} seed(s) are no real training case of this cohort ({', '.join(unknown[:5])})."
        )


def variation_plan(
    cohort: Cohort,
    record: RunRecord,
    seed: int,
    synthetic_per_real: float | None = None,
    allocation: str | None = "proportional",
    fixed: Mapping[str, int] | None = None,
    counts: Sequence[int] | None = None,
    seeds: Collection[str] | None = None,
) -> list[list[PlannedCase]]:
    """The plan of a run whose images are variations of training images.

    An id comes from the weights, the seed, the seed image and the number of the variation: more variations, or more seed
    images, only add to a plan.

    Args:
        cohort, record, seed: of the run.
        synthetic_per_real: variations per training image, the expansion factor.
        allocation, fixed: see `quotas`.
        counts: images per class, one whole number each; overrides the three.
        seeds: ids of the training cases to vary; None is all of them.

    Raises:
        ConfigError, DataError, LeakageError: see `quotas` and `make_plan`.
    """
    if counts is None:
        counts = quotas(cohort, synthetic_per_real, allocation, fixed)
    if sum(check_counts(cohort, counts)) == 0:
        raise ConfigError("counts-invalid", "The plan asks for no image at all; raise --per-real or the counts.")
    plan = make_plan(cohort, counts, seed, record.weights_sha256, seeds)
    return [
        [replace(case, id=_variation_id(record.weights_sha256, seed, case.reference.id, case.variation)) for case in cases]
        for cases in plan
    ]


def check_counts(cohort: Cohort, counts: Sequence[int]) -> list[int]:
    """The counts, one whole number of at least 0 per class.

    Raises:
        ConfigError: anything else (code `counts-invalid`).
    """
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    if len(counts) != len(cohort.classes) or not whole:
        raise ConfigError(
            "counts-invalid", f"counts must hold one whole number per class ({len(cohort.classes)}), got {list(counts)}."
        )
    return list(counts)


def _case_id(weights_sha256: str, seed: int, label: int, number: int) -> str:
    return "s" + hashlib.sha256(f"{weights_sha256}/{seed}/{label}/{number}".encode()).hexdigest()[:15]


def _variation_id(weights_sha256: str, seed: int, reference: str, variation: int) -> str:
    return "v" + hashlib.sha256(f"{weights_sha256}/{seed}/{reference}/{variation}".encode()).hexdigest()[:15]


def batches(plan: Sequence[Sequence[PlannedCase]], batch_size: int) -> list[list[PlannedCase]]:
    """Batches of one class each, cut at multiples of `batch_size`, so that a resumed plan has the same batches."""
    return [list(cases[start : start + batch_size]) for cases in plan for start in range(0, len(cases), batch_size)]


def seed_batches(plan: Sequence[Sequence[PlannedCase]], batch_size: int) -> list[list[PlannedCase]]:
    """Batches in which the variations of a seed image lie together, so that it is inverted once.

    A batch holds whole seed images, or, where one has more variations than `batch_size`, a part of a single one: so what a
    batch inverts does not depend on the batch before it.
    """
    cut: list[list[PlannedCase]] = []
    for cases in plan:
        of_seed: dict[str, list[PlannedCase]] = {}
        for case in cases:
            of_seed.setdefault(case.reference.id, []).append(case)
        most = max(map(len, of_seed.values()), default=1)
        group, seeds = max(1, batch_size // most), list(of_seed.values())
        for start in range(0, len(seeds), group):
            together = [case for seed in seeds[start : start + group] for case in seed]
            cut += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
    return cut
