"""Feedback rounds: the decisions as pure functions, and one small job to its end."""

from __future__ import annotations

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
from medaug.errors import ConfigError, DataError
from medaug.feedback import FeedbackOptions, run_feedback
from medaug.generation.feedback import Round, class_doubt, doubt, doubted_references, helped, next_amount, saving, spend
from medaug.training import data

sys.path.append(str(Path(__file__).parent / "generation"))


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


def test_the_saving_counts_images_used() -> None:
    rounds = [made(1, 30, 20, True), made(2, 30, 25, False)]
    found = saving(rounds, 0.7, {10: 0.6, 50: 0.72, 90: 0.71})
    assert (found["generated"], found["kept"], found["one_shot_needed"], found["saved"]) == (60, 20, 50, 30)
    assert saving(rounds, 0.9, {10: 0.6})["saved"] is None


@pytest.mark.parametrize("change", [{"budget": 0}, {"per_round": True}, {"folds": 1}, {"share": 2.0}, {"network": "none"}])
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
    monkeypatch.setattr(feedback, "helped", lambda before, after, least_gain: before == first)
    options = FeedbackOptions(12, 6, seeds=1, grading_profile="tiny", checks=("usable",))
    settings = {"device_name": "cpu", "generation_batch_size": 6}
    job = feedback.FeedbackJob("uncertainty_guidance", world.cohort, tmp_path / "run", tmp_path / "out", options)
    first = job._grade([])["scores"]
    arguments = ("uncertainty_guidance", tmp_path / "cohort", tmp_path / "run", tmp_path / "out", options)
    result = run_feedback(*arguments, overlay="disturbance", overrides=settings)
    assert [sum(entry["counts"]) for entry in result["rounds"]] == [6, 6] and result["rounds"][0]["kept"]
    assert result["saving"]["generated"] == 12 and result["split"] == "validation" and result["one_shot"]
    accepted = read_cohort(tmp_path / "out" / "accepted")
    check_against(accepted, world.cohort)
    assert len(accepted.training) == result["accepted"] == result["saving"]["kept"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "graders").iterdir()}
    assert run_feedback(*arguments, overlay="disturbance", overrides=settings) == result
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "graders").iterdir()}


def test_feedback_without_validation_is_refused(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.cohort import write_cohort

    cohort = make_cohort(tmp_path / "cohort", per_class=10)
    write_cohort(cohort.with_cases(validation=()), tmp_path / "cohort")
    with pytest.raises(DataError, match="split-empty"):
        run_feedback("uncertainty_guidance", tmp_path / "cohort", tmp_path / "r", tmp_path / "o", FeedbackOptions(4, 2))
