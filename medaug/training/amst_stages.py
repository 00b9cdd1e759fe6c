"""The two trainings of AMST: auxiliary heads on real images (stage 1), and the steps of the main head (stage 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from medaug.errors import ConfigError
from medaug.networks.amst import AuxiliaryHeads
from medaug.networks.grading import penultimate
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.classifier import ClassifierRecipe, LabelledImages, seeded
from medaug.training.softmatch import SoftMatch
from medaug.training.steps import EndlessOrder, class_weights, mixed_precision, rate_factor

Key = tuple[Hashable, ...]

__all__ = ["Joined", "MainStep", "consistency_loss", "frozen_statistics", "judging", "pretrain", "pretraining_loss", "refresh"]


@contextmanager
def judging(network: nn.Module) -> Iterator[None]:
    """Drop-out is off inside the block, and batch norm normalises by the batch and keeps its running statistics; modes are put back.

    In evaluation mode the running statistics trail a network that learns fast, and for whole epochs it may call every image the
    same class, with confidence: as a target of the consistency, that teaches the network its own lag.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    for module in modes:
        if isinstance(module, _BatchNorm):
            module.training = True
    try:
        with frozen_statistics(network):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch inside the block but keeps its running statistics: strong views must not enter them."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    kept = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, kept, strict=True):
            layer.momentum = momentum


class Joined:
    """Several image sets under one numbering, in their order; None and empty ones count for nothing."""

    def __init__(self, *parts: LabelledImages | None) -> None:
        self._parts = [part for part in parts if part is not None and len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def batch(self, indices: np.ndarray) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of these numbers, in this order."""
        owner = np.searchsorted(self._ends, indices, side="right")
        out: Tensor | None = None
        for place in np.unique(owner):
            start = 0 if place == 0 else self._ends[place - 1]
            members = np.flatnonzero(owner == place)
            images, _ = self._parts[place].batch(np.asarray(indices)[members] - start)
            out = torch.empty((len(indices), *images.shape[1:])) if out is None else out
            out[torch.from_numpy(members)] = images
        assert out is not None, "a batch holds at least one image"
        return out


def pretraining_loss(
    heads: AuxiliaryHeads,
    features: dict[str, Tensor],
    target: Tensor,
    orthogonality: float,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Eq. 7: the heads' cross-entropies summed, plus `orthogonality` times their penalty.

    Args:
        features: view -> (B, d).
        target: (B,) class indices.
        weights: per class (K,), or None.
        smoothing: of the labels.
    """
    loss = orthogonality * heads.penalty()
    for view, seen in features.items():
        for logits in heads.logits(view, seen):
            loss = loss + functional.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing)
    return loss


def pretrain(
    network: nn.Module,
    heads: AuxiliaryHeads,
    real: LabelledImages,
    recipe: ClassifierRecipe,
    amst: AmstRecipe,
    num_steps: int,
    *,
    key: Key,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Stage 1: train the backbone and the auxiliary heads on real images, a weak and a strong view of each; in place.

    The network's own last layer is not touched.

    Args:
        recipe: batch size, rates and loss; its number of steps and policy are not used.
        num_steps: optimiser steps of this stage.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: the loss is no longer finite (code ``training-diverged``).
    """
    parameters = [*network.parameters(), *heads.parameters()]
    return _train_heads(network, heads, parameters, real, recipe, amst, num_steps, key, device)


def refresh(
    network: nn.Module,
    heads: AuxiliaryHeads,
    real: LabelledImages,
    recipe: ClassifierRecipe,
    amst: AmstRecipe,
    num_steps: int,
    *,
    key: Key,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Fit the auxiliary heads to a backbone that has moved on; the backbone stays as it is. Arguments: `pretrain`."""
    return _train_heads(network, heads, list(heads.parameters()), real, recipe, amst, num_steps, key, device)


def _train_heads(
    network: nn.Module,
    heads: AuxiliaryHeads,
    parameters: list[nn.Parameter],
    real: LabelledImages,
    recipe: ClassifierRecipe,
    amst: AmstRecipe,
    num_steps: int,
    key: Key,
    device: str | torch.device,
) -> list[float]:
    network.to(device)
    heads.to(device)
    moving = len(parameters) > len(list(heads.parameters()))
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    order, staged = EndlessOrder(np.arange(len(real)), (*key, "real")), replace(recipe, num_steps=num_steps)
    weights = class_weights(real.labels(), heads.heads[0].out_features).to(device) if recipe.class_balanced else None  # type: ignore[arg-type]
    views = {"weak": amst.views.weak, "strong": amst.views.strong}
    losses = []
    for step in range(num_steps):
        x, target = real.batch(order.take(step * recipe.batch_size, recipe.batch_size))
        x, target = x.to(device), target.to(device)
        drawn = [(*key, "view", step, position) for position in range(len(x))]
        network.train(moving)
        heads.train()
        with seeded(*key, "dropout", step, device=device):
            features = {}
            for view in dict.fromkeys(heads.views):
                with torch.set_grad_enabled(moving), _statistics(network, view):
                    seen = views[view](x, drawn)
                    with mixed_precision(recipe.precision, device):
                        features[view] = penultimate(network, seen)
                    features[view] = features[view].float()
            loss = pretraining_loss(heads, features, target, amst.orthogonality, weights, recipe.label_smoothing)
        losses.append(_step(loss, optimiser, parameters, recipe, rate_factor(step, staged), f"{step + 1} of the auxiliary heads"))
    return losses


@contextmanager
def _statistics(network: nn.Module, view: str) -> Iterator[None]:
    if view == "weak":
        yield
    else:
        with frozen_statistics(network):
            yield


def _step(
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    recipe: ClassifierRecipe,
    rate: float,
    name: str,
) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(
            "training-diverged", f"The loss is {value} at step {name}; lower learning_rate ({recipe.learning_rate})."
        )
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
    optimiser.step()
    return value


def consistency_loss(
    weak_logits: Tensor, strong_logits: Tensor, weigh: SoftMatch, soft_target: bool = False
) -> tuple[Tensor, Tensor]:
    """Eq. 9: mean over the batch of lambda(y^w) H(target, strong), the target made from the weak view without gradient.

    Args:
        weak_logits, strong_logits: of the main head, (B, K).
        weigh: its mean and variance are updated by this batch, then used.
        soft_target: softmax of the weak view instead of its argmax.

    Returns:
        The loss and the weights lambda (B,).
    """
    probs = torch.softmax(weak_logits.detach(), dim=1)
    weights = weigh(probs)
    target = probs if soft_target else probs.argmax(dim=1)
    losses = functional.cross_entropy(strong_logits, target, reduction="none")
    return (weights * losses).mean(), weights


@dataclass(eq=False)
class MainStep:
    """Steps of stage 3: backbone and main head on labelled images and, by consistency, on unlabelled ones.

    Attributes:
        network: in training, on `device`.
        pool: all images.
        indices_of: step -> numbers of the labelled images in its batch.
        targets: number in the pool -> label, (N,) int64, or class probabilities (N, K).
        unlabelled: their numbers in the pool, maybe none.
        recipe, amst: settings.  num_steps: of the whole stage, for the learning rate.  round_steps: of this round, for SoftMatch.
        key: of every draw.
        class_weights: (K,) or None.
        weights, smallest: mean and least lambda of every step that had unlabelled images.
        image_passes, forward_passes: images through the network so far, with and without a backward pass.
    """

    network: nn.Module
    optimiser: torch.optim.Optimizer
    pool: Joined
    indices_of: Callable[[int], np.ndarray]
    targets: Tensor
    unlabelled: np.ndarray
    recipe: ClassifierRecipe
    amst: AmstRecipe
    num_steps: int
    round_steps: int
    key: Key
    class_weights: Tensor | None = None
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        self.weights: list[float] = []
        self.smallest: list[float] = []
        self.image_passes = self.forward_passes = 0
        self._size = max(1, round(self.recipe.batch_size * self.amst.unlabelled_ratio))
        self._order = EndlessOrder(self.unlabelled, (*self.key, "unlabelled"))
        self._weigh: SoftMatch | None = None

    def __call__(self, step: int) -> float:
        """Do one step, counted from 0 within the stage; returns L = L_sup + L_c."""
        chosen = self.indices_of(step)
        x = self.amst.views.weak(self.pool.batch(chosen).to(self.device), self._keys("labelled", step, len(chosen)))
        target = self.targets[torch.from_numpy(chosen)].to(self.device)
        weak, strong = self._unlabelled_views(step)
        self.image_passes += len(x)
        with seeded(*self.key, "dropout", step, device=self.device):
            self.network.train()
            logits = self._logits(x)
            smoothing = self.recipe.label_smoothing
            loss = functional.cross_entropy(logits, target, weight=self.class_weights, label_smoothing=smoothing)
            if weak is not None and strong is not None:
                loss = loss + self._consistency(weak, strong, logits.shape[1])
        rate = rate_factor(step, replace(self.recipe, num_steps=self.num_steps))
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        return _step(loss, self.optimiser, parameters, self.recipe, rate, f"{step + 1} of the main head")

    def _unlabelled_views(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.amst.consistency or len(self.unlabelled) == 0:
            return None, None
        x = self.pool.batch(self._order.take(step * self._size, self._size)).to(self.device)
        keys = self._keys("unlabelled", step, len(x))
        return self.amst.views.weak(x, keys), self.amst.views.strong(x, keys)

    def _consistency(self, weak: Tensor, strong: Tensor, num_classes: int) -> Tensor:
        """L_c; the weak view is judged without drop-out."""
        self._weigh = self._weigh or self.amst.softmatch(num_classes, self.round_steps)
        with torch.no_grad(), judging(self.network):
            weak_logits = self._logits(weak)
        with frozen_statistics(self.network):
            loss, weights = consistency_loss(weak_logits, self._logits(strong), self._weigh, self.amst.soft_target)
        self.image_passes += len(strong)
        self.forward_passes += len(weak)
        self.weights.append(float(weights.mean()))
        self.smallest.append(float(weights.min()))
        return loss

    def _logits(self, x: Tensor) -> Tensor:
        with mixed_precision(self.recipe.precision, self.device):
            logits: Tensor = self.network(x)
        return logits.float()

    def _keys(self, what: str, step: int, count: int) -> Sequence[Key]:
        return [(*self.key, what, step, position) for position in range(count)]
