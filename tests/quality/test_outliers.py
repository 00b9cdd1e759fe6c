"""Outlier scores: known values, scikit-learn's covariance, strangers score above the limit that real images set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from medaug.errors import DataError
from medaug.quality.outliers import METHODS, energy, fit_gaussians, fit_vos, limit_of, virtual_outliers
from medaug.quality.real_fake import auc_interval, fit_real_fake

CENTRES = 4 * np.eye(3, 8)


def classes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three Gaussian classes in eight dimensions."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return CENTRES[labels] + draw.standard_normal((n, 8)), labels


def test_energy_is_minus_log_sum_exp_and_large_logits_do_not_overflow():
    logits = np.random.default_rng(0).normal(0, 5, (20, 4))
    np.testing.assert_allclose(energy(logits), -logsumexp(logits, axis=1))
    np.testing.assert_allclose(energy(logits, 2.0), -2 * logsumexp(logits / 2, axis=1))
    assert np.isfinite(energy(np.array([[1e4, -1e4]]))).all()


def test_tied_covariance_is_ledoit_wolf_of_the_residuals():
    x, labels = classes(60)
    residual = x - np.stack([x[labels == label].mean(0) for label in range(3)])[labels]
    expected = LedoitWolf(assume_centered=True).fit(residual)
    fitted = fit_gaussians(x, labels)
    np.testing.assert_allclose(fitted.covariance, expected.covariance_, rtol=1e-6, atol=1e-8)
    difference = x - fitted.means[1]
    wanted = np.einsum("ij,jk,ik->i", difference, np.linalg.inv(fitted.covariance), difference)
    np.testing.assert_allclose(fitted.squared_distances(x)[:, 1], wanted)


@pytest.mark.parametrize("method", METHODS)
def test_strangers_are_beyond_the_limit_and_new_images_within(method):
    x, labels = classes(300)
    score = METHODS[method](x, labels)
    limit = limit_of(score(classes(300, seed=1)[0]))
    assert (score(classes(2000, seed=2)[0]) <= limit).mean() == pytest.approx(0.95, abs=0.04)
    strangers = -4 * np.ones((200, 8)) + np.random.default_rng(3).standard_normal((200, 8))
    assert (score(strangers) > limit).mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_fewer_images_than_dimensions_one_class_and_any_order(method):
    x = np.random.default_rng(0).standard_normal((12, 40))
    score = METHODS[method](x, np.zeros(12, int))
    new = np.random.default_rng(1).standard_normal((9, 40))
    assert np.isfinite(score(new)).all()
    np.testing.assert_allclose(score(new)[::-1], score(new[::-1]), rtol=1e-9)


def test_neighbour_score_is_the_distance_to_the_fifth():
    x, labels = classes(80)
    new = classes(20, seed=1)[0]
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, new)]
    expected = NearestNeighbors(n_neighbors=5).fit(unit[0]).kneighbors(unit[1])[0][:, -1]
    np.testing.assert_allclose(METHODS["knn"](x, labels)(new), expected)


def test_virtual_outliers_lie_on_the_rim_and_training_pushes_them_out():
    x, labels = classes(300)
    gaussians = fit_gaussians(x, labels)
    made = virtual_outliers(gaussians, 50, 4000, "test")
    rim = gaussians.squared_distances(made).reshape(3, 50, 3)
    own = np.stack([rim[label, :, label] for label in range(3)])
    assert own.min() > np.quantile(gaussians.squared_distances(x).min(1), 0.95)
    with_beta, without = fit_vos(x, labels), fit_vos(x, labels, beta=0.0)
    outliers = virtual_outliers(gaussians, 200, 4000, "other")

    def auc(score) -> float:
        return auc_interval(score.energies(outliers), score.energies(x))[0]

    assert auc(with_beta) > auc(without)
    again = fit_vos(x, labels)
    np.testing.assert_array_equal(again.weight, with_beta.weight)


def test_limit_is_the_order_statistic_and_needs_images():
    assert limit_of(np.arange(1, 101)) == 96  # 95 lie below it and it passes itself
    with pytest.raises(DataError, match="at least 20 validation images, got 3"):
        limit_of(np.zeros(3))
    with pytest.raises(DataError, match="finite"):
        limit_of(np.full(30, np.nan))


def test_constant_features_are_refused():
    with pytest.raises(DataError, match="same features"):
        fit_gaussians(np.ones((5, 3)), np.zeros(5))
    with pytest.raises(DataError, match="label"):
        fit_gaussians(np.ones((5, 3)), np.zeros(4))


def test_real_fake_cannot_tell_equals_and_tells_strangers():
    names = [f"p{index // 2}" for index in range(120)]
    same = fit_real_fake(classes(120)[0], classes(120, seed=1)[0], names, names)
    assert same.low < 0.5 < same.high and same.accuracy == pytest.approx(0.5, abs=0.12) and same.p > 0.01
    apart = fit_real_fake(classes(120)[0], classes(120, seed=1)[0] + 2, names, names)
    assert apart.auc > 0.98 and apart.p < 1e-6 and (apart.synthetic > 0).mean() > 0.9
    assert (apart.scores(classes(50, seed=2)[0]) < 0).mean() > 0.9


def test_scores_are_out_of_fold():
    noise = np.random.default_rng(0)
    wide, other = noise.standard_normal((60, 400)), noise.standard_normal((60, 400))  # a fitted model would separate these
    names = [str(index) for index in range(60)]
    found = fit_real_fake(wide, other, names, [f"s{name}" for name in names])
    assert 0.3 < found.auc < 0.7


def test_the_limit_of_an_image_is_that_of_the_model_that_judges_it():
    draw = np.random.default_rng(0)
    real, new, validation = (draw.standard_normal((n, 120)) for n in (100, 60, 200))
    found = fit_real_fake(real, new, [f"r{index}" for index in range(100)], [f"s{index}" for index in range(60)])
    limits = found.limits(validation, 0.9)
    assert set(found.fold) == set(range(5)) and len(set(limits)) == 5
    for index, model in enumerate(found.models):
        own = found.fold == index
        np.testing.assert_allclose(found.synthetic[own], model.decision_function(new[own]))
        assert set(limits[own]) == {limit_of(model.decision_function(validation), 0.9)}
    # A mean over models spreads less than the scores of one: its limit would turn more than a tenth of new images away.
    assert limits.mean() > limit_of(found.scores(validation).mean(axis=0), 0.9)
    with pytest.raises(DataError, match="got 0"):
        found.limits(np.empty((0, 120)))


def test_auc_interval_covers_and_needs_both_sides():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = auc_interval(draw.normal(1, 1, 60), draw.normal(0, 1, 60))
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert covered / 200 > 0.9
    auc, low, high = auc_interval(np.ones(10), np.zeros(10))
    assert (auc, high) == (1, 1) and low < 0.95
    with pytest.raises(DataError, match="both sides"):
        auc_interval(np.array([]), np.ones(3))
    with pytest.raises(DataError, match="two patients"):
        fit_real_fake(np.ones((3, 2)), np.ones((3, 2)), ["a"] * 3, ["b"] * 3)
