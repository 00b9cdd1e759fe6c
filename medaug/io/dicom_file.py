"""Opening untrusted DICOM files: what is one, the caps, and the data set without surprises."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import BinaryIO

from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom_elements import has, text, texts

# Elements an identifying-group file without preamble may start with (PS3.6): group 2, or the first ones of group 8.
_FIRST_ELEMENTS = {(0x0002, element) for element in (0x00, 0x01, 0x02)} | {
    (0x0008, element) for element in (0x00, 0x01, 0x05, 0x06, 0x08, 0x12, 0x13, 0x14, 0x16, 0x18, 0x20)
}
_IN_MEMORY = 1 << 26  # larger files are read as a stream, so that their bytes are not in memory twice
_SMALL = 1 << 22
MAX_DEFLATED_BYTES = 1 << 28  # what a deflated data set may grow to: pydicom holds it twice


def is_dicom(path: Path) -> bool:
    """True if the file starts as DICOM does: "DICM" after 128 bytes, or, without preamble, a first known element."""
    try:
        with open(path, "rb") as stream:
            return starts_as_dicom(stream.read(132))
    except OSError:
        return False


def starts_as_dicom(head: bytes) -> bool:
    """`is_dicom` for the first 132 bytes of a file."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    for order in ("little", "big"):
        tag = (int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order))  # type: ignore[arg-type]
        explicit = head[4:6].isalpha() and head[4:6].isupper()
        implicit = order == "little" and int.from_bytes(head[4:8], "little") <= 64
        if tag in _FIRST_ELEMENTS and (explicit or implicit):
            return True
    return False


def open_dataset(path: Path, *, hashed: bool = True) -> tuple[Dataset, str]:
    """The whole data set of a file and the sha256 of its bytes; the file is read once. Call it inside `limits.decoding`.

    Args:
        path: of the file.
        hashed: False leaves the sha256 out ("").

    Raises:
        DataError: `file-missing`, `image-empty`, `image-too-large`, `image-unreadable` (no DICOM).
    """
    size = limits.check_file(path)
    with open(path, "rb") as file:
        if size <= _IN_MEMORY:
            data = file.read(size)
            digest = hashlib.sha256(data).hexdigest() if hashed else ""
            return _dataset(io.BytesIO(data), _may_be_deflated(data)), digest
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hashed else ""
        file.seek(0)
        return _dataset(file, True), digest


def open_header(path: Path) -> Dataset:
    """The data set up to its pixels. Call it inside `limits.decoding`.

    Raises:
        DataError: as `open_dataset`.
    """
    size = limits.check_file(path)
    with open(path, "rb") as file:
        if size <= _SMALL:  # parsing reads byte by byte: faster in memory, pixels and all
            data = file.read(size)
            return _dataset(io.BytesIO(data), _may_be_deflated(data), header_only=True)
        return _dataset(file, True, header_only=True)


def _may_be_deflated(data: bytes) -> bool:
    return DeflatedExplicitVRLittleEndian.encode() in data


def _dataset(stream: BinaryIO, may_be_deflated: bool, header_only: bool = False) -> Dataset:
    head = stream.read(132)
    stream.seek(0)
    if not starts_as_dicom(head):
        raise DataError("image-unreadable", "The file is not DICOM: no DICM mark and no known first element.")
    if may_be_deflated:
        _cap_deflated(stream)
    dataset = dcmread(stream, force=True, stop_before_pixels=header_only)
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _cap_deflated(stream: BinaryIO) -> None:
    """Measure a deflated data set first: pydicom inflates without a cap (3.0.2)."""
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        rest = iter(lambda: stream.read(limits.CHUNK_BYTES), b"")
        for _ in limits.inflate(rest, wbits=-15, max_bytes=min(limits.MAX_FILE_BYTES, MAX_DEFLATED_BYTES)):
            pass
    stream.seek(0)


def object_name(dataset: Dataset) -> str:
    """Name of the SOP class from the standard's own list, never text of the file."""
    uid = UID(text(dataset, "SOPClassUID"))
    return uid.name if uid and uid.name != uid else "an object of unknown SOP class"


def frame_count(dataset: Dataset) -> int:
    """NumberOfFrames, 1 if absent.

    Raises:
        DataError: `pixel-format-invalid`.
    """
    count = (texts(dataset, "NumberOfFrames") or ["1"])[0]
    if not (count.isascii() and count.isdigit() and len(count) <= 10) or int(count) < 1:
        raise DataError("pixel-format-invalid", "(0028,0008) NumberOfFrames must be a whole number of at least 1.")
    return int(count)


def refuse_other_objects(dataset: Dataset) -> None:
    """Refuse what is no image.

    Raises:
        DataError: `not-an-image`, `image-truncated`, `pixel-format-invalid`.
    """
    if has(dataset, "PixelData"):
        return
    name = object_name(dataset)
    if has(dataset, "FloatPixelData") or has(dataset, "DoubleFloatPixelData"):
        raise DataError(
            "pixel-format-invalid", f"The file holds {name} with floating-point pixels; export it with integer PixelData."
        )
    if has(dataset, "Rows"):
        raise DataError(
            "image-truncated", f"The file describes {name} but ends before its PixelData; copy it again from its origin."
        )
    raise DataError("not-an-image", f"The file holds {name} without PixelData; leave reports and presentation states out.")
