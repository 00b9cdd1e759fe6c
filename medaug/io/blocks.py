"""Whole pictures and volumes worked through in blocks of rows: double precision without a copy of everything in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 20  # values; 8 MB in float64


def row_blocks(array: np.ndarray, values: int = BLOCK) -> Iterator[slice]:
    """Slices of the first axis that hold about so many values each; everything at once if it is no larger."""
    length = len(array) if array.ndim else 1
    step = max(1, length if array.size <= values else values * length // max(1, array.size))
    return (slice(start, start + step) for start in range(0, length, step))


def percentiles(array: np.ndarray, wanted: tuple[float, float]) -> tuple[float, float]:
    """`np.percentile(array.astype(np.float64), wanted)` of finite float32 values to the last bit, without the copy.

    The values at the two ranks around each percentile are found by counting: first the upper, then the lower half of the
    bits of all values, turned so that they sort like the numbers.
    """
    if array.size <= 2 * BLOCK or array.dtype != np.float32:
        low, high = np.percentile(array.astype(np.float64), wanted)
        return float(low), float(high)
    places = [(array.size - 1) * np.true_divide(percent, 100.0) for percent in wanted]
    ranks = sorted({int(rank) for place in places for rank in (np.floor(place), min(np.floor(place) + 1, array.size - 1))})
    found = dict(zip(ranks, _at_ranks(array, ranks), strict=True))
    ends = []
    for place in places:
        rank = int(np.floor(place))
        below, above = found[rank], found[min(rank + 1, array.size - 1)]
        part, step = place - rank, above - below
        # As numpy interpolates: from the nearer end.
        ends.append(float(above - step * (1 - part) if part >= 0.5 else below + step * part))
    return ends[0], ends[1]


def _at_ranks(array: np.ndarray, ranks: list[int]) -> list[np.float64]:
    """The values that would be at these 0-based ranks after sorting."""
    upper = np.zeros(1 << 16, dtype=np.int64)
    for block in row_blocks(array):
        upper += np.bincount(_sortable(array[block]) >> np.uint32(16), minlength=1 << 16)
    ends = np.cumsum(upper)
    bins = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    lower = {place: np.zeros(1 << 16, dtype=np.int64) for place in bins}
    for block in row_blocks(array):
        bits = _sortable(array[block])
        halves = bits >> np.uint32(16)
        for place, counts in lower.items():
            counts += np.bincount(bits[halves == place] & np.uint32(0xFFFF), minlength=1 << 16)
    found = []
    for rank, place in zip(ranks, bins, strict=True):
        before = int(ends[place - 1]) if place else 0
        half = int(np.searchsorted(np.cumsum(lower[place]), rank - before, side="right"))
        found.append(_number(place << 16 | half))
    return found


def _sortable(block: np.ndarray) -> np.ndarray:
    """The bits of float32 values as unsigned numbers of the same order."""
    bits = (np.ascontiguousarray(block).ravel() + np.float32(0)).view(np.uint32)  # -0 becomes 0
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31))


def _number(sortable: int) -> np.float64:
    bits = sortable & 0x7FFFFFFF if sortable >> 31 else ~sortable & 0xFFFFFFFF
    return np.float64(np.array([bits], dtype=np.uint32).view(np.float32)[0])
