"""How alike two pictures are once mirrored, shifted or cropped: correlation of pixels, which contrast does not change.

A copy that was flipped, moved by a few pixels, cropped a little, given another contrast or some noise is still a copy, and
features that see positions miss it. Candidates come from a coarse grid by matrix products; the best of them are
compared over every shift.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medaug.errors import DataError

SIDE = 32  # larger pictures are averaged down to this side: copies show at any size
SHIFT_SHARE = 3 / 32  # largest shift, as a share of the side
SCALES = (1.0, 0.975, 0.95, 0.925, 0.9)  # shares of the side that a crop keeps
COARSE = (0, 2, 4)  # of the scales: enough for finding candidates
CELLS = 7  # along each side of the coarse grid
BLUR = 0.7  # standard deviation in pixels; takes most of white noise away and little of what tells pictures apart
CANDIDATES = 8
DIGITS = 6  # float32 leaves no more of 1 - correlation
_QUERIES = 32  # pictures screened at once
_ALIGNED = 8  # pictures aligned at once: their windows take 5 MB, which stays in the cache's reach and in the allocator's hands

__all__ = ["Match", "PixelIndex", "ssim", "working_images"]


@dataclass(frozen=True)
class Match:
    """Nearest pictures.

    Attributes:
        distance: 1 - correlation at the best alignment, (N,) in [0, 2]; infinite without a candidate.
        index: of the nearest picture, (N,), -1 without one.
        second: the smallest distance to a picture of another group than the nearest one's, (N,); infinite without one.
        similarity: SSIM of the two at that alignment, (N,).
    """

    distance: np.ndarray
    index: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


def working_images(batches: Iterable[Tensor]) -> Tensor:
    """Grey pictures (N, S, S), S at most `SIDE`, slightly blurred, of batches (B, C, H, W) in [-1, 1].

    Raises:
        DataError: no pictures, or pixels that are not finite (code `features-invalid`).
    """
    small = []
    for batch in batches:
        side = min(SIDE, batch.shape[-1])
        small.append(_blurred(functional.adaptive_avg_pool2d(batch.mean(dim=1, keepdim=True), side))[:, 0])
    if not small or not all(bool(torch.isfinite(part).all()) for part in small):
        raise DataError("features-invalid", "Pictures to compare must be finite, and at least one.")
    return torch.cat(small)


def _gaussian(sigma: float, radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return kernel / kernel.sum()


def _blurred(x: Tensor, sigma: float = BLUR) -> Tensor:
    kernel = _gaussian(sigma, 3)
    x = functional.pad(x, (3, 3, 3, 3), mode="replicate")
    return functional.conv2d(functional.conv2d(x, kernel[None, None, None]), kernel[None, None, :, None])


def _centre_crop(x: Tensor, share: float) -> Tensor:
    """The middle of pictures (N, S, S), `share` of the side, enlarged to S."""
    if share == 1:
        return x
    theta = torch.tensor([[share, 0, 0], [0, share, 0]], dtype=x.dtype).expand(len(x), 2, 3)
    grid = functional.affine_grid(theta, [len(x), 1, *x.shape[1:]], align_corners=False)
    return functional.grid_sample(x[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]


def _mirrored(x: Tensor) -> Tensor:
    """(N, 4, S, S): as it is, left-right, up-down, both."""
    return torch.stack([x, x.flip(-1), x.flip(-2), x.flip(-1, -2)], dim=1)


def _normed(x: Tensor) -> Tensor:
    """Rows without mean and of length 1; a constant row becomes 0."""
    x = x - x.mean(dim=-1, keepdim=True)
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-4, x / length.clamp_min(1e-4), torch.zeros_like(x))


class PixelIndex:
    """Pictures to look others up in.

    Args:
        pictures: (M, S, S) of `working_images`.
        groups: (M,) integers; images of one group (patient) do not count as each other's second nearest.
    """

    def __init__(self, pictures: Tensor, groups: np.ndarray) -> None:
        self.groups = np.asarray(groups)
        self.reach = max(1, round(SHIFT_SHARE * pictures.shape[-1]))
        self.window = pictures.shape[-1] - 2 * self.reach
        if self.window < 4:
            raise DataError("image-size", f"Comparing pixels needs images of at least 8 pixels, got {pictures.shape[-1]}.")
        self._scaled = torch.stack([_centre_crop(pictures, share) for share in SCALES], dim=1)
        self._coarse = torch.stack([self._cells(self._scaled[:, index]) for index in COARSE])

    def __len__(self) -> int:
        return len(self.groups)

    def _cells(self, x: Tensor, down: int = 0, right: int = 0) -> Tensor:
        """Normed coarse grids (N, cells) of the windows `down` and `right` of the middle."""
        top, left, size = self.reach + down, self.reach + right, self.window
        part = x[..., top : top + size, left : left + size]
        return _normed(functional.adaptive_avg_pool2d(part, min(CELLS, size)).flatten(-2))

    def match(self, pictures: Tensor, groups: np.ndarray | None = None) -> Match:
        """The nearest pictures of the index.

        Args:
            pictures: (N, S, S) of `working_images`.
            groups: (N,) integers; pictures of the same group are passed over.
        """
        parts = []
        for start in range(0, len(pictures), _QUERIES):
            block = pictures[start : start + _QUERIES]
            own = None if groups is None else np.asarray(groups)[start : start + _QUERIES]
            parts.append(self._match(block, own))
        return Match(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def pairs(self, pictures: Tensor, indices: np.ndarray) -> np.ndarray:
        """Distance (N,) of each picture to the picture of the index that `indices` names."""
        found = []
        for start in range(0, len(pictures), _QUERIES):
            part = slice(start, start + _QUERIES)
            chosen = torch.from_numpy(np.asarray(indices)[part, None])
            found.append(self._align(_mirrored(pictures[part]), chosen)[0][:, 0])
        return _distance(torch.cat(found))

    @torch.no_grad()
    def _match(self, pictures: Tensor, groups: np.ndarray | None) -> tuple[np.ndarray, ...]:
        mirrored = _mirrored(pictures)
        coarse = self._screen(mirrored)
        if groups is not None:
            coarse[torch.from_numpy(groups[:, None] == self.groups[None, :])] = -2.0
        scores, candidates = coarse.topk(min(CANDIDATES, len(self)), dim=1)
        values, places = self._align(mirrored, candidates)
        values[scores < -1.5] = -torch.inf  # of the own group: only chosen where nothing else was left
        best = values.argmax(dim=1)
        rows = torch.arange(len(values))
        index = candidates[rows, best].numpy()
        other = torch.from_numpy(self.groups[candidates.numpy()] != self.groups[index][:, None])
        second = torch.where(other, values, -torch.inf).max(dim=1).values
        similarity = self._similarity(mirrored, index, places[rows, best])
        nothing = ~np.isfinite(values[rows, best].numpy())
        return _distance(values[rows, best]), np.where(nothing, -1, index), _distance(second), similarity

    def _screen(self, mirrored: Tensor) -> Tensor:
        """Coarse correlation (N, M), the best over mirrors, scales and every shift: one pixel off, a copy looks like a stranger."""
        best = torch.full((len(mirrored), len(self)), -1.0)
        shifts = range(-self.reach, self.reach + 1)
        for down in shifts:
            for right in shifts:
                cells = self._cells(mirrored, down, right)
                flat = cells.reshape(-1, cells.shape[-1])
                for templates in self._coarse:
                    found = (flat @ templates.T).reshape(len(mirrored), 4, -1)
                    torch.maximum(best, found.amax(dim=1), out=best)
        return best

    def _align(self, mirrored: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Best correlation (N, C) over mirrors, scales and every shift, and its place as a flat number (N, C)."""
        middle = slice(self.reach, self.reach + self.window)
        queries = _normed(mirrored[..., middle, middle].flatten(-2))  # (N, 4, P)
        values, places = [], []
        for query, chosen in zip(queries.split(_ALIGNED), candidates.split(_ALIGNED), strict=True):
            for column in range(candidates.shape[1]):
                windows = _normed(self._windows(chosen[:, column]))
                top = torch.bmm(windows, query.transpose(1, 2)).flatten(1).max(dim=1)  # of (B, scales * shifts * 4)
                values.append(top.values)
                places.append(top.indices)
        return self._columns(values, candidates), self._columns(places, candidates)

    @staticmethod
    def _columns(parts: list[Tensor], candidates: Tensor) -> Tensor:
        """Parts of (B,), candidate by candidate within each block of rows, as (N, C)."""
        width = candidates.shape[1]
        return torch.cat([torch.stack(parts[start : start + width], dim=1) for start in range(0, len(parts), width)])

    def _windows(self, index: Tensor) -> Tensor:
        """Every window of every scale of some pictures, (N, scales * shifts, P)."""
        size = self.window
        return self._scaled[index].unfold(2, size, 1).unfold(3, size, 1).flatten(1, 3).flatten(-2)

    def _similarity(self, mirrored: Tensor, index: np.ndarray, place: Tensor) -> np.ndarray:
        """SSIM (N,) of the middle of each picture, mirrored as `place` says, with the window found there."""
        rows, middle = torch.arange(len(mirrored)), slice(self.reach, self.reach + self.window)
        query = mirrored[rows, place % 4][..., middle, middle]
        found = self._windows(torch.from_numpy(index))[rows, place // 4].reshape(query.shape)
        return np.asarray(ssim(query, found))


def _distance(correlation: Tensor) -> np.ndarray:
    return np.maximum(np.round(1 - correlation.double().numpy(), DIGITS), 0)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (N,) of pictures (N, H, W) in [-1, 1]: Gaussian window of 1.5 pixels (Wang et al. 2004, eq. 13).

    Only windows that lie inside the picture count; a picture smaller than the window of 11 pixels is padded.
    """
    radius = 5
    if min(x.shape[-2:]) <= 2 * radius:
        x, y = (functional.pad(part[:, None], (radius,) * 4, mode="replicate")[:, 0] for part in (x, y))
    kernel = _gaussian(1.5, radius)

    def mean(values: Tensor) -> Tensor:
        rows = functional.conv2d(values[:, None], kernel[None, None, None])
        return functional.conv2d(rows, kernel[None, None, :, None])[:, 0]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of [-1, 1] is 2
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.flatten(1).mean(dim=1)
