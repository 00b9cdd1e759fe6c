"""Training a guided diffusion network: one iteration as a MONAI engine calls it, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medaug.diffusion.objective import WEIGHTINGS, Weighting
from medaug.diffusion.parameterisation import PARAMETERISATIONS, Level, Parameterisation, make_level
from medaug.diffusion.schedule import NoiseSchedule, make_schedule
from medaug.draws import randn_batch, torch_generator
from medaug.errors import ConfigError
from medaug.networks.guided_unet import GuidedUNet
from medaug.prompts import Prompts
from medaug.training import distributed
from medaug.training.data import keep_mask
from medaug.training.ema import ExponentialMovingAverage


@dataclass(frozen=True)
class NoiseObjective:
    """The diffusion part of the loss: how a network is applied to a noised batch. The trainer's `inferer`.

    Attributes:
        parameterisation: what the network predicts.
        schedule: the noise levels.
        weighting: weight of a level; None for the parameterisation's own.
    """

    parameterisation: Parameterisation
    schedule: NoiseSchedule
    weighting: Weighting | None = None

    def draw(self, seed: int, stage: str, keys: list[tuple[int, int]], device: torch.device | str) -> Level:
        """One noise level per key; shape (B,) each."""
        drawn = [self.parameterisation.draw_level(self.schedule, torch_generator(seed, stage, *key)) for key in keys]
        return make_level(drawn, device)

    def __call__(self, inputs: Tensor, network: Callable[[Tensor, Tensor], Tensor], *, noise: Tensor, level: Level) -> Tensor:
        """Weighted squared error per image, shape (B,). `inputs`: clean images (B, C, H, W) in [-1, 1]."""
        return self.parameterisation.training_loss(network, inputs, noise, level, self.weighting)


@dataclass
class GuidedIteration:
    """One training step of the guided DDPM, given to `SupervisedTrainer(iteration_update=...)`.

    L = || eps - U(x_t, t, E(I_R)) ||^2 + label_loss_weight * CE(C_R, y_R); the gradients of both terms reach E.
    Every draw (noise, level, condition drop) is keyed by (seed, iteration, position).

    Attributes:
        ema: updated after every step.
        scheduler: stepped after every step.
        seed: first part of every key.
        label_loss_weight: lambda, 0.1 as published.
        condition_dropout: share of images whose reference features become the null feature, per image.
        label_dropout: share of images whose class becomes NULL, or whose context becomes the null context, per image
            (classifier-free guidance). The same draw decides on the reference, so that guidance finds a network that knows
            all conditions gone.
        bottleneck_noise_train: relative scale of Gaussian noise on the bottleneck while training; 0 is off.
        max_gradient_norm: clip.
        prompts: what a network that reads texts is told of each image, drawn anew each time; None for other networks.
    """

    ema: ExponentialMovingAverage
    scheduler: torch.optim.lr_scheduler.LRScheduler
    seed: int = 0
    label_loss_weight: float = 0.1
    condition_dropout: float = 0.0
    label_dropout: float = 0.0
    bottleneck_noise_train: float = 0.0
    max_gradient_norm: float = 1.0
    prompts: Prompts | None = None

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Take one optimiser step. Returns the losses of the step.

        Raises:
            ConfigError: the loss is not finite (code `training-diverged`).
        """
        iteration = int(batch["iteration"][0])
        network: GuidedUNet = engine.network
        network.train()
        with torch.random.fork_rng(devices=[]):  # dropout inside the networks draws from the global generator
            torch.manual_seed(torch_generator(self.seed, "iteration", iteration).initial_seed())
            losses = guided_losses(network, engine.inferer, engine.loss_function, batch, self, engine.state.device)
        total = losses["loss_noise"] + self.label_loss_weight * losses["loss_label"]
        return {name: float(value.detach()) for name, value in losses.items()} | optimise(engine, total, iteration, self)


class OptimiserStep(Protocol):
    """What `optimise` needs of an iteration."""

    ema: ExponentialMovingAverage
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_gradient_norm: float


def optimise(engine: Any, total: Tensor, iteration: int, step: OptimiserStep) -> dict[str, float]:
    """One step of optimiser, learning rate and average down the loss `total`. Returns loss, gradient norm and learning rate.

    Several processes step down the mean of their losses; the loss returned is this one's.

    Raises:
        ConfigError: the loss is not finite (code `training-diverged`).
    """
    refuse_divergence(total, iteration)
    network = engine.network
    engine.optimizer.zero_grad(set_to_none=True)
    total.backward()
    distributed.average_gradients(network.parameters())
    norm = nn.utils.clip_grad_norm_(network.parameters(), step.max_gradient_norm)
    engine.optimizer.step()
    step.scheduler.step()
    step.ema.update(network)
    return {
        "loss": float(total.detach()),
        "gradient_norm": float(norm),
        "learning_rate": float(step.scheduler.get_last_lr()[0]),
    }


def refuse_divergence(loss: Tensor, iteration: int) -> None:
    """Refuse a loss that is not finite, in every process when it is so in one.

    Raises:
        ConfigError: code `training-diverged`.
    """
    loss = distributed.mean(loss)
    if not torch.isfinite(loss):
        raise ConfigError(
            "training-diverged",
            f"The loss is {float(loss)} at iteration {iteration}; lower learning_rate and start again.",
        )


def guided_losses(
    network: GuidedUNet,
    objective: NoiseObjective,
    label_loss: Callable[[Tensor, Tensor], Tensor],
    batch: dict[str, Any],
    step: GuidedIteration,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The two terms of the joint loss for one batch: ``loss_noise`` and ``loss_label`` (scalars)."""
    images, labels = batch["image"].to(device), torch.as_tensor(batch["label"], device=device)
    keys = [(int(i), int(j)) for i, j in zip(batch["iteration"], batch["position"], strict=True)]
    noise = randn_batch(images.shape[1:], keys, step.seed, "noise").to(device)
    level = objective.draw(step.seed, "level", keys, device)
    conditioned: Callable[..., Tensor] = network
    if network.num_classes is not None or network.condition_encoder is not None:
        keep = keep_mask(step.label_dropout, [(step.seed, "drop", *key) for key in keys]).to(device)
        if network.condition_encoder is not None:
            conditions = drawn_prompts(step, labels, keys) if network.takes_text else labels
            conditioned = partial(conditioned, context=network.context(conditions, keep))
        if network.num_classes is not None:
            conditioned = partial(conditioned, class_labels=torch.where(keep, labels, network.num_classes))
    loss_label = torch.zeros((), device=device)
    if network.with_fusion:
        features, logits = network.reference(batch["reference"].to(device))
        keep = keep_mask(step.condition_dropout, [(step.seed, "drop", *key) for key in keys]).to(device)
        conditioned = partial(conditioned, features=features, keep_reference=keep)
        loss_label = label_loss(logits, labels)
    if step.bottleneck_noise_train > 0:
        conditioned = partial(conditioned, perturb=_training_perturbation(step, keys))
    return {"loss_noise": objective(images, conditioned, noise=noise, level=level).mean(), "loss_label": loss_label}


def drawn_prompts(step: GuidedIteration, labels: Tensor, keys: list[tuple[int, int]]) -> list[str]:
    """One prompt per image for its label, keyed by (seed, iteration, position).

    Raises:
        ConfigError: the iteration was given no prompts.
    """
    if step.prompts is None:
        raise ConfigError(
            "prompts-missing", "This network reads texts; give the iteration prompts (medaug.prompts.make_prompts)."
        )
    return [step.prompts.prompt(int(label), step.seed, *key) for label, key in zip(labels, keys, strict=True)]


def _training_perturbation(step: GuidedIteration, keys: list[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    from medaug.diffusion.perturbation import bottleneck_noise

    def perturb(h: Tensor) -> Tensor:
        draw = randn_batch(h.shape[1:], keys, step.seed, "bottleneck-train").to(h)
        return bottleneck_noise(h, draw, step.bottleneck_noise_train)

    return perturb


def warmup_cosine(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: int, final_share: float = 0.01
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a half cosine down to `final_share` of the learning rate at `num_steps`."""

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def warmup_constant(optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then the constant learning rate."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


LEARNING_RATE_SCHEDULES = {"cosine": warmup_cosine, "constant": warmup_constant}


def make_learning_rate_schedule(
    name: str, optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The entry `name` of `LEARNING_RATE_SCHEDULES`; an unknown name is refused."""
    options = {"optimizer": optimizer, "num_steps": num_steps, "warmup_steps": warmup_steps}
    schedule: torch.optim.lr_scheduler.LambdaLR = choose("learning-rate-schedule", LEARNING_RATE_SCHEDULES, name, options)
    return schedule


OBJECTIVE_SETTINGS = (
    "parameterisation",
    "parameterisation_options",
    "schedule",
    "num_train_timesteps",
    "schedule_options",
    "weighting",
    "weighting_options",
)


def build_objective(settings: Mapping[str, Any]) -> NoiseObjective:
    """The objective from plain settings, as a bundle or a run folder holds them.

    Args:
        settings: ``parameterisation`` (epsilon, sample, v_prediction, edm), ``schedule`` (name), ``num_train_timesteps``,
            ``weighting`` (name or None) and the options of each.

    Raises:
        ConfigError: an unknown name or option.
    """
    unknown = set(settings) - set(OBJECTIVE_SETTINGS)
    if unknown:
        raise ConfigError(
            "setting-unknown", f"Unknown diffusion setting(s) {sorted(unknown)}; known are {list(OBJECTIVE_SETTINGS)}."
        )
    weighting = settings.get("weighting")
    return NoiseObjective(
        parameterisation=choose(
            "parameterisation",
            PARAMETERISATIONS,
            settings.get("parameterisation", "epsilon"),
            settings.get("parameterisation_options"),
        ),
        schedule=make_schedule(
            settings.get("schedule", "linear_beta"),
            settings.get("num_train_timesteps", 1000),
            **settings.get("schedule_options") or {},
        ),
        weighting=None if weighting is None else choose("weighting", WEIGHTINGS, weighting, settings.get("weighting_options")),
    )


def choose(kind: str, table: Mapping[str, Callable[..., Any]], name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build the entry `name` of a table of parts; an unknown name or option is refused with what is known.

    Raises:
        ConfigError: code `<kind>-unknown` or `setting-unknown`.
    """
    if name not in table:
        raise ConfigError(f"{kind}-unknown", f"{kind} must be one of {', '.join(table)}, got {name!r}.")
    try:
        return table[name](**options or {})
    except TypeError as error:
        raise ConfigError("setting-unknown", f"{kind} {name} does not take these options: {error}.") from error
