"""`medaug labels` on graded discs of which every fifth training label was planted wrong: what it finds, writes and refuses."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_gate import write_synthetic

from medaug.cohort import Cohort, read_cohort, write_cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.quality import labels as label_module
from medaug.quality import out_of_fold as folds_module
from medaug.quality.labels import COLUMNS, run_labels
from medaug.training.classifier import ClassifierRecipe

RECIPE = ClassifierRecipe(
    num_steps=150, batch_size=16, learning_rate=3e-3, evaluate_every=150, policy="weak", class_balanced=True
)
QUICK = replace(RECIPE, num_steps=2, evaluate_every=2)
NOISE, FOLDS = 0.2, 5
# Chosen before the first run: a guess has precision 0.2, and more is not asked of 150 steps at 16 px.
PRECISION, RECALL = 0.7, 0.7


def plant(cohort: Cohort, root: Path) -> dict[str, int]:
    """Give a fifth of the training cases another class, drawn by case; id -> true class of those."""
    wrong: dict[str, int] = {}
    cases = []
    count = round(NOISE * len(cohort.training))
    chosen = set(numpy_generator("planted", 0).permutation(len(cohort.training))[:count].tolist())
    for index, case in enumerate(cohort.training):
        if index in chosen:
            shift = int(numpy_generator("planted", 0, case.id).integers(1, len(cohort.classes)))
            wrong[case.id] = case.label
            case = replace(case, label=(case.label + shift) % len(cohort.classes))
        cases.append(case)
    write_cohort(cohort.with_cases(training=cases), root)
    return wrong


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def scene(tmp_path_factory, make_cohort):
    """The cohort, its planted labels, a synthetic cohort, and one whole run over them."""
    root = tmp_path_factory.mktemp("labels")
    cohort = make_cohort(root / "real", num_classes=4, per_class=80, ordinal=True)
    wrong = plant(cohort, root / "real")
    real = read_cohort(root / "real")
    write_synthetic(root / "synthetic", real, make_cohort(root / "others", num_classes=4, per_class=10, seed=1))
    before = contents(root / "real")
    summary = run_labels(root / "real", root / "out", recipe=RECIPE, num_folds=FOLDS, synthetic_dir=root / "synthetic")
    assert contents(root / "real") == before  # nothing in the cohort changes
    return root, real, wrong, summary


def test_planted_labels_are_found(scene):
    root, real, wrong, summary = scene
    rows = table(root / "out" / "labels.csv")
    found = {row["id"] for row in rows if row["reason"]}
    precision, recall = len(found & set(wrong)) / len(found), len(found & set(wrong)) / len(wrong)
    assert precision >= PRECISION and recall >= RECALL, (len(rows), len(wrong), len(found), precision, recall)
    assert summary["parts"]["training"]["issues"] == len(found)
    right = [row["suggested"] == real.classes[wrong[row["id"]]] for row in rows if row["id"] in found & set(wrong)]
    assert np.mean(right) >= 0.7  # and what it suggests is mostly the true class


def test_a_flip_by_more_grades_scores_worse(scene):
    root, real, wrong, summary = scene
    quality = {row["id"]: float(row["quality"]) for row in table(root / "out" / "labels.csv")}
    given = {case.id: case.label for case in real.training}
    by_distance = [
        np.mean([quality[name] for name, truth in wrong.items() if abs(truth - given[name]) == apart]) for apart in (1, 2, 3)
    ]
    clean = np.mean([value for name, value in quality.items() if name not in wrong])
    assert clean > by_distance[0] > by_distance[1] > by_distance[2]
    training = summary["parts"]["training"]
    assert sum(training["issues_by_distance"].values()) == training["issues"]


def test_wrong_synthetic_labels_are_found_by_the_network_of_the_real_images(scene):
    root, real, _, summary = scene
    rows = {row["id"]: row for row in table(root / "out" / "labels_synthetic.csv")}
    wrong = [rows[f"s{label}wrong"]["reason"] != "" for label in range(4)]
    good = [row["reason"] != "" for name, row in rows.items() if "good" in name]
    assert sum(wrong) >= 3 and np.mean(good) <= 0.25  # of 4, and of 24
    assert summary["network"]["fit_cases"] == len(real.training)


def test_tables_and_summary_speak_of_the_same_images(scene):
    root, real, _, summary = scene
    assert list(summary["parts"]) == ["training", "validation", "test", "synthetic"]
    for name, file in (("training", "labels.csv"), ("validation", "labels_validation.csv"), ("test", "labels_test.csv")):
        rows = table(root / "out" / file)
        assert tuple(rows[0]) == COLUMNS and {row["id"] for row in rows} == {case.id for case in real.split(name)}
        part = summary["parts"][name]
        assert part["n"] == len(rows) and part["issues"] == sum(row["reason"] != "" for row in rows)
        assert np.sum(part["label_and_suggestion"]) == part["issues"] == sum(entry["issues"] for entry in part["per_class"])
        worst = [float(row["quality"]) for row in rows if row["reason"]]
        assert worst == sorted(worst) and all(row["reason"] for row in rows[: len(worst)])
        assert all(row["suggested"] == row["label"] for row in rows[len(worst) :])
    assert json.loads((root / "out" / "labels.json").read_text()) == summary
    assert sum(fold["n"] for fold in summary["folds"]) == len(real.training)
    html = (root / "out" / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= summary["parts"]["training"]["issues"] * 0.5
    assert str(root) not in html and str(root) not in json.dumps(summary)


def test_a_stopped_run_goes_on_to_the_same_bytes(scene, tmp_path, monkeypatch):
    root, _, _, _ = scene
    options = {"recipe": QUICK, "num_folds": 3}
    run_labels(root / "real", tmp_path / "whole", **options)
    calls = []
    original = folds_module.fit_classifier

    def stopping(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(folds_module, "fit_classifier", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_labels(root / "real", tmp_path / "out", **options)
    assert len(list((tmp_path / "out" / "folds").rglob("*.json"))) == 2
    assert not list((tmp_path / "out").glob("labels*")) and not (tmp_path / "out" / "report.html").exists()
    run_labels(root / "real", tmp_path / "out", **options)
    assert len(calls) == 4  # the third fold alone was trained again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_fold_is_trained_again(scene, tmp_path, monkeypatch, caplog):
    root, _, _, _ = scene
    run_labels(root / "real", tmp_path, recipe=QUICK, num_folds=2)
    before = contents(tmp_path)
    (path,) = (tmp_path / "folds").rglob("fold-1.json")
    path.write_text(path.read_text()[:-40])
    run_labels(root / "real", tmp_path, recipe=QUICK, num_folds=2)
    assert contents(tmp_path) == before and "damaged" in caplog.text


def test_no_network_judges_a_group_that_it_saw(scene, tmp_path, monkeypatch):
    root, real, _, _ = scene
    seen = []
    monkeypatch.setattr(
        folds_module,
        "_judged",
        lambda cohort, images, seen_, held, *rest: seen.append((seen_, held)) or np.full((len(held), 4), 0.25),
    )
    made = folds_module.out_of_fold(real, real.training, tmp_path, network="simple_cnn", recipe=QUICK, num_folds=4)
    groups = np.array([case.group for case in real.training])
    for trained, held in seen:
        assert not set(groups[trained]) & set(groups[held])
        assert sorted([*trained, *held]) == list(range(len(groups)))
    assert len(seen) == 4 and sorted(np.concatenate([held for _, held in seen])) == list(range(len(groups)))
    assert set(made.folds) == {0, 1, 2, 3}


def test_tables_of_parts_that_are_gone_are_removed(scene, tmp_path):
    root, _, _, _ = scene
    run_labels(root / "real", tmp_path, recipe=QUICK, num_folds=2, synthetic_dir=root / "synthetic")
    assert (tmp_path / "labels_synthetic.csv").is_file()
    run_labels(root / "real", tmp_path, recipe=QUICK, num_folds=2)
    assert not (tmp_path / "labels_synthetic.csv").exists()


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be trained before a refusal."""
    for module, name in ((folds_module, "fit_classifier"), (label_module, "train_filter")):
        monkeypatch.setattr(module, name, lambda *arguments, **named: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ({"num_classes": 1}, {}, "labels-one-class"),
        ({"per_class": 10}, {"num_folds": 5}, "class-too-small.*rarest has 3"),  # 6 training images of 3 groups
        ({"per_class": 40, "cases_per_group": 20}, {"num_folds": 3}, "class-too-small"),  # 2 groups of 20 images
        ({}, {"num_folds": 1}, "folds-invalid"),
        ({}, {"network": "odd"}, "network-unknown"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path, make_cohort, untrained, shape, options, match):
    make_cohort(tmp_path / "c", **shape)
    with pytest.raises((ConfigError, DataError), match=match):
        run_labels(tmp_path / "c", tmp_path / "out", **({"recipe": QUICK, "num_folds": 2} | options))
    assert not list((tmp_path / "out").glob("labels*"))


def test_a_class_without_real_images_is_refused(tmp_path, make_cohort, untrained):
    cohort = make_cohort(tmp_path / "c")
    write_cohort(cohort.with_cases(training=[case for case in cohort.training if case.label]), tmp_path / "c")
    with pytest.raises(DataError, match="class-empty.*class0"):
        run_labels(tmp_path / "c", tmp_path / "out", recipe=QUICK, num_folds=2)


def test_without_cleanlab_nothing_is_trained(tmp_path, make_cohort, untrained, monkeypatch):
    make_cohort(tmp_path / "c")
    monkeypatch.setitem(sys.modules, "cleanlab.count", None)
    with pytest.raises(ConfigError, match="labels-not-installed"):
        run_labels(tmp_path / "c", tmp_path / "out", recipe=QUICK)


def test_wrong_folders_are_refused(tmp_path, make_cohort, untrained):
    make_cohort(tmp_path / "c")
    with pytest.raises(ConfigError, match="out-is-input"):
        run_labels(tmp_path / "c", tmp_path / "c", recipe=QUICK)
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    with pytest.raises(DataError, match="not-synthetic"):
        run_labels(tmp_path / "c", tmp_path / "out", recipe=QUICK, synthetic_dir=tmp_path / "d")
