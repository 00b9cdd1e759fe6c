"""The independent judge: what it says of right and wrong labels, that it is independent, and what the report shows of it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_gate import GOOD, RECIPE, write_synthetic

from medaug.cohort import fit_sha256
from medaug.errors import ConfigError
from medaug.quality import judge_check, pseudo_label
from medaug.quality.context import GateContext
from medaug.quality.gate import run_gate
from medaug.quality.judge_check import judge, train_judge
from medaug.quality.pseudo_label import PseudoLabel

CHECKS = ["pseudo_label", {"judge": {"num_steps": 80}}]


@pytest.fixture(scope="module")
def scene(tmp_path_factory, make_cohort):
    root = tmp_path_factory.mktemp("judged")
    real = make_cohort(root / "real", per_class=30, cases_per_group=2)
    some = set(sorted(real.groups("training"))[:3])
    write_synthetic(root / "synthetic", real, make_cohort(root / "others", per_class=10, seed=1), fit_groups=some)
    result = run_gate(root / "synthetic", root / "real", root / "out", checks=CHECKS, recipe=RECIPE, threshold=0.6)
    return root, real, result


def test_report_shows_the_matrix_beside_that_of_real_images(scene):
    root, real, result = scene
    facts = json.loads((root / "out" / "gate.json").read_text())["judge"]
    assert (facts["network"], facts["seed"]) == ("resnet18", 1) and facts["fit_cases"] == len(real.training)
    assert facts["fit_on"] == fit_sha256(real.groups("training"))
    assert np.sum(facts["confusion"], axis=1).tolist() == [GOOD + 2] * 3  # all that can be read
    assert np.sum(facts["validation"]["confusion"]) == facts["validation"]["n"] == len(real.validation)
    assert facts["agreement"] == np.trace(facts["confusion"]) / np.sum(facts["confusion"])
    html = (root / "out" / "report.html").read_text()
    assert "Independent judge" in html and "Real validation: class (rows)" in html


def test_wrong_labels_are_held_back(scene):
    _, real, result = scene
    reasons = {row["id"]: " ".join(row["reasons"]) for row in result.verdicts}
    assert facts_are_worth_something(result) and sum("judge-disagrees" in reasons[f"s{label}wrong"] for label in range(3)) >= 2
    good = [reasons[f"s{label}good{index}"] for label in range(3) for index in range(GOOD)]
    assert sum("judge-disagrees" in reason for reason in good) <= len(good) / 3


def facts_are_worth_something(result) -> bool:
    return result.summary["judge"]["validation"]["accuracy"] > 0.6  # a guess has a third


def test_accepted_images_say_what_the_judge_was_fitted_on(scene):
    root, real, result = scene
    assert list(result.accepted.fit_on) == [fit_sha256(real.groups("training"))]  # the generator saw three groups only
    lineage = result.accepted.training[0].lineage
    assert lineage["judge_sha256"] == result.summary["judge"]["weights_sha256"] != lineage["filter_sha256"]
    assert lineage["judge_label"] == result.accepted.training[0].label and 0 < lineage["judge_confidence"] <= 1


def test_a_judge_alone_counts_as_fitted(scene, tmp_path):
    root, real, _ = scene
    result = run_gate(
        root / "synthetic", root / "real", tmp_path, checks=CHECKS[1:], recipe=RECIPE, filter_dir=root / "out" / "filter"
    )
    assert list(result.accepted.fit_on) == [fit_sha256(real.groups("training"))]


def test_the_judge_is_trained_once(scene, monkeypatch):
    root, _, first = scene
    monkeypatch.setattr(pseudo_label, "fit_classifier", lambda *arguments, **options: pytest.fail("trained twice"))
    again = run_gate(root / "synthetic", root / "real", root / "out", checks=CHECKS, recipe=RECIPE, threshold=0.0)
    assert again.summary["judge"] == first.summary["judge"]


@pytest.mark.parametrize("own", [{"network": "simple_cnn"}, {"seed": 0}])
def test_the_filters_own_architecture_or_seed_is_refused(scene, monkeypatch, own):
    root, real, _ = scene
    monkeypatch.setattr(judge_check, "train_filter", lambda *arguments, **options: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="judge-not-independent"):
        train_judge(GateContext(real, real, root / "f", 0.8), **own)


@pytest.mark.parametrize(
    ("filters", "judges"), [("simple_cnn", "resnet18"), ("resnet18", "simple_cnn"), ("vgg16_bn", "resnet18")]
)
def test_default_judge_differs_from_the_filter(scene, monkeypatch, filters, judges):
    root, real, _ = scene
    monkeypatch.setattr(judge_check, "train_filter", lambda *arguments, **options: options)
    made = train_judge(GateContext(real, real, root / "f", 0.8, network=filters, seed=4))
    assert (made["network"], made["seed"]) == (judges, 5)


@pytest.fixture
def canned(scene, monkeypatch):
    """A context of three real images whose judge always sees class 1."""
    root, real, _ = scene
    facts = dict.fromkeys(judge_check._FACTS)
    fake = SimpleNamespace(
        classes=real.classes, facts=facts, judge=lambda cohort, cases, threshold: [PseudoLabel(1, 0.9) for _ in cases]
    )
    monkeypatch.setattr(judge_check, "train_judge", lambda *arguments: fake)
    cases = [replace(real.training[0], id=f"x{label}", label=label) for label in range(3)]
    return GateContext(real, real, root / "f", 0.8), cases


def test_agreement_is_with_the_label_that_the_image_carries(canned):
    context, cases = canned
    assert [finding.verdict for finding in judge(context, cases)] == ["quarantine", "accept", "quarantine"]
    context.carried["x2"] = 1  # another check gave it the class that the judge sees
    assert [finding.verdict for finding in judge(context, cases)] == ["quarantine", "accept", "accept"]
    assert context.reports["judge"]["confusion"] == [[0, 1, 0], [0, 2, 0], [0, 0, 0]]


def test_it_may_only_report(canned):
    context, cases = canned
    assert {finding.verdict for finding in judge(context, cases, verdict="accept")} == {"accept"}
    assert judge(context, []) == [] and context.reports["judge"]["agreement"] is None
    with pytest.raises(ConfigError, match="verdict-unknown"):
        judge(context, cases, verdict="doubt")
