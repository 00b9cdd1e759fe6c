"""Distribution metrics against closed forms, other implementations and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from medaug.errors import ConfigError, DataError
from medaug.networks.grading import build_network
from medaug.quality.fidelity import (
    RandomConvFeatures,
    features_of,
    frechet_distance,
    kid,
    neighbourhood_metrics,
    polynomial_mmd2,
    task_features,
)


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_mmd_equals_a_double_loop():
    x, y = normal(7, 3), normal(5, 3, 1) + 0.5

    def kernel(a, b):
        return (float(np.dot(a, b)) / 3 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(a, b) for a in x for b in y) / 35
    assert polynomial_mmd2(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_kid_is_about_zero_for_one_distribution_and_grows_with_a_shift():
    x, y = normal(400, 8), normal(300, 8, 1)
    near, far, further = (kid(x, y + shift, subset_size=100) for shift in (0, 0.5, 1))
    # 0 within four standard errors of the mean over subsets of one pair of sets
    assert abs(near.value) < 4 * near.std / np.sqrt(3)
    assert near.value < far.value < further.value
    assert (near.n_real, near.n_synthetic) == (400, 300)


def test_kid_is_unbiased():
    # Mean over independent pairs of sets: 0 within four standard errors, where the biased estimate lies far above.
    values = [polynomial_mmd2(normal(20, 4, 2 * seed), normal(20, 4, 2 * seed + 1)) for seed in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)


def test_kid_of_whole_sets_has_no_spread():
    x = normal(60, 4)
    whole = kid(x, x.copy())
    assert whole.std is None and whole.value == pytest.approx(0, abs=0.5) and whole.value < 0  # unbiased: below 0 for X, X


def test_frechet_of_a_set_with_itself_is_zero():
    x = normal(200, 6)
    assert frechet_distance(x, x).value == pytest.approx(0, abs=1e-9)


def test_frechet_of_a_shift_is_its_square():
    x = normal(200, 6)
    shift = np.arange(6) / 3
    assert frechet_distance(x, x + shift).value == pytest.approx((shift**2).sum(), rel=1e-9)


def test_frechet_of_scaled_gaussians_is_known():
    # Gaussians N(0, I) and N(0, 4 I): sum over d of (2 - 1)^2 = d, with the very same draws.
    x = normal(500, 5)
    covariance = np.cov(x, rowvar=False)
    assert frechet_distance(x, 2 * x).value == pytest.approx(np.trace(covariance) + (x.mean(0) ** 2).sum(), rel=1e-9)


def test_frechet_agrees_with_scipy():
    x, y = normal(120, 5) @ normal(5, 5, 3), normal(100, 5, 1) @ normal(5, 5, 4) + 0.3
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2)))
    estimate = frechet_distance(x, y)
    assert estimate.value == pytest.approx(expected, rel=1e-6) and estimate.reliable


def test_frechet_with_few_images_says_so():
    estimate = frechet_distance(normal(60, 40), normal(60, 40, 1))
    assert not estimate.reliable and "fewer than 80" in estimate.note and np.isfinite(estimate.value)


def test_duplicates_have_recall_and_coverage_one():
    x = normal(80, 4)
    metrics = neighbourhood_metrics(x, x.copy())
    assert {name: metrics[name].value for name in ("precision", "recall", "coverage")} == {
        "precision": 1,
        "recall": 1,
        "coverage": 1,
    }
    assert metrics["density"].value >= 1


def test_one_point_has_precision_but_no_coverage():
    x = normal(200, 2)
    metrics = neighbourhood_metrics(x, np.zeros((60, 2)))
    assert metrics["precision"].value == 1
    assert metrics["recall"].value == 0 and metrics["coverage"].value < 0.15


def test_far_away_set_has_nothing():
    metrics = neighbourhood_metrics(normal(60, 3), normal(60, 3, 1) + 100)
    assert all(estimate.value == 0 for estimate in metrics.values())


def test_neighbourhoods_by_brute_force():
    x, y = normal(60, 2), 0.7 * normal(70, 2, 1)

    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points, i, k):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    r3, r5, s3 = ([radius(points, i, k) for i in range(len(points))] for points, k in ((x, 3), (x, 5), (y, 3)))
    inside = [[distance(x[i], y[j]) for j in range(70)] for i in range(60)]
    metrics = {name: estimate.value for name, estimate in neighbourhood_metrics(x, y).items()}
    assert metrics == pytest.approx(
        {
            "precision": np.mean([any(inside[i][j] <= r3[i] for i in range(60)) for j in range(70)]),
            "recall": np.mean([any(inside[i][j] <= s3[j] for j in range(70)) for i in range(60)]),
            "density": sum(inside[i][j] <= r5[i] for i in range(60) for j in range(70)) / (5 * 70),
            "coverage": np.mean([any(inside[i][j] <= r5[i] for j in range(70)) for i in range(60)]),
        }
    )


def test_order_of_samples_changes_nothing():
    x, y = normal(120, 4), normal(90, 4, 1) + 0.2
    shuffle = np.random.default_rng(5).permutation
    a, b = x[shuffle(120)], y[shuffle(90)]
    assert kid(a, b, subset_size=50).value == pytest.approx(kid(x, y, subset_size=50).value, rel=1e-9)
    assert frechet_distance(a, b).value == pytest.approx(frechet_distance(x, y).value, rel=1e-9)
    before, after = neighbourhood_metrics(x, y), neighbourhood_metrics(a, b)
    assert {name: e.value for name, e in after.items()} == pytest.approx({name: e.value for name, e in before.items()})


@pytest.mark.parametrize("metric", [kid, frechet_distance, lambda x, y: neighbourhood_metrics(x, y)["density"]])
def test_few_images_are_insufficient(metric):
    estimate = metric(normal(49, 3), normal(100, 3))
    assert estimate.value is None and estimate.note == "insufficient" and (estimate.n_real, estimate.n_synthetic) == (49, 100)


def test_faults_are_refused():
    with pytest.raises(DataError, match="Features must be"):
        kid(normal(60, 3), normal(60, 4))
    with pytest.raises(DataError, match="finite"):
        frechet_distance(normal(60, 3), np.full((60, 3), np.nan))
    with pytest.raises(ConfigError, match="2 to 60 images"):
        kid(normal(60, 3), normal(70, 3), subset_size=61)
    with pytest.raises(DataError, match="at least one image"):
        features_of(RandomConvFeatures(), [])


@pytest.mark.parametrize("channels", [1, 3])
def test_random_features_belong_to_seed_and_image(channels):
    images = torch.rand(5, channels, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = features_of(RandomConvFeatures(0, channels), [images])
    assert whole.shape == (5, 64 * 16 + 64) and whole.dtype == np.float64
    np.testing.assert_allclose(features_of(RandomConvFeatures(0, channels), images.split(2)), whole, atol=1e-5)  # float32 sums
    assert not np.allclose(features_of(RandomConvFeatures(1, channels), [images]), whole)


def test_task_features_are_what_the_last_layer_sees():
    network = build_network("simple_cnn", 3, 1, 16)
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    extractor = task_features(network)
    features = extractor(images)
    torch.testing.assert_close(network.classifier(features), network(images))
    assert not features.requires_grad and extractor.name == "task"
