"""Training sets mixed from several sources: fixed shares of every batch, a weight for every image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from medaug.errors import ConfigError
from medaug.training.steps import EndlessOrder, Key

_TOLERANCE = 1e-9

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture:
    """Where the images of a training set come from and how the sources count.

    Attributes:
        source: name of every image's source, (N,).
        shares: source -> share of every batch; the sources without one have the rest in natural proportion.
        weights: source -> weight of its images in the loss, 1 where absent; 0 leaves the source out of the training.

    Raises:
        ConfigError: `share-without-source`, or `share-invalid` if the shares do not make a whole.
    """

    source: tuple[str, ...]
    shares: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        present = set(self.source)
        absent = sorted(set(self.shares) - present)
        if absent:
            raise ConfigError(
                "share-without-source", f"A batch share is given to {', '.join(absent)}, of which the training set has no image."
            )
        if any(self.weights.get(name) == 0 for name in self.shares):
            raise ConfigError("share-invalid", "A source with loss weight 0 is left out and has no share of a batch.")
        total, rest = math.fsum(self.shares.values()), self._rest()
        if self.shares and not (abs(total - 1) < _TOLERANCE if not rest else total < 1 - _TOLERANCE):
            wanted = f"below 1, to leave a place for {', '.join(rest)}" if rest else "1, since every source has one"
            raise ConfigError("share-invalid", f"The batch shares must sum to {wanted}; got {total:g}.")

    def _rest(self) -> list[str]:
        """Sources that share what is left, in order of first appearance."""
        return [name for name in dict.fromkeys(self.source) if name not in self.shares and self.weights.get(name) != 0]

    def used(self) -> np.ndarray:
        """Numbers of the images whose weight is not 0, (M,) int64."""
        return np.array([place for place, name in enumerate(self.source) if self.weights.get(name) != 0], dtype=np.int64)

    def of_used(self) -> Mixture:
        """The mixture of the images of `used` alone."""
        source = tuple(self.source[place] for place in self.used())
        return replace(self, source=source, weights={name: value for name, value in self.weights.items() if value != 0})

    def batch_counts(self, batch_size: int) -> dict[str, int]:
        """Images of every source with a share, and of the rest (""), in every batch: largest remainders, ties to the earlier.

        Raises:
            ConfigError: `share-too-small`, if one of them would have none.
        """
        if not self.shares:
            return {"": batch_size}
        wanted = {name: share * batch_size for name, share in self.shares.items()}
        if self._rest():
            wanted[""] = batch_size - math.fsum(wanted.values())
        counts = {name: math.floor(value + _TOLERANCE) for name, value in wanted.items()}
        order = sorted(wanted, key=lambda name: counts[name] - wanted[name])
        for name in order[: batch_size - sum(counts.values())]:
            counts[name] += 1
        if min(counts.values()) < 1:
            raise ConfigError(
                "share-too-small", f"In a batch of {batch_size} images a source would have none ({counts}); raise its share."
            )
        return counts

    def indices(self, batch_size: int, key: Key) -> Callable[[int], np.ndarray]:
        """The function step -> numbers (B,) of the images of its batch; every source has an endless order of its own."""
        names = np.array(self.source)
        parts = []
        for name, count in self.batch_counts(batch_size).items():
            pool = np.flatnonzero(names == name if name else np.isin(names, self._rest()))
            parts.append((EndlessOrder(pool, (*key, "share", name)), count))
        return lambda step: np.concatenate([order.take(step * count, count) for order, count in parts])

    def importance(self) -> np.ndarray | None:
        """Weight of every image, (N,) float32; None if all are 1."""
        if all(value == 1 for value in self.weights.values()):
            return None
        return np.array([self.weights.get(name, 1.0) for name in self.source], dtype=np.float32)
