"""The pilot through the bundle's own stages; only what the sampler draws is a stand-in, to be as good or as bad as the test needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "generation"))
from random_run import World, new_run

from medaug import cli, pilot
from medaug.cohort import Case, Cohort, write_cohort
from medaug.draws import randn
from medaug.errors import ConfigError, LeakageError
from medaug.generation import generate as generation
from medaug.pilot import PilotOptions, run_pilot, wanted_counts
from medaug.training.data import read_case
from medaug.workflow import run_stage

PER_CLASS = 20
SETTINGS: dict[str, Any] = {
    "generation_batch_size": 8,
    "device_name": "cpu",
    "sampler_settings": {"step": "dpm_solver_pp_2m", "num_inference_steps": 2, "spacing": "karras", "sigma_min": 0.01},
    "augment#gate_threshold": 0.6,
    "augment#filter": {"num_steps": 120, "batch_size": 16, "evaluate_every": 60},
}
HASTY = SETTINGS | {"augment#filter": {"num_steps": 20, "batch_size": 16, "evaluate_every": 20}}  # where accuracy plays no part
CHECKS = ["acceptance", "outliers", "kid", "copies", "accuracy", "time", "disk"]


@pytest.fixture(scope="module")
def world(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pilot")
    return new_run(make_cohort(root / "cohort", per_class=90), root / "run")


@pytest.fixture(scope="module")
def others(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Discs that no cohort holds."""
    return make_cohort(tmp_path_factory.mktemp("others"), per_class=50, seed=1)


@pytest.fixture
def draws_discs(monkeypatch: pytest.MonkeyPatch, others: Cohort) -> None:
    """New discs of the intended class."""
    of_class = [[case for case in others.cases() if case.label == label] for label in range(3)]
    stand_in(monkeypatch, lambda case: read_case(others, of_class[case.label][case.number]))


@pytest.fixture
def draws_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda case: randn((1, 16, 16), "noise", case.id).clamp(-1, 1))


def stand_in(monkeypatch: pytest.MonkeyPatch, draw: Callable[[Any], torch.Tensor]) -> None:
    def sample(engine: Any, batch: Any) -> dict[str, Any]:
        return {"samples": torch.stack([draw(case) for case in batch["cases"]]), "cases": batch["cases"]}

    monkeypatch.setattr(generation, "sample_batch", sample)


def go(world: World, out: Path, per_class: int = PER_CLASS, settings: dict[str, Any] = HASTY) -> dict[str, Any]:
    assert world.cohort.root is not None
    return run_pilot("guided_ddpm", world.cohort.root, world.run, out, PilotOptions(per_class, 90), overrides=settings)


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in result["checks"]}


def test_new_discs_are_go_and_a_second_run_changes_nothing(
    world: World, tmp_path: Path, draws_discs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = go(world, tmp_path / "out", settings=SETTINGS)
    assert outcomes(result) == dict.fromkeys(CHECKS, "pass"), [check["sentence"] for check in result["checks"]]
    assert result["go"] and json.loads((tmp_path / "out" / "pilot.json").read_text()) == result
    assert [row["generated"] for row in result["acceptance"]] == [PER_CLASS] * 3
    assert [row["value"] for row in result["kid"][1:]] == [None] * 3  # 20 of a class are insufficient
    projection = result["projection"]
    assert projection["measured_images"] == projection["made"] == 3 * PER_CLASS
    assert projection["wanted"] == 90 and projection["generate"] >= 90 and projection["memory_bytes"] > 10**7
    assert projection["seconds"] == pytest.approx(projection["generate"] * projection["seconds_per_image"])
    assert result["accuracy"]["n"] == 3 * PER_CLASS and result["accuracy"]["n_validation"] == len(world.cohort.validation)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Go: no check fails." in page and page.count("data:image/png;base64") == 3

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(generation, "sample_batch", never)
    monkeypatch.setattr(pilot, "fit_classifier", never)
    again = go(world, tmp_path / "out", settings=SETTINGS)
    assert without_disk(again) == without_disk(result)


def without_disk(result: dict[str, Any]) -> dict[str, Any]:
    """The share of the free disk changes with what others write."""
    return result | {"checks": [check for check in result["checks"] if check["name"] != "disk"]}


def test_noise_is_no_go(world: World, tmp_path: Path, draws_noise: None) -> None:
    result = go(world, tmp_path / "out")
    found = outcomes(result)
    assert not result["go"]
    assert {found[name] for name in ("acceptance", "outliers", "kid")} == {"fail"}
    assert found["copies"] == "pass"
    assert "No-go: acceptance" in (tmp_path / "out" / "report.html").read_text()


def test_empty_images_leave_nothing_to_measure(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda case: torch.zeros(1, 16, 16))
    result = go(world, tmp_path / "out", per_class=2)
    expected = dict.fromkeys(CHECKS, "undefined") | {"acceptance": "fail"}
    assert outcomes(result) == expected and not result["go"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_killed_pilot_goes_on_and_the_full_generation_has_the_same_images(
    world: World, tmp_path: Path, draws_discs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = generation.sample_batch, []

    def killed(engine: Any, batch: Any) -> dict[str, Any]:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(engine, batch)

    monkeypatch.setattr(generation, "sample_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        go(world, tmp_path / "out", per_class=10)
    images = tmp_path / "out" / "synthetic" / "images"
    assert len(list(images.iterdir())) == 10  # batches of 8 and 2
    result = go(world, tmp_path / "out", per_class=10)
    assert len(calls) == 7 and 20 <= result["projection"]["measured_images"] <= 30
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(images.parent)}
    plain = {key: value for key, value in SETTINGS.items() if not key.startswith("augment#")}
    counts = {"counts": [12, 12, 12], "tracking": {"enabled": False}}
    run_stage("guided_ddpm", "generating", None, plain | paths | counts)
    after = {path.name: path.read_bytes() for path in images.iterdir()}
    assert len(after) == 36 and before.items() <= after.items()
    with pytest.raises(ConfigError, match="pilot-outgrown"):
        go(world, tmp_path / "out", per_class=10)
    assert len(list(images.iterdir())) == 36


def test_without_validation_the_comparisons_are_undefined_with_their_reasons(
    world: World, tmp_path: Path, draws_discs: None
) -> None:
    assert world.cohort.root is not None
    for case in (*world.cohort.training, *world.cohort.test):
        target = tmp_path / "cohort" / case.image
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(world.cohort.path(case).read_bytes())
    write_cohort(world.cohort.with_cases(validation=()), tmp_path / "cohort")
    options = PilotOptions(PER_CLASS, per_real=0.5)
    result = run_pilot("guided_ddpm", tmp_path / "cohort", world.run, tmp_path / "out", options, overrides=SETTINGS)
    found = {check["name"]: check for check in result["checks"]}
    assert [name for name in CHECKS if found[name]["outcome"] == "undefined"] == ["outliers", "kid", "accuracy"]
    assert "validation" in found["outliers"]["sentence"] and "held-out" in found["kid"]["sentence"]
    assert "validation" in found["accuracy"]["sentence"]
    assert result["projection"]["wanted"] == 81  # half of 162


def test_a_run_of_another_cohort_is_refused(world: World, make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    assert world.cohort.root is not None
    stranger = new_run(make_cohort(tmp_path / "more", per_class=120), tmp_path / "run")
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        run_pilot("guided_ddpm", world.cohort.root, stranger.run, tmp_path / "out", overrides=SETTINGS)
    fewer = make_cohort(tmp_path / "fewer", num_classes=2)
    with pytest.raises(ConfigError, match="class-mismatch"):
        run_pilot("guided_ddpm", tmp_path / "fewer", world.run, tmp_path / "out2", overrides=SETTINGS)
    assert fewer.root and not list((tmp_path / "out").rglob("*.png")) and not (tmp_path / "out" / "pilot.json").exists()


@pytest.mark.parametrize("options", [{"per_class": 0}, {"per_class": True}, {"wanted": 0}, {"wanted": 5, "per_real": 1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pilot-option|option-conflict"):
        PilotOptions(**options)


def test_what_is_wanted_comes_from_the_options_or_the_bundle() -> None:
    cases = [Case(f"c{i}", f"images/{i}.png", i % 4 // 3, f"g{i}", "0" * 64) for i in range(40)]  # 30 and 10
    cohort = Cohort("few", "", ("a", "b"), False, 16, training=tuple(cases))
    config = {"counts": None, "synthetic_per_real": 2.5, "allocation": "proportional", "fixed": None}
    assert wanted_counts(cohort, config, PilotOptions()) == [75, 25]
    assert wanted_counts(cohort, config, PilotOptions(per_real=1.0)) == [30, 10]
    assert wanted_counts(cohort, config, PilotOptions(wanted=100)) == [75, 25]
    assert wanted_counts(cohort, config | {"allocation": "balance"}, PilotOptions(wanted=30)) == [5, 25]
    fixed = config | {"allocation": "fixed", "fixed": {"b": 7}}
    assert wanted_counts(cohort, fixed, PilotOptions()) == [0, 7]
    assert wanted_counts(cohort, config | {"counts": [1, 2]}, PilotOptions()) == [1, 2]
    for given in (fixed, config | {"counts": [1, 2]}):
        with pytest.raises(ConfigError, match="option-conflict"):
            wanted_counts(cohort, given, PilotOptions(wanted=5))


@pytest.mark.parametrize(("outcome", "code"), [("pass", 0), ("undefined", 0), ("fail", 3)])
def test_the_exit_code_is_the_decision(
    outcome: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = {"name": "copies", "outcome": outcome, "value": 0.1, "limit": 0.05, "sentence": "Seen."}
    monkeypatch.setattr(pilot, "run_pilot", lambda *_, **__: {"go": outcome != "fail", "checks": [check]})
    command = ["medaug", "pilot", "guided_ddpm", "--cohort", "c", "--run", "r", "--out", "o"]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", command + more)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
        out = capsys.readouterr().out
        assert json.loads(out)["checks"] == [check] if more else ("No-go: copies." in out) is (code == 3)


def test_per_class_zero_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["medaug", "pilot", "guided_ddpm", "--cohort", "c", "--run", "r", "--out", "o", "--per-class", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "[pilot-option]" in capsys.readouterr().err
