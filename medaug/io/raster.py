"""PNG, JPEG, TIFF, BMP and WebP pictures, and the two PNG forms a cohort stores."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.blocks import row_blocks
from medaug.io.picture import Picture

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # Pillow opens MPO through JPEG
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


def read_raster(path: Path) -> Picture:
    """Read one picture, whatever its file extension says.

    Grey (8, 16 or 32 bit) stays grey; colour whose three channels are equal becomes grey; palettes are resolved,
    alpha is dropped (not blended), and an EXIF orientation is applied. Colour is read with 8 bits per channel.

    Returns:
        Picture of unit "uint8", "uint16" or, for 32-bit TIFF, "stored".

    Raises:
        DataError: `image-unreadable`, `image-truncated`, `image-too-large`, `image-empty`, `image-not-finite`,
            `multi-frame-unsupported`.
    """
    path = Path(path)
    limits.check_file(path)
    array, kind = _decode(path)
    unit = {"uint8": "uint8", "uint16": "uint16"}.get(array.dtype.name, "stored")
    if array.ndim == 3 and all((array[block, :, :1] == array[block]).all() for block in row_blocks(array)):
        array = array[..., 0]
    pixels = np.ascontiguousarray(array, dtype=np.float32)
    limits.check_finite(pixels)
    acquisition = {
        "original_size": list(array.shape[:2]),
        "bits": array.dtype.itemsize * 8,
        "photometric": "RGB" if array.ndim == 3 else "MONOCHROME2",
        "format": kind,
    }
    return Picture(pixels, unit, acquisition=acquisition, source=storage.sha256_file(path))


def _decode(path: Path) -> tuple[np.ndarray, str]:
    """(H, W) of any number type or (H, W, 3) uint8, upright, and the format's name."""
    # Pillow warns above its own pixel cap; ours is lower and comes first.
    with limits.decoding("raster"), limits.silenced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(path) as image:
            limits.check_shape((image.height, image.width, len(image.getbands())))
            kind = str(image.format)
            # A multi-picture JPEG (MPO) is one photograph with previews; TIFF pages and WebP frames are several images.
            frames = 1 if kind in ("MPO", "PNG") else int(getattr(image, "n_frames", 1))
            if frames > 1:
                raise DataError(
                    "multi-frame-unsupported",
                    f"The {kind} file holds {frames} pictures, one was expected; save each as its own file.",
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _as_array(image), kind


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:  # beyond twice Pillow's own cap
        message = f"The header declares more pixels than the cap of {limits.MAX_PIXELS}; crop or shrink the image first."
        raise DataError("image-too-large", message) from None


def _as_array(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I;16", "I", "F")):
        array = np.asarray(image)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        # Pillow may widen 16-bit grey PNG to 32 bits.
        widened = image.mode == "I" and array.size and array.min() >= 0 and array.max() <= 65535
        return array.astype(np.uint16) if widened else array
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("LA").getchannel("L") if image.mode == "La" else image.convert("L"))
    return np.asarray(image.convert("RGB"))


def encode_unit_png(unit_image: np.ndarray) -> bytes:
    """PNG bytes of a unit image: 16-bit grey for (H, W), 8-bit RGB for (H, W, 3).

    Raises:
        DataError: other shape, values outside [0, 1], NaN.
    """
    image = np.asarray(unit_image)
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or image.size == 0:
        raise DataError("shape-invalid", f"A unit image has shape (H, W) or (H, W, 3), got {image.shape}.")
    limits.check_finite(image)
    if image.min() < 0 or image.max() > 1:
        raise DataError(
            "image-not-unit",
            f"A unit image lies in [0, 1], got {image.min():.4g} to {image.max():.4g}; scale it with `to_unit` first.",
        )
    levels, dtype = (65535, np.uint16) if image.ndim == 2 else (255, np.uint8)
    buffer = io.BytesIO()
    stored = np.empty(image.shape, dtype)
    for block in row_blocks(image):
        stored[block] = np.rint(image[block].astype(np.float64) * levels)
    Image.fromarray(stored).save(buffer, format="PNG")
    return buffer.getvalue()


def write_unit_png(path: Path, unit_image: np.ndarray) -> None:
    """Write a unit image (values in [0, 1]) as a cohort's PNG: 16-bit grey or 8-bit RGB, whole or not at all.

    Raises:
        DataError: see `encode_unit_png`.  StorageError: disk full, no permission.
    """
    storage.write_bytes(Path(path), encode_unit_png(unit_image))


def read_unit_png(path: Path) -> np.ndarray:
    """Read a cohort's PNG as float32 in [0, 1], shape (H, W) or (H, W, 3); colour with equal channels stays colour.

    Raises:
        DataError: see `read_raster`; `image-not-unit` for a PNG that is neither 8- nor 16-bit.
    """
    path = Path(path)
    limits.check_file(path)
    array, _ = _decode(path)
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError("image-not-unit", f"A cohort image is 8- or 16-bit PNG, got {array.dtype}.")
    return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
