"""Does a generator's denoising loss tell its training images from held-out ones? Then it remembers them.

A loss threshold as an attack on membership (Yeom et al. 2018; for diffusion models Matsumoto et al. 2023): for each image and
several noise levels the squared error of the predicted noise; the AUC of "smaller loss means training image" is 0.5 for a
generator that remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from medaug.cohort import Case, Cohort
from medaug.diffusion.objective import Uniform
from medaug.draws import numpy_generator, randn_batch
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.networks.guided_unet import GuidedUNet
from medaug.quality.images import image_batches
from medaug.quality.real_fake import auc_interval
from medaug.training.diffusion import NoiseObjective, build_objective
from medaug.training.run_folder import load_network, read_run

LEVELS = (0.1, 0.25, 0.5, 0.75)  # shares of the training timesteps
DRAWS = 4  # noise draws per image and level
MOST = 1000  # images of either side

__all__ = ["denoising_losses", "membership", "membership_of_run"]


@torch.no_grad()
def denoising_losses(
    network: Callable[..., Tensor],
    objective: NoiseObjective,
    cohort: Cohort,
    cases: Sequence[Case],
    levels: Sequence[float] = LEVELS,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Mean squared error of the predicted noise, (N, levels), over `draws` draws that belong to the image and the level.

    Args:
        network: as for training, (x, time) and class labels where it knows classes; references are left out.
        objective: parameterisation and schedule it was trained with.
        cohort, cases: the images.
        levels: shares of the training timesteps, in (0, 1).
    """
    top = objective.schedule.num_train_timesteps
    losses: list[np.ndarray] = []
    at = 0
    for images in image_batches(cohort, cases, 64):
        own = list(cases[at : at + len(images)])
        at += len(images)
        asked = network
        if getattr(network, "num_classes", None) is not None:
            asked = partial(network, class_labels=torch.tensor([case.label for case in own]))
        block = np.zeros((len(images), len(levels)))
        for column, share in enumerate(levels):
            level = objective.parameterisation.level(objective.schedule, min(top - 1, int(share * top)), len(images), "cpu")
            for draw in range(draws):
                noise = randn_batch(images.shape[1:], [case.id for case in own], "membership", seed, column, draw)
                block[:, column] += (
                    objective.parameterisation.training_loss(asked, images, noise, level, Uniform()).double().numpy() / draws
                )
        losses.append(block)
    return np.concatenate(losses)


def membership(training: np.ndarray, held_out: np.ndarray, levels: Sequence[float] = LEVELS) -> dict[str, Any]:
    """AUC with 95 % interval of "smaller loss means training image", per level and for the mean rank over levels.

    Args:
        training, held_out: losses (N, levels) and (M, levels).

    Raises:
        DataError: a side without images, or losses that are not finite.
    """
    if not min(len(training), len(held_out)):
        raise DataError("held-out-empty", "Membership needs training and held-out images; one side has none.")
    both = np.concatenate([training, held_out])
    if not np.isfinite(both).all():
        raise DataError("features-invalid", "The denoising losses are not finite; the weights are not usable.")
    ranks = stats.rankdata(both, axis=0).mean(axis=1)  # levels have losses of different sizes
    rows = [{"level": level, **_auc(-training[:, column], -held_out[:, column])} for column, level in enumerate(levels)]
    overall = _auc(-ranks[: len(training)], -ranks[len(training) :])
    return overall | {"n_training": len(training), "n_held_out": len(held_out), "levels": rows}


def _auc(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    auc, low, high = auc_interval(members, others)
    return {"auc": auc, "low": low, "high": high}


def membership_of_run(run: Path, cohort: Cohort, *, seed: int = 0, most: int = MOST) -> dict[str, Any]:
    """`membership` of a finished run, its real training images against the validation images of the cohort.

    Raises:
        ConfigError: the run was trained for other classes or images.  LeakageError: it saw a validation image's group.
        DataError: no run, no validation images.
    """
    record = read_run(run)
    if (record.classes, record.image_size, record.channels) != (cohort.classes, cohort.image_size, cohort.channels):
        raise ConfigError(
            "class-mismatch",
            f"The run was trained for classes {list(record.classes)} at {record.image_size} px, the cohort has "
            f"{list(cohort.classes)} at {cohort.image_size} px.",
        )
    seen = set(record.fit_groups)
    leaked = seen & (cohort.groups("validation") | cohort.groups("test"))
    if leaked:
        raise LeakageError(
            "fit-on-held-out", f"The run was trained on {len(leaked)} group(s) that this cohort holds out; train again."
        )
    members = [case for case in cohort.training if not case.is_synthetic and case.group in seen]
    network = load_network(run, record, cohort.classes)
    assert isinstance(network, GuidedUNet)
    objective = build_objective(record.settings.get("diffusion") or {})
    assert isinstance(objective, NoiseObjective)
    sides = [_some(members, most, seed), _some(cohort.validation, most, seed)]
    if not all(sides):
        raise DataError("held-out-empty", "Membership needs training and held-out images; one side has none.")
    own, others = (denoising_losses(network.eval(), objective, cohort, cases, seed=seed) for cases in sides)
    return membership(own, others) | {"weights_sha256": record.weights_sha256, "draws": DRAWS}


def _some(cases: Sequence[Case], most: int, seed: int) -> list[Case]:
    """At most `most` cases, drawn by key, in their order."""
    chosen = numpy_generator("membership", seed).permutation(len(cases))[:most]
    return [cases[index] for index in sorted(chosen)]
