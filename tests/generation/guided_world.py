"""A generator and a classifier of noisy images with random weights, as the two trainings of `uncertainty_guidance` leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from random_run import DIFFUSION, World
from tiny_run import BACKBONE, randomised

from medaug.cohort import Cohort
from medaug.networks.build import build_guided_unet
from medaug.training.run_folder import new_record, write_run
from medaug.training.time_classifier import new_time_classifier

NETWORK = {"backbone": "lean", "class_conditional": True, "backbone_options": BACKBONE, "reference": None}
CLASSIFIER: dict[str, Any] = {"channels": [8, 16], "patch": 2, "norm_num_groups": 4, "dropout": 0.2}
SAMPLER = {"step": "ddim", "num_inference_steps": 4, "spacing": "karras", "sigma_min": 0.02, "sigma_max": 80.0, "clip": False}
QUIET = {"tracking": {"enabled": False}, "device_name": "cpu"}


def new_classifier_run(
    cohort: Cohort, folder: Path, seed: int = 0, diffusion: Any = DIFFUSION, settings: Any = CLASSIFIER
) -> None:
    """A run folder as classifier.yaml leaves it."""
    network = randomised(new_time_classifier(settings, cohort, seed), seed)
    write_run(
        folder, new_record("uncertainty_guidance", cohort, {"classifier": settings, "diffusion": diffusion}, seed), network, 1
    )


def new_guided_run(cohort: Cohort, folder: Path, seed: int = 0) -> World:
    """Both run folders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_guided_unet(NETWORK, cohort.channels, len(cohort.classes))
    randomised(network.unet, seed)
    settings = {"network": NETWORK, "diffusion": DIFFUSION, "sampler": SAMPLER}
    record = write_run(folder, new_record("uncertainty_guidance", cohort, settings, seed), network, 1)
    new_classifier_run(cohort, folder / "classifier", seed)
    return World(cohort, record, folder)
