"""Temperature scaling: it finds the temperature that was planted, never does harm where it is fitted, and changes no decision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from medaug.training.temperature import (
    HIGHEST,
    LOWEST,
    expected_calibration_error,
    fit_temperature,
    measure_calibration,
    negative_log_likelihood,
    softmax,
)


def calibrated(seed: int, n: int, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true probability of the labels drawn from it."""
    draw = np.random.default_rng(seed)
    logits = 2 * draw.standard_normal((n, k))
    return logits, np.array([draw.choice(k, p=row) for row in softmax(logits)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    logits, labels = calibrated(1, 20000)
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.04)  # sampling error of the labels


def test_temperature_stays_in_its_bounds():
    assert fit_temperature(np.eye(3) * 5, [0, 1, 2]) == pytest.approx(LOWEST, rel=1e-3)  # a network without an error
    assert measure_calibration(np.eye(3) * 5, [0, 1, 2]).at_lowest
    assert fit_temperature(np.eye(3) * 5, [1, 2, 0]) == pytest.approx(HIGHEST, rel=1e-3)  # and one that is always wrong


def test_logits_that_say_nothing_keep_temperature_one():
    assert fit_temperature(np.zeros((4, 3)), [0, 1, 2, 0]) == 1.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), scale=st.floats(0.05, 30))
def test_no_decision_changes_and_the_likelihood_is_no_worse(seed, n, scale):
    draw = np.random.default_rng(seed)
    logits, labels = scale * draw.standard_normal((n, 4)), draw.integers(0, 4, n)
    found = measure_calibration(logits, labels)
    assert (softmax(logits, found.temperature).argmax(1) == logits.argmax(1)).all()
    assert found.nll_after <= found.nll_before
    assert LOWEST * 0.999 <= found.temperature <= HIGHEST * 1.001 and 0 <= found.ece_after <= 1


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.3, 5))
def test_minimum_is_the_one_that_scipy_finds(seed, scale):
    logits, labels = calibrated(seed, 200)
    loss = lambda inverse: -log_softmax(scale * logits * inverse, axis=1)[np.arange(200), labels].mean()  # noqa: E731
    oracle = minimize_scalar(loss, bounds=(1 / HIGHEST, 1 / LOWEST), method="bounded", options={"xatol": 1e-9}).x
    assert 1 / fit_temperature(scale * logits, labels) == pytest.approx(oracle, rel=1e-3)


def test_likelihood_by_hand():
    logits = np.log([[0.8, 0.2], [0.4, 0.6]])
    assert negative_log_likelihood(logits, [0, 0]) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)


def test_calibration_error_by_hand():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    # Bin of 0.9: confidence 0.9, accuracy 0.5; bin of 0.6: confidence 0.6, accuracy 1.
    assert expected_calibration_error(np.array([0, 1, 0, 1]), probs) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_an_overconfident_network_is_made_honest():
    logits, labels = calibrated(2, 4000)
    found = measure_calibration(4 * logits, labels)
    assert found.n == 4000 and not found.at_lowest and found.ece_before > 0.1 and found.ece_after < 0.03
