"""Feedback rounds: the decisions as pure functions, and one small job to its end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medaug import feedback
from medaug.cohort import Case, Cohort, check_against, read_cohort
from medaug.errors import ConfigError, DataError, MedaugError
from medaug.feedback import FeedbackOptions, run_feedback
from medaug.generation.feedback import (
    Round,
    class_doubt,
    doubt,
    doubted_references,
    helped,
    next_amount,
    saving,
    saving_text,
    spend,
    uses_references,
)
from medaug.training import data

sys.path.append(str(Path(__file__).parent / "generation"))


BAD_GAINS: list[dict[str, object]] = [{"least_gain": value} for value in (math.nan, math.inf, -0.1, "much", True)]


def made(number: int, count: int, accepted: int, kept: bool) -> Round:
    return Round(number, (count,), accepted, (0.5,), (0.6,), kept)


def test_doubt_is_what_is_missing_of_the_true_class() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    np.testing.assert_allclose(doubt(probs, [0, 0, 1]), [0.1, 0.8, 0.6])
    np.testing.assert_allclose(class_doubt(probs, [0, 0, 1], 2), [0.45, 0.6])
    np.testing.assert_allclose(class_doubt(probs, [0, 0, 0], 2), [1.3 / 3, 1.3 / 3])  # class 1 does not occur


@given(total=st.integers(0, 500), doubts=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_the_budget_is_spent_exactly_and_on_doubt(total: int, doubts: list[float]) -> None:
    counts = spend(total, doubts)
    assert sum(counts) == total and min(counts) >= 0
    for a, b in zip(range(len(doubts)), range(1, len(doubts)), strict=False):
        if doubts[a] > doubts[b]:
            assert counts[a] >= counts[b] - 1


def test_references_are_the_most_doubted_of_each_class() -> None:
    ids, labels, doubts = ["a", "b", "c", "d", "e"], [0, 0, 0, 0, 1], [0.1, 0.9, 0.5, 0.9, 0.0]
    assert doubted_references(ids, labels, doubts, 0.5) == ["b", "d", "e"]
    with pytest.raises(ConfigError, match="feedback-option"):
        doubted_references(ids, labels, doubts, 0.0)


def test_a_round_is_kept_for_a_gain_beyond_its_noise() -> None:
    assert helped([0.5, 0.5], [0.6, 0.61]) and helped([0.5], [0.51])
    assert not helped([0.5, 0.5], [0.8, 0.4]) and not helped([0.5], [0.5])
    assert not helped([0.5, 0.5], [0.52, 0.52], least_gain=0.05)


def test_it_stops_without_help_or_budget() -> None:
    assert next_amount([], 100, 30) == 30
    assert next_amount([made(1, 30, 20, True)] * 3, 100, 30) == 10
    assert next_amount([made(1, 50, 20, True)] * 2, 100, 30) == 0
    assert next_amount([made(1, 30, 20, False)], 100, 30) == 0
    assert next_amount([made(1, 30, 20, False)], 100, 30, patience=2) == 30


def test_the_saving_counts_generated_images_on_both_sides() -> None:
    rounds = [made(1, 30, 20, True), made(2, 30, 25, False)]
    found = saving(rounds, 0.7, {10: 0.6, 90: 0.72, 100: 0.71}, baseline=0.5)
    assert (found["generated"], found["kept"], found["one_shot_needed"], found["saved"]) == (60, 20, 90, 30)
    assert saving(rounds, 0.7, {10: 0.6, 40: 0.72}, baseline=0.5)["saved"] == -20
    assert saving(rounds, 0.9, {10: 0.6}, baseline=0.5)["saved"] is None


@pytest.mark.parametrize("one_shot", [{}, {2: 0.9}, {2: 0.1}])
def test_nothing_kept_saves_nothing(one_shot: dict[int, float]) -> None:
    found = saving([made(1, 30, 20, False)], 0.833, one_shot, baseline=0.833)
    assert (found["kept"], found["one_shot_needed"], found["saved"], found["generated"]) == (0, 0, 0, 30)


def test_the_last_line_names_what_was_compared() -> None:
    kept, dropped = [made(1, 30, 20, True)], [made(1, 30, 20, False)]
    texts = [
        saving_text(saving(dropped, 0.5, {}, 0.5)),
        saving_text(saving(kept, 0.7, {}, 0.5)),
        saving_text(saving(kept, 0.7, {40: 0.6}, 0.5)),
        saving_text(saving(kept, 0.7, {40: 0.8}, 0.5)),
        saving_text(saving(kept, 0.7, {10: 0.8}, 0.5)),
    ]
    parts = ["Nothing was kept", "not compared", "does not reach", "10 fewer than one shot", "20 more than one shot"]
    for text, part in zip(texts, parts, strict=True):
        assert part in text and "None" not in text and "validation" in text


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"source": "runs/typical"}, "feedback-source"),
        ({"source": "real", "disturbance_settings": {"spread": 0.0, "guidance": [{"scale": 5.0}]}}, "feedback-source"),
        ({"source": "real", "disturbance_settings": {"guidance": [{"scale": 5.0}]}}, "feedback-source"),
        ({"source": "real", "disturbance_settings": {"spread": 0.5, "guidance": []}}, "feedback-source"),
        ({"source": "real", "disturbance_settings": None}, "feedback-source"),
        ({"source": "generated", "target_label": "1"}, "feedback-option"),
        ({"source": "generated", "target_label": 0}, "feedback-option"),
        ({"source": "generated", "counts": [1, 2]}, "feedback-option"),
        ({"source": "real", "seeds": ["a"], "disturbance_settings": {"spread": 0.5, "guidance": [{}]}}, "feedback-option"),
    ],
)
def test_settings_that_rounds_cannot_follow_are_refused(settings: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        uses_references(settings)


def test_references_are_sought_only_where_they_show() -> None:
    assert not uses_references({})  # no choice of seed images
    assert not uses_references({"source": "generated", "seeds": None, "target_label": None, "counts": None})
    assert uses_references(
        {"source": "real", "seeds": None, "disturbance_settings": {"spread": 0.5, "guidance": [{"scale": 5.0}]}}
    )
    assert uses_references({"seeds": None})  # variations of training images


@pytest.mark.parametrize(
    "change",
    [{"budget": 0}, {"per_round": True}, {"folds": 1}, {"share": 2.0}, {"network": "none"}, *BAD_GAINS, {"checks": ("none",)}],
)
def test_options_out_of_range_are_refused(change: dict[str, object]) -> None:
    options: dict[str, object] = {"budget": 10, "per_round": 5, "grading_profile": "tiny", "network": "simple_cnn"} | change
    if "network" in change:
        options["grading_profile"] = "nothing"
    with pytest.raises(ConfigError):
        FeedbackOptions(**options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.integration
def test_rounds_run_to_their_end_without_the_test_split(
    make_cohort: Callable[..., Cohort], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guided_world import new_guided_run

    world = new_guided_run(make_cohort(tmp_path / "cohort", per_class=10), tmp_path / "run")
    held, read = {case.id for case in world.cohort.test}, data.read_case

    def watched(cohort: Cohort, case: Case) -> Tensor:
        assert case.id not in held
        return read(cohort, case)

    monkeypatch.setattr(data, "read_case", watched)
    options = FeedbackOptions(12, 6, seeds=1, grading_profile="tiny", checks=("usable",))
    settings = {"device_name": "cpu", "generation_batch_size": 6}
    job = feedback.FeedbackJob("uncertainty_guidance", world.cohort, tmp_path / "run", tmp_path / "out", options)
    first = job._grade([])["scores"]
    monkeypatch.setattr(feedback, "helped", lambda before, after, least_gain: before == first)
    arguments = ("uncertainty_guidance", tmp_path / "cohort", tmp_path / "run", tmp_path / "out", options)
    result = run_feedback(*arguments, overlay="disturbance", overrides=settings)
    assert [sum(entry["counts"]) for entry in result["rounds"]] == [6, 6] and result["rounds"][0]["kept"]
    assert result["saving"]["generated"] == 12 and result["split"] == "validation" and result["one_shot"]
    accepted = read_cohort(tmp_path / "out" / "accepted")
    check_against(accepted, world.cohort)
    assert len(accepted.training) == result["accepted"] == result["saving"]["kept"]
    graders = [json.loads(path.read_text()) for path in (tmp_path / "out" / "graders").iterdir()]
    assert not any("inside" in entry for entry in graders)  # the source is generated: no reference shows
    assert max(map(int, result["one_shot"])) == options.budget  # generated, not accepted
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "graders").iterdir()}
    (tmp_path / "out" / "accepted" / "images" / "unlisted.png").write_bytes(b"")
    assert run_feedback(*arguments, overlay="disturbance", overrides=settings) == result
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "graders").iterdir()}
    assert not (tmp_path / "out" / "accepted" / "images" / "unlisted.png").exists()
    monkeypatch.setattr(feedback, "helped", lambda before, after, least_gain: False)
    again = run_feedback(*arguments, overlay="disturbance", overrides=settings)
    assert (again["accepted"], again["saving"]["saved"]) == (None, 0) and not (tmp_path / "out" / "accepted").exists()


def test_feedback_without_validation_is_refused(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.cohort import write_cohort

    cohort = make_cohort(tmp_path / "cohort", per_class=10)
    write_cohort(cohort.with_cases(validation=()), tmp_path / "cohort")
    with pytest.raises(DataError, match="split-empty"):
        run_feedback("uncertainty_guidance", tmp_path / "cohort", tmp_path / "r", tmp_path / "o", FeedbackOptions(4, 2))


def test_an_accepted_folder_of_another_command_is_left_alone(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.feedback import clear_accepted

    make_cohort(tmp_path / "accepted")
    before = sorted((tmp_path / "accepted").rglob("*"))
    with pytest.raises(ConfigError, match="folder-not-empty"):
        clear_accepted(tmp_path / "accepted")
    assert sorted((tmp_path / "accepted").rglob("*")) == before


@pytest.mark.integration
@pytest.mark.parametrize(
    ("run", "overrides", "code"),
    [
        ("nowhere", {}, "run-"),
        ("run", {"nonsense": 3}, "config-key-unknown"),
        ("run", {"classifier_dirs": ["of other classes"]}, "class-mismatch"),
        ("run", {"source": "real"}, "feedback-source"),
        ("run", {"target_label": 0}, "feedback-option"),
        ("run", {"allocation": "most"}, "allocation-unknown"),
        ("run", {"guidance_settings#cfg_scale": "much"}, "config-value"),
    ],
)
def test_it_is_refused_before_a_grader_is_trained(
    make_cohort: Callable[..., Cohort],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: str,
    overrides: dict[str, object],
    code: str,
) -> None:
    from guided_world import new_classifier_run, new_guided_run

    def no_grader(*_: object, **__: object) -> None:
        raise AssertionError("a grader is trained")

    new_guided_run(make_cohort(tmp_path / "cohort", per_class=10), tmp_path / "run")
    if "classifier_dirs" in overrides:
        new_classifier_run(make_cohort(tmp_path / "other", num_classes=2), tmp_path / "classifier")
        overrides = {"classifier_dirs": [str(tmp_path / "classifier")]}
    monkeypatch.setattr(feedback, "fit_classifier", no_grader)
    options = FeedbackOptions(4, 2, seeds=1, grading_profile="tiny", checks=("usable",))
    with pytest.raises(MedaugError, match=code):
        run_feedback(
            "uncertainty_guidance",
            tmp_path / "cohort",
            tmp_path / run,
            tmp_path / "out",
            options,
            overlay="disturbance",
            overrides={"device_name": "cpu"} | overrides,
        )


@pytest.mark.slow
@pytest.mark.integration
def test_doubted_references_are_disturbed_where_they_show(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from guided_world import new_guided_run

    new_guided_run(make_cohort(tmp_path / "cohort", per_class=10), tmp_path / "run")
    options = FeedbackOptions(6, 6, seeds=1, grading_profile="tiny", checks=("usable",), one_shot=False)
    settings = {"device_name": "cpu", "generation_batch_size": 6, "source": "real", "disturbance_settings#spread": 0.5}
    arguments = ("uncertainty_guidance", tmp_path / "cohort", tmp_path / "run", tmp_path / "out", options)
    result = run_feedback(*arguments, overlay="disturbance", overrides=settings)
    assert sum(result["rounds"][0]["counts"]) == 6 and result["saving"]["one_shot_best"] is None
    judged = [entry for path in (tmp_path / "out" / "graders").iterdir() if "inside" in (entry := json.loads(path.read_text()))]
    assert len(judged) == options.folds
