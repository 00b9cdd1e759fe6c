"""The label filter: what it accepts, what it is trained on, and that it is trained once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.errors import ConfigError, DataError
from medaug.quality import pseudo_label
from medaug.quality.pseudo_label import accept, train_filter
from medaug.training.classifier import ClassifierRecipe
from medaug.training.temperature import softmax

RECIPE = ClassifierRecipe(num_steps=12, batch_size=8, evaluate_every=6)


def probabilities(seed: int, n: int = 40, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return softmax(3 * draw.standard_normal((n, k))), draw.integers(0, k, n)


def test_accept_by_hand():
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.1, 0.9], [0.3, 0.7]])
    verdicts = accept(probs, [0, 0, 0, 0], 0.8)
    assert [verdict.accepted for verdict in verdicts] == [True, False, False, False]
    assert [verdict.reasons for verdict in verdicts] == [
        (),
        ("confidence-low",),
        ("label-disagrees",),
        ("label-disagrees", "confidence-low"),
    ]
    assert [(verdict.label, verdict.confidence) for verdict in verdicts] == [(0, 0.9), (0, 0.7), (1, 0.9), (1, 0.7)]


def test_confidence_equal_to_the_threshold_is_accepted():
    assert accept(np.array([[0.8, 0.2]]), [0], 0.8)[0].accepted


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), thresholds=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_larger_threshold_accepts_a_subset(seed, thresholds):
    probs, intended = probabilities(seed)
    low, high = sorted(thresholds)
    lenient, strict = accept(probs, intended, low), accept(probs, intended, high)
    assert all(wide.accepted for wide, narrow in zip(lenient, strict, strict=True) if narrow.accepted)
    for verdict, want in zip(strict, intended, strict=True):
        assert verdict.accepted == (verdict.label == want and verdict.confidence >= high)


def test_threshold_zero_is_agreement():
    probs, intended = probabilities(0)
    assert [verdict.accepted for verdict in accept(probs, intended, 0)] == (probs.argmax(1) == intended).tolist()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_threshold_outside_the_unit_interval_is_refused(threshold):
    with pytest.raises(ConfigError, match="threshold must be in"):
        accept(np.array([[1.0, 0.0]]), [0], threshold)


@pytest.mark.parametrize("probs", [[[0.5, 0.6]], [[np.nan, 1.0]], [[-0.1, 1.1]]])
def test_rows_that_are_no_probabilities_are_refused(probs):
    with pytest.raises(DataError, match="sum to 1"):
        accept(np.array(probs), [0], 0.5)


def test_labels_of_another_length_are_refused():
    with pytest.raises(DataError, match="N labels"):
        accept(np.array([[1.0, 0.0]]), [0, 1], 0.5)


def test_filter_is_fitted_on_real_training_cases_only(tmp_path, make_cohort, monkeypatch):
    cohort = make_cohort(tmp_path / "c", per_class=10, size=8)
    seen: dict[str, object] = {}
    original = pseudo_label.fit_classifier

    def spy(network, training, validation, recipe, **options):
        seen["training"] = [training[index]["id"] for index in range(len(training))]
        seen["validation"] = validation
        return original(network, training, validation, recipe, **options)

    monkeypatch.setattr(pseudo_label, "fit_classifier", spy)
    made = train_filter(cohort, tmp_path / "f", recipe=RECIPE)
    assert set(seen["training"]) == {case.id for case in cohort.training}
    assert seen["validation"] is None  # a step chosen by validation would make the filter fitted on it
    assert set(made.fit_groups) == cohort.groups("training")
    assert not set(made.fit_groups) & (cohort.groups("validation") | cohort.groups("test"))


def test_filter_reports_its_accuracy_and_is_trained_once(tmp_path, make_cohort, monkeypatch):
    cohort = make_cohort(tmp_path / "c", per_class=10, size=8)
    first = train_filter(cohort, tmp_path / "f", recipe=RECIPE, calibrate=True, report_test=True)
    (facts_path,) = (tmp_path / "f").glob("*/filter.json")
    facts = json.loads(facts_path.read_text())
    assert facts["validation"]["n"] == len(cohort.validation) and facts["test"]["n"] == len(cohort.test)
    assert np.sum(facts["validation"]["confusion"]) == len(cohort.validation)
    assert facts["calibration"]["temperature"] == first.temperature != 1
    assert facts["calibration"]["n"] == len(cohort.validation)

    monkeypatch.setattr(pseudo_label, "fit_classifier", lambda *args, **options: pytest.fail("trained twice"))
    again = train_filter(cohort, tmp_path / "f", recipe=RECIPE, calibrate=True, report_test=True)
    assert (first.cached, again.cached) == (False, True)
    assert train_filter(cohort, tmp_path / "f", recipe=RECIPE).temperature == 1  # calibration is no part of the training
    cases = list(cohort.test)
    assert again.judge(cohort, cases, 0.5) == first.judge(cohort, cases, 0.5)


def test_calibration_changes_confidence_and_no_label(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=10, size=8)
    plain, calibrated = (train_filter(cohort, tmp_path / "f", recipe=RECIPE, calibrate=value) for value in (False, True))
    before, after = (made.judge(cohort, cohort.validation, 0.0) for made in (plain, calibrated))
    assert [seen.label for seen in before] == [seen.label for seen in after]
    assert [seen.confidence for seen in before] != [seen.confidence for seen in after]


def test_a_temperature_at_its_bound_is_not_applied(tmp_path, make_cohort, monkeypatch):
    cohort = make_cohort(tmp_path / "c", per_class=10, size=8)
    faultless = lambda network, images: 5 * torch.eye(3)[[case.label for case in images.cases]]  # noqa: E731
    monkeypatch.setattr(pseudo_label, "predict_logits", faultless)
    made = train_filter(cohort, tmp_path / "f", recipe=RECIPE, calibrate=True)
    assert made.facts["calibration"]["at_lowest"] and made.temperature == 1


def test_calibration_without_validation_is_refused(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=5, size=8).with_cases(validation=[])
    with pytest.raises(DataError, match="validation-empty"):
        train_filter(cohort, tmp_path / "f", recipe=RECIPE, calibrate=True)


def test_damaged_cache_is_trained_again_to_the_same_weights(tmp_path, make_cohort, caplog):
    cohort = make_cohort(tmp_path / "c", per_class=10, size=8)
    first = train_filter(cohort, tmp_path / "f", recipe=RECIPE)
    (weights,) = (tmp_path / "f").glob("*/filter.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    again = train_filter(cohort, tmp_path / "f", recipe=RECIPE)
    assert not again.cached and "damaged" in caplog.text
    assert again.facts["weights_sha256"] == first.facts["weights_sha256"]


def test_class_without_training_image_is_refused(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=5, size=8)
    without = cohort.with_cases(training=[case for case in cohort.training if case.label != 1])
    with pytest.raises(DataError, match="none of class1"):
        train_filter(without, tmp_path / "f", recipe=RECIPE)
