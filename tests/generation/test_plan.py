from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError, DataError
from medaug.generation.plan import batches, largest_remainder, make_plan, plan_for, quotas

real_counts = st.lists(st.integers(1, 12), min_size=1, max_size=5)
ratios = st.floats(0.05, 5, allow_nan=False)


def cohort_of(counts: list[int]) -> Cohort:
    """A cohort without images: counts[k] training cases of class k, and one test case of each."""
    training = [Case(f"t{k}{i}", "x", k, f"g{k}{i}", "") for k, count in enumerate(counts) for i in range(count)]
    test = [Case(f"e{k}", "x", k, f"e{k}", "") for k in range(len(counts))]
    made = Cohort(name="", modality="", classes=tuple(f"c{k}" for k in range(len(counts))), ordinal=False, image_size=8)
    return made.with_cases(training=training, test=test)


@settings(deadline=None, max_examples=25)
@given(real_counts, ratios, st.sampled_from(["proportional", "balance"]))
def test_quotas_sum_to_the_ratio_exactly(counts: list[int], ratio: float, allocation: str) -> None:
    made = quotas(cohort_of(counts), ratio, allocation)
    assert sum(made) == round(ratio * sum(counts))
    assert min(made) >= 0


@settings(deadline=None, max_examples=25)
@given(real_counts, ratios)
def test_proportional_quotas_are_close_to_the_shares(counts: list[int], ratio: float) -> None:
    made = quotas(cohort_of(counts), ratio)
    total = sum(made)
    assert total == round(ratio * sum(counts))
    assert all(abs(number - count / sum(counts) * total) <= 1.5 for number, count in zip(made, counts, strict=True))


@settings(deadline=None, max_examples=25)
@given(real_counts, ratios, ratios, st.sampled_from(["proportional", "balance"]))
def test_quotas_nest_in_the_ratio(counts: list[int], one: float, other: float, allocation: str) -> None:
    cohort = cohort_of(counts)
    few, many = (quotas(cohort, ratio, allocation) for ratio in sorted((one, other)))
    assert all(a <= b for a, b in zip(few, many, strict=True))


def test_a_rare_class_keeps_its_image_in_a_larger_plan() -> None:
    cohort = cohort_of([1, 13, 13])  # largest remainders make [1, 5, 5] of 11 and [0, 7, 7] of 14
    assert [quotas(cohort, ratio)[0] for ratio in (0.4, 0.5, 0.6, 1.0)] == [0, 1, 1, 1]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), ratios)
def test_balance_leaves_classes_as_even_as_it_can(counts: list[int], ratio: float) -> None:
    added = quotas(cohort_of(counts), ratio, "balance")
    assert sum(added) == round(ratio * sum(counts))
    sums = [count + more for count, more in zip(counts, added, strict=True)]
    filled = [value for value, more in zip(sums, added, strict=True) if more]
    assert not filled or max(filled) - min(sums) <= 1  # nobody was raised above one that stayed behind


def test_known_quotas() -> None:
    assert quotas(cohort_of([10, 10, 20]), 2.5) == [25, 25, 50]  # the paper's ratio, taken literally
    assert quotas(cohort_of([1, 1, 1]), 4 / 3) == [2, 1, 1]  # ties go to the earlier class
    assert quotas(cohort_of([10, 1, 4]), 1.0, "balance") == [0, 9, 6]
    assert quotas(cohort_of([2, 2]), None, "fixed", {"c1": 3}) == [0, 3]
    assert largest_remainder([0.5, 0.25, 2.25], 3) == [1, 0, 2]


@settings(deadline=None, max_examples=25)
@given(real_counts, st.integers(0, 30), st.integers(0, 30), st.integers(0, 3))
def test_a_larger_plan_begins_with_the_smaller(counts: list[int], small: int, more: int, seed: int) -> None:
    cohort = cohort_of(counts)
    first = make_plan(cohort, [small] * len(counts), seed, "w")
    second = make_plan(cohort, [small + more] * len(counts), seed, "w")
    assert all(b[: len(a)] == a for a, b in zip(first, second, strict=True))


@settings(deadline=None, max_examples=25)
@given(real_counts, st.integers(0, 40), st.integers(0, 3))
def test_references_are_training_cases_of_the_class_used_evenly(counts: list[int], number: int, seed: int) -> None:
    cohort = cohort_of(counts)
    plan = make_plan(cohort, [number] * len(counts), seed, "w")
    training = {case.id for case in cohort.training}
    for label, planned in enumerate(plan):
        used = Counter(case.reference.id for case in planned)
        assert set(used) <= training  # never a validation or test case
        assert all(case.reference.label == label == case.label for case in planned)
        assert not used or max(used.values()) - (min(used.values()) if len(used) == counts[label] else 0) <= 1


def test_ids_belong_to_weights_seed_class_and_number() -> None:
    cohort = cohort_of([3, 3])
    plans = [make_plan(cohort, [4, 4], seed, weights) for seed in (0, 1) for weights in ("v", "w")]
    ids = [case.id for plan in plans for cases in plan for case in cases]
    assert len(set(ids)) == len(ids) == 32


def test_synthetic_cases_are_no_references() -> None:
    cohort = cohort_of([2])
    fake = Case("s", "x", 0, "g", "", lineage={"fit_on": "x"})
    plan = make_plan(cohort.with_cases(training=[*cohort.training, fake]), [9], 0, "w")
    assert "s" not in {case.reference.id for case in plan[0]}
    with pytest.raises(DataError, match="class-empty"):
        make_plan(cohort.with_cases(training=[fake]), [1], 0, "w")


@settings(deadline=None, max_examples=25)
@given(real_counts, st.integers(1, 7), st.integers(0, 20))
def test_batches_hold_one_class_and_every_case_once(counts: list[int], size: int, number: int) -> None:
    plan = make_plan(cohort_of(counts), [number] * len(counts), 0, "w")
    made = batches(plan, size)
    assert [case for batch in made for case in batch] == [case for cases in plan for case in cases]
    assert all(1 <= len(batch) <= size and len({case.label for case in batch}) == 1 for batch in made)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((1.0, "even"), "allocation-unknown"),
        ((0.0,), "ratio-invalid"),
        ((-1.0,), "ratio-invalid"),
        ((None,), "ratio-invalid"),
        ((float("nan"),), "ratio-invalid"),
        ((float("inf"),), "ratio-invalid"),
        ((None, "fixed"), "allocation-fixed"),
        ((None, "fixed", {"c9": 1}), "allocation-fixed"),
        ((None, "fixed", {"c0": -1}), "counts-invalid"),
        ((None, "fixed", {"c0": 1.5}), "counts-invalid"),
    ],
)
def test_bad_quotas_are_refused(arguments: tuple[Any, ...], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        quotas(cohort_of([2, 2]), *arguments)


def test_empty_training_split_is_refused() -> None:
    with pytest.raises(DataError, match="training-empty"):
        quotas(cohort_of([0, 0]), 1.0)


@pytest.mark.parametrize("counts", [[1], [1, -1], [1, 2.0], [1, True]])
def test_bad_counts_are_refused(world: Any, counts: list[int]) -> None:
    with pytest.raises(ConfigError, match="counts-invalid"):
        plan_for(cohort_of([2, 2]), world.record, 0, counts=counts)


def test_absent_class_with_a_quota_is_refused() -> None:
    with pytest.raises(DataError, match="class-empty.*c1"):
        make_plan(cohort_of([2, 0]), [1, 1], 0, "w")
    assert [len(cases) for cases in make_plan(cohort_of([2, 0]), [1, 0], 0, "w")] == [1, 0]
