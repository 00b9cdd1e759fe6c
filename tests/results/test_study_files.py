"""The data files of a page: small, exact, one line a row; what of an unfinished grading can be judged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from medaug import storage
from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.grading.arms import Arm, Variant
from medaug.grading.graded_data import GradedData
from medaug.grading.metrics import classification_metrics
from medaug.grading.record import CellName, GradingRecord
from medaug.grading.rows import Row
from medaug.grading.verdict import Opponents
from medaug.results.limits import Outcome, limits
from medaug.results.study import Study, page_files, study_from_files
from medaug.results.unfinished import finished_part

CLASSES = ("a", "b", "c", "d")


def made_up(arms: list[str], networks: int, seeds: int, images: int) -> Study:
    """A study of random probabilities: every figure follows from them, as in rows from training."""
    draw = numpy_generator("study", images)
    target = draw.integers(0, 4, images)
    split = {"images": images, "groups": images, "per_class": [images, 0, 0, 0]}
    data = GradedData(
        name="made up", modality="CT", classes=CLASSES, ordinal=False, image_size=32, channels=1, content_sha256="c" * 64,
        created_by={}, splits=dict.fromkeys(("training", "validation", "test"), split), leak={}, group_origins={},
        target=tuple(map(int, target)), groups=tuple(range(images)), ids_sha256="",
    )  # fmt: skip
    rows = [_row(arm, f"network{n}", seed, target, draw) for arm in arms for n in range(networks) for seed in range(seeds)]
    cells = tuple(CellName(row["arm"], row["network"], row["seed"], row["sha256"]) for row in rows)
    opponents = {arm: Opponents() for arm in arms if arm != "none"}
    record = GradingRecord(data, tuple(map(Arm, arms)), opponents, cells, finished=True)
    return Study(record, tuple(rows))


def _row(arm: str, network: str, seed: int, target: np.ndarray, draw: np.random.Generator) -> Row:
    recipe = {
        "num_steps": 500,
        "batch_size": 32,
        "learning_rate": 0.001,
        "weight_decay": 0.0001,
        "policy": "none",
        "head": "linear",
    }
    content = {"name": arm, "policy": "none", "oversample": False, "extra": [0] * 4, "synthetic": None}
    key = {
        "format": 1,
        "cohort": "c" * 64,
        "classes": list(CLASSES),
        "arm": content,
        "network": network,
        "seed": seed,
        "recipe": recipe,
    }
    probs = np.round(draw.dirichlet([0.5] * 4, len(target)), 6)
    metrics = classification_metrics(target, probs, ordinal=False)
    counts = {"num_training": 489, "num_synthetic": 0, "ratio": 0.0, "num_steps": 500, "image_passes": 16000, "best_step": 350}
    sha = storage.sha256_json(key)
    test = {"metrics": metrics, "probs": probs.tolist()}
    history = [{"step": step, "loss": 0.5} for step in range(0, 500, 25)]
    return {"sha256": sha, "arm": arm, "network": network, "seed": seed, "key": key, "test": test, "history": history} | counts | {
        "validation": {"metrics": metrics, "ids": ["case"], "probs": [[0.25] * 4]}
    }  # fmt: skip


def again(study: Study) -> Study:
    files = page_files(study)
    return study_from_files(files["rows.json"], *(json.loads(files[name]) for name in ("experiment.json", "environment.json")))


def test_probabilities_and_metrics_come_back_as_they_were() -> None:
    study = made_up(["none", "a"], 1, 2, 40)
    for old, new in zip(study.rows, again(study).rows, strict=True):
        assert new["test"]["probs"] == old["test"]["probs"]
        assert new["test"]["metrics"] == old["test"]["metrics"]
        assert new["key"] == old["key"]
    assert page_files(again(study)) == page_files(study)


def test_a_page_of_165_rows_and_230_test_images_stays_small() -> None:
    files = page_files(made_up(["none", "b", "c", "d", "e"], 11, 3, 230))
    sizes = {name: len(text.encode()) for name, text in files.items()}
    assert sum(line.startswith('{"sha256"') for line in files["rows.json"].splitlines()) == 165
    assert sum(sizes.values()) < 1_500_000, sizes


def test_rows_hold_no_case_and_no_course_of_training() -> None:
    text = page_files(made_up(["none"], 1, 1, 5))["rows.json"]
    assert "history" not in text and '"case"' not in text


def test_groups_that_a_teacher_saw_stay_out() -> None:
    study = made_up(["none"], 1, 1, 5)
    row = json.loads(json.dumps(study.rows[0]))
    row["key"]["arm"]["teacher"] = {"sha256": "t" * 64, "fit_groups": ["Mrs Smith"]}
    row["sha256"] = storage.sha256_json(row["key"])
    cells = (CellName("none", "network0", 0, row["sha256"]),)
    taught = Study(replace(study.record, cells=cells), (row,))
    assert "Smith" not in "".join(page_files(taught).values())
    assert again(taught).rows[0]["sha256"] == row["sha256"]


def test_an_unfinished_arm_takes_its_variants_and_those_who_meet_it_along() -> None:
    study = made_up(["none", "oversample", "a@1", "a@2", "b"], 1, 2, 5)
    arms = [replace(arm, variant=Variant("a", float(arm.name[-1]))) if "@" in arm.name else arm for arm in study.record.arms]
    opponents = {name: Opponents(control="oversample") for name in ("a@1", "a@2", "b")} | {"oversample": Opponents()}
    record = replace(study.record, arms=tuple(arms), opponents=opponents)

    def whole(*gone: str) -> list[str]:
        rows = [row for row in study.rows if not (row["arm"] in gone and row["seed"] == 1)]
        part, kept = finished_part(record, rows)
        assert {row["arm"] for row in kept} == {arm.name for arm in part.arms} == {cell.arm for cell in part.cells}
        return [arm.name for arm in part.arms]

    assert whole() == ["none", "oversample", "a@1", "a@2", "b"]
    assert whole("a@2") == ["none", "oversample", "b"]
    assert whole("oversample") == ["none"]
    with pytest.raises(DataError, match="page-too-early"):
        whole("none")


def test_of_an_unfinished_grading_the_larger_comparison_is_kept() -> None:
    study = made_up(["none", "a", "b"], 4, 2, 5)

    def kept(*gone: tuple[str, str]) -> tuple[list[str], list[str]]:
        rows = [row for row in study.rows if (row["arm"], row["network"]) not in gone or row["seed"] == 0]
        part, rest = finished_part(study.record, rows)
        assert [(row["arm"], row["network"], row["seed"]) for row in rest] == [
            (cell.arm, cell.network, cell.seed) for cell in part.cells
        ]
        return [arm.name for arm in part.arms], sorted({row["network"] for row in rest})

    all_arms, all_networks = ["none", "a", "b"], ["network0", "network1", "network2", "network3"]
    assert kept() == (all_arms, all_networks)
    assert kept(("b", "network3"), ("a", "network3"), ("none", "network3")) == (all_arms, all_networks[:3])
    assert kept(("b", "network2"), ("b", "network3")) == (["none", "a"], all_networks)  # 16 runs against 12
    assert kept(("none", "network0")) == (all_arms, all_networks[1:])
    with pytest.raises(DataError, match="page-too-early"):
        kept(*(("none", network) for network in all_networks))


def test_limits_follow_from_the_settings() -> None:
    study = made_up(["none", "a"], 2, 2, 5)
    entry = {"metric": "balanced_accuracy", "against_none": {"low": -0.1, "high": 0.2}}

    def text(rows: list[Row], **more: object) -> str:
        return " ".join(limits(Outcome(study.record, rows, {"a": entry | more})))

    rows = [dict(row) for row in study.rows]
    plain = text(rows)
    assert "One set of images" not in plain and "per real one" not in plain
    assert "are 0.300 wide" in plain and "2 seeds, too few for a verdict" in plain and "fewer than 20 groups" in plain
    added = [row | ({"num_synthetic": 9, "ratio": 1.5} if row["arm"] == "a" else {}) for row in rows]
    assert "1.5 per real one; it was set, not chosen" in text(added) and "One set of images" in text(added)
    assert "was chosen on validation" in text(added, choice={})
    assert "no validation split" in text([row | {"validation": None} for row in rows])
