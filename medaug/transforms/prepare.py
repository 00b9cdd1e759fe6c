"""The way of one image into the network and back: picture -> unit image -> square -> tensor, and each inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medaug.errors import ConfigError, DataError
from medaug.io.blocks import BLOCK, percentiles, row_blocks
from medaug.io.limits import check_finite
from medaug.io.picture import Picture

if TYPE_CHECKING:
    from torch import Tensor

LUNG_WINDOW_HU = (-1350.0, 150.0)  # center -600, width 1500
PERCENTILES = (0.5, 99.5)
MAX_SIDE = 1 << 16  # pixels; the padded square of a longer strip would have 2^32


def to_unit(
    picture: Picture, window: tuple[float, float] | None = None, *, overwrite: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scale a picture's pixels to [0, 1].

    Args:
        picture: as read.
        window: (lower, upper) in the picture's unit; None takes the lung window [-1350, 150] for Hounsfield units,
            [0, 255] for 8-bit pictures, and the 0.5 and 99.5 percentile of this picture for everything else.
        overwrite: put the result into the memory of the picture's pixels, which are lost: for volumes.

    Returns:
        Unit image, float32 of the same shape, and what its 0 and 1 mean: ``{"kind": "window_hu", "0": -1350.0,
        "1": 150.0}``; kind is "uint8", "window_hu", "window_stored" or "percentile" (then 0 and 1 differ per image).

    Raises:
        ConfigError: `window-invalid` if not finite or not ascending, `window-not-hu` for a window on an 8-bit picture.
        DataError: `image-not-finite`.
    """
    check_finite(picture.pixels)
    kind, lower, upper = _range(picture, window)
    pixels = picture.pixels
    into = overwrite and pixels.dtype == np.float32 and pixels.flags.writeable
    unit = pixels if into else np.empty(pixels.shape, dtype=np.float32)
    for block in row_blocks(pixels):
        # float64: the width of two huge float32 values may overflow.
        scaled = pixels[block].astype(np.float64)
        scaled -= lower
        scaled /= upper - lower
        unit[block] = np.clip(scaled, 0.0, 1.0, out=scaled)
    return unit, {"kind": kind, "0": lower, "1": upper}


def _range(picture: Picture, window: tuple[float, float] | None) -> tuple[str, float, float]:
    if window is not None:
        lower, upper = (float(value) for value in window)
        if not (np.isfinite([lower, upper]).all() and lower < upper):
            raise ConfigError(
                "window-invalid", f"A window is two finite ascending numbers such as -1350,150; got {lower:g},{upper:g}."
            )
        if picture.unit == "uint8":
            raise ConfigError(
                "window-not-hu",
                "The window was given for Hounsfield or stored values, but this picture has 8 bits; leave --window out.",
            )
        return ("window_hu" if picture.unit == "hu" else "window_stored"), lower, upper
    if picture.unit == "hu":
        return "window_hu", *LUNG_WINDOW_HU
    if picture.unit == "uint8":
        return "uint8", 0.0, 255.0
    lower, upper = percentiles(picture.pixels, PERCENTILES)
    if lower >= upper:  # a mark on an even background
        lower, upper = float(picture.pixels.min()), float(picture.pixels.max())
    return "percentile", lower, upper if lower < upper else lower + max(1.0, abs(lower))


def square(unit_image: np.ndarray, size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Pad to a square with the minimum of the border, then resize with antialiasing; the aspect ratio is kept.

    Args:
        unit_image: (H, W) or (H, W, 3), float in [0, 1].
        size: side of the result in pixels.

    Returns:
        (size, size) or (size, size, 3) float32 in [0, 1], and the geometry that `unsquare` needs:
        original_size [rows, columns], padding [top, bottom, left, right], size.

    Raises:
        ConfigError: `image-size-invalid`.  DataError: `shape-invalid`, `image-too-large` for a side over `MAX_SIDE`.
    """
    _check_unit_shape(unit_image)
    if size < 1:
        raise ConfigError("image-size-invalid", f"The image size must be at least 1 pixel, got {size}.")
    height, width = unit_image.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise DataError("image-too-large", f"A picture of {height} x {width} pixels is longer than {MAX_SIDE}; crop it first.")
    top, left = max(width - height, 0) // 2, max(height - width, 0) // 2
    padding = [top, max(width - height, 0) - top, left, max(height - width, 0) - left]
    planes = [_squared(plane, padding, size) for plane in _planes(unit_image)]
    return _stack(planes), {"original_size": [height, width], "padding": padding, "size": size}


def unsquare(unit_image: np.ndarray, geometry: Mapping[str, Any]) -> np.ndarray:
    """Undo `square`: resize to the padded size and cut the padding off; shape (H, W) or (H, W, 3) as it was.

    Exact where `square` only padded; otherwise the detail that the smaller image lost stays lost.
    """
    _check_unit_shape(unit_image)
    height, width = geometry["original_size"]
    top, _, left, _ = geometry["padding"]
    planes = [_resize(plane, max(height, width))[top : top + height, left : left + width] for plane in _planes(unit_image)]
    return _stack(planes)


def prepare(unit_image: np.ndarray) -> Tensor:
    """Unit image (H, W) or (H, W, 3) -> float32 tensor (C, H, W) in [-1, 1]."""
    import torch

    _check_unit_shape(unit_image)
    planes = np.stack(_planes(unit_image)).astype(np.float32)
    return torch.from_numpy(planes * np.float32(2) - np.float32(1))


def restore(tensor: Tensor) -> np.ndarray:
    """Tensor (C, H, W) with C 1 or 3, about [-1, 1] -> unit image (H, W) or (H, W, 3), float32, clipped to [0, 1].

    Raises:
        DataError: `shape-invalid`, or `image-not-finite` for a diverged sample.
    """
    planes = tensor.detach().cpu().float().numpy()
    if planes.ndim != 3 or planes.shape[0] not in (1, 3):
        raise DataError("shape-invalid", f"An image tensor has shape (1, H, W) or (3, H, W), got {tuple(planes.shape)}.")
    check_finite(planes)
    unit = np.clip((planes + np.float32(1)) / np.float32(2), 0.0, 1.0)
    return _stack(list(unit))


def _check_unit_shape(unit_image: np.ndarray) -> None:
    if not (unit_image.ndim == 2 or (unit_image.ndim == 3 and unit_image.shape[2] == 3)) or unit_image.size == 0:
        raise DataError("shape-invalid", f"A unit image has shape (H, W) or (H, W, 3), got {tuple(unit_image.shape)}.")


def _planes(unit_image: np.ndarray) -> list[np.ndarray]:
    return [unit_image] if unit_image.ndim == 2 else [unit_image[..., channel] for channel in range(3)]


def _stack(planes: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(planes[0] if len(planes) == 1 else np.stack(planes, axis=-1), dtype=np.float32)


def _squared(plane: np.ndarray, padding: list[int], size: int) -> np.ndarray:
    """`_resize` of the padded plane; a large one is never padded nor copied as a whole.

    Pillow resizes rows first and keeps the result in float32, then columns, so that rows can be resized by blocks.
    """
    top, bottom, left, right = padding
    border = min(edge.min() for edge in (plane[0], plane[-1], plane[:, 0], plane[:, -1]))
    side = max(plane.shape)
    if side * side <= BLOCK or side == size:
        return _resize(np.pad(plane, ((top, bottom), (left, right)), constant_values=border), size)
    narrow = np.empty((side, size), dtype=np.float32)
    for block in row_blocks(plane, BLOCK * plane.shape[1] // side):
        rows = np.pad(plane[block], ((0, 0), (left, right)), constant_values=border)
        narrow[top + block.start : top + block.start + len(rows)] = _resized(rows, (size, len(rows)))
    empty = _resized(np.full((1, side), border, dtype=np.float32), (size, 1))
    narrow[:top], narrow[side - bottom :] = empty, empty
    return np.clip(_resized(narrow, (size, size)), 0.0, 1.0)


def _resized(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize(shape, Image.Resampling.BILINEAR))


def _resize(plane: np.ndarray, size: int) -> np.ndarray:
    """Antialiased resize of one float plane. Pillow's bilinear filter widens with the reduction and cannot ring."""
    if plane.shape == (size, size):
        return np.asarray(plane, dtype=np.float32)
    return np.clip(_resized(plane, (size, size)), 0.0, 1.0)
