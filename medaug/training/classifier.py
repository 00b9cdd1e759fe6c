"""Train a classifier for a fixed number of optimiser steps, every draw keyed: the grader's and the label filter's trainer.

Nothing here reads the global random state: weights are made under `seeded`, the order of cases, the augmentation and the
drop-out of step s follow from (key, s). The same key and data give the same weights on the CPU at one thread count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.utils.data import Dataset

from medaug.draws import key_seed
from medaug.errors import ConfigError, DataError
from medaug.kinds import NUMBER, WHOLE
from medaug.networks.ordinal import LOSSES
from medaug.training.mixture import Mixture
from medaug.training.steps import PRECISIONS, batch_indices, class_weights, mixed_precision, rate_factor
from medaug.transforms.policies import Augmented, augment_batch, check_policy

CACHE_BYTES = 200 * 2**20
_LEVELS = 65535  # cohort images have 8 or 16 bits, so 16 bits hold them without loss

Key = tuple[Hashable, ...]
Augment = Callable[[Tensor, Sequence[Key]], Tensor]

_SCORED_PIXELS = 256 * 64 * 64  # of one batch

__all__ = [
    "Augment",
    "BestKeeper",
    "ClassifierRecipe",
    "FitResult",
    "LabelledImages",
    "confusion_counts",
    "fit_classifier",
    "image_levels",
    "in_memory",
    "macro_f1",
    "predict_logits",
    "seeded",
]


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is trained; the same for every arm of a comparison.

    Attributes:
        num_steps: optimiser steps, the same for small and large training sets.
        batch_size: images per step; the order runs on over epoch ends, so every batch is full.
        learning_rate: peak of AdamW's rate: linear warm-up over `warmup_fraction` of the steps, then cosine to 0.
        weight_decay: of AdamW, for all parameters.
        evaluate_every: validation after this many steps, and after the last; the best macro-F1 is kept (ties: the later).
        policy: classic augmentation of the training images, a name in `medaug.transforms.policies.POLICIES`.
        head: of the network, a name in `medaug.networks.ordinal.HEADS`; decides the loss.
        class_balanced: weight the loss by the inverse class frequency of the training set.
        label_smoothing: of the cross-entropy.
        max_grad_norm: gradients are clipped to this norm.
        real_share: share of real images in every batch; None draws real and synthetic in their natural proportion.
        precision: of the forward and backward pass, "float32" or "bfloat16" (mixed, see `mixed_precision`); scores are taken in 32 bits.
    """

    num_steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.1
    evaluate_every: int = 50
    policy: str = "none"
    class_balanced: bool = False
    label_smoothing: float = 0.0
    max_grad_norm: float = 1.0
    real_share: float | None = None
    head: str = "linear"
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_policy(self.policy)
        _require(self.head in LOSSES, "head", f"one of {', '.join(LOSSES)}", self.head)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        for name in ("num_steps", "batch_size", "evaluate_every"):
            value = getattr(self, name)
            _require(WHOLE[1](value) and value >= 1, name, "a whole number of at least 1", value)
        for name, words, fits in _IN_RANGE:
            value = getattr(self, name)
            _require(NUMBER[1](value) and fits(value), name, words, value)
        share = self.real_share
        _require(share is None or (NUMBER[1](share) and 0 < share <= 1), "real_share", "in (0, 1] or none", share)


_IN_RANGE: Sequence[tuple[str, str, Callable[[float], bool]]] = (
    ("learning_rate", "above 0", lambda value: value > 0),
    ("max_grad_norm", "above 0", lambda value: value > 0),
    ("warmup_fraction", "in [0, 1)", lambda value: 0 <= value < 1),
    ("label_smoothing", "in [0, 1)", lambda value: 0 <= value < 1),
    ("weight_decay", "0 or more", lambda value: value >= 0),
)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError("recipe-invalid", f"Classifier recipe: {name} must be {expected}, got {value!r}.")


@dataclass(frozen=True)
class FitResult:
    """What a training run left behind.

    Attributes:
        best_step: the step whose weights are in the network.
        best_macro_f1: its macro-F1 on validation, None without validation.
        history: one entry per evaluation: step, loss (mean training loss since the last entry), macro_f1, accuracy.
    """

    best_step: int
    best_macro_f1: float | None
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def seeded(*key: object, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed torch's own generators by `key` inside the block, put them back after it: for initial weights and drop-out."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key_seed(*key))
        yield


def image_levels(image: Tensor) -> np.ndarray:
    """An image in [-1, 1] as 16-bit levels of the same shape; values outside are clipped."""
    unit = (image.to(torch.float32).numpy() + 1) / 2
    return np.rint(unit.clip(0, 1) * _LEVELS).astype(np.uint16)


class LabelledImages(Dataset[dict[str, Any]]):
    """A data set decoded once into memory (16 bits per value) if it is small, else read item by item.

    Both ways give the same values: an image passes through the same 16 bits.

    Args:
        dataset: items ``{"image": Tensor (C, H, W) in [-1, 1], "label": int, "id": str}``; values outside are clipped.
        cache_bytes: largest cache; a larger data set is read lazily.

    Raises:
        DataError: the data set is empty.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], *, cache_bytes: int = CACHE_BYTES) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if size == 0:
            raise DataError("training-empty", "A classifier needs at least one labelled image, got none.")
        self._dataset = dataset
        self._positions = np.arange(size)
        self._pixels: np.ndarray | None = None
        self._labels = np.full(size, -1, dtype=np.int64)
        shape = tuple(dataset[0]["image"].shape)
        if size * math.prod(shape) * 2 <= cache_bytes:
            self._pixels = np.empty((size, *shape), dtype=np.uint16)
            for position in range(size):
                self._pixels[position], self._labels[position] = self._read(position)

    def _read(self, position: int) -> tuple[np.ndarray, int]:
        item = self._dataset[position]
        return image_levels(item["image"]), int(item["label"])

    def select(self, positions: Sequence[int]) -> LabelledImages:
        """A view with these positions, repeats allowed; shares the memory."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._positions = self._positions[np.asarray(positions, dtype=np.int64)]
        return view

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = self.batch([index])
        return {"image": images[0], "label": int(labels[0])}

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and labels (B,) int64 of these indices."""
        positions = self._positions[np.asarray(indices, dtype=np.int64)]
        if self._pixels is not None:
            pixels, labels = self._pixels[positions], self._labels[positions]
        else:
            items = [self._read(int(position)) for position in positions]
            pixels, labels = np.stack([image for image, _ in items]), np.array([label for _, label in items], dtype=np.int64)
        return self.network_values(pixels), torch.from_numpy(labels)

    @staticmethod
    def network_values(pixels: np.ndarray) -> Tensor:
        """The inverse of `image_levels`: float32 in [-1, 1]."""
        return torch.from_numpy(pixels.astype(np.float32) / np.float32(_LEVELS) * 2 - 1)

    def labels(self) -> np.ndarray:
        """All labels, shape (N,); reads every image once if the data set is lazy."""
        if self._pixels is not None:
            return self._labels[self._positions]
        return np.array([int(self._dataset[int(position)]["label"]) for position in self._positions], dtype=np.int64)


def confusion_counts(target: np.ndarray, preds: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (K, K): rows the true class, columns the predicted one."""
    flat = np.bincount(np.asarray(target) * num_classes + np.asarray(preds), minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in the truth or the predictions; counts (..., K, K) -> (...)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    involved = counts.sum(-1) + counts.sum(-2)
    present = involved > 0
    scores = np.divide(2 * hits, involved, out=np.zeros(hits.shape), where=present)
    return scores.sum(-1) / np.maximum(present.sum(-1), 1)


def fit_classifier(
    network: nn.Module,
    training: Dataset[dict[str, Any]],
    validation: Dataset[dict[str, Any]] | None,
    recipe: ClassifierRecipe,
    *,
    key: Key,
    synthetic: Sequence[bool] | None = None,
    augment: Augment | None = None,
    mixture: Mixture | None = None,
    device: str | torch.device = "cpu",
    on_eval: Callable[[Mapping[str, Any]], None] | None = None,
) -> FitResult:
    """Train `network` in place and leave the weights with the best validation macro-F1 in it (on the CPU or `device`).

    Args:
        network: images (B, C, H, W) in [-1, 1] -> logits (B, K); make it under ``seeded(*key, "init")``.
        training: items ``{"image", "label"}`` (a `LabelledImages` is used as it is).
        validation: real images only; None keeps the last weights.
        recipe: steps, rates, policy.
        key: decides order, augmentation and drop-out.
        synthetic: one flag per training image, needed by `recipe.real_share` alone.
        augment: images (B, C, H, W) and B keys -> images, in the place of the recipe's policy.
        mixture: sources of the training images, their shares of every batch (in the place of `recipe.real_share`) and their
            weights in the loss; a source of weight 0 is left out as if it were not there.
        device: "cpu", "cuda", "mps".
        on_eval: called with each history entry.

    Raises:
        DataError: no training images.  ConfigError: the loss is no longer finite (code ``training-diverged``).
    """
    images = in_memory(training)
    held_out = None if validation is None or len(validation) == 0 else in_memory(validation)  # type: ignore[arg-type]
    network.to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    flags = None if synthetic is None else np.asarray(synthetic, dtype=bool)
    if mixture is not None:
        used = mixture.used()
        images, flags, mixture = images.select(used.tolist()), None if flags is None else flags[used], mixture.of_used()
    if mixture is not None and mixture.shares:
        indices_of = mixture.indices(recipe.batch_size, key)
    else:
        indices_of = batch_indices(len(images), recipe, key, flags)
    importance = None if mixture is None else mixture.importance()
    update = _update_function(network, optimiser, images, recipe, indices_of, key, augment, importance, device)
    trainer = Engine(update)
    keeper = BestKeeper(network, held_out, device, on_eval)

    @trainer.on(Events.ITERATION_COMPLETED)
    def _evaluate(engine: Engine) -> None:
        step = engine.state.iteration
        keeper.losses.append(float(engine.state.output))  # type: ignore[arg-type]
        if step % recipe.evaluate_every == 0 or step == recipe.num_steps:
            keeper.evaluate(step)

    trainer.run(range(recipe.num_steps), max_epochs=1)
    return keeper.restore()


def in_memory(dataset: Dataset[dict[str, Any]]) -> LabelledImages:
    """The data set as `LabelledImages`; one that is so already is given back as it is."""
    return dataset if isinstance(dataset, LabelledImages) else LabelledImages(dataset)


def _update_function(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: LabelledImages,
    recipe: ClassifierRecipe,
    indices_of: Callable[[int], np.ndarray],
    key: Key,
    augment: Augment | None,
    importance: np.ndarray | None,
    device: str | torch.device,
) -> Callable[[Engine, int], float]:
    """One optimiser step as an ignite process function; its batch is the 0-based step."""
    weights: Tensor | None = None
    change = partial(augment_batch, recipe.policy) if augment is None else lambda x, keys: Augmented(augment(x, keys))
    loss_of = LOSSES[recipe.head]

    def update(engine: Engine, step: int) -> float:
        nonlocal weights
        indices = indices_of(step)
        x, target = images.batch(indices)
        x, target = x.to(device), target.to(device)
        augmented = change(x, [(*key, "policy", step, position) for position in range(len(x))])
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate_factor(step, recipe)
        network.train()
        with seeded(*key, "dropout", step, device=device), mixed_precision(recipe.precision, device):
            logits = network(augmented.images).float()
        if recipe.class_balanced and weights is None:
            weights = class_weights(images.labels(), logits.shape[1]).to(device)
        counts = None if importance is None else torch.from_numpy(importance[indices]).to(device)
        loss = augmented.loss(loss_of, logits, target, counts, weight=weights, label_smoothing=recipe.label_smoothing)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ConfigError(
                "training-diverged",
                f"The classifier's loss is {value} at step {step + 1}; lower learning_rate ({recipe.learning_rate}).",
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.max_grad_norm)
        optimiser.step()
        return value

    return update


class BestKeeper:
    """Scores the network on validation, remembers the best weights and the history.

    Args:
        network: in training; scored as it is at every `evaluate`.
        validation: real images, or None: then the last weights count as the best.
        device: of the network.
        on_eval: called with each history entry.

    Attributes:
        losses: of the steps since the last `evaluate`; the trainer appends to it.
    """

    def __init__(
        self,
        network: nn.Module,
        validation: LabelledImages | None,
        device: str | torch.device,
        on_eval: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self.losses: list[float] = []
        self._network, self._validation, self._device, self._on_eval = network, validation, device, on_eval
        self._history: list[dict[str, Any]] = []
        self._best: tuple[float, int, dict[str, Tensor]] | None = None
        self._target = None if validation is None else validation.labels()

    def evaluate(self, step: int) -> None:
        """Enter the mean of `losses` and the scores on validation after `step`; keep the weights if they are no worse."""
        entry: dict[str, Any] = {"step": step, "loss": float(np.mean(self.losses)), "macro_f1": None, "accuracy": None}
        self.losses = []
        if self._validation is not None and self._target is not None:
            logits = predict_logits(self._network, self._validation, device=self._device)
            counts = confusion_counts(self._target, logits.argmax(1).numpy(), logits.shape[1])
            entry |= {"macro_f1": float(macro_f1(counts)), "accuracy": float(np.trace(counts) / counts.sum())}
            if self._best is None or entry["macro_f1"] >= self._best[0]:
                state = {name: tensor.detach().clone() for name, tensor in self._network.state_dict().items()}
                self._best = (entry["macro_f1"], step, state)
        self._history.append(entry)
        if self._on_eval is not None:
            self._on_eval(dict(entry))

    def restore(self) -> FitResult:
        """Put the best weights into the network (ties: the later) and say which step they are of."""
        if self._best is None:
            return FitResult(self._history[-1]["step"], None, self._history)
        score, step, state = self._best
        self._network.load_state_dict(state)
        return FitResult(step, score, self._history)


@torch.no_grad()
def predict_logits(
    network: nn.Module, dataset: Dataset[dict[str, Any]], batch_size: int | None = None, device: str | torch.device = "cpu"
) -> Tensor:
    """Logits (N, K) on the CPU, in evaluation mode; the network's mode is put back.

    Args:
        batch_size: None takes 256 images of up to 64 x 64 pixels and fewer larger ones, so that the memory does not grow with the size.

    Raises:
        DataError: the data set is empty.
    """
    images = in_memory(dataset)
    was_training = network.training
    network.to(device).eval()
    if batch_size is None:
        batch_size = min(256, max(1, _SCORED_PIXELS // images.batch(range(1))[0][0, 0].numel()))
    starts = range(0, len(images), batch_size)
    logits = [network(images.batch(range(start, min(start + batch_size, len(images))))[0].to(device)).cpu() for start in starts]
    network.train(was_training)
    return torch.cat(logits)
