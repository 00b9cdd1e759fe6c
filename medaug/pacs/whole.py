"""Whether a file holds all the pixels that it declares, seen from its header: some archives hang up on one that does not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from medaug.errors import DataError
from medaug.io.dicom_elements import code, has, integer
from medaug.pacs.syntaxes import DEFLATED, EXPLICIT_BIG, IMPLICIT_LITTLE, UNCOMPRESSED

SHAPE = ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "NumberOfFrames", "PhotometricInterpretation")
PIXEL_ELEMENTS = (0x0008, 0x0009, 0x0010)  # of group 7FE0: float, double, integer
UNDEFINED = 0xFFFFFFFF


def pixel_fault(path: Path, syntax: str) -> str:
    """Why the pixels of a file cannot be whole.

    Only for native syntaxes, whose length follows from the header; deflated and compressed ones are not looked into.

    Returns:
        "" or a code: `image-truncated`, `pixel-format-invalid`, `image-unreadable`.
    """
    if syntax not in UNCOMPRESSED or syntax == DEFLATED:
        return ""
    try:
        with open(path, "rb") as stream:
            return _fault(stream, path.stat().st_size, syntax)
    except DataError as error:
        return error.code
    except Exception:  # noqa: BLE001 - pydicom raises anything on arbitrary bytes
        return "image-unreadable"


def _fault(stream: BinaryIO, size: int, syntax: str) -> str:
    from pydicom import dcmread

    dataset = dcmread(stream, stop_before_pixels=True, specific_tags=list(SHAPE))
    needed = _needed(dataset)
    order = ">" if syntax == EXPLICIT_BIG else "<"
    tag = stream.read(4)
    if len(tag) < 4 or struct.unpack(order + "HH", tag) not in [(0x7FE0, element) for element in PIXEL_ELEMENTS]:
        return "image-truncated" if needed else ""
    header = stream.read(4 if syntax == IMPLICIT_LITTLE else 8)
    length = struct.unpack(order + "L", header[-4:])[0]
    if length == UNDEFINED:
        return "pixel-format-invalid"
    return "image-truncated" if length < needed or length > size - stream.tell() else ""


def _needed(dataset: Any) -> int:
    """Bytes of pixels that the header declares; 0 without a declaration."""
    if not all(has(dataset, keyword) for keyword in ("Rows", "Columns", "BitsAllocated")):
        return 0
    bits = integer(dataset, "Rows") * integer(dataset, "Columns") * integer(dataset, "BitsAllocated")
    bits *= integer(dataset, "SamplesPerPixel", 1) * integer(dataset, "NumberOfFrames", 1)
    layout = code(dataset, "PhotometricInterpretation")
    if layout.startswith("YBR_") and layout.endswith(("422", "420")):  # chrominance at half the resolution (PS3.3 C.7.6.3.1.2)
        bits = bits * 2 // 3 if layout.endswith("422") else bits // 2
    return (bits + 7) // 8
