"""Near-copies: exact copies are all found, honest images at the rate the percentile promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from medaug.errors import DataError
from medaug.quality import neighbours
from medaug.quality.copies import copy_report, copy_threshold, cross_group_distances, nearest_distances


def normal(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_exact_copies_have_rate_one_and_new_images_about_one_percent():
    train, held_out, new = normal(300), normal(2000, seed=1), normal(2000, seed=2)
    threshold = copy_threshold(nearest_distances(held_out, train)[0])
    copied = copy_report(nearest_distances(train[:50], train)[0], threshold)
    assert (copied.rate, copied.suspicious) == (1, True)
    honest = copy_report(nearest_distances(new, train)[0], threshold)
    assert honest.rate == pytest.approx(0.01, abs=0.01) and not honest.suspicious  # four standard errors at 2,000


def test_nearest_by_brute_force_and_in_chunks(monkeypatch):
    x, train = normal(20), normal(30, seed=1)
    unit_x, unit_train = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, train))
    expected = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in unit_train] for a in unit_x])
    monkeypatch.setattr(neighbours, "BLOCK", 210)  # seven rows
    distances, indices = nearest_distances(x, train)
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-12)
    assert indices.tolist() == expected.argmin(axis=1).tolist()


def test_cross_group_distance_ignores_the_own_group():
    x = np.array([[1, 0], [1, 0], [0, 1.0]])
    np.testing.assert_allclose(cross_group_distances(x, ["a", "a", "b"]), np.sqrt(2) * np.ones(3))
    assert len(cross_group_distances(x, ["a", "a", "a"])) == 0


def test_interval_is_clopper_pearson():
    report = copy_report(np.array([0.0] * 3 + [1.0] * 17), 0.5)
    assert (report.n, report.copies, report.rate) == (20, 3, 0.15)
    assert (report.low, report.high) == pytest.approx((beta.ppf(0.025, 3, 18), beta.ppf(0.975, 4, 17)))


def test_distance_zero_counts_at_threshold_zero():
    assert copy_report(np.array([0.0, 0.1]), 0.0).copies == 1


def test_nothing_judged_has_no_rate():
    assert copy_report(np.array([]), 0.1).rate is None


def test_faults_are_refused():
    with pytest.raises(DataError, match="held-out images"):
        copy_threshold(np.array([]))
    with pytest.raises(DataError, match="finite"):
        nearest_distances(np.array([[np.inf, 0]]), normal(3, 2))
