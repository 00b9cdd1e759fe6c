"""Weak and strong views of an image, for training that compares the two: keyed draws, batched application.

What the usual lists take from photographs and a medical image must not suffer is left out by default: no mirror, because left and
right carry meaning (situs, laterality marks); no solarise, posterise or invert, because they make another tissue of a
grey value; no colour change where there is no colour. Data that allow them can name them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medaug.draws import numpy_generator
from medaug.errors import ConfigError
from medaug.transforms.operations import COLOUR_OPERATIONS, GREY_OPERATIONS, OPERATIONS, apply_chosen, usual_operations
from medaug.transforms.policies import shift_whole_pixels

Key = Sequence[Hashable]

__all__ = ["COLOUR_OPERATIONS", "GREY_OPERATIONS", "OPERATIONS", "Views", "cutout", "mirror"]


def mirror(images: Tensor, keys: Sequence[Key]) -> Tensor:
    """Left and right exchanged with probability one half."""
    drawn = torch.tensor([numpy_generator(*key, "mirror").random() < 0.5 for key in keys], device=images.device)
    return torch.where(drawn[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, keys: Sequence[Key], largest: float) -> Tensor:
    """A square of mid-grey (0), its side up to `largest` of the image's, centred anywhere (cut off by the border)."""
    height, width = images.shape[-2:]
    draws = np.stack([numpy_generator(*key, "cutout").random(3) for key in keys])
    half, y, x = (torch.from_numpy(draws[:, column]).to(images)[:, None] for column in range(3))
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    inside = ((rows - y).abs() <= half * largest / 2)[:, :, None] & ((columns - x).abs() <= half * largest / 2)[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)


@dataclass(frozen=True)
class Views:
    """The two augmentations of one image that consistency training compares.

    Attributes:
        pad: the weak view is a random crop of the image padded by this share of its side, in whole pixels (border repeated).
        flip: mirror half of the images, in both views; only where left and right mean nothing.
        operations: the strong view applies some of these, names in `OPERATIONS`; None takes `GREY_OPERATIONS` for
            one channel and `COLOUR_OPERATIONS` for three.
        num_operations: how many, drawn with repetition, each with a magnitude of its own (RandAugment, Cubuk et al. 2020,
            with uniform magnitudes).
        cutout: largest side of the square that the strong view blanks, as a share of the image's; 0 switches it off.
    """

    pad: float = 0.125
    flip: bool = False
    operations: tuple[str, ...] | None = None
    num_operations: int = 3
    cutout: float = 0.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.operations or () if name not in OPERATIONS]
        if unknown or self.operations == ():
            raise ConfigError(
                "view-operation-unknown",
                f"A strong view takes at least one of {', '.join(OPERATIONS)}, got {', '.join(unknown) or 'none'}.",
            )
        if not (0 <= self.pad <= 0.5 and 0 <= self.cutout <= 1 and self.num_operations >= 0):
            raise ConfigError(
                "view-invalid",
                "Views need pad in [0, 0.5], cutout in [0, 1] and num_operations of 0 or more, "
                f"got {self.pad!r}, {self.cutout!r} and {self.num_operations!r}.",
            )

    def weak(self, images: Tensor, keys: Sequence[Key]) -> Tensor:
        """Shifted, and mirrored if `flip`: images (B, C, H, W) in [-1, 1], one key per image; a new tensor."""
        shifted = shift_whole_pixels(images, [(*key, "view") for key in keys], self.pad) if self.pad else images
        return mirror(shifted, keys) if self.flip else shifted

    def strong(self, images: Tensor, keys: Sequence[Key]) -> Tensor:
        """The weak view, then `num_operations` operations and a cutout, within [-1, 1].

        Raises:
            ConfigError: a colour operation for grey images.
        """
        names = self._operations(images.shape[1])
        out = self.weak(images, keys)
        draws = [numpy_generator(*key, "strong") for key in keys]
        for _ in range(self.num_operations):
            chosen = np.array([draw.integers(len(names)) for draw in draws])
            magnitudes = torch.tensor([draw.uniform(-1, 1) for draw in draws], dtype=torch.float32, device=images.device)
            out = apply_chosen(out, names, chosen, magnitudes)
        return cutout(out, keys, self.cutout) if self.cutout else out

    def _operations(self, channels: int) -> tuple[str, ...]:
        if self.operations is None:
            return usual_operations(channels)
        if channels != 3 and "saturation" in self.operations:
            raise ConfigError(
                "view-needs-colour", f"The operation saturation needs 3 channels, these images have {channels}; leave it out."
            )
        return self.operations
