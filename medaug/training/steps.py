"""What every classifier training shares, step by step: the keyed order of images, the learning rate, the class weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from medaug.draws import numpy_generator
from medaug.errors import ConfigError

if TYPE_CHECKING:
    from medaug.training.classifier import ClassifierRecipe

Key = tuple[Hashable, ...]

PRECISIONS = ("float32", "bfloat16")

__all__ = [
    "PRECISIONS",
    "EndlessOrder",
    "batch_indices",
    "check_precision",
    "class_weights",
    "mixed_precision",
    "one_thread",
    "rate_factor",
]


def mixed_precision(precision: str, device: str | torch.device) -> torch.autocast:
    """The context of a forward pass: with "bfloat16" convolutions and matrix products take 16 bits, weights and losses keep 32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision != "float32")


def check_precision(precision: str, device: str | torch.device) -> None:
    """Refuse 16 bits where the processor has no instructions for them: they would take many times as long as 32.

    Raises:
        ConfigError: `precision-slow`.
    """
    if precision == "bfloat16" and torch.device(device).type == "cpu" and not _fast_bfloat16():
        raise ConfigError(
            "precision-slow",
            "This processor has no instructions for bfloat16 and would be slower with it; use --precision float32.",
        )


def _fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch in the block, the former number after it.

    A sum over several threads is ordered by their number, so results of two threads differ from those of one in the last digits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class EndlessOrder:
    """Position of every training image in the endless, keyed order: epoch after epoch, each one a permutation.

    Args:
        pool: (N,) numbers of the images, at least one.
        key: of the permutations.
    """

    def __init__(self, pool: np.ndarray, key: Key) -> None:
        self._pool, self._key, self._epoch = pool, key, -1
        self._permutation = pool

    def take(self, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count - 1 of the order, (count,) int64."""
        return np.array([self._at(place) for place in range(start, start + count)], dtype=np.int64)

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._pool))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = numpy_generator(*self._key, "order", epoch).permutation(self._pool)
        return int(self._permutation[offset])


def batch_indices(size: int, recipe: ClassifierRecipe, key: Key, synthetic: np.ndarray | None) -> Callable[[int], np.ndarray]:
    """The function step -> indices (B,) of its batch; any step can be asked for without the ones before.

    Args:
        size: number of training images.
        recipe: its `batch_size`, and its `real_share` if there are both real and synthetic images.
        key: of the order.
        synthetic: (size,) flags, needed by `real_share` alone.
    """
    everything = np.arange(size)
    mixed = synthetic is not None and recipe.real_share is not None and 0 < int(synthetic.sum()) < size
    if not mixed or synthetic is None or recipe.real_share is None:
        order = EndlessOrder(everything, key)
        return lambda step: order.take(step * recipe.batch_size, recipe.batch_size)
    num_real = round(recipe.batch_size * recipe.real_share)
    num_synthetic = recipe.batch_size - num_real
    real_order = EndlessOrder(everything[~synthetic], (*key, "real"))
    synthetic_order = EndlessOrder(everything[synthetic], (*key, "synthetic"))
    return lambda step: np.concatenate(
        [real_order.take(step * num_real, num_real), synthetic_order.take(step * num_synthetic, num_synthetic)]
    )


def rate_factor(step: int, recipe: ClassifierRecipe) -> float:
    """Factor on the learning rate at 0-based `step`: linear warm-up, then half a cosine that would reach 0 at num_steps."""
    warmup = round(recipe.warmup_fraction * recipe.num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(recipe.num_steps - warmup, 1)))


def class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Weights (K,) of the loss, inverse to the class frequency of labels (N,), 1 where classes are even."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1))).float()
