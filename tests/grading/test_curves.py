"""Curves over ratios and fractions: known points, and what the pictures show of them."""

from __future__ import annotations

import numpy as np
import pytest

from medaug.grading.arms import Arm, Variant
from medaug.grading.curves import curve_points, learning_curve, learning_figure, mixing_curve, mixing_figure
from medaug.grading.figures import confusion_figure, forest_figure, mean_confusion, png
from medaug.grading.scores import Predictions, Scores, score_cells
from medaug.grading.statistics import paired_bootstrap
from medaug.grading.variants import Choice
from medaug.grading.verdict import Opponents, default_opponents, judge

METRIC = "balanced_accuracy"


def arm(base, ratio=None, part=None):
    name = base + (f"@{ratio:g}" if ratio else "") + (f"@real{part:g}" if part else "")
    return Arm(name, variant=Variant(base, ratio, part))


ARMS = [
    arm(base, ratio, part) for base in ("none", "a") for part in (0.5, 1) for ratio in ((None,) if base == "none" else (1, 2))
]
SCORES = {"none@real0.5": 0.5, "none@real1": 0.6, "a@1@real0.5": 0.7, "a@2@real0.5": 0.65, "a@1@real1": 0.62, "a@2@real1": 0.55}
OPPONENTS = {one.name: Opponents(f"none@real{one.variant.real_fraction:g}") for one in ARMS if one.base == "a"}


@pytest.fixture
def points():
    """Scores with a known spread: resamples are the score plus -0.1 ... 0.1, the same ones for every arm."""
    noise = np.concatenate([[0], np.linspace(-0.1, 0.1, 201)])
    pooled = {name: score + noise for name, score in SCORES.items()}
    scores = Scores(
        METRIC, {(name, "n"): values for name, values in pooled.items()}, pooled, {n: [s] for n, s in SCORES.items()}, 9
    )
    choices = [Choice("a", "a@1@real0.5", 1, 0.5, {}), Choice("a", "a@2@real1", 2, 1, {})]
    validation = {(name, network): score + shift for name, score in SCORES.items() for network, shift in (("n", 0), ("k", 0.1))}
    return curve_points(ARMS, choices, scores, OPPONENTS, validation)


def test_points_hold_score_paired_difference_and_choice(points):
    found = {point["arm"]: point for point in points}
    one = found["a@1@real0.5"]
    assert (one["base"], one["per_real"], one["real_fraction"], one["chosen"]) == ("a", 1, 0.5, True)
    assert (one["score"], one["validation"]) == pytest.approx((0.7, 0.75))
    assert (one["low"], one["high"]) == pytest.approx((0.605, 0.795))  # the middle 95 % of an even spread of 0.2
    # Paired: the resamples move both arms alike, so nothing is left of their spread.
    assert [one[name] for name in ("difference", "difference_low", "difference_high")] == pytest.approx([0.2] * 3)
    assert found["none@real1"]["difference"] is None and found["none@real1"]["chosen"] is None


def test_the_mixing_curve_begins_at_none_of_the_same_fraction(points):
    curve = mixing_curve(points, "a", 0.5)
    assert [(point["per_real"], point["score"]) for point in curve] == [(0, 0.5), (1, 0.7), (2, 0.65)]
    assert [point["arm"] for point in mixing_curve(points, "a", 1)] == ["none@real1", "a@1@real1", "a@2@real1"]


def test_the_learning_curve_goes_by_the_chosen_ratios(points):
    assert [(point["real_fraction"], point["score"]) for point in learning_curve(points, "a")] == [(0.5, 0.7), (1, 0.55)]
    assert [point["score"] for point in learning_curve(points, "none")] == [0.5, 0.6]


def test_the_pictures_show_the_points(points):
    figure = mixing_figure(points, METRIC)
    assert figure is not None and len(figure.axes) == 6  # two fractions; validation, test and difference
    stars = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "*"]
    assert [line.get_ydata()[0] for line in stars] == pytest.approx([0.75, 0.7, 0.2, 0.6, 0.55, -0.05])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    learning = learning_figure(points, METRIC)
    assert learning is not None and [text.get_text() for text in learning.legends[0].texts] == ["none", "a"]
    assert png(learning).startswith(b"\x89PNG")


def test_every_row_of_the_mixing_figure_has_the_same_ticks(points):
    lone = dict(points[2]) | {"arm": "pure@2", "base": "pure", "per_real": 2, "real_fraction": None}
    figure = mixing_figure([*points, lone], METRIC)
    labels = {tuple(label.get_text() for label in axis.get_xticklabels()) for axis in figure.axes}
    assert labels == {("0", "1", "2")}


def test_without_variants_there_is_no_curve():
    pooled = {"none": np.array([0.5, np.nan]), "a": np.array([0.6, np.nan])}
    scores = Scores(METRIC, {(name, "n"): one for name, one in pooled.items()}, pooled, {"none": [0.5], "a": [0.6]}, 9)
    assert curve_points([Arm("none"), Arm("a")], [], scores, {"a": Opponents()}, {}) == []
    assert mixing_figure([], METRIC) is None and learning_figure([], METRIC) is None
    with_variant = curve_points([arm("a", 1)], [], Scores(METRIC, {}, {"a@1": pooled["a"]}, {}, 9), {}, {})
    assert with_variant[0]["low"] is None and with_variant[0]["validation"] is None
    assert mixing_figure(with_variant, METRIC) is not None


@pytest.fixture
def predictions():
    """Two networks, three seeds; the arm `good` errs less."""
    target = np.arange(60) % 3
    draw = np.random.default_rng(0)

    def probs(rate):
        preds = np.where(draw.random((3, 60)) < rate, target, (target + 1) % 3)
        return np.eye(3)[preds]

    cells = {
        (name, network): probs(rate) for name, rate in (("none", 0.5), ("oversample", 0.5), ("good", 0.95)) for network in "ab"
    }
    return Predictions(target, [f"g{index // 2}" for index in range(60)], cells, dict.fromkeys(cells))


def test_differences_of_one_network_are_those_of_the_paired_bootstrap(predictions):
    scores = score_cells(predictions, METRIC, num_resamples=100)
    direct = paired_bootstrap(
        predictions.target,
        predictions.groups,
        predictions.probs["good", "a"],
        predictions.probs["none", "a"],
        METRIC,
        num_resamples=100,
    )
    assert scores.compare_networks("good", "none")["a"] == direct
    assert scores.interval("none")[1] < scores.interval("none")[0] < scores.interval("none")[2]


def test_the_forest_has_a_line_per_network_and_one_of_all_against_both(predictions):
    verdict = judge(predictions, ordinal=False, num_resamples=100)
    figure = forest_figure(verdict, METRIC)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    wins = verdict["oversample"]["wilcoxon"]["wins"]
    ours = ["good − none\n2 of 2 networks won", "good − oversample\n2 of 2 networks won"]
    assert titles == [f"oversample − none\n{wins} of 2 networks won", "", *ours]
    shown = [text.get_text() for text in figure.axes[3].texts]
    assert len(shown) == 3 and shown[-1].startswith(f"{verdict['good']['against_control']['difference']:+.3f}")
    assert any("no control" in text.get_text() for text in figure.axes[1].texts)
    alone = {name: entry for name, entry in verdict.items() if name == "oversample"}
    assert len(forest_figure(alone, METRIC).axes) == 1


def test_wins_and_ranks_reach_the_verdict_with_holm_and_reasons(predictions):
    good = judge(predictions, ordinal=False, num_resamples=50)["good"]
    assert good["wilcoxon"]["wins"] == good["wilcoxon_control"]["wins"] == 2
    assert good["wilcoxon"]["p_value"] == 0.5 and good["wilcoxon"]["p_holm"] == 1  # two arms
    assert good["wilcoxon_control"]["p_holm"] == 0.5  # one arm has a control
    copy = dict(predictions.probs) | {("good", network): predictions.probs["none", network] for network in "ab"}
    same = Predictions(predictions.target, predictions.groups, copy, dict.fromkeys(copy))
    entry = judge(same, ordinal=False, num_resamples=50, opponents=default_opponents(["none", "good"]))["good"]["wilcoxon"]
    assert (entry["p_value"], entry["p_holm"], entry["reason"]) == (None, None, "every difference is 0")


def test_confusion_is_the_mean_over_runs_by_share_and_count():
    rows = [{"arm": "a", "test": {"metrics": {"confusion": counts}}} for counts in ([[4, 0], [1, 3]], [[2, 2], [1, 3]])]
    assert mean_confusion(rows, "a").tolist() == [[3, 1], [1, 3]]
    figure = confusion_figure(rows, ["a"], ["first_class", "x" * 60])
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["75 %\n3.0", "25 %\n1.0", "25 %\n1.0", "75 %\n3.0"]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == "first class (n = 4)" and len(labels[1]) < 40
    many = [{"arm": "a", "test": {"metrics": {"confusion": np.eye(21).tolist()}}}]
    assert not list(confusion_figure(many, ["a"], [str(place) for place in range(21)]).axes[0].texts)  # too many to be read
