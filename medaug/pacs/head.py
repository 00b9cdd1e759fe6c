"""The first elements of a data set, read without its pixels: which image it is and whether it says to be synthetic."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from medaug import __implementation_uid__
from medaug.errors import DataError
from medaug.pacs.syntaxes import DEFLATED, EXPLICIT_BIG, IMPLICIT_LITTLE

HEAD_BYTES = 1 << 14  # (0008,001C) and what may stand before it
PREAMBLE = bytes(128) + b"DICM"
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass(frozen=True)
class Head:
    """SOP class and instance, transfer syntax, and (0008,001C) SyntheticData of one file."""

    sop_class: str
    sop: str
    syntax: str
    synthetic: bool


def is_uid(text: str) -> bool:
    """Digits and dots, 1 to 64 characters (PS3.5 9.1). Components with leading zeros occur in practice and do no harm."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def read_head(data: bytes, syntax: str) -> Head:
    """Read the first elements of an encoded data set.

    Args:
        data: the first `HEAD_BYTES` of the data set, or all of a shorter one.
        syntax: its transfer syntax.

    Raises:
        DataError: `image-unreadable`.
    """
    from pydicom.filereader import read_dataset

    if syntax == DEFLATED:
        data = _inflate(data)
    try:
        elements = read_dataset(
            BytesIO(data),
            syntax == IMPLICIT_LITTLE,
            syntax != EXPLICIT_BIG,
            stop_when=lambda tag, _vr, _length: tag > 0x0008001C,
        )
        found = {tag: str(elements[tag].value or "") for tag in (0x00080016, 0x00080018, 0x0008001C) if tag in elements}
    except Exception as error:  # noqa: BLE001 - pydicom raises anything on arbitrary bytes, and quotes them
        raise DataError(
            "image-unreadable", f"The data set cannot be read ({type(error).__name__}); copy it again from its origin."
        ) from None
    return Head(found.get(0x00080016, ""), found.get(0x00080018, ""), syntax, found.get(0x0008001C) == "YES")


def read_file_head(path: Path) -> Head:
    """Read the first elements of a DICOM file (PS3.10).

    Raises:
        DataError: `image-unreadable`: no DICOM file with file meta information, or a broken one.
    """
    from pydicom.filereader import read_dataset

    with open(path, "rb") as stream:
        data = stream.read(2 * HEAD_BYTES)
    if data[128:132] != b"DICM":
        raise DataError("image-unreadable", "The file is no DICOM file with a preamble (PS3.10 7.1).")
    try:
        buffer = BytesIO(data)
        buffer.seek(132)
        meta = read_dataset(buffer, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        syntax = str(meta.get("TransferSyntaxUID", ""))
    except Exception as error:  # noqa: BLE001 - as above
        raise DataError(
            "image-unreadable", f"The file meta information cannot be read ({type(error).__name__}); copy the file again."
        ) from None
    if not is_uid(syntax):
        raise DataError("image-unreadable", "(0002,0010) TransferSyntaxUID is missing or no UID; export the file again.")
    return read_head(data[buffer.tell() :][:HEAD_BYTES], syntax)


def file_meta(sop_class: str, sop: str, syntax: str) -> bytes:
    """Preamble of zeros and file meta information (PS3.10 7.1): the same bytes for the same image, whoever sent it.

    Encoded here, in explicit VR little endian, because it is written for every image that comes in.
    """
    elements = b"".join(
        [
            struct.pack("<HH2sHI2s", 2, 1, b"OB", 0, 2, b"\0\1"),
            _short(0x02, b"UI", sop_class),
            _short(0x03, b"UI", sop),
            _short(0x10, b"UI", syntax),
            _short(0x12, b"UI", __implementation_uid__),
            _short(0x13, b"SH", IMPLEMENTATION_NAME),
        ]
    )
    return PREAMBLE + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(elements)) + elements


def _short(element: int, vr: bytes, text: str) -> bytes:
    """An element of group 2 with a length of 16 bits, padded to an even one (PS3.5 7.1.2, 9.1)."""
    value = text.encode("ascii")
    if len(value) % 2:
        value += b"\0" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value


IMPLEMENTATION_NAME = "MEDAUG"  # without the release, so that an image sent again after an update is still the same file


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(data, HEAD_BYTES)
    except zlib.error:
        raise DataError("image-unreadable", "The deflated data set cannot be read; copy it again from its origin.") from None
