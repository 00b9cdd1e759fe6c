from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from medaug import __version__, cli, stages, workflow
from medaug.errors import ConfigError, DataError, LeakageError, MedaugError, MissingDependencyError, StorageError


@pytest.fixture(autouse=True)
def _keep_sigterm() -> Any:
    old = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, old)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `medaug ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["medaug", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return 0 if stop.code is None else int(stop.code)
    return 0


def stage(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[tuple[Any, ...]]:
    """Put `outcome` (raised if an exception) in place of `run_stage`; returns the calls."""
    calls: list[tuple[Any, ...]] = []

    def fake(*arguments: Any) -> Any:
        calls.append(arguments)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(workflow, "run_stage", fake)
    return calls


TRAIN = ("train", "guided_ddpm", "--cohort", "c", "--out", "runs/r")
RECORD = types.SimpleNamespace(iterations=7, weights_sha256="ab" * 32, config_sha256="cd" * 32)


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [(ConfigError, 2), (MissingDependencyError, 2), (DataError, 3), (LeakageError, 4), (StorageError, 5), (MedaugError, 1)],
)
def test_each_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[MedaugError], exit_code: int
) -> None:
    stage(monkeypatch, kind("some-code", "One sentence."))
    assert run(monkeypatch, *TRAIN) == exit_code
    out, err = capsys.readouterr()
    assert err == "medaug: [some-code] One sentence.\n"
    assert out == ""


def test_ctrl_c_is_130_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stage(monkeypatch, KeyboardInterrupt())
    assert run(monkeypatch, *TRAIN) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_sigterm_is_like_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not raised")

    monkeypatch.setattr(workflow, "run_stage", fake)
    assert run(monkeypatch, *TRAIN) == 130


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("nothing",),
        ("train", "guided_ddpm", "--cohort", "c", "--out", "r", "--nothing"),
        (*TRAIN, "--seed", "-1"),
        (*TRAIN, "--seed", "x"),
        (*TRAIN, "--set", "a"),
        ("generate", "guided_ddpm", "--cohort", "c", "--run", "r", "--out", "s", "--counts", "1,x"),
        ("generate", "guided_ddpm", "--cohort", "c", "--run", "r", "--out", "s", "--counts", "1.5,2"),
        ("generate", "guided_ddpm", "--cohort", "c", "--out", "s"),
        ("intake", "folder", "--out", "c", "--split", "0.5,0.5"),
        ("intake", "folder", "--out", "c", "--window", "low,high"),
    ],
)
def test_wrong_usage_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    stage(monkeypatch, RECORD)
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert err and "Traceback" not in err
    assert out == ""


def test_train_hands_its_options_to_the_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stage(monkeypatch, RECORD)
    assert (
        run(
            monkeypatch,
            *TRAIN,
            "--profile",
            "tiny",
            "--seed",
            "3",
            "--set",
            "batch_size=4",
            "--set",
            "learning_rate=1e-4",
            "--json",
        )
        == 0
    )
    ((bundle, name, profile, overrides),) = calls
    assert (bundle, name, profile) == ("guided_ddpm", "training", "tiny")
    assert overrides["dataset_dir"] == "c"
    assert overrides["output_dir"] == "runs/r"
    assert (overrides["seed"], overrides["batch_size"], overrides["learning_rate"]) == (3, 4, 1e-4)
    assert json.loads(capsys.readouterr().out) == {
        "out": "r",
        "iterations": 7,
        "weights_sha256": "ab" * 32,
        "config_sha256": "cd" * 32,
    }


def test_generate_hands_its_options_to_the_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = types.SimpleNamespace(classes=("a", "b"), class_counts=lambda split: [1, 2], training=(1, 2, 3), content_sha256="ef")
    calls = stage(monkeypatch, made)
    options = ("--cohort", "c", "--run", "r", "--out", "s", "--counts", "1,2", "--allocation", "balance", "--per-real", "1.5")
    assert run(monkeypatch, "generate", "guided_ddpm", *options, "--json") == 0
    overrides = calls[0][3]
    assert (overrides["counts"], overrides["allocation"], overrides["synthetic_per_real"]) == ([1, 2], "balance", 1.5)
    assert json.loads(capsys.readouterr().out)["per_class"] == {"a": 1, "b": 2}


def test_labels_hands_its_options_to_the_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    part = {"issues": 3, "n": 40, "agreement": 0.875}
    monkeypatch.setattr(
        stages, "check_labels", lambda *args, **options: calls.append((args, options)) or {"parts": {"training": part}}
    )
    arguments = ("--folds", "4", "--network", "resnet18", "--profile", "tiny", "--seed", "2", "--synthetic", "s")
    assert run(monkeypatch, "labels", "c", "--out", "o", *arguments) == 0
    options = {"network": "resnet18", "folds": 4, "synthetic": Path("s"), "profile": "tiny", "seed": 2}
    assert calls == [((Path("c"), Path("o")), options)]
    assert "training: 3 of 40 labels look wrong; networks agree with 88%" in capsys.readouterr().out


def test_overlays_reach_the_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = types.SimpleNamespace(classes=("a", "b"), class_counts=lambda split: [1, 2], training=(1, 2, 3), content_sha256="ef")
    row = {"scale": 2.0, "entropy": 0.5, "agreement": 0.9, "change": 0.1}
    calls: list[tuple[str, str, dict[str, Any], str | None]] = []

    def fake(bundle: str, name: str, profile: str | None, overrides: dict[str, Any], overlay: str | None = None) -> Any:
        calls.append((bundle, name, overrides, overlay))
        return RECORD if name == "training" else {"rows": [row]} if "sweep_dir" in overrides else made

    monkeypatch.setattr(workflow, "run_stage", fake)
    train = ("train", "uncertainty_guidance", "--cohort", "c", "--out", "r")
    work = ("uncertainty_guidance", "--overlay", "disturbance", "--cohort", "c", "--run", "r", "--out", "s")
    assert run(monkeypatch, *train) == 0
    assert run(monkeypatch, *train, "--overlay", "classifier") == 0
    assert run(monkeypatch, "generate", *work) == 0
    assert run(monkeypatch, "sweep", *work, "--scales", "0,2") == 0
    assert [(name, overlay) for _, name, _, overlay in calls] == [
        ("training", None),
        ("training", "classifier"),
        ("training", "classifier"),
        ("generating", "disturbance"),
        ("generating", "disturbance"),
    ]
    assert [call[2]["output_dir"] for call in calls[:3]] == ["r", "r/classifier", "r"]
    assert calls[-1][2]["sweep_settings#scales"] == [0.0, 2.0]
    assert "scale 2: entropy 0.500" in capsys.readouterr().out
    assert run(monkeypatch, "sweep", "sdedit", "--cohort", "c", "--run", "r") == 2


def test_missing_cohort_is_3_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", "guided_ddpm", "--cohort", "nowhere", "--out", "r", "--profile", "tiny") == 3
    err = capsys.readouterr().err
    assert "[cohort-missing] nowhere" in err and "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_version_and_bundles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert run(monkeypatch, "bundles", "--json") == 0
    assert "guided_ddpm" in json.loads(capsys.readouterr().out)["bundles"]
    assert run(monkeypatch, "bundles", "copy", "guided_ddpm", str(tmp_path / "mine")) == 0
    assert (tmp_path / "mine" / "configs" / "train.yaml").is_file()
    assert run(monkeypatch, "bundles", "copy", "guided_ddpm", str(tmp_path / "mine")) == 2


@pytest.mark.parametrize(
    "command",
    [
        "intake",
        "train",
        "generate",
        "gate",
        "grade",
        "augment",
        "pilot",
        "import",
        "quickstart",
        "bundles",
        "evidence",
        "labels",
        "replay",
    ],
)
def test_every_command_has_help_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert f"Example: medaug {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "monai", "timm", "mlflow", "matplotlib", "pandas", "sklearn", "torchvision", "scipy")
    script = (
        "import sys; sys.argv = ['medaug', '--help']\n"
        "from medaug.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"sys.stderr.write(','.join(n for n in {heavy!r} if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    assert "quickstart" in done.stdout
