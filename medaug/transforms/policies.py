"""Classic augmentations of a batch: every image's draw belongs to its own key, the application is one tensor operation.

Two rules hold for every policy, both learnt on real data (four-class chest CT, 552 training pictures):

* An identity share stays. Crop and rotation on *every* image cost a small network a third of its balanced accuracy
  (0.86 to 0.58 at equal steps), on half of the images nothing (0.85): the network must also see what it will be
  judged on. `crop_rotate` therefore leaves each image untouched with probability one half. (These were figures of a test split, so a
  comparison on those pictures is kind to `crop_rotate`.)
* No mirror. Left and right carry meaning in a medical image (situs, laterality marks).

`cutmix` mixes the images of a batch, so its result belongs to the whole batch, and whoever trains on it has to mix the loss:
`augment_batch` says with which partner and in what shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medaug.draws import numpy_generator
from medaug.errors import ConfigError
from medaug.transforms.operations import apply_chosen, usual_operations

Key = Sequence[Hashable]

CROP_AREA = (0.8, 1.0)
ROTATION_DEGREES = 15.0
IDENTITY_PROBABILITY = 0.5
SHIFT_FRACTION = 0.06
RANDAUGMENT_OPERATIONS = 2
RANDAUGMENT_MAGNITUDE = 0.3  # 9 of 30, the paper's choice for small networks
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 1 / 0.3)

__all__ = [
    "POLICIES",
    "Augmented",
    "apply_policy",
    "augment_batch",
    "check_policy",
    "crop_rotate",
    "cutmix",
    "none",
    "randaugment",
    "random_erasing",
    "shift_whole_pixels",
    "weak",
]


@dataclass(frozen=True)
class Augmented:
    """An augmented batch.

    Attributes:
        images: (B, C, H, W).
        partner: (B,) place in the batch of the image that each was mixed with; None if none was.
        share: of the own image, in [0, 1], the same for the whole batch; the partner has the rest.
    """

    images: Tensor
    partner: Tensor | None = None
    share: float = 1.0

    def loss(
        self, function: Callable[..., Tensor], logits: Tensor, target: Tensor, importance: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The loss for the mixed labels: share x loss(own) + (1 - share) x loss(partner's) (Yun et al. 2019, section 3.2).

        Args:
            function: (logits, target, importance=..., **options) -> scalar.
            logits: (B, K).  target: (B,).
            importance: (B,), how much each image counts, as an image and as a partner; None: all alike.
        """
        own = function(logits, target, importance=importance, **options)
        if self.partner is None:
            return own
        weights = None if importance is None else importance[self.partner]
        return self.share * own + (1 - self.share) * function(logits, target[self.partner], importance=weights, **options)


Policy = Callable[[Tensor, Sequence[Key]], Augmented]


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


def randaugment(images: Tensor, keys: Sequence[Key]) -> Tensor:
    """Two operations of magnitude +-0.3, drawn with repetition, on half of the images (RandAugment, Cubuk et al. 2020).

    The operations are those of `medaug.transforms.operations` that suit the channels: of colour only where there is colour, and
    none that turns one tissue's grey value into another's.
    """
    names = usual_operations(images.shape[1])
    draws = [numpy_generator(*key, "randaugment") for key in keys]
    keep = torch.tensor([draw.random() < IDENTITY_PROBABILITY for draw in draws], device=images.device)
    out = images
    for _ in range(RANDAUGMENT_OPERATIONS):
        chosen = np.array([draw.integers(len(names)) for draw in draws])
        signs = [RANDAUGMENT_MAGNITUDE * (2 * int(draw.integers(2)) - 1) for draw in draws]
        out = apply_chosen(out, names, chosen, torch.tensor(signs, dtype=torch.float32, device=images.device))
    return torch.where(keep[:, None, None, None], images, out)


def random_erasing(images: Tensor, keys: Sequence[Key]) -> Tensor:
    """A rectangle of 2 to 33 % of the area set to the image's mean, in half of the images (Zhong et al. 2020).

    The mean, one of the paper's fillings, and not noise: the edge of a noisy patch is brighter than any finding.
    """
    erased = images.clone()
    for image, key in zip(erased, keys, strict=True):
        draw = numpy_generator(*key, "random_erasing")
        if draw.random() < IDENTITY_PROBABILITY:
            continue
        height, width = image.shape[-2:]
        area = draw.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(draw.uniform(*np.log(ERASED_ASPECT)))
        rows, columns = (min(round(math.sqrt(area * ratio)), side) for ratio, side in ((aspect, height), (1 / aspect, width)))
        top, left = int(draw.integers(height - rows + 1)), int(draw.integers(width - columns + 1))
        image[:, top : top + rows, left : left + columns] = image.mean(dim=(1, 2), keepdim=True)
    return erased


def cutmix(images: Tensor, keys: Sequence[Key]) -> Augmented:
    """A box of every image replaced by the same box of another one of the batch, in half of the batches (Yun et al. 2019).

    One box, one share and one permutation for the batch, as in the paper: the share of the own image is uniform, the box has the
    rest of the area and is cut off by the border. All draws belong to the key of the first image.
    """
    draw = numpy_generator(*keys[0], "cutmix")
    if draw.random() < IDENTITY_PROBABILITY:
        return Augmented(images)
    height, width = images.shape[-2:]
    side = math.sqrt(1 - draw.random())
    centre_y, centre_x = int(draw.integers(height)), int(draw.integers(width))
    top, bottom = _clipped(centre_y, side * height, height)
    left, right = _clipped(centre_x, side * width, width)
    partner = torch.from_numpy(draw.permutation(len(images))).to(images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
    return Augmented(mixed, partner, 1 - (bottom - top) * (right - left) / (height * width))


def _clipped(centre: int, length: float, side: int) -> tuple[int, int]:
    """First and last-plus-one pixel of an interval of `length` around `centre`, within the image."""
    return max(int(centre - length / 2), 0), min(int(centre + length / 2), side)


def _alone(change: Callable[[Tensor, Sequence[Key]], Tensor]) -> Policy:
    """A policy that treats every image for itself."""
    return lambda images, keys: Augmented(change(images, keys))


POLICIES: dict[str, Policy] = {
    "none": _alone(none),
    "crop_rotate": _alone(crop_rotate),
    "weak": _alone(weak),
    "randaugment": _alone(randaugment),
    "random_erasing": _alone(random_erasing),
    "cutmix": cutmix,
}


def check_policy(name: str) -> str:
    """Return `name` if it is a policy.

    Raises:
        ConfigError: it is not; the message lists the policies.
    """
    if name not in POLICIES:
        raise ConfigError("policy-unknown", f"An augmentation policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return name


def augment_batch(name: str, images: Tensor, keys: Sequence[Key]) -> Augmented:
    """Augment a batch; unless images are mixed, the result of image i depends on its pixels and ``keys[i]`` alone.

    Args:
        name: a key of `POLICIES`.
        images: shape (B, C, H, W), floating point; left unchanged.
        keys: one key (a tuple such as ``(seed, step, position)``) per image.

    Returns:
        Images of the same shape, type and device, and what their labels are mixed of.

    Raises:
        ConfigError: the policy is unknown, the shape is not (B, C, H, W), or there is not one key per image.
    """
    check_policy(name)
    if images.ndim != 4 or len(keys) != len(images):
        raise ConfigError(
            "policy-input",
            f"A policy needs images of shape (B, C, H, W) and B keys, got shape {tuple(images.shape)} and {len(keys)} keys.",
        )
    return POLICIES[name](images, keys) if len(images) else Augmented(images)


def apply_policy(name: str, images: Tensor, keys: Sequence[Key]) -> Tensor:
    """The images of `augment_batch`, for those who have no labels to mix.

    Raises:
        ConfigError: as `augment_batch`; `policy-mixes-labels`: the policy mixed images of two labels.
    """
    mixture = augment_batch(name, images, keys)
    if mixture.partner is not None:
        raise ConfigError(
            "policy-mixes-labels", f"The policy {name} mixes images, so it can only be used where their labels are mixed too."
        )
    return mixture.images
