"""The bootstrap against resampling by hand, its laws, and the tests over seeds and networks."""

import itertools
import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions import predictions
from scipy import stats
from sklearn import metrics as reference

from medaug.errors import ConfigError, DataError
from medaug.grading import statistics
from medaug.grading.metrics import BOOTSTRAP_METRICS, RANKING, classification_metrics, pair_auc
from medaug.grading.tables import number


@pytest.mark.parametrize("metric", BOOTSTRAP_METRICS)
def test_identical_predictions_differ_by_nothing(metric):
    target, probs = predictions(0)
    groups = [f"g{index // 2}" for index in range(len(target))]
    result = statistics.paired_bootstrap(target, groups, probs[None], probs[None], metric, num_resamples=200)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def of_cases(metric, target, probs):
    """The metric of cases that stand as often as they count."""
    if metric == RANKING:
        return pair_auc(target, probs[None])(np.ones((1, len(target))))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = classification_metrics(target, probs, ordinal=True)[metric]
    return math.nan if value is None else value


@pytest.mark.parametrize("metric", BOOTSTRAP_METRICS)
def test_bootstrap_equals_resampling_the_cases_themselves(metric):
    """Counting per group and copying the cases of the drawn groups is the same thing."""
    target, probs_a = predictions(1, num_cases=24, decimals=2)
    probs_b = predictions(2, num_cases=24, decimals=2)[1]
    groups = np.array([f"g{index % 9}" for index in range(24)])
    names = np.unique(groups)
    scores = statistics.bootstrap_scores(target, groups, np.stack([probs_a, probs_b]), metric, num_resamples=5, seed=3)
    draws = statistics.numpy_generator("bootstrap", 3, len(names)).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=5
    )
    for draw, score in zip(draws, scores[1:], strict=True):
        cases = np.concatenate([np.tile(np.flatnonzero(groups == name), count) for name, count in zip(names, draw, strict=True)])
        singles = []
        for probs in (probs_a, probs_b):
            singles.append(of_cases(metric, target[cases.astype(int)], probs[cases.astype(int)]))
        assert score == pytest.approx(np.mean(singles), nan_ok=True)


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_recalls_are_those_of_scikit_learn_and_average_to_the_balanced_accuracy(seed, num_runs):
    target, _ = predictions(seed)
    probs = np.stack([predictions(seed + run)[1] for run in range(num_runs)])
    groups = [f"g{index // 3}" for index in range(len(target))]
    recalls = statistics.bootstrap_recalls(target, groups, probs, num_resamples=40, seed=3)
    expected = [reference.recall_score(target, run.argmax(1), average=None, labels=range(4)) for run in probs]
    assert recalls[0] == pytest.approx(np.mean(expected, axis=0))
    scores = statistics.bootstrap_scores(target, groups, probs, "balanced_accuracy", num_resamples=40, seed=3)
    complete = ~np.isnan(recalls).any(1)  # a resample may miss a class
    assert recalls.shape == (41, 4) and complete[0]
    assert recalls[complete].mean(1) == pytest.approx(scores[complete])


def test_the_recall_of_an_absent_class_is_undefined():
    target, probs = np.array([0, 0, 2]), np.eye(3)[[0, 1, 2]][None]
    recalls = statistics.bootstrap_recalls(target, ["a", "b", "c"], probs, num_resamples=5)
    assert recalls[0, [0, 2]].tolist() == [0.5, 1] and np.isnan(recalls[:, 1]).all()


def test_bootstrap_is_decided_by_its_seed_and_antisymmetric():
    target, probs_a = predictions(1)
    probs_b = predictions(1, decimals=0)[1] + 0.01 * predictions(5)[1]
    groups = [str(index // 3) for index in range(len(target))]
    first, again, other = (
        statistics.paired_bootstrap(target, groups, probs_a[None], probs_b[None], "auc", num_resamples=300, seed=seed)
        for seed in (0, 0, 1)
    )
    back = statistics.paired_bootstrap(target, groups, probs_b[None], probs_a[None], "auc", num_resamples=300, seed=0)
    assert first == again and first != other
    assert (back.difference, back.p_value) == (-first.difference, first.p_value)
    assert (back.low, back.high) == pytest.approx((-first.high, -first.low))


def test_interval_of_a_mean_matches_the_normal_theory():
    """Accuracy against an arm that is always wrong is a plain proportion: +-1.96 sqrt(p(1-p)/n)."""
    correct = np.arange(400) < 300
    target = np.zeros(400, int)
    probs_a, probs_b = np.zeros((400, 2)), np.tile([0.0, 1.0], (400, 1))
    probs_a[np.arange(400), np.where(correct, 0, 1)] = 1
    result = statistics.paired_bootstrap(
        target, [str(i) for i in range(400)], probs_a[None], probs_b[None], "accuracy", num_resamples=4000
    )
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert result.difference == 0.75
    assert (result.low, result.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.005)  # Monte Carlo of 4000 draws
    assert result.p_value == pytest.approx(2 / 4001)


def test_groups_widen_the_interval():
    """Cases that repeat each other carry no new evidence: five copies per group give the interval of the groups."""
    target, probs_a = predictions(3, num_cases=40)
    probs_b = predictions(4, num_cases=40)[1]
    copies = [np.repeat(values, 5, axis=0) for values in (target, probs_a, probs_b)]
    grouped = statistics.paired_bootstrap(
        copies[0], np.repeat(np.arange(40), 5), copies[1][None], copies[2][None], "accuracy", num_resamples=2000
    )
    alone = statistics.paired_bootstrap(target, np.arange(40), probs_a[None], probs_b[None], "accuracy", num_resamples=2000)
    naive = statistics.paired_bootstrap(
        copies[0], np.arange(200), copies[1][None], copies[2][None], "accuracy", num_resamples=2000
    )
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.6 * (grouped.high - grouped.low)


def test_ten_thousand_resamples_take_seconds():
    target, probs = predictions(0, num_cases=150)
    runs = np.stack([probs, probs[:, ::-1], probs])
    start = time.perf_counter()
    for metric in ("balanced_accuracy", "auc"):
        statistics.paired_bootstrap(target, np.arange(150), runs, runs, metric)
    assert time.perf_counter() - start < 30  # about 2 s alone on one core; generous for a busy machine


def test_chunks_do_not_change_the_draws(monkeypatch):
    target, probs = predictions(0)
    whole = statistics.bootstrap_scores(target, np.arange(60), probs[None], "macro_f1", num_resamples=50)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 60 * 7)
    assert np.array_equal(whole, statistics.bootstrap_scores(target, np.arange(60), probs[None], "macro_f1", num_resamples=50))


def test_holm_by_hand():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert statistics.holm({}) == {}


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=25)
def test_holm_lies_between_raw_and_bonferroni(values):
    raw = {str(index): value for index, value in enumerate(values)}
    for name, adjusted in statistics.holm(raw).items():
        assert raw[name] <= adjusted <= min(1, len(raw) * raw[name]) + 1e-12


def test_wilcoxon_equals_scipy_exact():
    differences = [0.011, 0.02, -0.005, 0.03, 0.041, 0.013, 0.027, 0.06, 0.052, 0.001]
    result = statistics.wilcoxon_networks(differences)
    assert result["p_value"] == stats.wilcoxon(differences, method="exact").pvalue
    assert (result["wins"], result["num_networks"]) == (9, 10)
    assert statistics.wilcoxon_networks(np.arange(1, 11) / 100)["p_value"] == pytest.approx(0.001953125)
    assert statistics.wilcoxon_networks([0, 0])["p_value"] is None
    assert statistics.wilcoxon_networks([])["median"] is None


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_signed_ranks_are_exact_with_ties_and_zeros(differences):
    """Every pattern of signs counted by hand; no p-value below what the number of differences can show."""
    values = np.array([value for value in differences if value])
    found = statistics.wilcoxon_networks(differences)["p_value"]
    if not len(values):
        assert found is None
        return
    ranks = stats.rankdata(np.abs(values))
    sums = [ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=len(values))]
    reached = ranks[values > 0].sum()
    tail = min(np.mean(np.array(sums) <= reached), np.mean(np.array(sums) >= reached))
    assert found == pytest.approx(min(1, 2 * tail)) and found >= 2 / 2 ** len(values)


def test_refusals():
    target, probs = predictions(0)
    with pytest.raises(ConfigError, match="balanced_accuracy"):
        statistics.bootstrap_scores(target, np.arange(60), probs[None], "f2")
    with pytest.raises(DataError, match="predictions-invalid"):
        statistics.bootstrap_scores(target, np.arange(59), probs[None], "accuracy")


def test_seeds_and_patients_add_up_to_one_interval():
    """By hand: three seeds of variance 0.0003, 0.0001 for their mean, and as much from the patients of 41 groups."""
    bootstrap = statistics.PairedDifference(0.03, 0.011, 0.049, 0.002, 0.8, 0.77, 1000, patient_std=0.01)
    seeds = [0.03 - math.sqrt(0.0003), 0.03, 0.03 + math.sqrt(0.0003)]
    result = statistics.with_training_luck(bootstrap, seeds, 41)
    half = (stats.t.ppf(0.975, 2) + stats.t.ppf(0.975, 40)) / 2 * math.sqrt(0.0002)
    assert (result.low, result.high) == pytest.approx((0.03 - half, 0.03 + half))
    critical = (stats.t.isf(result.p_value / 2, 2) + stats.t.isf(result.p_value / 2, 40)) / 2
    assert critical == pytest.approx(0.03 / math.sqrt(0.0002))
    assert (result.difference, result.score_a) == (0.03, 0.8)


@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=6), st.floats(0, 0.1), st.integers(2, 200))
@settings(deadline=None, max_examples=50)
def test_training_luck_only_takes_evidence_away(seeds, patient_std, num_groups):
    mean = float(np.mean(seeds))
    before = statistics.PairedDifference(
        mean, mean - patient_std, mean + 2 * patient_std, 0.04, 0.5, 0.5 - mean, 100, patient_std=patient_std
    )
    after = statistics.with_training_luck(before, seeds, num_groups)
    assert after.low <= before.low and after.high >= before.high and 0.04 <= after.p_value <= 1
    if len(seeds) == 1:
        assert after == before
    else:
        assert (after.low > 0 or after.high < 0) <= (after.p_value < 0.05)


@pytest.mark.parametrize("num_seeds, share", [(3, 0.1), (3, 1.0), (3, 3.0), (3, 10.0), (3, 100.0), (5, 3.0)])
def test_without_an_effect_one_in_twenty_intervals_misses_zero(num_seeds, share):
    """Normal luck of patients and seeds, the variance of the seeds' mean `share` times the patients'."""
    draw, count = np.random.default_rng(0), 3000
    luck = draw.normal(0, math.sqrt(share * num_seeds), (count, num_seeds))
    patients = draw.normal(0, 1, count)
    deviations = np.sqrt(draw.chisquare(79, count) / 79)
    missed = 0
    for own, shared, deviation in zip(luck, patients, deviations, strict=True):
        mean = float(own.mean() + shared)
        before = statistics.PairedDifference(mean, mean, mean, 0.0, 0, 0, 100, patient_std=float(deviation))
        after = statistics.with_training_luck(before, list(own), 80)
        missed += after.low > 0 or after.high < 0
        assert (after.low > 0 or after.high < 0) == (after.p_value < 0.05)
    assert missed / count <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / count)


def test_a_mean_halfway_between_two_figures_reads_alike_in_sentence_and_table():
    above, below = np.nextafter(0.8155, 1), np.nextafter(0.8155, 0)  # the same mean, summed in another order
    results = [statistics.compare_scores(np.full(3, score), np.full(3, 0.8)) for score in (above, below)]
    shown = {f"{result.score_a:.3f}" for result in results} | {number(float(score), None) for score in (above, below)}
    assert len(shown) == 1 and results[0].difference == results[1].difference
