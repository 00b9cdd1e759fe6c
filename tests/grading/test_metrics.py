"""Metrics against scikit-learn and hand-worked values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions import predictions
from sklearn import metrics as reference

from medaug.errors import DataError
from medaug.grading import metrics
from medaug.training.classifier import confusion_counts


@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from([None, 1]))
@settings(deadline=None, max_examples=25)
def test_metrics_equal_scikit_learn(seed, num_classes, decimals):
    target, probs = predictions(seed, num_classes=num_classes, decimals=decimals)
    preds = probs.argmax(1)
    ours = metrics.classification_metrics(target, probs, ordinal=True)
    assert ours["accuracy"] == pytest.approx(reference.accuracy_score(target, preds))
    assert ours["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(target, preds))
    assert ours["macro_f1"] == pytest.approx(reference.f1_score(target, preds, average="macro"))
    assert ours["quadratic_kappa"] == pytest.approx(reference.cohen_kappa_score(target, preds, weights="quadratic"))
    assert ours["grade_mae"] == pytest.approx(reference.mean_absolute_error(target, preds))
    assert ours["confusion"] == reference.confusion_matrix(target, preds, labels=range(num_classes)).tolist()
    one_vs_rest = [reference.roc_auc_score(target == index, probs[:, index]) for index in range(num_classes)]
    assert ours["auc"] == pytest.approx(one_vs_rest[1] if num_classes == 2 else np.mean(one_vs_rest))
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        target, preds, labels=range(num_classes), zero_division=np.nan
    )
    assert [row["support"] for row in ours["per_class"]] == support.tolist()
    assert [row["recall"] for row in ours["per_class"]] == pytest.approx(recall.tolist())
    for row, expected in zip(ours["per_class"], precision, strict=True):
        assert row["precision"] is None if math.isnan(expected) else row["precision"] == pytest.approx(expected)


def test_kappa_by_hand():
    # Three of four right, one off by one grade of three: O-weight 1/4, E-weight from the marginals (2,1,1) and (1,2,1).
    counts = confusion_counts(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]), 3)
    observed = 1 * 0.25 / 4
    expected = (2 * 2 * 0.25 + 2 * 1 * 1 + 1 * 1 * 0.25 + 1 * 1 * 0.25 + 1 * 1 * 1 + 1 * 2 * 0.25) / 16
    assert metrics.quadratic_kappa(counts) == pytest.approx(1 - observed / expected)


def test_kappa_is_zero_for_independent_marginals_and_one_for_perfect():
    assert metrics.quadratic_kappa(np.outer([3, 5, 2], [4, 1, 5])) == pytest.approx(0)
    assert metrics.quadratic_kappa(np.diag([3, 5, 2])) == 1


def test_absent_class_gives_none_with_a_reason():
    result = metrics.classification_metrics(np.array([0, 1, 0]), np.full((3, 3), 1 / 3), ordinal=False)
    assert result["auc"] is None and "[2]" in result["undefined"]["auc"]
    assert result["quadratic_kappa"] is None and "order" in result["undefined"]["quadratic_kappa"]
    assert result["per_class"][2] == {"precision": None, "recall": None, "f1": None, "support": 0}
    constant = metrics.classification_metrics(np.zeros(3, int), np.tile([1.0, 0, 0], (3, 1)), ordinal=True)
    assert constant["quadratic_kappa"] is None and "one class" in constant["undefined"]["quadratic_kappa"]
    assert constant["balanced_accuracy"] == 1


def test_refusal_of_targets_that_do_not_fit():
    target, probs = predictions(0)
    with pytest.raises(DataError, match="predictions-invalid"):
        metrics.classification_metrics(target[:5], probs, ordinal=False)


def reference_pair_auc(target, probs, weights):
    """Each pair of classes by scikit-learn, on its cases alone, by the odds of the two."""
    found = []
    for j in range(probs.shape[1]):
        for i in range(j):
            both = np.isin(target, (i, j)) & (weights > 0)
            if len(set(target[both])) == 2:
                odds = np.log(np.maximum(probs, 5e-7))[both]
                found.append(reference.roc_auc_score(target[both] == j, odds[:, j] - odds[:, i], sample_weight=weights[both]))
    return np.mean(found) if found else np.nan


@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([None, 1]))
@settings(deadline=None, max_examples=15)
def test_the_ranking_of_classes_equals_scikit_learn_also_with_repeated_and_absent_cases(seed, num_classes, decimals):
    target, _ = predictions(seed, num_cases=30, num_classes=num_classes)
    runs = np.stack([predictions(seed + run, 30, num_classes, decimals)[1] for run in range(3)])
    weights = np.random.default_rng(seed).integers(0, 3, (6, 30)).astype(float)
    weights[5, target == 1] = 0  # a resample without the class
    found = metrics.pair_auc(target, runs)(weights)
    expected = [np.mean([reference_pair_auc(target, run, row) for run in runs]) for row in weights]
    assert found == pytest.approx(expected, nan_ok=True)
    assert np.isnan(found[5]) == (num_classes == 2)


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(deadline=None, max_examples=15)
def test_a_moved_boundary_changes_no_ranking(seed, num_classes):
    target, probs = predictions(seed, num_classes=num_classes)
    moved = probs * np.random.default_rng(seed).uniform(0.2, 5, num_classes)  # as another share of classes in training does
    moved /= moved.sum(1, keepdims=True)
    weights = np.ones((1, len(target)))
    assert metrics.pair_auc(target, moved[None])(weights) == pytest.approx(metrics.pair_auc(target, probs[None])(weights))


def test_of_two_classes_the_ranking_is_the_usual_area():
    target, probs = predictions(1, num_classes=2, decimals=2)
    weights = np.random.default_rng(0).integers(0, 3, (4, 60)).astype(float)
    assert metrics.pair_auc(target, probs[None])(weights) == pytest.approx(metrics.macro_auc(target, probs, weights))


def test_a_class_that_the_test_split_lacks_is_left_out_of_the_ranking():
    target, probs = predictions(2, num_classes=3)
    present = target != 1
    found = metrics.pair_auc(target[present], probs[None, present])(np.ones((1, present.sum())))
    assert found == pytest.approx(reference_pair_auc(target[present], probs[present], np.ones(present.sum())))
    assert np.isnan(metrics.pair_auc(np.zeros(5, int), probs[None, :5])(np.ones((1, 5))))


def test_the_ranking_of_many_cases_is_computed_run_by_run(monkeypatch):
    target, probs = predictions(3)
    weights = np.random.default_rng(0).integers(0, 3, (4, 60)).astype(float)
    whole = metrics.pair_auc(target, probs[None])(weights)
    called = []
    weighted = metrics._weighted_auc
    monkeypatch.setattr(metrics, "_MOST_PAIRS", 10)
    monkeypatch.setattr(metrics, "_weighted_auc", lambda *given: called.append(1) or weighted(*given))
    assert metrics.pair_auc(target, probs[None])(weights) == pytest.approx(whole) and called
