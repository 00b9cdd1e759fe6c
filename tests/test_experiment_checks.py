"""An experiment that cannot be meant is refused before anything is made: by its file, by the stages it names, by the folder it writes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medaug import experiment
from medaug.errors import ConfigError, DataError, MedaugError, StorageError
from medaug.experiment_checks import check_experiment
from medaug.experiment_file import read_experiment

ROW: dict[str, Any] = {"name": "a", "bundle": "guided_ddpm"}


def write(folder: Path, **content: object) -> str:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def refused(file: str) -> MedaugError:
    with pytest.raises(MedaugError) as caught:
        check_experiment(read_experiment(file))
    return caught.value


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "a/b", "/x", "none", "oversample", "a:b", "a@2", "a + b", "a=b", " ", "x" * 300, "a\0", 3, True, [3], {"a": 1}]
)  # fmt: skip
def test_a_row_has_a_name_that_is_a_folder_and_an_arm(tmp_path: Path, name: object) -> None:
    assert refused(write(tmp_path, rows=[{**ROW, "name": name}])).code in ("arm-name", "experiment-rows")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"bundle": 3}, "config-value"),
        ({"bundle": "nope"}, "bundle-unknown"),
        ({"overlay": "nope"}, "overlay-unknown"),
        ({"trainer": 3}, "config-value"),
        ({"trainer": ["amst"]}, "config-value"),
        ({"trainer": "amts"}, "amst-unknown"),
        ({"training": {"max_epoch": 3}}, "config-key-unknown"),
        ({"training": {"max_epochs": "many"}}, "config-value"),
        ({"generating": {"output_dir": "elsewhere"}}, "config-value"),
        ({"bundle": "bottleneck_perturbation", "generating": {"calibration_dir": "elsewhere"}}, "config-value"),
        ({"bundle": "bottleneck_perturbation", "generating": {"calibrate": True}, "feedback": {"rounds": 1}}, "feedback-option"),
        ({"generating": {"seed": "abc"}}, "config-value"),
        ({"gate": {"checks": 3}}, "config-value"),
        ({"gate": {"checks": "copies"}}, "config-value"),
        ({"gate": {"calibrate": "no"}}, "config-value"),
        ({"gate": {"threshold": "x"}}, "config-value"),
        ({"gate": {"threshold": 2}}, "config-value"),
        ({"gate": {"label": "oracle"}}, "label-source-unknown"),
        ({"feedback": {"rounds": 1, "network": "resnet"}}, "network-unknown"),
        ({"gate": {"network": 3}}, "config-value"),
        ({"gate": {"network": "resnet"}}, "network-unknown"),
        ({"gate": {"filter_recipe": {"num_steps": "x"}}}, "recipe-invalid"),
        ({"gate": {"filter_recipe": {"steps": 3}}}, "recipe-unknown-key"),
        ({"gate": {"label": "amst", "amst": [1]}}, "config-value"),
        ({"feedback": {"rounds": 1, "share": "x"}}, "config-value"),
    ],
)
def test_a_row_that_a_stage_would_refuse(tmp_path: Path, row: dict[str, object], code: str) -> None:
    assert refused(write(tmp_path, rows=[{**ROW, **row}])).code == code


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"arms": 3}, "config-value"),
        ({"arms": "none"}, "config-value"),
        ({"arms": [3]}, "config-value"),
        ({"arms": {"none": 1}}, "config-value"),
        ({"arms": ["x=nowhere"]}, "cohort-missing"),
        ({"arms": ["x=nowhere/{seed}:amst"]}, "cohort-missing"),
        ({"grading": {"networks": ["all"]}}, "network-unknown"),
        ({"cells": 3}, "config-value"),
        ({"profile": 3}, "config-value"),
        ({"profile": "nope"}, "profile-unknown"),
        ({"name": "../x"}, "config-value"),
        ({"grading": {"networks": 3}}, "config-value"),
        ({"grading": {"networks": ["resnet"]}}, "network-unknown"),
        ({"grading": {"networks": ["resnet18", "resnet18"]}}, "config-value"),
        ({"grading": {"seeds": "3"}}, "config-value"),
        ({"grading": {"seeds": 1.5}}, "config-value"),
        ({"grading": {"seeds": 0}}, "config-value"),
        ({"grading": {"seeds": [0, 0]}}, "config-value"),
        ({"grading": {"profile": ["tiny"]}}, "config-value"),
        ({"grading": {"profile": "nope"}}, "profile-unknown"),
        ({"grading": {"allocation": "even"}}, "allocation-unknown"),
        ({"grading": {"synthetic_per_real": "x"}}, "config-value"),
        ({"grading": {"synthetic_per_real": 0}}, "ratio-invalid"),
        ({"grading": {"synthetic_per_real": float("nan")}}, "config-malformed"),
        ({"grading": {"real_fraction": 2}}, "fraction-invalid"),
        ({"grading": {"amst": [1]}}, "config-value"),
        ({"grading": {"amst": {"x": 1}}}, "amst-unknown-key"),
        ({"grading": {"overrides": [1]}}, "config-value"),
        ({"grading": {"overrides": {"num_steps": 2.5}}}, "recipe-invalid"),
        ({"grading": {"overrides": {"learning_rate": "x"}}}, "recipe-invalid"),
        ({"intake": {"source": "$X", "split": [0.7, 0.1, float("inf")]}}, "config-malformed"),
    ],
)
def test_settings_that_would_fail_after_the_images(tmp_path: Path, content: dict[str, object], code: str) -> None:
    assert refused(write(tmp_path, rows=[ROW], **content)).code == code


def test_lists_of_networks_and_seeds_are_taken(tmp_path: Path) -> None:
    for grading in (
        {"networks": "simple_cnn, resnet18"},
        {"networks": ["simple_cnn"], "seeds": [3, 1]},
        {"networks": "all", "seeds": 5},
    ):
        check_experiment(read_experiment(write(tmp_path, rows=[ROW], grading=grading)))


def test_empty_and_null_stand_for_none(tmp_path: Path) -> None:
    row = {**ROW, "overlay": "", "trainer": "", "gate": {"network": None, "label": None, "threshold": 0.5}}
    read = read_experiment(write(tmp_path, rows=[row], title="", arms=["turned=rot", "again=a"]))
    check_experiment(read)
    assert read.rows[0].gate == {"threshold": 0.5}


def test_nothing_of_another_experiment_or_page_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    file = write(tmp_path, rows=[ROW], name="second", intake={"source": "nowhere"})
    for content in ({"name": "first", "table": []}, {"rows_sha256": "0", "name": "second"}, [1]):
        (out / "experiment.json").write_text(json.dumps(content))
        with pytest.raises(StorageError) as caught:
            experiment.run_experiment(file, None, out)
        assert caught.value.code == "folder-not-empty"
        assert json.loads((out / "experiment.json").read_text()) == content


def test_a_mistyped_cohort_leaves_the_finished_summary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "experiment.json").write_text(json.dumps({"name": "table", "table": ["finished"]}))
    with pytest.raises(DataError):
        experiment.run_experiment(write(tmp_path, rows=[ROW]), tmp_path / "nowhere", out)
    assert json.loads((out / "experiment.json").read_text())["table"] == ["finished"]


def test_a_refused_file_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        experiment.run_experiment(write(tmp_path, rows=[{**ROW, "bundle": "nope"}]), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
