"""Noise, another modality and wrong labels among good drawn discs: each is caught by the check that is for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.io.raster import read_unit_png, write_unit_png
from medaug.quality.checks import pseudo_label
from medaug.quality.context import GateContext
from medaug.quality.feature_cache import FeatureCache
from medaug.quality.outlier_checks import outliers, real_fake
from medaug.training.classifier import ClassifierRecipe

RECIPE = ClassifierRecipe(num_steps=120, batch_size=16, learning_rate=3e-3, evaluate_every=60)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, make_cohort: Callable[..., Cohort]) -> tuple[GateContext, dict[str, list[Case]]]:
    root = tmp_path_factory.mktemp("scene")
    real = make_cohort(root / "real", per_class=60, cases_per_group=1)
    others = make_cohort(root / "others", per_class=15, seed=1)
    context = GateContext(real, replace(others, root=root), root / "filter", 0.6, RECIPE, cache=FeatureCache(root / "features"))
    made: dict[str, list[Case]] = {"good": [], "noise": [], "modality": [], "label": []}

    def add(kind: str, image: np.ndarray, case: Case, label: int) -> None:
        name = f"{kind}{len(made[kind])}"
        write_unit_png(root / f"{name}.png", np.ascontiguousarray(image.clip(0, 1), dtype=np.float32))
        made[kind].append(replace(case, id=name, image=f"{name}.png", label=label, lineage={}))

    for index, case in enumerate(others.cases()):
        image = read_unit_png(others.path(case))
        add("good", image, case, case.label)
        if index % 3 == 0:
            add("noise", numpy_generator("noise", index).random((16, 16)), case, case.label)
            add("modality", 1 - image, case, case.label)  # dark on bright
            add("label", image, case, (case.label + 2) % 3)
    return context, made


def test_noise_and_another_modality_are_strangers(scene):
    context, made = scene
    methods, space = ["mahalanobis", "knn"], "random_conv"
    cases = [*made["good"], *made["noise"], *made["modality"]]
    held = [finding.verdict != "accept" for finding in outliers(context, cases, methods=methods, space=space)]
    good, strange = held[: len(made["good"])], held[len(made["good"]) :]
    assert np.mean(strange) > 0.95 and np.mean(good) < 0.25
    report = context.reports["outliers"]
    assert set(report) == set(methods) and all(row["n"] == len(cases) and row["n_validation"] == 36 for row in report.values())


def test_energy_and_task_features_use_the_filter(scene):
    context, made = scene
    findings = outliers(context, made["good"][:9], methods=["energy", "mahalanobis"], space="task")
    assert set(findings[0].lineage["outlier_scores"]) == {"energy", "mahalanobis"}
    computed = context.cache.computed
    outliers(context, made["good"][:9], methods=["energy", "mahalanobis"], space="task", pass_share=0.9)
    assert context.cache.computed == computed  # another threshold needs no features


def test_wrong_labels_are_for_the_filter(scene):
    context, made = scene
    wrong = pseudo_label(context, made["label"])
    right = pseudo_label(context, made["good"])
    assert np.mean([finding.verdict == "reject" for finding in wrong]) > 0.9
    assert np.mean([finding.verdict == "accept" for finding in right]) > 0.6


def test_a_classifier_knows_noise_from_discs(scene):
    context, made = scene
    noise = real_fake(context, made["noise"])
    assert context.reports["real_fake"]["auc"] > 0.95 and all(finding.verdict == "quarantine" for finding in noise)
    real_fake(context, made["good"])
    assert context.reports["real_fake"]["low"] < 0.75


def test_wrong_settings_are_refused(scene):
    context, made = scene
    for options in ({"methods": ["odd"]}, {"methods": []}, {"methods": "knn"}):
        with pytest.raises(ConfigError, match="energy, mahalanobis, knn, vos"):
            outliers(context, made["good"], **options)
    with pytest.raises(ConfigError, match="accept, quarantine, reject"):
        outliers(context, made["good"], verdict="maybe")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        real_fake(context, made["good"], pass_share=1.5)
    bare = GateContext(replace(context.cohort, validation=()), context.synthetic, Path(), 0.5)
    with pytest.raises(DataError, match="got 0; leave this check out"):
        outliers(bare, made["good"])
