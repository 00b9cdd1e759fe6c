"""Splits: every group on one side, every class on all sides, the same whatever the order of the cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.errors import ConfigError, DataError
from medaug.splits import grouped_folds, grouped_split, parse_ratios, stratified_part

# Groups of one class each: (class, size); mixed groups are drawn apart, since they may allow no split at all.
PURE = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=40)
MIXED = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=2, max_size=60)


def expand(groups: list[tuple[int, int]]) -> tuple[list[int], list[str]]:
    cases = [(label, f"g{index}") for index, (label, size) in enumerate(groups) for _ in range(size)]
    return [label for label, _ in cases], [group for _, group in cases]


def parts_of(keys: list, values: list) -> dict:
    found: dict = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key, set()).add(value)
    return found


@settings(deadline=None, max_examples=25)
@given(PURE, st.integers(0, 5))
def test_every_class_reaches_every_split_it_has_groups_for(groups, seed):
    labels, names = expand(groups)
    split = grouped_split(labels, names, seed=seed)
    assert all(len(parts) == 1 for parts in parts_of(names, split).values())
    number = {label: sum(own == label for own, _ in groups) for label in set(labels)}
    for label, parts in parts_of(labels, split).items():
        wanted = {"training"} | ({"test"} if number[label] >= 2 else set()) | ({"validation"} if number[label] >= 3 else set())
        assert wanted <= parts


@settings(deadline=None, max_examples=25)
@given(MIXED, st.integers(0, 3))
def test_mixed_groups_stay_whole_or_are_refused(cases, seed):
    labels, names = [label for label, _ in cases], [f"g{group}" for _, group in cases]
    try:
        split = grouped_split(labels, names, seed=seed)
    except DataError as error:
        assert error.code == "split-impossible"
        return
    assert all(len(parts) == 1 for parts in parts_of(names, split).values())
    for label, parts in parts_of(labels, split).items():
        if len({name for own, name in zip(labels, names, strict=True) if own == label}) >= 2:
            assert {"training", "test"} <= parts


@settings(deadline=None, max_examples=25)
@given(PURE, st.randoms(use_true_random=False))
def test_order_of_cases_does_not_matter(groups, random):
    labels, names = expand(groups)
    order = list(range(len(labels)))
    random.shuffle(order)
    straight = dict(zip(names, grouped_split(labels, names, seed=3), strict=True))
    shuffled = grouped_split([labels[index] for index in order], [names[index] for index in order], seed=3)
    assert dict(zip([names[index] for index in order], shuffled, strict=True)) == straight


def test_ratios_are_met_per_class():
    generator = np.random.default_rng(0)
    groups = [(int(generator.integers(0, 3)), int(generator.integers(1, 9))) for _ in range(300)]
    labels, names = expand(groups)
    split = np.array(grouped_split(labels, names))
    for label in range(3):
        own = split[np.array(labels) == label]
        for part, share in (("training", 0.7), ("validation", 0.1), ("test", 0.2)):
            assert (own == part).mean() == pytest.approx(share, abs=0.02)


def test_seed_changes_the_split():
    labels, names = expand([(index % 2, 2) for index in range(60)])
    assert grouped_split(labels, names, seed=0) == grouped_split(labels, names, seed=0)
    assert grouped_split(labels, names, seed=0) != grouped_split(labels, names, seed=1)


def test_large_groups_do_not_all_stay_in_training():
    labels, names = expand([(0, 10)] * 20 + [(0, 1)] * 20)
    split = dict(zip(names, grouped_split(labels, names), strict=True))
    assert "test" in {split[f"g{index}"] for index in range(20)}


def test_impossible_mixture_is_refused():
    # Three classes in three groups, each group holding two of them: two sides cannot both hold all three.
    labels, names = [0, 1, 1, 2, 0, 2], ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(DataError, match="split-impossible"):
        grouped_split(labels, names, (0.8, 0.0, 0.2))


@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.7, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_wrong_ratios_are_refused(ratios):
    with pytest.raises(ConfigError, match="split-ratios-invalid"):
        grouped_split([0, 1], ["a", "b"], ratios)


def test_parse_ratios():
    assert parse_ratios("0.6,0.2,0.2") == (0.6, 0.2, 0.2)
    with pytest.raises(ConfigError, match="0.7,0.1,0.2"):
        parse_ratios("most,some")


def test_empty_or_uneven_input_is_refused():
    with pytest.raises(DataError, match="split-input-invalid"):
        grouped_split([], [])
    with pytest.raises(DataError, match="split-input-invalid"):
        grouped_split([0, 1], ["a"])


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(0, 3), st.integers(0, 9))
def test_folds_are_disjoint_and_hold_every_class(num_folds, extra, seed):
    labels, names = expand([(label, 1 + index % 3) for label in range(2) for index in range(num_folds + extra)])
    folds = grouped_folds(labels, names, num_folds, seed)
    assert all(len(parts) == 1 for parts in parts_of(names, folds).values())
    assert all(parts == set(range(num_folds)) for parts in parts_of(labels, folds).values())


def test_too_many_folds_are_refused():
    with pytest.raises(DataError, match="class-too-small"):
        grouped_folds([0, 0, 1, 1, 1], ["a", "b", "c", "d", "e"], 3, 0)
    with pytest.raises(ConfigError, match="folds-invalid"):
        grouped_folds([0, 1], ["a", "b"], 1, 0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(0, 3), st.data())
def test_a_part_is_exact_keeps_every_class_and_nests(labels, seed, data):
    names = [f"case{index}" for index in range(len(labels))]
    fewest = len(set(labels))
    total = data.draw(st.integers(fewest, len(labels)))
    chosen = stratified_part(labels, names, total, seed)
    assert sum(chosen) == total
    assert {label for label, kept in zip(labels, chosen, strict=True) if kept} == set(labels)
    if total < len(labels):
        larger = stratified_part(labels, names, total + 1, seed)
        assert all(more for kept, more in zip(chosen, larger, strict=True) if kept)
    turned = stratified_part(labels[::-1], names[::-1], total, seed)
    assert turned[::-1] == chosen


def test_a_part_has_the_shares_of_the_whole():
    labels = [0] * 1214 + [1] * 3494
    chosen = stratified_part(labels, [str(index) for index in range(len(labels))], 200)
    assert sum(chosen[:1214]) == 52 and sum(chosen[1214:]) == 148  # 200 * 1214 / 4708 = 51.6


@pytest.mark.parametrize("total", [0, 1, 5])
def test_a_part_of_no_such_size_is_refused(total):
    with pytest.raises(ConfigError, match="part-invalid"):
        stratified_part([0, 0, 1, 1], list("abcd"), total)
