"""An experiment file becomes a table: what rows share, what they may change, and one small one run to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medaug import assets, experiment
from medaug.cohort import Cohort, read_cohort
from medaug.errors import ConfigError
from medaug.grading.cells_figure import cells_figure, cells_png

SHARED: dict[str, Any] = {
    "bundle": "guided_ddpm",
    "training": {"batch_size": 4, "max_epochs": 1, "epoch_length": 2, "preview_every": 0, "device_name": "cpu"},
    "generating": {"counts": [2, 2, 2], "device_name": "cpu", "generation_batch_size": 2},
    "gate": {"checks": ["usable"]},
}
ROWS = [
    {"name": "still", "generating": {"sampler_settings": {"num_inference_steps": 2, "bottleneck_scale": 0.0}}},
    {"name": "shaken", "generating": {"sampler_settings": {"num_inference_steps": 2, "bottleneck_scale": 0.5}}},
]


def write(folder: Path, **content: object) -> str:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_row_is_the_shared_settings_with_its_own_laid_over(tmp_path: Path) -> None:
    row = {"name": "long", "training": {"max_epochs": 9}}
    read = experiment.read_experiment(write(tmp_path, shared=SHARED, rows=[{"name": "short"}, row], title="Lengths"))
    short, long = read.rows
    assert (short.training["max_epochs"], long.training["max_epochs"]) == (1, 9)
    assert long.training["batch_size"] == 4
    assert long.bundle == "guided_ddpm"
    assert short.run_name() != long.run_name()
    assert read.arms[0] == "none"


def test_rows_that_train_alike_share_a_run(tmp_path: Path) -> None:
    read = experiment.read_experiment(write(tmp_path, shared=SHARED, rows=ROWS))
    assert len({row.run_name() for row in read.rows}) == 1


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"rows": []}, "experiment-empty"),
        ({"rows": [{"name": "a"}]}, "experiment-rows"),
        ({"rows": [{"name": "a", "bundle": "x"}, {"name": "a", "bundle": "x"}]}, "experiment-rows"),
        ({"rows": [{"name": "a", "bundle": "x", "lr": 1}]}, "config-key-unknown"),
        ({"rows": ["a"]}, "config-key-unknown"),
        ({"rows": [{"name": "a", "bundle": "x"}], "grading": {"epochs": 1}}, "config-key-unknown"),
        ({"rows": [{"name": "syn1", "bundle": "x"}], "cells": ["orig75"]}, "preset-unknown"),
        ({"rows": [{"name": "syn1", "bundle": "x"}], "cells": ["orig+syn2"]}, "source-missing"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, content: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment.read_experiment(write(tmp_path, **content))
    assert caught.value.code == code


@pytest.mark.parametrize("name", assets.list_experiments())
def test_shipped_experiments_can_be_read(name: str) -> None:
    read = experiment.read_experiment(name)
    assert read.title
    for row in read.rows:
        assets.bundle_root(row.bundle)


def test_the_table_takes_its_figures_from_the_rows() -> None:
    rows = [
        {"arm": arm, "network": "n", "seed": seed, "balanced_accuracy": value}
        for arm, values in {"none": (0.5, 0.7), "a": (0.7, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    verdict = {
        "a": {"metric": "balanced_accuracy", "verdict": "helps", "against_none": {"difference": 0.2, "low": 0.1, "high": 0.3}}
    }
    none, a = experiment.table_lines(rows, verdict, {"a": {"generated": 9, "accepted": 6, "label_agreement": 1.0}})
    assert none["score"] == pytest.approx(0.6)
    assert (a["score"], a["spread"]) == (pytest.approx(0.8), pytest.approx(0.1))
    lines = experiment.table_lines(rows, verdict, {"a": {"accepted": 6}, "b": {"generated": 9, "accepted": 0}})
    assert (lines[-1]["arm"], lines[-1]["accepted"], lines[-1]["score"]) == ("b", 0, None)
    assert "| b | 9 | 0 |  |  |  |  |  |" in experiment.markdown("Title", lines)
    text = experiment.markdown("Title", [none, a])
    assert "| a | 9 | 6 | 1.000 | 0.800 ± 0.100 | +0.200 | +0.100 to +0.300 | helps |" in text


def test_rows_of_cells_are_sources_and_all_real_images_are_the_baseline(tmp_path: Path) -> None:
    rows = [{"name": name, "generating": {"seed": seed}} for seed, name in enumerate(("syn1", "syn2"))]
    read = experiment.read_experiment(write(tmp_path, shared=SHARED, rows=rows, cells=["orig100", "syn1", "orig50+rot"]))
    specs, sources = read.arm_specs(Path("accepted"), {})
    assert specs == ["none", "oversample", "syn1", "orig50+rot"]
    assert sources == ["syn1=accepted/syn1", "syn2=accepted/syn2"]
    assert len({row.run_name() for row in read.rows}) == 1


def test_the_picture_of_the_cells_shows_every_run() -> None:
    scores = {("orig100", "n", 0): 0.5, ("orig100", "n", 1): 0.7, ("syn1", "n", 0): 0.2, ("syn1", "m", 0): None}
    rows = [{"arm": a, "network": n, "seed": s, "accuracy": value} for (a, n, s), value in scores.items()]
    (axis,) = cells_figure(rows, ["orig100", "syn1"], "accuracy").axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in dots] == [[0.5, 0.7], [0.2]]
    means = [float(line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "_"]
    assert means == [pytest.approx(0.6), pytest.approx(0.2)]
    assert cells_png(rows, ["orig100", "syn1"], "accuracy") == cells_png(rows, ["orig100", "syn1"], "accuracy")


@pytest.mark.slow
@pytest.mark.integration
def test_a_mixing_matrix_runs_to_a_picture(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    make_cohort(tmp_path / "cohort", size=16, per_class=15)
    grading = {"networks": ["simple_cnn"], "seeds": 1, "profile": "tiny"}
    shared = {
        **SHARED,
        # Long enough for images that show something: the gate turns away flat ones.
        "training": {**SHARED["training"], "batch_size": 8, "max_epochs": 4, "epoch_length": 30},
        "generating": {"counts": [10, 10, 10], "device_name": "cpu", "sampler_settings": {"num_inference_steps": 6}},
    }
    rows = [{"name": name, "generating": {"seed": seed}} for seed, name in enumerate(("syn1", "syn2"))]
    cells = ["orig100", "orig+syn1+syn2", "orig50+syn2_50", "syn1", "orig50+vflip"]
    file = write(tmp_path, shared=shared, rows=rows, cells=cells, title="Mix", profile="tiny", arms=["none"], grading=grading)
    result = experiment.run_experiment(file, tmp_path / "cohort", tmp_path / "out")
    assert [line["arm"] for line in result["table"]] == cells
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")  # the file is table.yaml
    assert {row["num_steps"] for row in result["rows"]} == {30}
    sizes = {row["arm"]: row["num_training"] for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    real = len(read_cohort(tmp_path / "cohort").training)
    half = sizes["orig50+vflip"] // 2
    assert sizes == dict(zip(cells, [real, 3 * real, real, real, 2 * half], strict=True))


@pytest.mark.slow
@pytest.mark.integration
def test_an_experiment_runs_to_a_table_and_again_without_work(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    make_cohort(tmp_path / "cohort", size=16, per_class=15)
    grading = {"networks": ["simple_cnn"], "seeds": 1, "profile": "tiny"}
    file = write(tmp_path, shared=SHARED, rows=ROWS, title="Noise", profile="tiny", grading=grading)
    first = experiment.run_experiment(file, tmp_path / "cohort", tmp_path / "out")
    assert [line["arm"] for line in first["table"]] == ["none", "oversample", "still", "shaken"]
    assert [line["generated"] for line in first["table"]] == [None, None, 6, 6]
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "benchmark" / "rows").iterdir()}
    assert experiment.run_experiment(file, tmp_path / "cohort", tmp_path / "out")["table"] == first["table"]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "benchmark" / "rows").iterdir()}
    assert "| shaken |" in (tmp_path / "out" / "table.md").read_text()
