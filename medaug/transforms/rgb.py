"""A cohort's images as the colour images of another size that a large pre-trained model works on, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medaug.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601-7, section 2.5.1


def to_rgb(images: Tensor, size: int) -> Tensor:
    """Grey or colour images (B, C, H, W), C 1 or 3, in [-1, 1] -> (B, 3, size, size) in [-1, 1]."""
    return resized(images, size).expand(-1, 3, -1, -1)


def from_rgb(images: Tensor, channels: int, size: int) -> Tensor:
    """Colour images (B, 3, H, W) -> (B, channels, size, size), the same range; grey is their luminance.

    Raises:
        ConfigError: neither 1 nor 3 channels (code `channels-invalid`).
    """
    if channels not in (1, 3):
        raise ConfigError("channels-invalid", f"A cohort's images have 1 or 3 channels, got {channels}.")
    if channels == 1:
        images = (images * images.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return resized(images, size)


def resized(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size) by the filter that intake shrinks with: bilinear, widened with the reduction.

    With another filter synthetic images would be sharper or softer than real ones, and a grader would see which is which.
    """
    from torch.nn.functional import interpolate

    if images.shape[-2:] == (size, size):
        return images
    return interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
