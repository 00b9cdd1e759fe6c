from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import BACKBONE

from medaug import assets
from medaug.cohort import Cohort
from medaug.workflow import STAGES, read_yaml

BUNDLE = assets.bundle_root("guided_ddpm")
PROFILES = assets.list_profiles()


def files(stage: str, profile: str | None) -> list[str]:
    overlay = [] if profile is None else [str(assets.profile_path(profile))]
    return [str(BUNDLE / "configs" / STAGES[stage]), *overlay]


def test_train_yaml_holds_the_papers_values() -> None:
    config = read_yaml(BUNDLE / "configs" / "train.yaml")
    assert (config["batch_size"], config["max_epochs"], config["learning_rate"], config["label_loss_weight"]) == (
        8,
        200,
        1e-4,
        0.1,
    )
    assert (config["reference"], config["bottleneck_noise_train"], config["condition_dropout"]) == ("self", 0.0, 0.0)
    assert config["network_settings"]["backbone_options"]["channels"] == [128, 128, 256, 256, 512, 512]
    assert config["diffusion_settings"] == {
        "parameterisation": "epsilon",
        "schedule": "linear_beta",
        "num_train_timesteps": 1000,
        "weighting": None,
    }


def test_inference_yaml_holds_the_papers_values() -> None:
    assert read_yaml(BUNDLE / "configs" / "inference.yaml")["synthetic_per_real"] == 2.5
    config = read_yaml(BUNDLE / "configs" / "train.yaml")
    assert (config["sampler_settings"]["step"], config["sampler_settings"]["num_inference_steps"]) == ("ancestral", 1000)


@pytest.mark.parametrize("name", sorted(path.name for path in (BUNDLE / "configs").glob("*.yaml")))
def test_bundle_holds_no_python_and_no_path_of_ours(name: str) -> None:
    text = (BUNDLE / "configs" / name).read_text()
    assert "lambda " not in text.replace("# lambda of", "").replace("lambda 0.1", "") and "/root" not in text
    assert not list(BUNDLE.rglob("*.py"))


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_training_has_every_property_monai_asks_for(
    make_cohort: Callable[..., Cohort], tmp_path: Path, profile: str | None
) -> None:
    from monai.bundle import ConfigWorkflow

    make_cohort(tmp_path / "cohort")
    small = {} if profile else {"network_settings#backbone": "lean", "network_settings#backbone_options": BACKBONE}
    workflow = ConfigWorkflow(
        config_file=files("training", profile),
        workflow_type="train",
        run_id="training",
        init_id=None,
        final_id=None,
        logging_file=str(BUNDLE / "configs" / "logging.conf"),
        dataset_dir=str(tmp_path / "cohort"),
        output_dir=str(tmp_path / "run"),
        **small,
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert workflow.dataset_dir == str(tmp_path / "cohort")
    assert (
        len(workflow.train_dataset) > 0 and workflow.max_epochs == read_yaml(Path(files("training", profile)[-1]))["max_epochs"]
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("profile", [None, "tiny"])
def test_inference_has_every_property_monai_asks_for(
    make_cohort: Callable[..., Cohort], tmp_path: Path, profile: str | None
) -> None:
    from monai.bundle import ConfigWorkflow
    from tiny_run import NO_REFERENCE, train

    cohort = make_cohort(tmp_path / "cohort")
    train(cohort, tmp_path / "run", max_epochs=1, more=NO_REFERENCE)
    workflow = ConfigWorkflow(
        config_file=files("generating", profile),
        workflow_type="infer",
        run_id="generating",
        init_id=None,
        final_id=None,
        logging_file=str(BUNDLE / "configs" / "logging.conf"),
        dataset_dir=str(tmp_path / "cohort"),
        run_dir=str(tmp_path / "run"),
        output_dir=str(tmp_path / "synthetic"),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert not workflow.network_def.training
    assert len(workflow.evaluator.data_loader) > 0


@pytest.mark.slow
@pytest.mark.integration
def test_monai_runs_the_bundle_from_another_folder(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    make_cohort(tmp_path / "cohort")
    arguments = {
        "config_file": str(files("training", "tiny")),
        "dataset_dir": "cohort",
        "output_dir": "run",
        "max_epochs": "1",
        "epoch_length": "2",
        "batch_size": "4",
        "network_settings#backbone_options": str(BACKBONE),
        "tracking#enabled": "False",
    }
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BUNDLE.parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["iterations"] == 2
    assert record["settings"]["network"]["backbone_options"] == BACKBONE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort", "run"]
