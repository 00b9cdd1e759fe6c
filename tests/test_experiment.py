"""An experiment becomes a table: from its images to the picture, resumed without work, and small ones run to their end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from medaug import experiment, storage
from medaug.cohort import Cohort, read_cohort
from medaug.errors import ConfigError, StorageError
from medaug.grading.cells_figure import cells_figure, cells_png
from medaug.grading.options import GradingOptions
from medaug.grading.recipe import grading_recipe
from medaug.intake import build
from medaug.io.raster import write_unit_png
from medaug.results.page import write_page

SHARED: dict[str, Any] = {
    "bundle": "guided_ddpm",
    "training": {"batch_size": 4, "max_epochs": 1, "epoch_length": 2, "preview_every": 0, "device_name": "cpu"},
    "generating": {"counts": [2, 2, 2], "device_name": "cpu", "generation_batch_size": 2},
    "gate": {"checks": ["usable"]},
}
# Long enough for images that show something: the gate turns away flat ones.
LONGER = {**SHARED["training"], "batch_size": 8, "max_epochs": 4, "epoch_length": 30}
ROWS = [
    {"name": "still", "generating": {"sampler_settings": {"num_inference_steps": 2, "bottleneck_scale": 0.0}}},
    {"name": "shaken", "generating": {"sampler_settings": {"num_inference_steps": 2, "bottleneck_scale": 0.5}}},
]


def write(folder: Path, **content: object) -> str:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def draw_folder(root: Path, per_class: int = 15, size: int = 16) -> dict[str, Any]:
    """Bright squares on noise as <class>/*.png in the folder that $DRAWN names, and the section that takes them in."""
    noise = np.random.default_rng(0)
    for width, name in ((3, "small"), (6, "medium"), (9, "large")):
        for index in range(per_class):
            image = noise.uniform(0.0, 0.3, (size, size)).astype(np.float32)
            top, left = noise.integers(0, size - width, 2)
            image[top : top + width, left : left + width] += 0.5
            write_unit_png(root / "squares" / name / f"{index}.png", image)
    return {"source": "$DRAWN/squares", "ordinal": False, "image_size": size, "burned_in": "keep"}


def without_work(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Rows and grading only noted."""
    seen: dict[str, Any] = {"made": []}

    def make(_: Any, row: Any, *__: Any) -> dict[str, Any]:
        seen["made"].append(row.name)
        return {"generated": 2, "accepted": 2, "labelled": 0, "agreeing": 0, "unkept": 0}

    def grade(cohort: Path, out: Path, specs: list[str], options: GradingOptions, **place: Any) -> dict[str, Any]:
        seen.update(place, cohort=cohort, specs=specs, options=options)
        return {"rows": [{"arm": "none", "balanced_accuracy": 0.5}], "verdict": {}}

    monkeypatch.setattr(experiment, "_make", make)
    monkeypatch.setattr(experiment, "grade_arms", grade)
    return seen


def test_the_cohort_is_made_once_as_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, intake = without_work(monkeypatch), draw_folder(tmp_path / "private")
    monkeypatch.setenv("DRAWN", str(tmp_path / "private"))
    file = write(tmp_path, shared=SHARED, rows=ROWS, intake=intake)
    experiment.run_experiment(file, None, tmp_path / "out")
    cohort = read_cohort(seen["cohort"], verify=True)
    assert seen["cohort"] == tmp_path / "out" / "cohort" and not cohort.ordinal and len(cohort.cases()) == 45
    written = (tmp_path / "out" / "experiment.json").read_text()
    assert "private" not in written + seen["command"] and json.loads(written)["intake"]["source"] == "$DRAWN/squares"

    def again(*_: object) -> None:
        raise AssertionError("the cohort is made again")

    monkeypatch.setattr(build, "_take_in", again)
    experiment.run_experiment(file, None, tmp_path / "out", seed=7)  # the split is the file's, not the seed's
    (tmp_path / "out" / "cohort").rename(tmp_path / "other")
    experiment.run_experiment(file, tmp_path / "other", tmp_path / "out")
    assert seen["cohort"] == tmp_path / "other"
    (tmp_path / "other").rename(tmp_path / "out" / "cohort")
    with pytest.raises(StorageError, match="folder-not-empty"):
        experiment.run_experiment(
            write(tmp_path, shared=SHARED, rows=ROWS, intake=intake | {"image_size": 32}), None, tmp_path / "out"
        )


@pytest.mark.parametrize(("intake", "code"), [({"source": "$DRAWN/squares"}, "variable-unset"), (None, "cohort-missing")])
def test_without_images_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intake: dict[str, Any] | None, code: str
) -> None:
    monkeypatch.delenv("DRAWN", raising=False)
    content = {"shared": SHARED, "rows": ROWS} | ({} if intake is None else {"intake": intake})
    with pytest.raises(ConfigError, match=code):
        experiment.run_experiment(write(tmp_path, **content), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_file_freezes_reaches_the_grading_and_the_machine_stays_outside(
    make_cohort: Callable[..., Cohort], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "cohort")
    seen = without_work(monkeypatch)
    rows = [*ROWS, {**ROWS[1], "name": "shaken+amst", "trainer": "amst"}]
    frozen = {"synthetic_per_real": [1, 2], "allocation": "balance", "real_fraction": 0.5, "overrides": {"batch_size": 8}}
    file = write(tmp_path, shared=SHARED, rows=rows, grading={**frozen, "networks": "all"})
    experiment.run_experiment(file, tmp_path / "cohort", tmp_path / "out", executor="ray", workers=3)
    assert {name: getattr(seen["options"], name) for name in frozen} == frozen
    assert (seen["options"].networks, seen["executor"], seen["workers"]) == ("all", "ray", 3)
    assert seen["made"] == ["still", "shaken"]
    assert seen["specs"][-1] == f"shaken+amst={tmp_path / 'out' / 'accepted' / 'shaken'}:amst"


def test_rounds_of_feedback_may_cost_what_the_row_would_make_at_once(
    make_cohort: Callable[..., Cohort], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, seen = make_cohort(tmp_path / "cohort"), {}

    def feedback(*arguments: Any, **options: Any) -> dict[str, Any]:
        seen.update(options, arguments=arguments)
        return {"saving": {"generated": 21}, "accepted": None, "rounds": [{"accepted": 12, "kept": False}]}

    monkeypatch.setattr(experiment, "run_feedback", feedback)
    row = {
        "name": "rounds",
        "bundle": "guided_ddpm",
        "generating": {"synthetic_per_real": 1.5, "seed": 4},
        "feedback": {"rounds": 3},
    }
    read = experiment.read_experiment(write(tmp_path, rows=[row], profile="tiny"))
    facts = experiment._make_in_rounds(read, read.rows[0], tmp_path / "cohort", tmp_path / "run", tmp_path / "out", seed=10)
    assert facts == {"generated": 21, "accepted": 0, "labelled": 0, "agreeing": 0, "unkept": 12}
    folder, options = seen["arguments"][3:]
    assert folder == tmp_path / "out" / "feedback" / "rounds" and options.budget == round(1.5 * len(cohort.training))
    assert (options.checks, seen["seed"], seen["profile"]) == (("usable", "copies"), 14, "tiny")


def test_each_row_keeps_the_calibration_of_its_own_noise(
    make_cohort: Callable[..., Cohort], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "cohort")
    result = {"rows": [], "weak_distance": 0.1, "least_agreement": 0.9, "seed_images": 4, "judge_validation": {"n": 3}}

    def generate(_: Any, stage: str, profile: Any, overrides: Any, **__: Any) -> Cohort:
        scale = float(overrides["variation_settings#strength"])
        storage.write_json(Path(overrides["calibration_dir"]) / "calibration.json", result | {"scale": scale})
        return read_cohort(tmp_path / "cohort")

    monkeypatch.setattr(experiment, "run_training", lambda *_: None)
    monkeypatch.setattr(experiment, "run_stage", generate)
    monkeypatch.setattr(experiment, "gate_synthetic", lambda *_, **__: SimpleNamespace(accepted=read_cohort(tmp_path / "cohort")))
    rows = [
        {"name": name, "generating": {"calibrate": True, "variation_settings#strength": value}}
        for name, value in (("faint", 0.5), ("strong", 0.8))
    ]
    read = experiment.read_experiment(write(tmp_path, shared={"bundle": "bottleneck_perturbation"}, rows=rows, profile="tiny"))
    assert experiment._calibrations(read, tmp_path / "out") == {}
    for row in read.rows:
        experiment._make(read, row, tmp_path / "cohort", tmp_path / "out", 0, {})
    (faint, strong) = experiment._calibrations(read, tmp_path / "out")["calibrations"]
    assert (faint["row"], faint["scale"], strong["row"], strong["scale"]) == ("faint", 0.5, "strong", 0.8)
    plain = experiment.read_experiment(write(tmp_path, shared={"bundle": "bottleneck_perturbation"}, rows=[{"name": "faint"}]))
    assert experiment._calibrations(plain, tmp_path / "out") == {}  # what lies there is of an earlier file
    assert faint["judge"] == {"n": 3, "balanced_accuracy": None} and faint["seed_images"] == 4


def test_only_seeds_without_images_count_the_rounds_that_did_not_help() -> None:
    some = {"generated": 18, "accepted": 10, "labelled": 0, "agreeing": 0, "unkept": 8}
    none = some | {"accepted": 0, "unkept": 0}
    mixed = experiment._together({0: some, 1: none})
    assert (mixed["accepted"], mixed["seeds_without"], mixed["unkept"]) == (10, [1], 0)
    assert experiment._together({0: some, 1: none | {"unkept": 3}})["unkept"] == 3


def test_the_table_takes_its_figures_from_the_rows() -> None:
    rows = [
        {"arm": arm, "network": "n", "seed": seed, "balanced_accuracy": value}
        for arm, values in {"none": (0.5, 0.7), "a": (0.7, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    verdict = {
        "a": {"metric": "balanced_accuracy", "verdict": "helps", "against_none": {"difference": 0.2, "low": 0.1, "high": 0.3}}
    }
    of_a = {"generated": 9, "accepted": 6, "label_agreement": 1.0, "seeds_without": []}
    none, a = experiment.table_lines(rows, verdict, {"a": of_a})
    assert none["score"] == pytest.approx(0.6)
    assert (a["score"], a["spread"]) == (pytest.approx(0.8), pytest.approx(0.1))
    without = {
        "b": {"generated": 9, "accepted": 0, "seeds_without": [0]},
        "c": {"generated": 9, "accepted": 3, "seeds_without": [1, 2]},
        "d": {"generated": 9, "accepted": 0, "seeds_without": [0], "unkept": 8},
    }
    lines = experiment.table_lines(rows, verdict, {"a": of_a, **without})
    assert [(line["arm"], line["accepted"], line["score"]) for line in lines[-3:]] == [
        ("b", 0, None),
        ("c", 3, None),
        ("d", 0, None),
    ]
    assert "| b | 9 | 0 |  |  |  |  | not graded: no image was accepted |" in experiment.markdown("Title", lines)
    assert "| c | 9 | 3 |  |  |  |  | not graded: no image was accepted for seed 1, 2 |" in experiment.markdown("Title", lines)
    assert "| d | 9 | 0 |  |  |  |  | not graded: no round of feedback helped |" in experiment.markdown("Title", lines)
    ratios = [{**row, "arm": f"a@{ratio}"} for ratio in (1, 2) for row in rows if row["arm"] == "a"]
    assert [line["accepted"] for line in experiment.table_lines(ratios, {}, {"a": of_a})] == [6, 6]
    text = experiment.markdown("Title", [none, a])
    assert "| a | 9 | 6 | 1.000 | 0.800 ± 0.100 | +0.200 | +0.100 to +0.300 | helps |" in text


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
        "training": LONGER,
        "generating": {"counts": [10, 10, 10], "device_name": "cpu", "sampler_settings": {"num_inference_steps": 6}},
    }
    rows = [{"name": name, "generating": {"seed": seed}} for seed, name in enumerate(("syn1", "syn2"))]
    cells = ["orig100", "orig+syn1+syn2", "orig50+syn2_50", "syn1", "orig50+vflip"]
    file = write(tmp_path, shared=shared, rows=rows, cells=cells, title="Mix", profile="tiny", arms=["none"], grading=grading)
    result = experiment.run_experiment(file, tmp_path / "cohort", tmp_path / "out")
    assert [line["arm"] for line in result["table"]] == cells
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")  # the file is table.yaml
    assert {row["num_steps"] for row in result["rows"]} == {grading_recipe("tiny", "simple_cnn").num_steps}
    sizes = {row["arm"]: row["num_training"] for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    real = len(read_cohort(tmp_path / "cohort").training)
    half = sizes["orig50+vflip"] // 2
    assert sizes == dict(zip(cells, [real, 3 * real, real, real, 2 * half], strict=True))


@pytest.mark.slow
@pytest.mark.integration
def test_every_seed_may_have_a_generator_of_its_own(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    make_cohort(tmp_path / "cohort", size=16, per_class=15)
    grading = {"networks": ["simple_cnn"], "seeds": 2, "profile": "tiny"}
    generating = {"counts": [3, 3, 3], "device_name": "cpu", "sampler_settings": {"num_inference_steps": 6}}
    content = {"shared": {**SHARED, "training": LONGER, "generating": generating}, "rows": [{"name": "plain"}]}
    file = write(tmp_path, **content, title="Luck", profile="tiny", grading=grading, generator_per_seed=True)
    result = experiment.run_experiment(file, tmp_path / "cohort", tmp_path / "out", seed=3)
    places = [tmp_path / "out" / "generators" / seed / "accepted" / "plain" for seed in ("0", "1")]
    made = [read_cohort(place) for place in places]
    assert [{(case.lineage or {})["seed"] for case in one.training} for one in made] == [{3}, {1003}]
    assert len({(case.lineage or {})["weights_sha256"] for one in made for case in one.training}) == 2
    line = next(line for line in result["table"] if line["arm"] == "plain")
    assert (line["generated"], line["accepted"]) == (18, sum(len(one.training) for one in made))
    assert result["verdict"]["plain"]["image_sets"] == 2
    write_page(tmp_path / "out", tmp_path / "page")
    assert "One set of images" not in (tmp_path / "page" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.integration
def test_an_experiment_runs_from_nothing_to_a_table_and_again_without_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake = draw_folder(tmp_path / "data")
    monkeypatch.setenv("DRAWN", str(tmp_path / "data"))
    grading = {"networks": ["simple_cnn"], "seeds": 1, "profile": "tiny"}
    few = {"counts": None, "synthetic_per_real": 0.2}
    shared = {**SHARED, "training": LONGER, "generating": {"counts": [2, 2, 2], "sampler_settings": {"num_inference_steps": 6}}}
    rounds = {"rounds": 2, "seeds": 1, "grading_profile": "tiny", "one_shot": False}
    rows: list[dict[str, Any]] = [{"name": "plain"}, {"name": "relabelled", "trainer": "amst-seed_label"}]
    rows += [{"name": "rounds", "generating": few, "feedback": rounds}]
    file = write(tmp_path, intake=intake, shared=shared, rows=rows, title="Noise", profile="tiny", grading=grading)
    first = experiment.run_experiment(file, None, tmp_path / "out")
    lines = {line["arm"]: line for line in first["table"]}
    assert set(lines) == {"none", "oversample", "plain", "relabelled", "rounds", "weak_view"}
    assert [lines[name]["generated"] for name in ("none", "plain", "relabelled")] == [None, 6, 6]
    assert 0 < lines["rounds"]["generated"] <= round(0.2 * len(read_cohort(tmp_path / "out" / "cohort").training))
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert [path.name for path in (tmp_path / "out" / "synthetic").iterdir()] == ["plain"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "benchmark" / "rows").iterdir()}
    assert experiment.run_experiment(file, None, tmp_path / "out")["table"] == first["table"]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "benchmark" / "rows").iterdir()}
    assert "| relabelled | 6 |" in (tmp_path / "out" / "table.md").read_text()
