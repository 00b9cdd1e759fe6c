"""Stored pixel values of DICOM files: the Image Pixel module checked, one decoder per transfer syntax, frame by frame.

Which decoder reads a transfer syntax is fixed here and depends on the file alone, so that two installations give the
same pixels or one of them says which package it lacks. pydicom by itself takes the first plugin that it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom_elements import code, integer
from medaug.io.dicom_file import NATIVE

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
# pydicom's name of the plugin that decodes a transfer syntax. Pillow is always there, but fails on some JPEG 2000 files
# (colour of more than 8 bits, some JP2 headers) and on JPEG of 12 bits.
PLUGINS = {
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "pillow",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
    RLELossless: "pydicom",
}
PACKAGES = {
    "gdcm": "python-gdcm",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg pylibjpeg-openjpeg",
    "pillow": "pillow",
    "pydicom": "pydicom",
}
_JPEG_SIZES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})  # SOFn, JPEG-LS


def check_pixel_format(dataset: Dataset, frames: int = 1) -> None:
    """Check the Image Pixel module (PS3.3 C.7.6.3) against itself, the caps, and the length of uncompressed data.

    Raises:
        DataError: `pixel-format-invalid`, `shape-invalid`, `image-too-large`, `image-truncated`.
    """
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    samples = integer(dataset, "SamplesPerPixel", 1)
    allocated, stored = integer(dataset, "BitsAllocated"), integer(dataset, "BitsStored")
    photometric = code(dataset, "PhotometricInterpretation")
    limits.check_shape((rows, columns, samples))
    if frames > 1:
        limits.check_shape((frames, rows, columns, samples), limits.MAX_VOXELS)
    if photometric not in GREY + COLOUR:
        raise DataError(
            "pixel-format-invalid", f"(0028,0004) PhotometricInterpretation must be one of {', '.join(GREY + COLOUR)}."
        )
    expected = 3 if photometric in COLOUR and photometric != "PALETTE COLOR" else 1
    if samples != expected:
        raise DataError(
            "pixel-format-invalid", f"(0028,0002) SamplesPerPixel must be {expected} for {photometric}, got {samples}."
        )
    if allocated not in (8, 16, 32):
        raise DataError("pixel-format-invalid", f"(0028,0100) BitsAllocated must be 8, 16 or 32, got {allocated}.")
    if not 1 <= stored <= allocated:
        raise DataError("pixel-format-invalid", f"(0028,0101) BitsStored must be 1 to BitsAllocated = {allocated}, got {stored}.")
    if integer(dataset, "HighBit", stored - 1) != stored - 1:
        raise DataError("pixel-format-invalid", f"(0028,0102) HighBit must be BitsStored - 1 = {stored - 1} (PS3.5 8.1.1).")
    if integer(dataset, "PixelRepresentation", 0) not in (0, 1):
        raise DataError("pixel-format-invalid", "(0028,0103) PixelRepresentation must be 0 or 1.")
    if dataset.file_meta.TransferSyntaxUID in NATIVE:
        subsampled = 2 if photometric == "YBR_FULL_422" else 3
        needed = frames * rows * columns * (samples if samples == 1 else subsampled) * allocated // 8
        length = len(dataset.PixelData or b"")
        if length < needed:
            what = f"{frames} x {rows} x {columns}" if frames > 1 else f"{rows} x {columns}"
            raise DataError(
                "image-truncated", f"{what} pixels need {needed} bytes of PixelData, got {length}; copy the file again."
            )


def decode_frames(dataset: Dataset, frames: int, order: list[int] | None = None) -> Iterator[np.ndarray]:
    """Stored values frame by frame: (rows, columns), or (rows, columns, 3) with YBR turned into RGB.

    Unused high bits are as in the file, since a padding value may use them.

    Args:
        dataset: checked by `check_pixel_format`.
        frames: how many there are.
        order: 0-based frames to yield, in this order; None yields all as they are stored.

    Raises:
        DataError: `transfer-syntax-unsupported` (names the package to install), `image-unreadable`.
    """
    wanted = list(range(frames)) if order is None else order
    if not wanted:
        return
    if _is_plain(dataset):
        yield from _native(dataset, wanted)
        return
    syntax = dataset.file_meta.TransferSyntaxUID
    plugin = _plugin(dataset) or ""
    decoder = get_decoder(syntax)
    shape = (integer(dataset, "Rows"), integer(dataset, "Columns"))
    if plugin and plugin != "pydicom":
        _check_streams(dataset, frames, shape)
    # Without indices pydicom walks the fragments once, with them again for every frame; but then it cannot correct the
    # sign of JPEG 2000 samples (3.0.2: "output array is read-only").
    at_once = frames > 1 and wanted == list(range(frames)) and plugin != "pylibjpeg"
    arrays = decoder.iter_array(dataset, indices=None if at_once else wanted, decoding_plugin=plugin, correct_unused_bits=False)
    count = 0
    while (array := _next(arrays)) is not None:
        if array.shape[:2] != shape:
            raise _other_size(shape)
        count += 1
        yield array
        if count == len(wanted):
            return
    raise DataError("image-truncated", f"The header declares {frames} frames, the data hold {count}; copy the file again.")


def _next(arrays: Iterator[tuple[np.ndarray, dict[str, Any]]]) -> np.ndarray | None:
    with limits.silenced():
        return next(arrays, (None, {}))[0]


def _is_plain(dataset: Dataset) -> bool:
    """Grey and uncompressed in little endian: no decoder is needed."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return syntax in NATIVE and syntax != ExplicitVRBigEndian and integer(dataset, "SamplesPerPixel", 1) == 1


def _native(dataset: Dataset, order: list[int]) -> Iterator[np.ndarray]:
    kind = "i" if integer(dataset, "PixelRepresentation", 0) else "u"
    dtype = np.dtype(f"<{kind}{integer(dataset, 'BitsAllocated') // 8}")
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    for index in order:
        offset = index * rows * columns * dtype.itemsize
        yield np.frombuffer(dataset.PixelData, dtype, rows * columns, offset).reshape(rows, columns)


def _plugin(dataset: Dataset) -> str | None:
    """The plugin that decodes this file, None if it needs none.

    Raises:
        DataError: `transfer-syntax-unsupported`.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in PLUGINS:
        plugin, bits = PLUGINS[syntax], integer(dataset, "BitsStored")
        if syntax == JPEGExtended12Bit and bits > 8:
            raise DataError(
                "transfer-syntax-unsupported",
                f"The pixels are in {syntax.name} with {bits} bits, for which no maintained decoder exists; "
                "export the file as Explicit VR Little Endian.",
            )
        if plugin not in get_decoder(syntax).available_plugins:
            raise DataError(
                "transfer-syntax-unsupported",
                f"The pixels are in {syntax.name}, whose decoder is not installed; run `pip install {PACKAGES[plugin]}`.",
            )
        return plugin
    if syntax in NATIVE:
        return None
    name = syntax.name if syntax.name != syntax else "an unknown transfer syntax"
    raise DataError(
        "transfer-syntax-unsupported",
        f"The pixels are in {name}, which medaug does not decode; export the file as Explicit VR Little Endian.",
    )


def _check_streams(dataset: Dataset, frames: int, shape: tuple[int, int]) -> None:
    """Compare the size inside every compressed frame with the header, before a decoder reserves memory for it."""
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames):
        size = stream_size(frame)
        if size is not None and size != shape:
            raise _other_size(shape)


def _other_size(shape: tuple[int, int]) -> DataError:
    return DataError(
        "image-unreadable", f"The header declares {shape[0]} x {shape[1]} pixels, the data hold others; export the file again."
    )


def stream_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream declares, None if it does not say.

    Reference: ISO/IEC 10918-1 B.2.2 (SOF), ISO/IEC 14495-1 C.2.2, ISO/IEC 15444-1 A.5.1 (SIZ).
    """
    start = frame.find(b"\xff\x4f\xff\x51")
    if 0 <= start < 256 and len(frame) >= start + 24:  # SOC, SIZ; a JP2 header may come before
        x_1, y_1, x_0, y_0 = (int.from_bytes(frame[start + 8 + 4 * i : start + 12 + 4 * i], "big") for i in range(4))
        return y_1 - y_0, x_1 - x_0
    place = 2
    while frame[:2] == b"\xff\xd8" and place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker in _JPEG_SIZES:
            return int.from_bytes(frame[place + 5 : place + 7], "big"), int.from_bytes(frame[place + 7 : place + 9], "big")
        else:
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None
