"""Labels by AMST in the gate: what is accepted carries the heads' label, the rest is kept unlabelled, nobody saw held-out groups."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medaug.cohort import Case, Cohort, check_against, fit_sha256, read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.networks.amst import fit_metadata
from medaug.networks.grading import build_network
from medaug.networks.weights import read_metadata, save_weights
from medaug.quality import amst_labels
from medaug.quality.amst_labels import train_amst_labels
from medaug.quality.gate import run_gate
from medaug.quality.pseudo_label import train_filter
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.classifier import ClassifierRecipe

RECIPE = ClassifierRecipe(num_steps=80, batch_size=16, learning_rate=3e-3, evaluate_every=25)
QUICK = replace(RECIPE, num_steps=3)
HALF = AmstRecipe(quantile=0.7)
EACH = 8


def mislabelled(root: Path, real: Cohort, others: Cohort) -> Cohort:
    """New discs, `EACH` of every class; of each class the last three were generated for the class two further on."""
    groups = sorted(real.groups("training"))
    cases = []
    for label in range(3):
        pictures = [others.path(case) for case in others.cases() if case.label == label][:EACH]
        for index, picture in enumerate(pictures):
            intended = label if index < EACH - 3 else (label + 2) % 3
            reference = next(case for case in real.training if case.label == intended)
            case_id = f"s{label}{index}"
            (root / "images").mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, root / "images" / f"{case_id}.png")
            lineage = {"reference": reference.id, "seed": 0, "fit_on": fit_sha256(groups)}
            cases.append(Case(case_id, f"images/{case_id}.png", intended, reference.group, "0" * 64, lineage=lineage))
    fit_on = {fit_sha256(groups): groups}
    made = replace(real, name="discs synthetic", training=tuple(cases), validation=(), test=(), fit_on=fit_on, root=None)
    return write_cohort(made, root)


@pytest.fixture(scope="module")
def filter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture
def gate(tmp_path: Path, make_cohort: Callable[..., Cohort], filter_dir: Path) -> Callable[..., Any]:
    real = make_cohort(tmp_path / "real", per_class=30, cases_per_group=2)
    mislabelled(tmp_path / "synthetic", real, make_cohort(tmp_path / "others", per_class=10, seed=1))

    def run(**options: Any) -> Any:
        usual = {"checks": ["pseudo_label"], "label": "amst", "recipe": RECIPE, "amst": HALF, "filter_dir": filter_dir}
        return run_gate(tmp_path / "synthetic", tmp_path / "real", tmp_path / "out", **usual | options)

    return run


def test_accepted_images_carry_the_heads_label_and_the_rest_is_kept(gate, tmp_path):
    result = gate()
    real, accepted = read_cohort(tmp_path / "real"), read_cohort(tmp_path / "out", verify=True)
    rest = read_cohort(tmp_path / "out" / "unlabelled", verify=True)
    synthetic = {case.id: case for case in read_cohort(tmp_path / "synthetic").training}
    assert {case.id for case in accepted.training} | {case.id for case in rest.training} == set(synthetic)
    assert len(accepted.training) + len(rest.training) == len(synthetic)
    right = [case.label == int(case.id[1]) for case in accepted.training]
    seeds_right = [case.label == int(case.id[1]) for case in synthetic.values()]
    assert sum(right) / len(right) > sum(seeds_right) / len(seeds_right) == (EACH - 3) / EACH
    moved = [case for case in accepted.training if case.label != synthetic[case.id].label]
    assert moved
    for case in moved:
        lineage = case.lineage
        assert lineage["intended_label"] == synthetic[case.id].label and lineage["pseudo_label"] == case.label
        assert lineage["uncertainty"] >= 0 and lineage["verdict"] == "accept"
        assert lineage["fit_on"] == fit_sha256(real.groups("training")) and len(lineage["filter_sha256"]) == 64
    assert all(case.label == synthetic[case.id].label and case.lineage["verdict"] == "reject" for case in rest.training)
    assert {code for case in rest.training for code in case.lineage["reasons"]} <= {"heads-disagree", "uncertainty-high"}
    check_against(accepted, real)
    check_against(rest, real)
    per_class = [sum(case.label == label for case in accepted.training) for label in range(3)]
    assert [entry.accepted for entry in result.acceptance] == per_class


def test_report_tells_of_acceptance_confusion_and_uncertainty(gate, tmp_path):
    gate()
    summary = json.loads((tmp_path / "out" / "gate.json").read_text())
    report = summary["filter"]["report"]
    assert summary["filter"]["source"] == "amst" and summary["config"]["label"] == "amst"
    assert report["scored"] == 3 * EACH == sum(report["histogram"]["counts"])
    assert report["relabelled"] == sum("label" in row and row["label"] != row["intended"] for row in summary["verdicts"])
    assert summary["filter"]["validation"]["accuracy"] > 0.6
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Labels by AMST" in html and "Variance under drop-out" in html and "confidence threshold" not in html


def test_thresholds_need_no_training_and_old_rest_goes(gate, tmp_path, monkeypatch):
    gate()
    monkeypatch.setattr(amst_labels, "pretrain", lambda *args, **options: pytest.fail("trained twice"))
    few = gate(amst=AmstRecipe(quantile=0.2)).accepted
    many = gate(amst=AmstRecipe(quantile=1.0)).accepted
    assert {case.id for case in few.training} < {case.id for case in many.training}
    all_in = gate(amst=AmstRecipe(quantile=1.0), label="amst", checks=["usable"])
    assert len(all_in.accepted.training) == 3 * EACH
    assert not (tmp_path / "out" / "unlabelled" / "cohort.json").exists()
    assert not list((tmp_path / "out" / "unlabelled").glob("images/*"))


def test_nothing_accepted_is_loud_but_the_rest_is_written(gate, tmp_path):
    with pytest.raises(DataError, match="No image passed") as caught:
        gate(amst=AmstRecipe(threshold=0.0))
    assert caught.value.code == "nothing-accepted"
    assert len(read_cohort(tmp_path / "out" / "unlabelled").training) == 3 * EACH


def test_quota_counts_the_label_an_image_carries(gate):
    result = gate(quotas=[1, 1, 1])
    assert sorted(case.label for case in result.accepted.training) == [0, 1, 2]


def test_heads_see_training_groups_only_and_damage_is_noticed(tmp_path, make_cohort, monkeypatch, caplog):
    cohort = make_cohort(tmp_path / "c", per_class=10, size=16)
    seen = []
    original = amst_labels.CaseImages
    monkeypatch.setattr(amst_labels, "CaseImages", lambda owner, cases: seen.append(list(cases)) or original(owner, cases))
    first = train_amst_labels(cohort, tmp_path / "f", recipe=QUICK)
    assert seen == [list(cohort.training)]
    assert set(first.fit_groups) == cohort.groups("training")
    (weights,) = (tmp_path / "f").glob("*/amst.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    again = train_amst_labels(cohort, tmp_path / "f", recipe=QUICK)
    assert "damaged" in caplog.text and weights.read_bytes() == whole
    assert again.facts["weights_sha256"] == first.facts["weights_sha256"]


def test_checkpoints_to_start_from(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=5, size=16)
    network, path = build_network("simple_cnn", 3, 1, 16), tmp_path / "w.safetensors"
    own = fit_metadata(cohort.groups("training"))
    scratch = train_amst_labels(cohort, tmp_path / "f", recipe=QUICK)
    save_weights(path, network, own)
    started = train_amst_labels(cohort, tmp_path / "f", recipe=QUICK, weights=path)
    assert started.facts["weights_sha256"] != scratch.facts["weights_sha256"] and not started.facts["weights_trusted"]
    save_weights(path, network, {"fit_groups": json.dumps(sorted(cohort.groups("test")))})
    for trusted in (False, True):
        with pytest.raises(LeakageError, match="fit-on-held-out") as caught:
            train_amst_labels(cohort, tmp_path / "f", recipe=QUICK, weights=path, weights_trusted=trusted)
        assert caught.value.exit_code == 4
    save_weights(path, build_network("simple_cnn", 5, 1, 16), own)
    with pytest.raises(ConfigError, match="made for 5 classes"):
        train_amst_labels(cohort, tmp_path / "f", recipe=QUICK, weights=path)
    train_amst_labels(cohort, tmp_path / "f", recipe=QUICK, weights=path, replace_head=True)


def turned_round(cohort: Cohort, root: Path) -> Cohort:
    """The same images, training and test exchanged."""
    shutil.copytree(cohort.root, root)
    return write_cohort(cohort.with_cases(training=cohort.test, test=cohort.training), root)


@pytest.mark.parametrize("kind", ["filter", "amst"])
def test_weights_of_a_cohort_that_trains_on_our_test_groups_are_refused(gate, tmp_path, kind):
    """What medaug writes itself says what it saw, and the gate reads that."""
    other = turned_round(read_cohort(tmp_path / "real"), tmp_path / "other")
    trained = train_filter if kind == "filter" else train_amst_labels
    made = trained(other, tmp_path / "elsewhere", recipe=QUICK)
    (path,) = (tmp_path / "elsewhere").glob("*/*.safetensors")
    assert json.loads(read_metadata(path)["fit_groups"]) == list(made.fit_groups) == sorted(other.groups("training"))
    for trusted in (False, True):
        with pytest.raises(LeakageError, match="fit-on-held-out"):
            gate(weights=path, weights_trusted=trusted, recipe=QUICK)
    assert not (tmp_path / "out" / "cohort.json").exists()


def test_weights_of_our_own_training_split_are_welcome(gate, tmp_path):
    real = read_cohort(tmp_path / "real")
    train_filter(real, tmp_path / "elsewhere", recipe=QUICK)
    (path,) = (tmp_path / "elsewhere").glob("*/*.safetensors")
    accepted = gate(weights=path, amst=AmstRecipe(quantile=1.0)).accepted
    assert not any("weights_trusted" in case.lineage for case in accepted.training)
    check_against(accepted, real)


def test_weights_of_unknown_origin_need_a_word_that_is_written_down(gate, tmp_path, filter_dir):
    path = tmp_path / "w.safetensors"
    save_weights(path, build_network("simple_cnn", 3, 1, 16))
    with pytest.raises(LeakageError, match="fit-unknown.*weights_trusted") as caught:
        gate(weights=path)
    assert caught.value.exit_code == 4
    result = gate(weights=path, weights_trusted=True, amst=AmstRecipe(quantile=1.0))
    assert all(case.lineage["weights_trusted"] is True for case in result.accepted.training)
    assert result.summary["filter"]["weights_trusted"] is True
    check_against(result.accepted, read_cohort(tmp_path / "real"))
    unknown = [home for home in filter_dir.glob("amst-*/amst.safetensors") if "fit_groups" not in read_metadata(home)]
    assert len(unknown) == 1  # heads that began from unknown weights do not say that they know
    with pytest.raises(LeakageError, match="fit-unknown"):  # the word is asked for again, cached heads or not
        gate(weights=path, amst=AmstRecipe(quantile=1.0))


def test_class_missing_from_the_real_data_is_refused(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=5, size=16)
    without = cohort.with_cases(training=[case for case in cohort.training if case.label != 1])
    with pytest.raises(DataError, match="none of class1"):
        train_amst_labels(without, tmp_path / "f", recipe=QUICK)


def test_refusals(gate, tmp_path):
    with pytest.raises(ConfigError, match="one of filter, amst"):
        gate(label="clip")
    with pytest.raises(ConfigError, match="weights-unused"):
        gate(label="filter", weights=tmp_path / "w")
    with pytest.raises(ConfigError, match="amst-gate"):
        gate(amst=AmstRecipe(rounds=2))
