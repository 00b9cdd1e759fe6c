"""The gate on drawn discs: good, mislabelled, copied and empty images go where they belong."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medaug import cohort as cohorts
from medaug.cohort import Case, Cohort, check_against, fit_sha256, read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.io.raster import write_unit_png
from medaug.quality import feature_cache, pseudo_label
from medaug.quality.gate import run_gate
from medaug.training.classifier import ClassifierRecipe

RECIPE = ClassifierRecipe(num_steps=120, batch_size=16, learning_rate=3e-3, evaluate_every=25)
GOOD = 6


def write_synthetic(root: Path, real: Cohort, others: Cohort, *, fit_groups: set[str] | None = None) -> Cohort:
    """Per class: `GOOD` new discs of the class, then a disc of another class, a copy of a training image, a constant image."""
    groups = sorted(real.groups("training") if fit_groups is None else fit_groups)
    cases = []
    for label in range(len(real.classes)):
        reference = next(case for case in real.training if case.label == label)
        new = [[others.path(case) for case in others.cases() if case.label == index] for index in range(len(real.classes))]
        pictures = {f"good{index}": new[label][index] for index in range(GOOD)}
        pictures |= {"wrong": new[(label + 2) % len(real.classes)][GOOD], "copy": real.path(reference)}
        write_unit_png(root / "images" / f"s{label}blank.png", np.full((16, 16), 0.5, np.float32))
        for name, picture in pictures.items():
            shutil.copy(picture, root / "images" / f"s{label}{name}.png")
        for name in [*pictures, "blank"]:
            lineage = {"reference": reference.id, "intended_label": label, "seed": 0, "fit_on": fit_sha256(groups)}
            case_id = f"s{label}{name}"
            cases.append(Case(case_id, f"images/{case_id}.png", label, reference.group, "0" * 64, name=case_id, lineage=lineage))
    fit_on = {fit_sha256(groups): groups}
    made = replace(real, name="discs synthetic", training=tuple(cases), validation=(), test=(), fit_on=fit_on, root=None)
    return write_cohort(made, root)


@pytest.fixture(scope="module")
def filter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of filters for the module: the cohorts of all tests have the same content."""
    return tmp_path_factory.mktemp("filters")


@pytest.fixture
def gate(tmp_path: Path, make_cohort: Callable[..., Cohort], filter_dir: Path) -> Callable[..., Any]:
    real = make_cohort(tmp_path / "real", per_class=30, cases_per_group=2)
    write_synthetic(tmp_path / "synthetic", real, make_cohort(tmp_path / "others", per_class=10, seed=1))

    def run(**options: Any) -> Any:
        settings = {"recipe": RECIPE, "filter_dir": filter_dir, "threshold": 0.6} | options
        return run_gate(tmp_path / "synthetic", tmp_path / "real", tmp_path / "out", **settings)

    return run


def verdicts_of(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    return {row["id"]: row["verdict"] for row in rows}


def test_every_image_goes_where_it_belongs(gate, tmp_path):
    result = gate()
    verdicts = verdicts_of(result.verdicts)
    assert [verdicts[f"s{label}wrong"] for label in range(3)] == ["reject"] * 3
    assert [verdicts[f"s{label}blank"] for label in range(3)] == ["reject"] * 3
    assert all(verdicts[f"s{label}copy"] in ("quarantine", "reject") for label in range(3))
    assert sum(verdicts[f"s{label}good{index}"] == "accept" for label in range(3) for index in range(GOOD)) >= 2 * GOOD
    reasons = {row["id"]: row["reasons"] for row in result.verdicts}
    assert reasons["s0wrong"][0].startswith("label-disagrees: Intended class0, the filter sees class2")
    assert reasons["s1blank"][0].startswith("image-constant")
    assert any(reason.startswith("near-copy") for reason in reasons["s2copy"])


def test_accepted_cohort_has_the_whole_lineage_and_trains(gate, tmp_path):
    result = gate()
    real = read_cohort(tmp_path / "real")
    accepted = read_cohort(tmp_path / "out", verify=True)
    check_against(accepted, real)
    assert {case.id for case in accepted.training} == {
        i for i, verdict in verdicts_of(result.verdicts).items() if verdict == "accept"
    }
    (fit,) = accepted.fit_on
    assert set(accepted.fit_on[fit]) == real.groups("training")
    for case in accepted.training:
        lineage = case.lineage
        assert lineage["fit_on"] == fit == fit_sha256(real.groups("training"))
        assert lineage["pseudo_label"] == lineage["intended_label"] == case.label
        assert lineage["confidence"] >= 0.6 and lineage["nearest_training_distance"] > 0
        assert (lineage["verdict"], lineage["reasons"]) == ("accept", [])
        assert len(lineage["filter_sha256"]) == 64 and lineage["reference"]


def test_quarantine_holds_the_images_and_the_reasons(gate, tmp_path):
    result = gate()
    with open(tmp_path / "out" / "quarantine.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == cohorts.QUARANTINE_COLUMNS
    held = {i for i, verdict in verdicts_of(result.verdicts).items() if verdict == "quarantine"}
    assert held and {path.stem for path in (tmp_path / "out" / "quarantine").iterdir()} == held
    assert {row["file"] for row in rows if row["code"] == "near-copy"} >= {f"quarantine/{i}.png" for i in held}
    assert {"image-constant", "label-disagrees"} <= {row["code"] for row in rows}


def test_generator_fitted_on_fewer_groups_is_joined_with_the_filter(gate, tmp_path):
    real = read_cohort(tmp_path / "real")
    shutil.rmtree(tmp_path / "synthetic")
    some = set(sorted(real.groups("training"))[:3])
    write_synthetic(tmp_path / "synthetic", real, read_cohort(tmp_path / "others"), fit_groups=some)
    accepted = gate().accepted
    assert list(accepted.fit_on) == [fit_sha256(real.groups("training"))]
    assert accepted.training[0].lineage["generator_fit_on"] == fit_sha256(some)


def test_generator_that_saw_a_test_group_is_refused(gate, tmp_path):
    real = read_cohort(tmp_path / "real")
    leaked = sorted(real.groups("test"))[0]
    path = tmp_path / "synthetic" / "cohort.json"
    text = json.loads(path.read_text())
    ((old, groups),) = text["fit_on"].items()
    new = fit_sha256([*groups, leaked])
    text["fit_on"] = {new: sorted([*groups, leaked])}
    path.write_text(json.dumps(text).replace(old, new))
    with pytest.raises(LeakageError, match=leaked):
        gate()
    assert not (tmp_path / "out" / "cohort.json").exists()


def test_another_threshold_needs_no_training(gate, tmp_path, monkeypatch):
    lenient = gate(threshold=0.0)
    monkeypatch.setattr(pseudo_label, "fit_classifier", lambda *args, **options: pytest.fail("trained twice"))
    strict = gate(threshold=0.9, allow_short=True)
    assert {case.id for case in strict.accepted.training} <= {case.id for case in lenient.accepted.training}
    assert {path.stem for path in (tmp_path / "out" / "images").iterdir()} == {case.id for case in strict.accepted.training}


def test_same_arguments_give_the_same_bytes(gate, tmp_path):
    gate()
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "out")
    gate()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == first


def test_quota_cuts_in_order_and_keeps_the_rate(gate):
    result = gate(quotas={"class0": 2, "class1": 1})
    assert [entry.accepted for entry in result.acceptance][:2] == [2, 1]
    assert result.acceptance[0].passed > 2 and result.acceptance[0].rate == result.acceptance[0].passed / (GOOD + 3)
    assert result.acceptance[2].quota is None
    first = [row["id"] for row in result.verdicts if row["id"].startswith("s0") and row["verdict"] == "accept"]
    surplus = [row["id"] for row in result.verdicts if row["reasons"] and row["reasons"][0].startswith("quota-filled")]
    assert max(first) < min(name for name in surplus if name.startswith("s0"))


def test_missed_quota_is_loud_after_the_report(gate, tmp_path):
    gate()
    with pytest.raises(DataError, match=r"class1 wanted 50, got \d \(acceptance \d+% of 9\)") as caught:
        gate(quotas=[1, 50, 1])
    assert (caught.value.code, caught.value.exit_code) == ("quota-missed", 3)
    assert (tmp_path / "out" / "report.html").is_file() and not (tmp_path / "out" / "cohort.json").exists()
    acceptance = json.loads((tmp_path / "out" / "gate.json").read_text())["acceptance"]
    assert [entry["short"] for entry in acceptance] == [False, True, False]
    short = gate(quotas=[1, 50, 1], allow_short=True)
    assert short.short == ["class1"] and read_cohort(tmp_path / "out").training


def test_nothing_accepted_is_loud(gate):
    with pytest.raises(DataError, match="No image passed"):
        gate(threshold=1.0)


def test_gate_json_and_report(gate, tmp_path):
    result = gate()
    data = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert data["verdicts"] == result.verdicts and {"id", "name", "verdict", "reasons"} <= set(data["verdicts"][0])
    assert data["filter"]["validation"]["accuracy"] > 0.6 and data["filter"]["fit_cases"] == 54
    assert sum(map(sum, data["agreement"])) == 3 * (GOOD + 2)
    assert data["copies"]["n"] == 3 * (GOOD + 2) and data["copies"]["basis"] == "other groups of training"
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 5 and "Nearest pairs" in html and "class2" in html
    assert str(tmp_path) not in html and str(tmp_path) not in json.dumps(data)


def test_only_the_asked_checks_run(gate, monkeypatch):
    monkeypatch.setattr(pseudo_label, "fit_classifier", lambda *args, **options: pytest.fail("trained"))
    result = gate(checks=["copies"], filter_dir=None)
    assert "filter" not in result.summary
    assert verdicts_of(result.verdicts)["s0wrong"] == "accept" and verdicts_of(result.verdicts)["s0blank"] == "reject"


def test_unreadable_image_is_rejected_not_fatal(gate, tmp_path):
    path = tmp_path / "synthetic" / "images" / "s0good0.png"
    path.write_bytes(path.read_bytes()[:40])
    row = next(row for row in gate().verdicts if row["id"] == "s0good0")
    assert row["verdict"] == "reject" and row["reasons"][0].startswith("image-")


class Recorder:
    """Stands in for a tracked run: remembers what was logged."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: self.calls.setdefault(name, []).append(args)


def test_tables_and_sheets_are_tracked(gate):
    run = Recorder()
    gate(tracking=run)
    assert [args[1] for args in run.calls["log_table"]] == ["gate_acceptance", "gate_reasons", "gate_verdicts"]
    assert [args[1] for args in run.calls["log_cohort"]] == ["reference", "synthetic", "accepted"]
    assert len(run.calls["log_image"]) == 3 and run.calls["log_metrics"][0][0]["accepted"] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"checks": ["unknown"]}, "one of usable, pseudo_label, copies"),
        ({"threshold": 1.5}, "in \\[0, 1\\]"),
        ({"quotas": {"class9": 1}}, "class9"),
        ({"network": "simple_cmm"}, "simple_cmm"),
        ({"quotas": [1, 2]}, "per class \\(3\\)"),
    ],
)
def test_wrong_options_are_refused(gate, options, match):
    with pytest.raises(ConfigError, match=match):
        gate(**options)


def test_real_cases_and_real_folders_are_refused(gate, tmp_path):
    with pytest.raises(DataError, match="carry no lineage"):
        run_gate(tmp_path / "real", tmp_path / "real", tmp_path / "out")
    with pytest.raises(ConfigError, match="another folder"):
        run_gate(tmp_path / "synthetic", tmp_path / "real", tmp_path / "real")


def test_checks_with_settings_say_what_each_said(gate, tmp_path):
    result = gate(checks=[{"copies": {"spaces": ["pixels"]}}, {"fidelity": {"halves": 0}}], filter_dir=None)
    rows = {row["id"]: row for row in result.verdicts}
    assert rows["s0copy"]["checks"] == {"usable": "accept", "copies": "quarantine", "fidelity": "accept"}
    assert rows["s0blank"]["checks"] == {"usable": "reject"}
    assert list(result.summary["copy_spaces"]) == ["pixels"] and result.summary["near_copies"]["copies"] >= 3
    assert {row["against"] for row in result.summary["fidelity_table"]} == {"training", "held-out"}
    assert result.summary["config"]["settings"]["copies"] == {"spaces": ["pixels"]}
    assert {path.stem for path in (tmp_path / "out" / "copies").iterdir()} >= {"s0copy", "s1copy", "s2copy"}


def test_features_are_kept_for_the_next_gate(gate, tmp_path, monkeypatch):
    gate(checks=["copies"])
    monkeypatch.setattr(feature_cache, "_compute", lambda *args: pytest.fail("computed twice"))
    gate(checks=["copies"])
    assert len(list((tmp_path / "out" / "features").iterdir())) == 1
