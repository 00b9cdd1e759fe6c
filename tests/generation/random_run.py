"""A run folder with random weights: generation needs no training to be tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_run import BACKBONE, randomised

from medaug.cohort import Cohort
from medaug.networks.build import build_guided_unet
from medaug.training.run_folder import RunRecord, new_record, write_run

DIFFUSION = {"parameterisation": "edm", "schedule": "karras", "num_train_timesteps": 1000}
NETWORK = {
    "backbone": "lean",
    "class_conditional": True,
    "backbone_options": BACKBONE,
    "reference": {"feature": "blocks", "pretrained_path": None},
}


def new_network(seed: int = 0) -> Any:
    """A guided network whose output depends on everything it is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_guided_unet(NETWORK, 1, 3)
    randomised(network.unet, seed)
    randomised(network.fusion, seed, 1.0)  # a fresh fusion lets only a whisper of the reference through
    return network.eval()


@dataclass
class World:
    """A real cohort and a finished run on it."""

    cohort: Cohort
    record: RunRecord
    run: Path


def new_run(cohort: Cohort, folder: Path, seed: int = 0) -> World:
    """A run folder as training leaves it."""
    record = new_record("guided_ddpm", cohort, {"network": NETWORK, "diffusion": DIFFUSION}, seed)
    return World(cohort, write_run(folder, record, new_network(seed), 1), folder)
