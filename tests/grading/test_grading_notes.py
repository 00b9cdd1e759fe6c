"""Sentences that a verdict is printed with: classes that are not there, makers that saw more, versions that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medaug import storage
from medaug.errors import DataError
from medaug.grading import arms
from medaug.grading.classic_copies import make_copies
from medaug.grading.figures import network_mark
from medaug.grading.grade import grade
from medaug.grading.notes import arm_notes, data_notes, run_notes
from medaug.grading.options import GradingOptions
from medaug.grading.recipe import grading_recipe

QUICK = {"num_steps": 2, "evaluate_every": 2}


def test_a_class_without_a_held_out_image_is_named(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real")
    assert data_notes(real) == []
    real = real.with_cases(
        validation=[case for case in real.validation if case.label != 1], test=[case for case in real.test if case.label]
    )
    validation, test = data_notes(real)
    assert "validation split has no image of class class1" in validation and "test split has no image of class class0" in test
    assert data_notes(real.with_cases(validation=())) == [test]


def test_makers_that_learned_from_more_than_the_fraction_are_named(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real", per_class=20)
    synthetic = make_synthetic(real, tmp_path / "s", [4, 4, 4])
    whole = arms.Arm("s", synthetic=synthetic)
    assert arm_notes(real, [whole]) == []
    (note,) = arm_notes(real, [whole, replace(whole, name="s@real0.5", real_fraction=0.5, variant=arms.Variant("s", None, 0.5))])
    assert "arm s learned from training images that its fraction" in note
    part = replace(whole, real_fraction=0.5)
    kept = sorted({case.group for case in arms.kept_cases(part, real, 0)})
    fair = make_synthetic(real, tmp_path / "fair", [4, 4, 4], fit_groups=kept)
    assert arm_notes(real, [replace(part, synthetic=fair)]) == []


def test_copies_of_kept_images_have_no_maker_that_saw_more(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real", per_class=20)
    named = {"rot": make_copies(real, "rot", tmp_path / "rot")}
    assert arm_notes(real, [arms.parse_arm("orig50+rot", named=named)]) == []


def test_images_that_were_scaled_in_another_way_are_named(tmp_path, make_cohort, make_synthetic):
    real = replace(make_cohort(tmp_path / "real"), intensity={"kind": "window_hu", "0": -1350, "1": 150})
    synthetic = make_synthetic(real, tmp_path / "s", [2, 2, 2])
    assert arm_notes(real, [arms.Arm("s", synthetic=replace(synthetic, intensity=real.intensity))]) == []
    (note,) = arm_notes(real, [arms.Arm("s", synthetic=replace(synthetic, intensity={"kind": "percentile"}))])
    assert "arm s were scaled in another way (percentile) than the real ones (window_hu)" in note


def test_runs_of_different_versions_are_no_like_with_like(tmp_path):
    one = {
        "commit": None,
        "python": "3.11",
        "machine": "2 cores",
        "packages": {"medaug": "0.1.0", "torch": "2.13.0", "timm": "1.0"},
    }
    other = one | {"commit": "abc", "machine": "8 cores"}
    newer = one | {"packages": one["packages"] | {"torch": "2.14.0"}}
    for environments, expected in (([one], 0), ([one, other], 0), ([one, newer], 1)):
        storage.write_json(tmp_path / "sessions.json", {"environments": environments, "stages": []})
        notes = run_notes(tmp_path, [], [])
        assert len(notes) == expected
    assert "different versions of torch," in notes[0]


def test_results_of_another_cohort_are_left_alone(tmp_path, make_cohort):
    for seed, name in enumerate(("one", "two")):
        make_cohort(tmp_path / name, seed=seed)
    grade(tmp_path / "one", tmp_path / "out", ["none"], GradingOptions(["simple_cnn"], 1, "tiny", QUICK), num_resamples=20)
    kinds = (".json", ".html", ".csv", ".md")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.suffix in kinds}
    with pytest.raises(DataError, match="results-of-another-cohort.*choose another --out"):
        grade(tmp_path / "two", tmp_path / "out", ["none"], GradingOptions(["simple_cnn"], 1, "tiny", QUICK), num_resamples=20)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 1


def test_three_test_patients_are_graded_with_a_word_of_warning(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real", per_class=10)
    assert len(real.groups("test")) == 3
    options = GradingOptions(["simple_cnn"], 3, "tiny", QUICK)
    result = grade(tmp_path / "real", tmp_path / "out", ["none", "crop_rotate"], options, num_resamples=50)
    entry = result["verdict"]["crop_rotate"]
    assert any("only 3 groups" in warning for warning in entry["warnings"])


def test_a_checkpoint_takes_smaller_steps_unless_told_otherwise():
    assert grading_recipe("cpu32", "resnet50").learning_rate == 1e-3
    assert grading_recipe("cpu32", "resnet50", pretrained=True).learning_rate == 1e-4
    assert grading_recipe("cpu32", "resnet50", {"learning_rate": 5e-4}, pretrained=True).learning_rate == 5e-4


def test_no_two_of_twenty_networks_look_the_same():
    assert len({network_mark(index) for index in range(20)}) == 20
