"""Training the DAGAN: pairs of one class, the Wasserstein loss with gradient penalty, one update as a MONAI engine calls it.

Antoniou, Storkey, Edwards 2017, arXiv:1711.04340; Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from medaug.cohort import Cohort
from medaug.draws import numpy_generator, randn_batch, torch_generator
from medaug.errors import ConfigError, DataError
from medaug.networks.dagan import DaganCritic, DaganGenerator, build_critic, build_generator
from medaug.training import distributed
from medaug.training.classifier import seeded
from medaug.training.data import KeyedBatches, jitter, permutation, read_case
from medaug.training.diffusion import refuse_divergence
from medaug.training.ema import ExponentialMovingAverage
from medaug.training.run_folder import RunRecord, load_run_weights, refuse_other_classes

Critic = Callable[[Tensor, Tensor], Tensor]  # (x_i, x_j) -> scores (B,)
SETTINGS = "generator"  # where a run's settings say how the network is built

# --- the loss ---------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Critic, x_i: Tensor, x_j: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Mean of (||grad D(x_i, x_hat)||_2 - 1)^2 with x_hat = mix x_j + (1 - mix) fake, a scalar.

    The gradient is with respect to the second image alone: x_i is what the critic is told, not what it judges.

    Args:
        critic: scores pairs, each by itself.
        x_i, x_j, fake: (B, C, H, W).
        mix: (B,) in [0, 1].

    Reference: Gulrajani et al. 2017, eq. 3, without the weight.
    """
    share = mix.reshape(-1, *[1] * (x_j.ndim - 1))
    x_hat = (share * x_j + (1 - share) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x_i, x_hat).sum(), x_hat, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(real_scores: Tensor, fake_scores: Tensor, penalty: Tensor, penalty_weight: float = 10.0) -> Tensor:
    """E[D(x_i, G(x_i, z))] - E[D(x_i, x_j)] + penalty_weight * penalty, a scalar; scores are (B,)."""
    return fake_scores.mean() - real_scores.mean() + penalty_weight * penalty


def generator_loss(fake_scores: Tensor) -> Tensor:
    """-E[D(x_i, G(x_i, z))], a scalar; scores are (B,)."""
    return -fake_scores.mean()


# --- pairs ------------------------------------------------------------------------------------------------------------


class BalancedBatches(KeyedBatches):
    """As `KeyedBatches`, every class as often as every other, whatever their sizes; classes without an image are left out.

    The classes take turns, and within a class the order is a chain of permutations.

    Args:
        labels: class index of each case.
        batch_size: cases per iteration.
        seed: key of the permutations.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, seed: int = 0) -> None:
        super().__init__(len(labels), batch_size, seed)
        self.members = [np.flatnonzero(np.asarray(labels) == label) for label in sorted(set(labels))]

    def _case(self, place: int) -> int:
        turn, which = divmod(place, len(self.members))
        members = self.members[which]
        epoch, offset = divmod(turn, len(members))
        return int(members[permutation((self.seed, which), epoch, len(members))[offset]])


class ClassPairs(Dataset[dict[str, Any]]):
    """Pairs (x_i, x_j) of different training images of one class, indexed by ``(iteration, position, case index)``.

    A class with a single image pairs it with its weak augmentation. Synthetic training cases count as any other.

    Args:
        cohort: only its training split is used.
        seed: first part of every key.
        shift: largest shift of either image, as a share of its side; 0 switches it off.

    Raises:
        DataError: no training image.
    """

    def __init__(self, cohort: Cohort, seed: int = 0, shift: float = 0.0) -> None:
        self.cohort, self.cases, self.seed, self.shift = cohort, list(cohort.training), seed, shift
        if not self.cases:
            raise DataError("training-empty", "The training split holds no image; use a cohort with training images.")
        self.labels = [case.label for case in self.cases]
        self.members = {label: np.flatnonzero(np.asarray(self.labels) == label) for label in set(self.labels)}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        iteration, position, index = key
        draw = numpy_generator(self.seed, "pair", iteration, position)
        case = self.cases[index]
        other = partner(self.members[case.label], index, draw)
        image = read_case(self.cohort, case)
        second = jitter(image, draw, 0.08, zoom=0.1) if other is None else read_case(self.cohort, self.cases[other])
        return {
            "image": jitter(image, draw, self.shift),
            "partner": jitter(second, draw, self.shift),
            "id": case.id,
            "partner_id": case.id if other is None else self.cases[other].id,
            "label": case.label,
            "iteration": iteration,
            "position": position,
        }


def partner(members: Sequence[int] | np.ndarray, index: int, draw: np.random.Generator) -> int | None:
    """One of the `members` of a class other than `index`, all equally likely; None when there is no other."""
    others = [int(member) for member in members if member != index]
    return others[int(draw.integers(len(others)))] if others else None


# --- one update -------------------------------------------------------------------------------------------------------


@dataclass
class DaganIteration:
    """One update of one of the two networks, given to `SupervisedTrainer(iteration_update=...)`.

    `critic_steps` iterations of the critic are followed by one of the generator, each with a batch of its own. The trainer's network and
    optimizer are the generator's. Every draw is keyed by (seed, iteration, position).

    Attributes:
        critic: the other network.
        critic_optimizer: its optimizer.
        ema: follows the generator.
        seed: first part of every key.
        critic_steps: updates of the critic per update of the generator.
        penalty_weight: of the gradient penalty.
    """

    critic: DaganCritic
    critic_optimizer: torch.optim.Optimizer
    ema: ExponentialMovingAverage
    seed: int = 0
    critic_steps: int = 5
    penalty_weight: float = 10.0

    def __post_init__(self) -> None:
        if self.critic_steps < 1 or self.penalty_weight < 0:
            raise ConfigError(
                "critic-invalid",
                f"critic_steps must be at least 1 and penalty_weight at least 0, got {self.critic_steps} and {self.penalty_weight}.",
            )

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, float]:
        """Take one optimiser step. Returns the figures of the network whose turn it is.

        Raises:
            ConfigError: the loss is not finite (code `training-diverged`).
        """
        iteration, device = int(batch["iteration"][0]), engine.state.device
        keys = [(int(i), int(j)) for i, j in zip(batch["iteration"], batch["position"], strict=True)]
        x_i, x_j = batch["image"].to(device), batch["partner"].to(device)
        z = randn_batch((engine.network.latent_dim,), keys, self.seed, "latent").to(device)
        engine.network.train()
        self.critic.train()
        with seeded(self.seed, "iteration", iteration, device=device):  # drop-out draws from the global generator
            if iteration % (self.critic_steps + 1):
                mix = torch.stack([torch.rand((), generator=torch_generator(self.seed, "mix", *key)) for key in keys])
                return self._critic_step(engine.network, x_i, x_j, z, mix.to(device), iteration)
            return self._generator_step(engine, x_i, z, iteration)

    def _critic_step(
        self, generator: nn.Module, x_i: Tensor, x_j: Tensor, z: Tensor, mix: Tensor, iteration: int
    ) -> dict[str, float]:
        with torch.no_grad():
            fake = generator(x_i, z)
        real_scores, fake_scores = self.critic(x_i, x_j), self.critic(x_i, fake)
        penalty = gradient_penalty(self.critic, x_i, x_j, fake, mix)
        loss = critic_loss(real_scores, fake_scores, penalty, self.penalty_weight)
        descend(loss, self.critic_optimizer, iteration)
        return {
            "critic_loss": float(loss.detach()),
            "critic_gap": float((real_scores.mean() - fake_scores.mean()).detach()),
            "gradient_penalty": float(penalty.detach()),
        }

    def _generator_step(self, engine: Any, x_i: Tensor, z: Tensor, iteration: int) -> dict[str, float]:
        self.critic.requires_grad_(False)  # its gradients would only be thrown away
        try:
            loss = generator_loss(self.critic(x_i, engine.inferer(x_i, engine.network, z)))
            descend(loss, engine.optimizer, iteration)
        finally:
            self.critic.requires_grad_(True)
        self.ema.update(engine.network)
        return {"generator_loss": float(loss.detach())}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, iteration: int) -> None:
    """One step of `optimizer` down the loss, of several processes down the mean of theirs.

    Raises:
        ConfigError: the loss is not finite (code `training-diverged`).
    """
    refuse_divergence(loss, iteration)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()


# --- networks ---------------------------------------------------------------------------------------------------------


def new_generator(settings: Mapping[str, Any], cohort: Cohort, seed: int) -> DaganGenerator:
    """A generator with random weights that depend on the seed alone; see `build_generator` for `settings`."""
    with seeded(seed, "weights"):
        return build_generator(settings, cohort.channels, cohort.image_size)


def new_critic(settings: Mapping[str, Any], cohort: Cohort, seed: int) -> DaganCritic:
    """A critic with random weights that depend on the seed alone; see `build_critic` for `settings`."""
    with seeded(seed, "critic-weights"):
        return build_critic(settings, cohort.channels, cohort.image_size)


def load_generator(folder: Path, record: RunRecord, expected_classes: Sequence[str] | None = None) -> DaganGenerator:
    """The trained generator of a run, in evaluation mode.

    Raises:
        ConfigError: other classes than expected; not the run of a DAGAN; weights that are not the ones the record names.
    """
    refuse_other_classes(record, expected_classes)
    if SETTINGS not in record.settings:
        raise ConfigError("run-malformed", f"The run {Path(folder).name} does not hold a DAGAN; train one with the bundle dagan.")
    network = build_generator(record.settings[SETTINGS], record.channels, record.image_size)
    load_run_weights(folder, record, network)
    return network.eval()
