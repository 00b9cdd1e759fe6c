"""Keyed random draws: every draw belongs to its key (seed, stage, case, step), none to a stream.

The same key gives the same numbers whatever ran before, whatever the batch size or the number of workers, so a
resumed run needs no generator state and a sample does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key_seed(*key: object) -> int:
    """A 63-bit seed from the parts of a key, stable across processes and machines.

    Parts are joined by their `repr`, so that ``("a", 1)`` and ``("a1",)`` differ.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def numpy_generator(*key: object) -> np.random.Generator:
    """A NumPy generator for this key alone."""
    return np.random.Generator(np.random.Philox(key_seed(*key)))


def torch_generator(*key: object) -> torch.Generator:
    """A CPU torch generator for this key alone."""
    import torch

    return torch.Generator().manual_seed(key_seed(*key))


def randn(shape: Sequence[int], *key: object) -> torch.Tensor:
    """Standard normal tensor of `shape` (float32, CPU) for this key alone."""
    import torch

    return torch.randn(tuple(shape), generator=torch_generator(*key))


def randn_batch(shape: Sequence[int], keys: Sequence[object], *prefix: object) -> torch.Tensor:
    """Stack one draw per key: shape (len(keys), *shape). Sample i depends on ``(*prefix, keys[i])`` only."""
    import torch

    return torch.stack([randn(shape, *prefix, key) for key in keys])
