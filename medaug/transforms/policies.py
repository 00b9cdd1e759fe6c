"""Classic augmentations of a batch: every image's draw belongs to its own key, the application is one tensor operation.

Two rules hold for every policy, both learnt on real data (four-class chest CT, 552 training pictures):

* An identity share stays. Crop and rotation on *every* image cost a small network a third of its balanced accuracy
  (0.86 to 0.58 at equal steps), on half of the images nothing (0.85): the network must also see what it will be
  judged on. `crop_rotate` therefore leaves each image untouched with probability one half.
* No mirror. Left and right carry meaning in a medical image (situs, laterality marks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medaug.draws import numpy_generator
from medaug.errors import ConfigError

Key = Sequence[Hashable]
Policy = Callable[[Tensor, Sequence[Key]], Tensor]

CROP_AREA = (0.8, 1.0)
ROTATION_DEGREES = 15.0
IDENTITY_PROBABILITY = 0.5
SHIFT_FRACTION = 0.06

__all__ = ["POLICIES", "apply_policy", "check_policy", "crop_rotate", "none", "shift_whole_pixels", "weak"]


def none(images: Tensor, keys: Sequence[Key]) -> Tensor:
    """The images as they are."""
    return images


def crop_rotate(images: Tensor, keys: Sequence[Key]) -> Tensor:
    """Random resized crop (80 to 100 % of the area) and rotation (+-15 degrees) of half of the images.

    One affine resampling does both, so an image is interpolated once; what rotates in from outside repeats the border.
    Images that draw the identity come back bit for bit.
    """
    drawn = [_draw_crop_rotate(key) for key in keys]
    theta = torch.from_numpy(np.stack([matrix for matrix, _ in drawn])).to(images)
    keep = torch.tensor([identity for _, identity in drawn], device=images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(keep[:, None, None, None], images, moved)


def _draw_crop_rotate(key: Key) -> tuple[np.ndarray, bool]:
    """The 2 x 3 matrix from output to input coordinates (both in [-1, 1]), and whether the image stays untouched."""
    generator = numpy_generator(*key, "crop_rotate")
    identity = bool(generator.random() < IDENTITY_PROBABILITY)
    side = math.sqrt(generator.uniform(*CROP_AREA))
    angle = math.radians(generator.uniform(-ROTATION_DEGREES, ROTATION_DEGREES))
    centre_x, centre_y = generator.uniform(-(1 - side), 1 - side, size=2)
    cos, sin = side * math.cos(angle), side * math.sin(angle)
    return np.array([[cos, -sin, centre_x], [sin, cos, centre_y]], dtype=np.float32), identity


def weak(images: Tensor, keys: Sequence[Key]) -> Tensor:
    """Shift by up to 6 % of the side, in whole pixels so that nothing is blurred; the border is repeated."""
    return shift_whole_pixels(images, keys, SHIFT_FRACTION)


def shift_whole_pixels(images: Tensor, keys: Sequence[Key], fraction: float) -> Tensor:
    """Shift images (B, C, H, W) by up to `fraction` of the side, each by its own key; the border is repeated."""
    height, width = images.shape[-2:]
    shifts = np.stack([numpy_generator(*key, "weak").uniform(-fraction, fraction, size=2) for key in keys])
    offsets = torch.from_numpy(np.rint(shifts * [height, width]).astype(np.int64)).to(images.device)
    rows = (torch.arange(height, device=images.device) + offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:]).clamp(0, width - 1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing around the channel axis moves it to the end: (B, H, W, C).
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


POLICIES: dict[str, Policy] = {"none": none, "crop_rotate": crop_rotate, "weak": weak}


def check_policy(name: str) -> str:
    """Return `name` if it is a policy.

    Raises:
        ConfigError: it is not; the message lists the policies.
    """
    if name not in POLICIES:
        raise ConfigError("policy-unknown", f"An augmentation policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return name


def apply_policy(name: str, images: Tensor, keys: Sequence[Key]) -> Tensor:
    """Augment a batch; the result of image i depends on its pixels and ``keys[i]`` alone.

    Args:
        name: a key of `POLICIES`.
        images: shape (B, C, H, W), floating point; left unchanged.
        keys: one key (a tuple such as ``(seed, step, position)``) per image.

    Returns:
        Tensor of the same shape, type and device.

    Raises:
        ConfigError: the policy is unknown, the shape is not (B, C, H, W), or there is not one key per image.
    """
    check_policy(name)
    if images.ndim != 4 or len(keys) != len(images):
        raise ConfigError(
            "policy-input",
            f"A policy needs images of shape (B, C, H, W) and B keys, got shape {tuple(images.shape)} and {len(keys)} keys.",
        )
    return POLICIES[name](images, keys) if len(images) else images
