"""An experiment's file: what rows share and change, what one file takes over from another, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medaug import assets
from medaug.errors import ConfigError
from medaug.experiment_checks import check_experiment
from medaug.experiment_file import read_experiment

SHARED: dict[str, Any] = {"bundle": "guided_ddpm", "training": {"batch_size": 4, "max_epochs": 1}, "gate": {"checks": ["usable"]}}
ROWS = [
    {"name": "still", "generating": {"sampler_settings": {"bottleneck_scale": 0.0}}},
    {"name": "shaken", "generating": {"sampler_settings": {"bottleneck_scale": 0.5}}},
]


def write(folder: Path, file: str = "table.yaml", **content: object) -> str:
    path = folder / file
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_row_is_the_shared_settings_with_its_own_laid_over(tmp_path: Path) -> None:
    row = {"name": "long", "training": {"max_epochs": 9}}
    read = read_experiment(write(tmp_path, shared=SHARED, rows=[{"name": "short"}, row], title="Lengths"))
    short, long = read.rows
    assert (short.training["max_epochs"], long.training["max_epochs"]) == (1, 9)
    assert long.training["batch_size"] == 4
    assert long.bundle == "guided_ddpm"
    assert short.run_name() != long.run_name()
    assert read.arms[0] == "none"


def test_rows_that_train_alike_share_a_run(tmp_path: Path) -> None:
    read = read_experiment(write(tmp_path, shared=SHARED, rows=ROWS))
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
        ({"rows": [{"name": "a", "bundle": "x"}], "grading": {"overrides": {"epochs": 1}}}, "recipe-unknown-key"),
        ({"rows": [{"name": "a", "bundle": "x"}], "grading": {"executor": "ray"}}, "config-key-unknown"),
        ({"rows": [{"name": "a", "bundle": "x"}], "intake": {"source": "x", "out": "y"}}, "config-key-unknown"),
        ({"rows": [{"name": "a", "bundle": "x", "gate": {"check": []}}]}, "config-key-unknown"),
        ({"rows": [{"name": "a", "bundle": "x", "gate": ["usable"]}]}, "config-value"),
        ({"rows": [{"name": "a", "bundle": "x", "gate": {"checks": ["usuable"]}}]}, "check-unknown"),
        ({"rows": [{"name": "a", "bundle": "x", "trainer": "amts"}]}, "amst-unknown"),
        ({"rows": [{"name": "a", "bundle": "x"}], "arms": ["cutmixx"]}, "arm-unknown"),
        ({"rows": [{"name": "a", "bundle": "x", "feedback": {}}]}, "feedback-option"),
        ({"rows": [{"name": "a", "bundle": "x", "feedback": {"rounds": 2, "budget": 9}}]}, "config-key-unknown"),
        ({"rows": [{"name": "a", "bundle": "x", "feedback": {"rounds": 2}, "gate": {"label": "amst"}}]}, "feedback-option"),
        ({"rows": [{"name": "syn1", "bundle": "x"}], "cells": ["orig75"]}, "preset-unknown"),
        ({"rows": [{"name": "a", "bundle": "x"}], "generator_per_seed": "yes"}, "config-value"),
        ({"rows": [{"name": "syn1", "bundle": "x"}], "cells": ["orig+syn2"]}, "source-missing"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, content: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_experiment(write(tmp_path, **content))
    assert caught.value.code == code


@pytest.mark.parametrize("name", assets.list_experiments())
def test_shipped_experiments_are_complete(name: str) -> None:
    read = read_experiment(name)
    assert read.title and read.intake is not None and read.intake["source"].startswith("$MEDAUG_DATA/")
    check_experiment(read)


def test_rows_of_cells_are_sources_and_all_real_images_are_the_baseline(tmp_path: Path) -> None:
    rows = [{"name": name, "generating": {"seed": seed}} for seed, name in enumerate(("syn1", "syn2"))]
    read = read_experiment(write(tmp_path, shared=SHARED, rows=rows, cells=["orig100", "syn1", "orig50+rot"]))
    specs, sources = read.arm_specs(Path("out"), {})
    assert specs == ["none", "oversample", "syn1", "orig50+rot"]
    assert sources == ["syn1=out/accepted/syn1", "syn2=out/accepted/syn2"]
    assert len({row.run_name() for row in read.rows}) == 1


def test_rows_that_differ_in_the_trainer_alone_use_the_same_images(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        {**ROWS[1], "name": "shaken+amst", "trainer": "amst"},
        {**ROWS[1], "name": "unfiltered", "gate": {"checks": []}},
    ]
    read = read_experiment(write(tmp_path, shared=SHARED, rows=rows))
    assert [read.maker(row).name for row in read.rows] == ["still", "shaken", "shaken", "unfiltered"]
    facts = {row.name: {"seeds_without": [0] if row.name == "still" else []} for row in read.rows}
    assert read.arm_specs(Path("out"), facts)[0] == [
        "none",
        "oversample",
        "shaken=out/accepted/shaken",
        "shaken+amst=out/accepted/shaken:amst",
        "unfiltered=out/accepted/unfiltered",
    ]


def test_every_seed_of_the_graders_may_have_images_of_its_own(tmp_path: Path) -> None:
    shared = {**SHARED, "gate": {"checks": ["usable", "copies"]}}
    rounds = {"name": "rounds", "feedback": {"rounds": 3, "seeds": 1, "one_shot": False}}
    read = read_experiment(
        write(tmp_path, shared=shared, rows=[{"name": "plain"}, rounds], grading={"seeds": [2, 5]}, generator_per_seed=True)
    )
    assert read.places(Path("out")) == {2: Path("out/generators/2"), 5: Path("out/generators/5")}
    specs, _ = read.arm_specs(Path("out"), {"plain": {"seeds_without": []}, "rounds": {"seeds_without": []}})
    assert specs[-2:] == ["plain=out/generators/{seed}/accepted/plain", "rounds=out/generators/{seed}/feedback/rounds/accepted"]
    specs, _ = read.arm_specs(Path("out"), {"plain": {"seeds_without": [5]}, "rounds": {"seeds_without": []}})
    assert [spec.partition("=")[0] for spec in specs] == ["none", "oversample", "rounds"]


def test_the_images_of_rounds_are_those_that_feedback_kept(tmp_path: Path) -> None:
    shared = {**SHARED, "gate": {"checks": ["usable", "copies"]}}
    rows = [{"name": "rounds", "feedback": {"rounds": 3, "seeds": 1, "one_shot": False}}]
    read = read_experiment(write(tmp_path, shared=shared, rows=rows))
    assert read.arm_specs(Path("out"), {"rounds": {"seeds_without": []}})[0][-1] == "rounds=out/feedback/rounds/accepted"
    options = read.rows[0].feedback_options(100)
    assert (options.budget, options.per_round, options.checks, options.seeds) == (100, 34, ("usable", "copies"), 1)


def test_a_file_that_extends_another_lays_its_keys_over_it(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", name="first", title="Base", shared=SHARED, rows=ROWS, arms=["none"], grading={"seeds": 5})
    read = read_experiment(
        write(tmp_path, extends="base.yaml", title="Other", intake={"source": "$X"}, grading={"profile": "tiny"})
    )
    assert (read.name, read.title, read.intake) == ("table", "Other", {"source": "$X"})
    assert [row.name for row in read.rows] == ["still", "shaken"] and read.arms == ("none",)
    assert (read.grading["seeds"], read.grading["profile"]) == (3, "tiny")  # whole keys, nothing is merged
    leaking, plain = read_experiment(write(tmp_path, "leak.yaml", extends="guided_ddpm_ct")), read_experiment("guided_ddpm_ct")
    assert leaking.rows == plain.rows and leaking.intake == plain.intake


def test_only_a_file_that_stands_alone_is_extended(tmp_path: Path) -> None:
    write(tmp_path, "middle.yaml", extends="guided_ddpm_ct")
    with pytest.raises(ConfigError, match="experiment-extends"):
        read_experiment(write(tmp_path, extends="middle.yaml"))
    with pytest.raises(ConfigError, match="experiment-unknown"):
        read_experiment(write(tmp_path, extends="nowhere"))
