"""Training a classifier of noisy images: one iteration as a MONAI engine calls it, in the session that trains the generator too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medaug.cohort import Case, Cohort
from medaug.diffusion.parameterisation import add_noise
from medaug.diffusion.schedule import NoiseSchedule
from medaug.draws import key_seed, numpy_generator, randn_batch, torch_generator
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.networks.time_classifier import TimeClassifier, build_time_classifier
from medaug.training.data import jitter, read_case
from medaug.training.diffusion import optimise
from medaug.training.ema import ExponentialMovingAverage
from medaug.training.run_folder import RunRecord, load_run_weights

QUARTILES = 4
SETTINGS = "classifier"  # where a run's settings say how the network is built


class LabelledCases(Dataset[dict[str, Any]]):
    """Training images with their labels, indexed by ``(iteration, position, case index)`` as `KeyedBatches` yields them.

    Args:
        cohort: where the images are.
        cases: what is trained on; None is the training split.
        seed: first part of every key.
        shift: largest shift of an image, as a share of its side; 0 switches it off.

    Raises:
        LeakageError: a case of a group that the cohort holds out (code `fit-on-held-out`).
        DataError: no case.
    """

    def __init__(self, cohort: Cohort, cases: Sequence[Case] | None = None, seed: int = 0, shift: float = 0.0) -> None:
        self.cohort, self.cases, self.seed, self.shift = cohort, list(cohort.training if cases is None else cases), seed, shift
        if not self.cases:
            raise DataError("training-empty", "A classifier needs at least one labelled image, got none.")
        held_out = (cohort.groups("validation") | cohort.groups("test")) & {case.group for case in self.cases}
        if held_out:
            raise LeakageError(
                "fit-on-held-out",
                f"{len(held_out)} group(s) among the classifier's images are held out ({', '.join(sorted(held_out)[:5])}); "
                "train it on the training split.",
            )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        iteration, position, index = key
        case = self.cases[index]
        image = jitter(read_case(self.cohort, case), numpy_generator(self.seed, "shift", iteration, position), self.shift)
        return {"image": image, "label": case.label, "id": case.id, "iteration": iteration, "position": position}


def draw_timesteps(schedule: NoiseSchedule, keys: Sequence[tuple[int, int]], *prefix: object) -> Tensor:
    """t uniform over {0, ..., T-1} for each key, (B,) int64: steps of the training schedule, never of a respaced one."""
    draws = [torch.randint(schedule.num_train_timesteps, (), generator=torch_generator(*prefix, *key)) for key in keys]
    return torch.stack(draws)


def quartile_accuracy(logits: Tensor, labels: Tensor, t: Tensor, num_train_timesteps: int) -> dict[str, float]:
    """``accuracy``, and ``accuracy_q1`` ... ``accuracy_q4`` by quartile of t for those that occur.

    q1 is the least noise; towards q4 it is expected to fall to the share of the largest class.

    Args:
        logits: (B, K).
        labels: (B,) true classes.
        t: (B,) timesteps in [0, T-1].
        num_train_timesteps: T.
    """
    right, quartile = (logits.argmax(dim=1) == labels).float().cpu(), t.cpu() * QUARTILES // num_train_timesteps
    found = {f"accuracy_q{q + 1}": float(right[quartile == q].mean()) for q in range(QUARTILES) if bool((quartile == q).any())}
    return {"accuracy": float(right.mean())} | found


@dataclass
class NoisyClassifierIteration:
    """One training step of a `TimeClassifier`, given to `SupervisedTrainer(iteration_update=...)` in the place of `GuidedIteration`.

    L = CE(p(. | x_t, t), y), t uniform over the training schedule (Dhariwal & Nichol 2021, section 4). The trainer's inferer is the
    `NoiseObjective` of the generator, whose schedule it is; its loss function the cross-entropy. Every draw is keyed by (seed,
    iteration, position).

    Attributes:
        ema: updated after every step.
        scheduler: stepped after every step.
        seed: first part of every key.
        max_gradient_norm: clip.
    """

    ema: ExponentialMovingAverage
    scheduler: torch.optim.lr_scheduler.LRScheduler
    seed: int = 0
    max_gradient_norm: float = 1.0

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Take one optimiser step. Returns loss and accuracies of the step.

        Raises:
            ConfigError: the loss is not finite (code `training-diverged`).
        """
        network, schedule, device = engine.network, engine.inferer.schedule, engine.state.device
        network.train()
        images, labels = batch["image"].to(device), torch.as_tensor(batch["label"], device=device)
        keys = [(int(i), int(j)) for i, j in zip(batch["iteration"], batch["position"], strict=True)]
        t = draw_timesteps(schedule, keys, self.seed, "level")
        noise = randn_batch(images.shape[1:], keys, self.seed, "noise").to(device)
        x_t = add_noise(images, noise, schedule.abar(t))
        with torch.random.fork_rng(devices=[]):  # drop-out draws from the global generator
            torch.manual_seed(torch_generator(self.seed, "iteration", keys[0][0]).initial_seed())
            logits = network(x_t, t.to(device, torch.float32))
        taken = optimise(engine, engine.loss_function(logits, labels), keys[0][0], self)
        return taken | quartile_accuracy(logits.detach(), labels, t, schedule.num_train_timesteps)


def new_time_classifier(settings: Mapping[str, Any], cohort: Cohort, seed: int) -> TimeClassifier:
    """A classifier with random weights that depend on the seed alone; see `build_time_classifier` for `settings`."""
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(key_seed(seed, "weights"))
        return build_time_classifier(settings, cohort.channels, len(cohort.classes), cohort.image_size)


def load_time_classifier(folder: Path, record: RunRecord, cohort: Cohort) -> TimeClassifier:
    """The trained classifier of a run, in evaluation mode, for guiding images of this cohort.

    Args:
        folder: the run folder.
        record: its record.
        cohort: whose images it will guide.

    Raises:
        ConfigError: other classes, image size or channels; not the run of a classifier; weights that are not the ones it names.
        LeakageError: it saw a group that the cohort holds out.
    """
    if (record.classes, record.image_size, record.channels) != (cohort.classes, cohort.image_size, cohort.channels):
        raise ConfigError(
            "class-mismatch",
            f"The classifier was trained for classes {list(record.classes)} at {record.image_size} px with {record.channels} channel(s), "
            f"the cohort has {list(cohort.classes)} at {cohort.image_size} px with {cohort.channels}; train one on this cohort.",
        )
    held_out = (cohort.groups("validation") | cohort.groups("test")) & set(record.fit_groups)
    if held_out:
        raise LeakageError(
            "fit-on-held-out",
            f"The classifier was trained on {len(held_out)} group(s) that this cohort holds out "
            f"({', '.join(sorted(held_out)[:5])}); train again on this cohort.",
        )
    if SETTINGS not in record.settings:
        raise ConfigError("run-malformed", f"The run {Path(folder).name} does not hold a classifier of noisy images.")
    network = build_time_classifier(record.settings[SETTINGS], record.channels, len(record.classes), record.image_size)
    load_run_weights(folder, record, network)
    return network.eval().requires_grad_(False)
