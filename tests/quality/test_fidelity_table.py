"""The table of fidelity: known shifts, independent kernels, intervals that cover, floors beside values, few images said so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cdist, pdist

from medaug.errors import ConfigError, DataError
from medaug.quality.fidelity import frechet_reduced, neighbourhood_metrics
from medaug.quality.fidelity_table import FeatureSet, fidelity_table, half_spread
from medaug.quality.local_features import local_features
from medaug.quality.mmd import gaussian_mmd, intraclass_diversity
from medaug.storage import sha256_file


def normal(n: int, d: int = 4, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def feature_set(name: str, n: int, seed: int, shift: float = 0.0) -> FeatureSet:
    return FeatureSet(name, normal(n, seed=seed, shift=shift), np.arange(n) % 2)


def test_mmd_is_the_sum_over_its_kernels():
    x, y = normal(30), normal(25, seed=1, shift=0.5)
    every = np.concatenate([x, y])
    sigma = np.median(pdist(every, "sqeuclidean")) ** 0.5
    expected = 0.0
    for factor in (0.5, 1, 2):
        xx, yy, xy = (np.exp(-cdist(a, b, "sqeuclidean") / (2 * (factor * sigma) ** 2)) for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - 30) / (30 * 29) + (yy.sum() - 25) / (25 * 24)
        expected += (within - 2 * xy.mean()) / 3
    found = gaussian_mmd(x, y)
    assert found.value == pytest.approx(expected, rel=1e-9) and found.bandwidth == pytest.approx(sigma)
    order = np.random.default_rng(0).permutation(30)
    assert gaussian_mmd(x[order], y) == found


def test_permutation_test_keeps_its_level_and_finds_a_shift():
    small = [gaussian_mmd(normal(30, seed=2 * i), normal(30, seed=2 * i + 1), permutations=99).p for i in range(40)]
    assert np.mean(np.array(small) <= 0.05) < 0.2
    assert gaussian_mmd(normal(60), normal(60, seed=1, shift=1), permutations=99).p == 0.01


def test_diversity_is_the_mean_distance_within_a_class():
    x, labels = normal(20), np.arange(20) % 2
    assert intraclass_diversity(x, labels) == pytest.approx(np.mean([pdist(x[labels == k]).mean() for k in (0, 1)]))
    assert intraclass_diversity(np.ones((4, 3)), np.zeros(4)) == 0
    assert intraclass_diversity(x[:2], np.arange(2)) is None


def test_frechet_in_few_components_says_so_and_knows_a_shift():
    x = normal(60, 200)
    found = frechet_reduced(x, x)
    assert (
        found.value == pytest.approx(0, abs=1e-8) and found.reliable and found.note.startswith("30 principal components of 200")
    )
    assert frechet_reduced(normal(2000), normal(2000, seed=1, shift=1)).value == pytest.approx(4, rel=0.1)


def test_duplicates_are_inside_their_balls_far_from_the_origin():
    x = normal(80) + 1e3
    found = neighbourhood_metrics(x, x.copy())
    assert [found[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    point = neighbourhood_metrics(x, np.repeat(x[:1], 80, axis=0))
    assert point["coverage"].value <= 0.2 and point["precision"].value == 1


def test_table_has_every_row_with_floor_and_the_worse_set_is_worse():
    real = {"training": feature_set("training", 240, 0), "held-out": feature_set("held-out", 120, 1)}
    good = fidelity_table(feature_set("synthetic", 120, 2), real, ["a", "b"], "test", halves=6)
    bad = fidelity_table(feature_set("synthetic", 120, 3, shift=1.5), real, ["a", "b"], "test", halves=6)
    assert len(good) == 3 * 2 * 9 and {row["class"] for row in good} == {"all", "a", "b"}
    assert {row["extractor"] for row in good} == {"test"}
    for name, worse in (("kid", 1), ("frechet", 1), ("mmd", 1), ("c2st", 1), ("coverage", -1), ("precision", -1)):
        one, two = (next(row for row in rows if row["metric"] == name) for rows in (good, bad))
        assert worse * (two["value"] - one["value"]) > 0
        assert one["floor"] is not None and worse * (two["value"] - one["floor"]) > 0
    for row in good:
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
    diversity = next(row for row in good if row["metric"] == "diversity")
    assert diversity["value"] == pytest.approx(1, abs=0.1)


def test_few_images_are_insufficient_and_no_held_out_set_leaves_no_floor():
    rows = fidelity_table(
        feature_set("synthetic", 60, 2), {"training": feature_set("training", 80, 0)}, ["a", "b"], "test", halves=2
    )
    assert all(row["note"] == "insufficient" and row["value"] is None for row in rows if row["class"] != "all")
    whole = [row for row in rows if row["class"] == "all"]
    assert all(row["floor"] is None for row in whole) and whole[0]["value"] is not None and whole[0]["n_synthetic"] == 60


def test_half_spread_is_that_of_the_estimate():
    def mean(real: FeatureSet, other: FeatureSet) -> dict[str, tuple[float, str]]:
        return {"mean": (float(other.features.mean() - real.features.mean()), "")}

    found = half_spread(mean, feature_set("r", 400, 0), feature_set("s", 400, 1), halves=200)["mean"]
    assert found == pytest.approx((2 / 1600) ** 0.5, rel=0.25)  # of whole sets of 400 x 4 numbers


def test_collapsed_images_have_a_row_without_a_number():
    real = {"training": feature_set("training", 60, 0)}
    rows = fidelity_table(FeatureSet("synthetic", np.ones((80, 4)), np.zeros(80)), real, ["a", "b"], "test", halves=0)
    values = {row["metric"]: row for row in rows if row["class"] == "all"}
    assert values["diversity"]["value"] == 0 and values["mmd"]["value"] is None or values["mmd"]["note"]


def test_faults_are_refused():
    with pytest.raises(DataError, match="two images"):
        gaussian_mmd(normal(1), normal(5))
    with pytest.raises(DataError, match="same features"):
        gaussian_mmd(np.ones((4, 2)), np.ones((4, 2)))


def test_local_weights_give_features_and_others_are_refused(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=5, in_chans=3)
    path = tmp_path / "weights.safetensors"
    save_file({f"module.{key}": value.contiguous() for key, value in network.state_dict().items()}, path)
    options = {"architecture": "timm:test_resnet.r160_in1k", "size": 64, "prefix": "module."}
    found = local_features(path, sha256_file(path), **options)
    assert sha256_file(path)[:16] in found.name
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    features = found(images)
    assert features.shape[0] == 2 and torch.isfinite(features).all()
    torch.testing.assert_close(found(images[1:]), features[1:], atol=1e-5, rtol=1e-4)
    for change, match in (
        ({"sha256": "0" * 64}, "weights-sha256"),
        ({"prefix": ""}, "weights-malformed.*tensors missing"),
        ({"architecture": "timm:none"}, "architecture-unknown"),
        ({"architecture": "odd"}, "architecture-unknown"),
        ({"path": tmp_path / "no"}, "weights-missing"),
    ):
        with pytest.raises(ConfigError, match=match):
            local_features(**({"path": path, "sha256": sha256_file(path)} | options | change))
    path.write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="not a safetensors"):
        local_features(path, sha256_file(path), **options)
