"""Stages as the commands call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from medaug.errors import ConfigError
from medaug.quality import gate
from medaug.quality.pseudo_label import default_recipe
from medaug.stages import gate_synthetic


def test_a_gate_without_checks_is_not_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "run_gate", lambda *_, checks, **__: checks)
    folders = Path("synthetic"), Path("cohort"), Path("out")
    assert gate_synthetic(*folders, checks=[]) == []  # run_gate adds "usable" to whatever it is given
    assert gate_synthetic(*folders) == list(gate.DEFAULT_CHECKS)


def test_another_network_confirms_labels_with_a_recipe_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "run_gate", lambda *_, network, recipe, **__: (network, recipe))
    folders = Path("synthetic"), Path("cohort"), Path("out")
    assert gate_synthetic(*folders) == ("simple_cnn", default_recipe())
    network, recipe = gate_synthetic(*folders, network="vit_small_patch16_224", filter_recipe={"num_steps": 7})
    assert network == "vit_small_patch16_224" and recipe.num_steps == 7
    assert (
        recipe.learning_rate == 3e-4 and recipe.policy == "weak" and recipe.class_balanced
    )  # a transformer's rate, a filter's images
    with pytest.raises(ConfigError, match="recipe-unknown-key"):
        gate_synthetic(*folders, network="resnet18", filter_recipe={"epochs": 7})
