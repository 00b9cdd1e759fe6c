"""Nearest neighbours in blocks: one float32 matrix product per block finds candidates, float64 differences decide among them.

The full distance matrix is never held. A squared distance from a product, |a|^2 - 2 a.b + |b|^2, loses digits where a
and b are close, which is where copies are: so the product only chooses candidates, within the bound of its rounding.
"""

from __future__ import annotations

import math

import numpy as np

from medaug.errors import DataError

BLOCK = 1 << 22  # numbers of a block of distances or differences held at once: 16 or 32 MB
MOST_CANDIDATES = 32  # beyond so many ties within float32 rounding the choice among them means nothing

__all__ = ["checked_features", "nearest", "unit_rows"]


def checked_features(features: np.ndarray) -> np.ndarray:
    """(N, D) float64, N of at least 1.

    Raises:
        DataError: another shape, no row, or values that are not finite (code `features-invalid`).
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0 or not np.isfinite(x).all():
        raise DataError("features-invalid", f"Features must be finite and (N, D) with N of at least 1, got shape {x.shape}.")
    return x


def unit_rows(features: np.ndarray) -> np.ndarray:
    """`checked_features`, each row divided by its L2 norm; a row of zeros stays."""
    x = checked_features(features)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(
    x: np.ndarray, y: np.ndarray, k: int = 1, *, x_groups: np.ndarray | None = None, y_groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of `y` for each row of `x` by Euclidean distance, nearest first, ties by index.

    Args:
        x: (N, D).
        y: (M, D), M >= k.
        k: how many.
        x_groups, y_groups: (N,), or (N, G) for several, and (M,) integers; rows of `y` of a group of a row of `x` are passed over.

    Returns:
        distances (N, k) float64, infinite where fewer than k rows are left, and indices (N, k), -1 there.

    Raises:
        DataError: `features-invalid`; fewer rows than k (code `neighbours-too-few`).
    """
    x, y = checked_features(x), checked_features(y)
    if x.shape[1] != y.shape[1]:
        raise DataError("features-invalid", f"Features must be (N, D) and (M, D), got {x.shape} and {y.shape}.")
    if not 1 <= k <= len(y):
        raise DataError("neighbours-too-few", f"{k} nearest neighbours need as many images to choose from, got {len(y)}.")
    centre = y.mean(axis=0)  # distances do not change, products lose less
    low_x, low_y = (x - centre).astype(np.float32), (y - centre).astype(np.float32)
    y_squares = np.einsum("ij,ij->i", low_y, low_y)
    distances, indices = np.full((len(x), k), np.inf), np.full((len(x), k), -1, dtype=np.int64)
    rows = max(1, BLOCK // len(y))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        block = low_x[part] @ low_y.T
        squares = np.einsum("ij,ij->i", low_x[part], low_x[part])
        block *= -2
        block += y_squares
        if x_groups is not None and y_groups is not None:
            for own in np.asarray(x_groups)[part].reshape(len(block), -1).T:
                block[own[:, None] == np.asarray(y_groups)[None, :]] = np.inf
        rounding = _rounding(x.shape[1], squares, y_squares)
        distances[part], indices[part] = _decide(block, rounding, x[part], y, k)
    return distances, indices


def _rounding(dimension: int, x_squares: np.ndarray, y_squares: np.ndarray) -> np.ndarray:
    """By how much a float32 squared distance may be off, (N,): a random walk of `dimension` roundings, with room to spare."""
    scale = x_squares + float(y_squares.max())
    return (8 * (math.sqrt(dimension) + 4) * np.finfo(np.float32).eps) * scale


def _decide(block: np.ndarray, rounding: np.ndarray, x: np.ndarray, y: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each row among those whose float32 value lies within the rounding of the k-th smallest."""
    kth = block.min(axis=1) if k == 1 else np.partition(block, k - 1, axis=1)[:, k - 1]
    close = block <= (kth + 2 * rounding)[:, None]
    close &= np.isfinite(block)
    limit = max(MOST_CANDIDATES, 4 * k)
    crowded = np.flatnonzero(close.sum(axis=1) > limit)
    for line in crowded:
        candidates = np.flatnonzero(close[line])
        chosen = candidates[np.argsort(block[line, candidates], kind="stable")[:limit]]
        close[line] = False
        close[line, chosen] = True
    row, column = np.nonzero(close)
    exact = _exact(x, y, row, column)
    order = np.lexsort((column, exact, row))
    row, column, exact = row[order], column[order], exact[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    distances, indices = np.full((len(x), k), np.inf), np.full((len(x), k), -1, dtype=np.int64)
    distances[row[kept], rank[kept]], indices[row[kept], rank[kept]] = exact[kept], column[kept]
    return distances, indices


def _exact(x: np.ndarray, y: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Distances of pairs of rows from their differences, float64."""
    found = np.empty(len(row))
    step = max(1, BLOCK // x.shape[1])
    for start in range(0, len(row), step):
        difference = x[row[start : start + step]] - y[column[start : start + step]]
        found[start : start + step] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    return found
