"""How far synthetic images are from real ones as distributions: KID, Frechet distance, precision, recall, density, coverage.

Values are comparable only within one feature extractor, so each result travels with its extractor's name. Below
`MINIMUM` images a metric says "insufficient" instead of a number that nobody should read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medaug.draws import numpy_generator, randn
from medaug.errors import ConfigError, DataError
from medaug.networks.grading import penultimate
from medaug.quality.neighbours import nearest

MINIMUM = 50
CHUNK = 512  # rows of a distance matrix held at once

__all__ = [
    "Estimate",
    "Extractor",
    "LogitFeatures",
    "RandomConvFeatures",
    "TaskFeatures",
    "features_of",
    "frechet_distance",
    "frechet_reduced",
    "kid",
    "neighbourhood_metrics",
    "polynomial_mmd2",
    "task_features",
]

Extractor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A metric with what is needed to trust it.

    Attributes:
        name: metric, such as "kid".
        value: None when `note` says why there is none.
        n_real, n_synthetic: images behind it.
        std: spread over subsets where the metric has one.
        reliable: False for a number that is known to be off, such as a Frechet distance with fewer images than 2 d.
        note: reason for a missing or unreliable value.
    """

    name: str
    value: float | None
    n_real: int
    n_synthetic: int
    std: float | None = None
    reliable: bool = True
    note: str = ""


class RandomConvFeatures:
    """Three random 3x3 convolutions of stride 2 with ReLU; means over a `grid` x `grid` raster and the global spread.

    Nothing is fitted, so training images look no nearer than new ones: the right ruler for copies. The same seed gives
    the same features on every machine up to rounding.

    Args:
        seed: of the weights.
        channels: input channels.
        grid: cells per side; 1 forgets positions, 4 tells where things are.
    """

    def __init__(self, seed: int = 0, channels: int = 1, grid: int = 4) -> None:
        self.name = f"random_conv-seed{seed}-grid{grid}"
        self._grid = grid
        widths = (channels, 32, 64, 64)
        self._weights = [
            randn((after, before, 3, 3), "random-conv", seed, layer) * (2 / (9 * before)) ** 0.5
            for layer, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 64 * grid^2 + 64) of images (B, C, H, W) in [-1, 1]."""
        x = images
        for weight in self._weights:
            x = functional.relu(functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), weight, stride=2))
        cells = functional.adaptive_avg_pool2d(x, self._grid).flatten(1)
        return torch.cat([cells, x.flatten(2).std(dim=2, correction=0)], dim=1)


class TaskFeatures:
    """Penultimate layer of a classifier trained on the real training split."""

    def __init__(self, network: nn.Module, name: str = "task") -> None:
        self.name = name
        self._network = network.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W) in [-1, 1]."""
        return penultimate(self._network, images)


class LogitFeatures:
    """Logits of a classifier trained on the real training split."""

    def __init__(self, network: nn.Module, name: str = "logits") -> None:
        self.name = name
        self._network = network.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [-1, 1]."""
        logits: Tensor = self._network(images)
        return logits


def task_features(network: nn.Module, name: str = "task") -> TaskFeatures:
    """The extractor of a classifier's penultimate layer."""
    return TaskFeatures(network, name)


def features_of(extractor: Extractor, batches: Iterable[Tensor]) -> np.ndarray:
    """Features (N, D) float64 of batches of images; only the features are held in memory.

    Raises:
        DataError: no images.
    """
    rows = [extractor(batch).double().numpy() for batch in batches]
    if not rows:
        raise DataError("features-empty", "Features need at least one image, got none.")
    return np.concatenate(rows)


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise DataError("features-invalid", f"Features must be (N, D) and (M, D), got {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("features-invalid", "Features must be finite.")
    return x, y


def _empty(name: str, x: np.ndarray, y: np.ndarray, minimum: int) -> Estimate:
    """An Estimate without a value: "insufficient" when either side has fewer than `minimum` images."""
    few = min(len(x), len(y)) < max(minimum, 2)
    return Estimate(name, None, len(x), len(y), reliable=not few, note="insufficient" if few else "")


def polynomial_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018); may be negative.

    Args:
        x: (N, D) float64, N >= 2.
        y: (M, D) float64, M >= 2.
    """
    n, m, d = len(x), len(y), x.shape[1]
    k_xx, k_yy, k_xy = (x @ x.T / d + 1) ** 3, (y @ y.T / d + 1) ** 3, (x @ y.T / d + 1) ** 3
    within = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1)) + (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within - 2 * k_xy.mean())


def kid(
    x: np.ndarray, y: np.ndarray, *, subsets: int = 100, subset_size: int | None = None, key: object = 0, minimum: int = MINIMUM
) -> Estimate:
    """Kernel inception distance: mean and standard deviation of `polynomial_mmd2` over random subsets.

    Args:
        x: real features (N, D).
        y: synthetic features (M, D).
        subsets: how many are drawn, without replacement within one.
        subset_size: None takes min(N, M, 1000). A subset that is the whole of both sets has no spread: std is then None.
        key: of the draws.
        minimum: fewer images on either side give no value.

    Raises:
        ConfigError: a subset size outside 2 .. min(N, M).
    """
    x, y = _checked(x, y)
    estimate = _empty("kid", x, y, minimum)
    if estimate.note:
        return estimate
    # Sorted rows: the draw then belongs to the set of images, not to their order.
    x, y = x[np.lexsort(x.T[::-1])], y[np.lexsort(y.T[::-1])]
    smaller = min(len(x), len(y))
    size = min(smaller, 1000) if subset_size is None else subset_size
    if not 2 <= size <= smaller or subsets < 1:
        raise ConfigError("subset-invalid", f"KID needs at least one subset of 2 to {smaller} images, got {subsets} of {size}.")
    if size == len(x) == len(y):
        return replace(estimate, value=polynomial_mmd2(x, y))
    draws = [numpy_generator("kid", key, index) for index in range(subsets)]
    values = [polynomial_mmd2(x[d.choice(len(x), size, replace=False)], y[d.choice(len(y), size, replace=False)]) for d in draws]
    return replace(estimate, value=float(np.mean(values)), std=float(np.std(values)))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(x: np.ndarray, y: np.ndarray, *, minimum: int = MINIMUM) -> Estimate:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of Gaussian fits (Heusel et al. 2017).

    The square roots are symmetric, by eigen-decomposition in float64, so no complex numbers appear. The value is biased
    upward for few images and marked unreliable below 2 d, where the covariances lose rank.
    """
    x, y = _checked(x, y)
    estimate = _empty("frechet", x, y, minimum)
    if estimate.note:
        return estimate
    s1, s2 = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    root = _symmetric_root(s1)
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(min=0)).sum()
    value = float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)
    needed = 2 * x.shape[1]
    few = min(len(x), len(y)) < needed
    note = f"fewer than {needed} images for {x.shape[1]} features" if few else ""
    return replace(estimate, value=value, reliable=not few, note=note)


def frechet_reduced(x: np.ndarray, y: np.ndarray, *, minimum: int = MINIMUM) -> Estimate:
    """`frechet_distance` in the first principal components of the real features `x`, where there are too few images for all.

    As many components as leave 2 d images on either side. Values are comparable only at equal numbers of them: the note says it.
    """
    x, y = _checked(x, y)
    kept = min(len(x), len(y)) // 2
    if x.shape[1] <= kept or min(len(x), len(y)) < max(minimum, 4):
        return frechet_distance(x, y, minimum=minimum)
    centre = x.mean(axis=0)
    axes = np.linalg.svd(x - centre, full_matrices=False)[2][:kept]
    found = frechet_distance((x - centre) @ axes.T, (y - centre) @ axes.T, minimum=minimum)
    return replace(found, note=f"{len(axes)} principal components of {x.shape[1]} features, as there are few images")


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row: the row itself is one of the zeros before it."""
    return nearest(x, x, k + 1)[0][:, k]


def neighbourhood_metrics(
    real: np.ndarray, synthetic: np.ndarray, *, k: int = 3, k_coverage: int = 5, minimum: int = MINIMUM
) -> dict[str, Estimate]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Precision: share of synthetic inside some real k-ball. Recall: share of real inside some synthetic k-ball. Density: real
    `k_coverage`-balls around a synthetic image, divided by `k_coverage`, on average. Coverage: share of real whose
    `k_coverage`-ball holds a synthetic image.

    Args:
        real: (N, D).  synthetic: (M, D).  k, k_coverage: neighbours that give a ball its radius.
    """
    x, y = _checked(real, synthetic)
    names = ("precision", "recall", "density", "coverage")
    estimates = {name: _empty(name, x, y, max(minimum, k + 1, k_coverage + 1)) for name in names}
    if estimates["precision"].note:
        return estimates
    real_radii, synthetic_radii, wide_radii = _radii(x, k), _radii(y, k), _radii(x, k_coverage)
    recalled, covered = np.zeros(len(x), bool), np.zeros(len(x), bool)
    precise = dense = 0
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    x_squares, y_squares = (x**2).sum(axis=1), (y**2).sum(axis=1)
    # A product rounds what a radius, from differences, does not: an image on the rim counts as inside.
    rounding = 1e-12 * (x_squares.max() + y_squares.max())
    for start in range(0, len(y), CHUNK):
        part = slice(start, start + CHUNK)
        squares = x_squares[:, None] + y_squares[None, part] - 2 * (x @ y[part].T) - rounding
        precise += int((squares <= real_radii[:, None] ** 2).any(axis=0).sum())
        inside = squares <= wide_radii[:, None] ** 2
        dense += int(inside.sum())
        covered |= inside.any(axis=1)
        recalled |= (squares <= synthetic_radii[None, part] ** 2).any(axis=1)
    values = (precise / len(y), recalled.mean(), dense / (k_coverage * len(y)), covered.mean())
    return {name: replace(estimates[name], value=float(value)) for name, value in zip(names, values, strict=True)}
