"""Pages of what the stages write today: a small experiment, and a grading at several ratios."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medaug import storage
from medaug.cohort import Cohort
from medaug.results.page import write_page

SHARED: dict[str, Any] = {
    "bundle": "guided_ddpm",
    # Long enough for images that show something: the gate turns away flat ones.
    "training": {"batch_size": 8, "max_epochs": 4, "epoch_length": 30, "preview_every": 0, "device_name": "cpu"},
    "generating": {"counts": [2, 2, 2], "device_name": "cpu", "sampler_settings": {"num_inference_steps": 6}},
    "gate": {"checks": ["usable", "copies"]},
}
EXPERIMENT = {
    "title": "One row",
    "profile": "tiny",
    "arms": ["none"],
    "grading": {"networks": ["simple_cnn"], "seeds": 1, "profile": "tiny"},
    "shared": SHARED,
    "rows": [{"name": "still"}],
}


def same(first: Path, second: Path) -> bool:
    names = {path.name for folder in (first, second) for path in folder.iterdir()} - {storage.LOCK_NAME}
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.slow
@pytest.mark.integration
def test_an_experiment_becomes_a_page(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.experiment import run_experiment

    make_cohort(tmp_path / "cohort", size=16, per_class=15)
    file = tmp_path / "asking.yaml"
    file.write_text("# Does standing still matter?\n# Asked of discs.\n" + yaml.safe_dump(EXPERIMENT))
    result = run_experiment(str(file), tmp_path / "cohort", tmp_path / "out", profile="tiny")
    times = (tmp_path / "out" / "sessions.json").read_bytes()
    run_experiment(str(file), tmp_path / "cohort", tmp_path / "out", profile="tiny")
    assert (tmp_path / "out" / "sessions.json").read_bytes() == times  # nothing was left to do
    write_page(tmp_path / "out", tmp_path / "page", samples=True)
    text = (tmp_path / "page" / "README.md").read_text()
    assert text.startswith("# One row\n\n**Asked.** Does standing still matter? Asked of discs. Arms: none, still;")
    assert '    medaug experiment asking.yaml --cohort "$COHORT" --out runs/asking --profile tiny --seed 0\n' in text
    assert result["verdict"]["still"]["sentence"] in text
    accepted = next(line["accepted"] for line in result["table"] if line["arm"] == "still")
    assert f"| still | 6 | {accepted} | – |" in text
    assert "Time: images of still " in text and ", grading " in text and "tiny of the generators, tiny of the graders" in text
    assert str(tmp_path) not in (tmp_path / "page" / "experiment.json").read_text()
    write_page(tmp_path / "page", tmp_path / "again")
    assert same(tmp_path / "page", tmp_path / "again")


@pytest.mark.slow
def test_a_chosen_ratio_is_chosen_again_from_the_page(world: Path, tmp_path: Path) -> None:
    from medaug.grading.options import GradingOptions
    from medaug.stages import grade_arms

    quick = {"num_steps": 3, "evaluate_every": 1, "batch_size": 8}
    options = GradingOptions("simple_cnn", 1, "tiny", quick, synthetic_per_real=[0.25, 0.5], real_fraction=[0.5, 1.0])
    arms = ["none", "oversample", f"drawn={world / 'accepted'}"]
    result = grade_arms(world / "cohort", tmp_path / "bench", arms, options, workers=1)
    write_page(tmp_path / "bench", tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    for entry in result["verdict"].values():
        assert entry["sentence"] in text and "was chosen on validation among 0.25, 0.5" in entry["sentence"]
    assert "The ratio of synthetic to real images was chosen on validation." in text
    assert {"mixing.png", "learning.png", "curves.csv"} <= {path.name for path in (tmp_path / "page").iterdir()}
    assert (tmp_path / "page" / "curves.csv").read_bytes() == (tmp_path / "bench" / "curves.csv").read_bytes()
    write_page(tmp_path / "page", tmp_path / "again")
    assert same(tmp_path / "page", tmp_path / "again")
    arms = json.loads((tmp_path / "page" / "experiment.json").read_text())["grading"]["arms"]
    assert [arm["per_real"] for arm in arms if arm["base"] == "drawn"] == [0.25, 0.5, 0.25, 0.5]
