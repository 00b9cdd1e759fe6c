"""The guided DDPM at its smallest, through the bundle's own configs: 16 px, two levels of eight channels, no MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medaug.cohort import Cohort
from medaug.draws import numpy_generator
from medaug.training.run_folder import RunRecord

BACKBONE = {"channels": [8, 8], "patch": 2}
SETTINGS: dict[str, Any] = {
    "network_settings#backbone_options": BACKBONE,
    "batch_size": 4,
    "epoch_length": 2,
    "max_epochs": 3,
    "warmup_steps": 2,
    "preview_every": 0,
    "device_name": "cpu",
    "tracking": {"enabled": False},
}
NO_REFERENCE = {"network_settings#reference": None}  # leaves the 4 M weights of the reference encoder out


def train(cohort: Cohort, out: Path, **overrides: Any) -> RunRecord:
    """`medaug train` in this process; keys with ``#`` are given as a mapping ``more``."""
    from medaug.workflow import run_stage

    more = overrides.pop("more", {})
    paths = {"dataset_dir": str(cohort.root), "output_dir": str(out)}
    record: RunRecord = run_stage("guided_ddpm", "training", "tiny", SETTINGS | paths | more | overrides)
    return record


def randomised(network: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Every weight moved by noise: a fresh diffusion network starts with a zero output, which would hide everything."""
    import torch

    draw = numpy_generator(seed, "randomised")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += scale * torch.from_numpy(draw.standard_normal(tuple(parameter.shape))).to(parameter)
    return network
