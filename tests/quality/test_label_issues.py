"""Doubtful labels from probabilities: against cleanlab as a whole, against the paper's formula, and the order of grades."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.errors import ConfigError, MissingDependencyError
from medaug.quality.label_issues import class_thresholds, confident_issues, label_quality, load_cleanlab, ordinal_quality


def noisy(seed: int, n: int = 90, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which every seventh is wrong, and probabilities that mostly know the true class; every class occurs."""
    draw = np.random.default_rng(seed)
    truth = np.arange(n) % k
    logits = 2.5 * np.eye(k)[truth] + draw.standard_normal((n, k))
    labels = np.where(np.arange(n) % 7 == 0, (truth + draw.integers(1, k, n)) % k, truth)
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_thresholds_by_hand():
    probs = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    assert class_thresholds(np.array([0, 0, 1]), probs) == pytest.approx([0.7, 0.8])


def test_issues_by_hand():
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.1, 0.9]])
    # Thresholds 0.7: the second is confidently of class 1; the third is only more likely of it.
    assert confident_issues(np.array([0, 0, 0, 1]), probs, np.array([0.7, 0.7])).tolist() == [False, True, False, False]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 5))
def test_issues_are_those_of_cleanlab_and_of_the_paper(seed, k):
    labels, probs = noisy(seed, k=k)
    found = confident_issues(labels, probs, class_thresholds(labels, probs))
    whole = load_cleanlab("filter").find_label_issues(labels, probs, filter_by="confident_learning", n_jobs=1)
    assert (found == whole).all()
    thresholds = [probs[labels == j, j].mean() for j in range(k)]  # eq. 2
    for row, label, issue in zip(probs, labels, found, strict=True):
        confident = [j for j in range(k) if row[j] >= thresholds[j]]  # eq. 1
        if issue:
            assert label != row.argmax() and confident and confident != [label]
        elif len(confident) == 1:
            assert confident == [label] or label == row.argmax()


def test_thresholds_of_training_judge_a_single_image():
    thresholds = class_thresholds(*noisy(0))
    assert confident_issues(np.array([2]), np.array([[0.98, 0.01, 0.01]]), thresholds).tolist() == [True]
    assert confident_issues(np.array([0]), np.array([[0.98, 0.01, 0.01]]), thresholds).tolist() == [False]
    assert confident_issues(np.array([], dtype=int), np.empty((0, 3)), thresholds).tolist() == []


def test_far_grades_cost_more_than_near_ones():
    certain = np.tile([1.0, 0, 0, 0], (4, 1))
    assert ordinal_quality(np.arange(4), certain) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    nominal = label_quality(np.arange(4), certain, ordinal=False)
    assert nominal[1] == nominal[3] == 0  # without an order one mistake is like another


def test_ordinal_quality_by_hand():
    assert ordinal_quality(np.array([2]), np.array([[0.5, 0.0, 0.25, 0.25]]))[0] == pytest.approx(1 - (0.5 * 2 + 0.25) / 3)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 6))
def test_ordinal_quality_is_a_share_and_falls_as_mass_moves_away(seed, k):
    draw = np.random.default_rng(seed)
    labels, probs = draw.integers(0, k, 20), draw.dirichlet(np.ones(k), 20)
    before = ordinal_quality(labels, probs)
    assert ((before >= -1e-12) & (before <= 1 + 1e-12)).all()
    mirrored = ordinal_quality(k - 1 - labels, probs[:, ::-1])
    assert mirrored == pytest.approx(before)
    farther = probs.copy()
    near = np.where(labels < k - 1, labels + 1, labels - 1)
    far = np.where(labels < k - 1, k - 1, 0)
    rows = np.arange(20)
    moved = np.minimum(farther[rows, near], 0.1)
    farther[rows, near] -= moved
    farther[rows, far] += moved
    assert (ordinal_quality(labels, farther) <= before + 1e-12).all()


def test_with_two_classes_both_scores_are_the_probability_of_the_label():
    labels, probs = noisy(3, k=2)
    for ordinal in (False, True):
        assert label_quality(labels, probs, ordinal=ordinal) == pytest.approx(probs[np.arange(len(labels)), labels])


def test_without_cleanlab_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.count", None)
    with pytest.raises(MissingDependencyError, match=r"labels-not-installed.*pip install -e '\.\[labels\]'") as caught:
        load_cleanlab()
    assert isinstance(caught.value, ConfigError) and caught.value.exit_code == 2
