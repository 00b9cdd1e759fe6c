"""Operations on images with a magnitude each, from which strong views and RandAugment choose.

What the usual lists take from photographs and a medical image must not suffer is in no list by default: no solarise, posterise or
invert, because they make another tissue of a grey value; no colour change where there is no colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Operation = Callable[[Tensor, Tensor], Tensor]

ROTATION_DEGREES = 30.0
SHEAR = 0.3
TRANSLATION = 0.3

__all__ = ["COLOUR_OPERATIONS", "GREY_OPERATIONS", "OPERATIONS", "Operation", "apply_chosen", "usual_operations"]


def _warp(images: Tensor, matrices: Sequence[Sequence[Tensor]]) -> Tensor:
    """One affine resampling; `matrices` holds the six entries, each (B,), from output to input in [-1, 1]."""
    theta = torch.stack([torch.stack(list(row), dim=1) for row in matrices], dim=1)
    grid = functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _rotate(images: Tensor, m: Tensor) -> Tensor:
    angle, zero = m * math.radians(ROTATION_DEGREES), torch.zeros_like(m)
    return _warp(images, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


def _shear_x(images: Tensor, m: Tensor) -> Tensor:
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _warp(images, [[one, SHEAR * m, zero], [zero, one, zero]])


def _shear_y(images: Tensor, m: Tensor) -> Tensor:
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _warp(images, [[one, zero, zero], [SHEAR * m, one, zero]])


def _translate_x(images: Tensor, m: Tensor) -> Tensor:
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _warp(images, [[one, zero, 2 * TRANSLATION * m], [zero, one, zero]])


def _translate_y(images: Tensor, m: Tensor) -> Tensor:
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _warp(images, [[one, zero, zero], [zero, one, 2 * TRANSLATION * m]])


def _per_image(m: Tensor) -> Tensor:
    return m[:, None, None, None]


def _brightness(images: Tensor, m: Tensor) -> Tensor:
    return images + 0.5 * _per_image(m)  # up to a quarter of the range


def _contrast(images: Tensor, m: Tensor) -> Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * 2 ** _per_image(m)


def _gamma(images: Tensor, m: Tensor) -> Tensor:
    return 2 * ((images + 1) / 2).clamp(0, 1) ** (2 ** _per_image(m)) - 1


def _sharpness(images: Tensor, m: Tensor) -> Tensor:
    """Blurred for m < 0, sharpened for m > 0."""
    smooth = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images + _per_image(m) * (images - smooth)


def _saturation(images: Tensor, m: Tensor) -> Tensor:
    grey = images.mean(dim=1, keepdim=True)
    return grey + (images - grey) * (1 + 0.9 * _per_image(m))


def _posterise(images: Tensor, m: Tensor) -> Tensor:
    levels = 2 ** (8 - torch.round(4 * m.abs())) - 1
    return torch.round((images + 1) / 2 * _per_image(levels)) / _per_image(levels) * 2 - 1


def _solarise(images: Tensor, m: Tensor) -> Tensor:
    return torch.where(images > 1 - 2 * _per_image(m.abs()), -images, images)


# Each takes images (B, C, H, W) in [-1, 1] and magnitudes (B,) in [-1, 1]; 0 leaves the image alone but for `invert`.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, m: images,
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "brightness": _brightness,
    "contrast": _contrast,
    "gamma": _gamma,
    "sharpness": _sharpness,
    "saturation": _saturation,
    "posterise": _posterise,
    "solarise": _solarise,
    "invert": lambda images, m: -images,
}
GREY_OPERATIONS = tuple(name for name in OPERATIONS if name not in ("saturation", "posterise", "solarise", "invert"))
COLOUR_OPERATIONS = (*GREY_OPERATIONS, "saturation")


def usual_operations(channels: int) -> tuple[str, ...]:
    """Names of the operations that suit images of this many channels."""
    return COLOUR_OPERATIONS if channels == 3 else GREY_OPERATIONS


def apply_chosen(images: Tensor, names: Sequence[str], chosen: np.ndarray, magnitudes: Tensor) -> Tensor:
    """Image i changed by operation ``names[chosen[i]]`` with ``magnitudes[i]``, within [-1, 1]; a new tensor.

    Args:
        images: (B, C, H, W).  names: of `OPERATIONS`.  chosen: (B,) places in `names`.  magnitudes: (B,) in [-1, 1].
    """
    changed = images.clone()
    for place in np.unique(chosen):
        members = torch.from_numpy(np.flatnonzero(chosen == place)).to(images.device)
        changed[members] = OPERATIONS[names[place]](images[members], magnitudes[members].to(images.dtype)).clamp(-1, 1)
    return changed
