"""Readers who disagree: the policies by hand, kappa against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.intake.readers import agreement, plain_kappa, settle, weighted_kappa

INDEX = {"0": 0, "1": 1, "2": 2, "3": 3, "II": 2}


def votes(*labels: str) -> list[tuple[int, str, str]]:
    """Readers a, b, c ... in this order."""
    return [(number, "abcdefgh"[number - 1], label) for number, label in enumerate(labels, start=1)]


@pytest.mark.parametrize(
    ("labels", "policy", "expected"),
    [
        (("1", "1"), "quarantine", 1),
        (("2", "II"), "quarantine", 2),
        (("1", "2"), "quarantine", None),
        (("1", "2", "II"), "majority", 2),
        (("1", "2"), "majority", None),
        (("0", "0", "3", "3", "1"), "majority", None),
        (("3", "1", "1"), "senior", 3),
        (("0", "1"), "mean", 0),  # 0.5 -> the even rank
        (("1", "2"), "mean", 2),  # 1.5 -> the even rank
        (("2", "3"), "mean", 2),  # 2.5 -> the even rank
        (("0", "3", "3"), "mean", 2),
        (("1", "1", "2"), "mean", 1),
    ],
)
def test_policies(labels: tuple[str, ...], policy: str, expected: int | None) -> None:
    assert settle(votes(*labels), INDEX, policy=policy, senior=" A ", ordinal=True) == expected


def test_senior_who_did_not_read_leaves_it_to_the_others() -> None:
    assert settle(votes("1", "1"), INDEX, policy="senior", senior="z", ordinal=True) == 1
    assert settle(votes("1", "2"), INDEX, policy="senior", senior="z", ordinal=True) is None
    twice = [(1, "a", "1"), (2, "a", "2"), (3, "b", "2")]
    assert settle(twice, INDEX, policy="senior", senior="a", ordinal=True) is None


def test_mean_of_names_is_no_mean() -> None:
    assert settle(votes("1", "2"), INDEX, policy="mean", senior=None, ordinal=False) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import cohen_kappa_score

    first, second = zip(*pairs, strict=True)
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1)
    for own, weights in ((weighted_kappa(table), "quadratic"), (plain_kappa(table), None)):
        if own is None:
            assert len({*first, *second}) == 1
        else:
            expected = cohen_kappa_score(first, second, labels=range(4), weights=weights)
            assert own == pytest.approx(expected, abs=1e-12)


def test_agreement_counts_units_and_numbers_readers() -> None:
    units = [votes("1", "1"), votes("1", "2"), votes("2", "II", "3"), [(9, "a", "0")]]
    found = agreement(units, INDEX, 4, ordinal=True)
    assert found["read_twice"] == 3 and found["disagreed"] == 2
    assert found["percent_agreement"] == pytest.approx(2 / 5)  # pairs: 1-1, 1-2, 2-2, 2-3, 2-3
    assert [(pair["readers"], pair["n"]) for pair in found["pairs"]] == [([1, 2], 3), ([1, 3], 1), ([2, 3], 1)]
    assert "a" not in str([pair["readers"] for pair in found["pairs"]])
    assert agreement([], INDEX, 4, ordinal=True)["kappa"] is None
