"""Verdicts on planted predictions."""

from dataclasses import replace

import numpy as np
import pytest

from medaug.errors import ConfigError, DataError
from medaug.grading.metrics import macro_auc
from medaug.grading.scores import Scores
from medaug.grading.statistics import compare_scores
from medaug.grading.verdict import Opponents, Predictions, default_opponents, judge, primary_metric

NUM_CASES, NUM_CLASSES = 240, 3


def probabilities(target, accuracy, seed):
    """One-hot predictions that are right for a share `accuracy` of the cases."""
    generator = np.random.default_rng(seed)
    preds = np.where(generator.random(len(target)) < accuracy, target, (target + 1) % NUM_CLASSES)
    return np.eye(NUM_CLASSES)[preds]


def planted(arms, networks=("simple_cnn", "resnet18"), num_seeds=3, groups=None):
    target = np.arange(NUM_CASES) % NUM_CLASSES
    probs = {
        (arm, network): np.stack(
            [probabilities(target, accuracy, (sum(map(ord, arm)), place, seed)) for seed in range(num_seeds)]
        )
        for arm, accuracy in arms.items()
        for place, network in enumerate(networks)
    }
    validation = {cell: 0.5 + (cell[0] == "good") * 0.1 for cell in probs}
    return Predictions(target, groups or [f"g{index // 2}" for index in range(NUM_CASES)], probs, validation)


def test_a_planted_effect_is_found_in_its_direction():
    arms = {"none": 0.7, "oversample": 0.7, "good": 0.85, "bad": 0.5}
    verdicts = judge(planted(arms, num_seeds=5), ordinal=False, num_resamples=2000)
    assert {arm: entry["verdict"] for arm, entry in verdicts.items()} == {
        "oversample": "no evidence",
        "good": "helps",
        "bad": "harms",
    }
    good = verdicts["good"]
    assert good["against_none"]["difference"] == pytest.approx(0.15, abs=0.04)  # 1440 draws, each within sqrt(.2/1440)
    assert good["against_none"]["low"] > 0 and good["against_control"]["low"] > 0
    assert good["validation_difference"] == pytest.approx(0.1)
    assert "0.15" in good["sentence"] or "+0.1" in good["sentence"]
    assert good["wilcoxon"]["wins"] == 2 and good["wilcoxon"]["p_value"] == 0.5  # two networks can never show more
    assert verdicts["oversample"]["against_control"] is None


def test_the_difference_is_the_mean_of_those_of_the_classes():
    verdicts = judge(planted({"none": 0.7, "oversample": 0.7, "good": 0.85}), ordinal=False, num_resamples=500)
    for against in ("against_none", "against_control"):
        classes = [one[against] for one in verdicts["good"]["per_class"]]
        assert len(classes) == NUM_CLASSES
        assert np.mean([one["difference"] for one in classes]) == pytest.approx(verdicts["good"][against]["difference"])
        assert all(one["low"] < one["difference"] < one["high"] for one in classes)
    assert [one["against_control"] for one in verdicts["oversample"]["per_class"]] == [None] * NUM_CLASSES


def test_beating_none_but_not_the_control_is_no_evidence():
    verdicts = judge(planted({"none": 0.6, "oversample": 0.8, "arm": 0.8}), ordinal=False, num_resamples=1000)
    assert verdicts["arm"]["against_none"]["low"] > 0
    assert verdicts["arm"]["verdict"] == "no evidence"
    assert verdicts["oversample"]["verdict"] == "helps"


def test_a_control_of_its_own_is_named():
    predictions = planted({"none": 0.6, "oversample": 0.6, "oversample-x": 0.7, "x": 0.7, "y": 0.7})
    opponents = default_opponents(predictions.arms) | {"x": Opponents(control="oversample-x"), "oversample-x": Opponents()}
    verdicts = judge(predictions, ordinal=False, opponents=opponents, num_resamples=100)
    assert "against repeated real images of its own count and classes (oversample-x) " in verdicts["x"]["sentence"]
    assert "of its own" not in verdicts["y"]["sentence"]


def test_without_the_control_no_arm_is_said_to_help():
    scores = {"none": 0.6, "good": 0.9, "bad": 0.3}
    with_control = judge(planted(scores | {"oversample": 0.6}), ordinal=False, num_resamples=1000)
    without = judge(planted(scores), ordinal=False, num_resamples=1000)
    assert with_control["good"]["verdict"] == "helps" and without["good"]["against_none"]["low"] > 0
    assert {arm: entry["verdict"] for arm, entry in without.items()} == {"good": "no evidence", "bad": "harms"}
    assert any("no arm is said to help; add --arm oversample" in warning for warning in without["good"]["warnings"])


def test_an_arm_with_views_of_its_own_must_beat_real_images_seen_that_way():
    """The shifts alone earn the whole difference: no evidence for the arm that also shifts."""
    scores = {"none": 0.6, "oversample": 0.6, "weak_view": 0.8, "amst": 0.8, "better": 0.95, "plain": 0.8}
    controls = {"amst": "weak_view", "better": "weak_view"}
    plain = default_opponents(list(scores))
    opponents = {arm: replace(other, views=controls.get(arm)) for arm, other in plain.items()}
    verdicts = judge(planted(scores), ordinal=False, opponents=opponents, num_resamples=1000)
    assert {arm: entry["verdict"] for arm, entry in verdicts.items()} == {
        "oversample": "no evidence", "weak_view": "helps", "amst": "no evidence", "better": "helps", "plain": "helps"
    }  # fmt: skip
    assert verdicts["amst"]["against_control"]["low"] > 0 and verdicts["amst"]["against_views"]["low"] <= 0
    assert "against real images seen through the same weak view +0.1" in verdicts["better"]["sentence"]
    assert verdicts["better"]["against_views"]["p_holm"] >= verdicts["better"]["against_views"]["p_value"]
    assert verdicts["plain"]["against_views"] is None
    with pytest.raises(ConfigError, match="control-missing"):
        judge(planted({"none": 0.6, "amst": 0.8}), ordinal=False, opponents={"amst": Opponents(views="weak_view")})


def test_seeds_and_networks_that_tie_but_for_the_order_of_summing_differ_by_nothing():
    hits = [(0.1, 0.2, 0.3), (0.3, 0.2, 0.1)]
    ours, theirs = (float(np.mean(values)) for values in hits)
    assert ours != theirs  # in the last bit
    resamples = np.array([ours, 0.5, 0.6])
    scores = Scores("accuracy", {}, {"a": resamples, "none": np.array([theirs, 0.5, 0.6])}, {"a": [ours], "none": [theirs]}, 30)
    assert scores.seed_differences("a", "none") == [0.0]
    assert compare_scores(scores.pooled["a"], scores.pooled["none"]).difference == 0


def test_many_arms_raise_the_bar():
    """The same arm alone and among many others without effect: Holm's correction may only take evidence away."""
    few = judge(planted({"none": 0.7, "x": 0.735}), ordinal=False, num_resamples=1000)
    many = judge(planted({"none": 0.7, "x": 0.735} | {f"n{index}": 0.7 for index in range(8)}), ordinal=False, num_resamples=1000)
    assert many["x"]["against_none"]["p_value"] == few["x"]["against_none"]["p_value"]
    assert many["x"]["against_none"]["p_holm"] >= few["x"]["against_none"]["p_holm"]


def test_identical_arm_is_no_evidence_with_p_one():
    predictions = planted({"none": 0.7, "copy": 0.7})
    for network in predictions.networks:
        predictions.probs["copy", network] = predictions.probs["none", network]
    entry = judge(predictions, ordinal=True, num_resamples=200)["copy"]
    assert entry["verdict"] == "no evidence"
    assert entry["metric"] == "quadratic_kappa" == primary_metric(True)
    assert (entry["against_none"]["low"], entry["against_none"]["high"], entry["against_none"]["p_value"]) == (0, 0, 1)
    assert entry["wilcoxon"]["p_value"] is None


def test_warnings_repeat_the_leak_and_name_what_is_missing():
    predictions = planted({"none": 0.7, "x": 0.7}, groups=[f"g{index % 5}" for index in range(NUM_CASES)])
    notes = judge(predictions, ordinal=False, notes=["Patients cross the split."], num_resamples=50)["x"]["warnings"]
    assert notes[0] == "Patients cross the split."
    assert any("5 groups" in note for note in notes) and any("--arm oversample" in note for note in notes)


def test_seeds_that_disagree_are_named():
    predictions = planted({"none": 0.7, "x": 0.7}, num_seeds=2)
    for network in predictions.networks:
        better, worse = (probabilities(predictions.target, accuracy, 1) for accuracy in (0.95, 0.4))
        predictions.probs["x", network] = np.stack([better, worse])
    sentence = judge(predictions, ordinal=False, num_resamples=50)["x"]["sentence"]
    assert "seeds disagree on the sign" in sentence
    assert sentence.startswith(
        "x has too few seeds for a verdict: balanced accuracy "
    )  # no word on evidence beside an interval that may speak


def test_refusals():
    with pytest.raises(ConfigError, match="--arm none"):
        judge(planted({"oversample": 0.7, "x": 0.7}), ordinal=False)
    uneven = planted({"none": 0.7, "x": 0.7})
    del uneven.probs["x", "resnet18"]
    with pytest.raises(DataError, match="rows-incomplete"):
        judge(uneven, ordinal=False)


def shifted(probs, towards, amount):
    """The same order of cases with the boundary of two classes moved: the log odds of class `towards` grow by `amount`."""
    odds = np.log(probs[..., towards] / probs[..., 1 - towards]) + amount
    ours = 1 / (1 + np.exp(-odds))
    return np.stack([ours, 1 - ours] if towards == 0 else [1 - ours, ours], axis=-1)


def two_classes(spread, seed, num_seeds=5, num_cases=600):
    """Probabilities (S, N, 2) of cases whose log odds are normal around -1 and 1, moved by 1.5 towards class 1."""
    target = np.arange(num_cases) % 2
    generator = np.random.default_rng(seed)
    own = generator.normal(size=num_cases) * spread
    odds = 2 * target - 1 + own + 0.1 * generator.normal(size=(num_seeds, num_cases))
    first = 1 / (1 + np.exp(odds))
    return target, shifted(np.stack([first, 1 - first], axis=-1), 1, 1.5)


def test_a_verdict_that_a_threshold_would_earn_says_so():
    target, plain = two_classes(1.0, seed=4)
    _, better = two_classes(0.5, seed=4)  # the same cases with half the noise are ranked better too
    arms = {
        "none": plain,
        "oversample": plain,
        "moved": shifted(plain, 0, 1.5),
        "better": shifted(better, 0, 1.5),
        "worse": shifted(plain, 1, 1.5),
    }
    predictions = Predictions(target, [f"g{index}" for index in range(600)], {(arm, "net"): p for arm, p in arms.items()}, {})
    verdicts = judge(predictions, ordinal=False, num_resamples=1000)
    assert {arm: entry["verdict"] for arm, entry in verdicts.items()} == {
        "oversample": "no evidence",
        "moved": "helps",
        "better": "helps",
        "worse": "harms",
    }
    moved = verdicts["moved"]["ranking"]
    assert moved["against_none"]["difference"] == pytest.approx(0, abs=1e-9)
    assert "No gain in the area under the ROC curve was shown" in verdicts["moved"]["sentence"]
    assert "threshold could bring that without new images" in verdicts["moved"]["sentence"]
    assert "No loss" in verdicts["worse"]["sentence"] and "threshold could undo" in verdicts["worse"]["sentence"]
    assert verdicts["better"]["ranking"]["against_none"]["low"] > 0 < verdicts["better"]["ranking"]["against_control"]["low"]
    assert "ROC" not in verdicts["better"]["sentence"] and "ROC" not in verdicts["oversample"]["sentence"]
    assert verdicts["oversample"]["ranking"]["against_control"] is None
    assert set(verdicts["better"]["ranking"]["per_network"]) == {"net"}


@pytest.mark.parametrize("ordinal", [False, True])
def test_with_four_classes_too_a_moved_boundary_is_called_so(ordinal):
    generator = np.random.default_rng(0)
    target = np.arange(600) % 4
    logits = generator.normal(size=(5, 600, 4)) * 0.3 + generator.normal(size=(600, 4)) + 1.5 * np.eye(4)[target]
    biased = logits + np.array([2.0, 0, 0, 0])

    def softmax(values):
        return np.exp(values) / np.exp(values).sum(-1, keepdims=True)

    arms = {"none": softmax(biased), "oversample": softmax(biased), "moved": softmax(logits)}
    predictions = Predictions(target, [f"g{index}" for index in range(600)], {(arm, "net"): p for arm, p in arms.items()}, {})
    entry = judge(predictions, ordinal=ordinal, num_resamples=1000)["moved"]
    assert entry["verdict"] == "helps" and "No gain in the area" in entry["sentence"]


def test_the_ranking_covers_the_luck_of_training_and_compares_with_the_arms_own_baseline():
    target, plain = two_classes(1.0, seed=4)
    noise = np.random.default_rng(1).normal(size=(5, 1, 2)) * [1.0, 0]
    other = (
        np.exp(np.log(plain) * np.exp(noise[..., :1]))
        + 0.3 * np.random.default_rng(2).random((5, 600, 2)) * np.arange(5)[:, None, None]
    )
    other /= other.sum(-1, keepdims=True)
    arms = {"none": two_classes(0.5, seed=4)[1], "none@real0.5": plain, "x": other}
    predictions = Predictions(target, [f"g{index}" for index in range(600)], {(arm, "net"): p for arm, p in arms.items()}, {})
    entry = judge(predictions, ordinal=False, opponents={"x": Opponents(baseline="none@real0.5")}, num_resamples=500)["x"]
    found, alone = entry["ranking"]["against_none"], entry["ranking"]["per_network"]["net"]
    assert found["score_b"] == pytest.approx(np.mean([macro_auc(target, run)[0] for run in plain]))
    assert found["high"] - found["low"] > alone["high"] - alone["low"]  # one network: the same bootstrap without the seeds
