"""Opening untrusted DICOM files: what is one, the caps, and the data set without surprises."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import BinaryIO

from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom_budget import MAX_READS, PIXELS, Budget
from medaug.io.dicom_elements import has, text, texts

# Elements an identifying-group file without preamble may start with (PS3.6): group 2, or the first ones of group 8.
_FIRST_ELEMENTS = {(0x0002, element) for element in (0x00, 0x01, 0x02)} | {
    (0x0008, element) for element in (0x00, 0x01, 0x05, 0x06, 0x08, 0x12, 0x13, 0x14, 0x16, 0x18, 0x20)
}
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)
# SOP classes (PS3.4 B.5) whose objects have no pixels, whatever else they carry: waveforms, presentation states, registrations
# and fiducials, reports and key objects, encapsulated documents, radiotherapy structures, plans and records.
_WITHOUT_PIXELS = tuple(
    f"1.2.840.10008.5.1.4.1.1.{root}" for root in ("9.", "11.", "66.1", "66.2", "66.3", "66.5", "88.", "104.")
) + tuple(f"1.2.840.10008.5.1.4.1.1.481.{number}" for number in range(3, 10))
_UNDEFINED = 0xFFFFFFFF
_IN_MEMORY = 1 << 26  # larger files are read as a stream, so that their bytes are not in memory twice
_SMALL = 1 << 22
MAX_DEFLATED_BYTES = 1 << 28  # what a deflated data set may grow to


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


def open_dataset(path: Path, *, hashed: bool = True, reads: int = MAX_READS) -> tuple[Dataset, str]:
    """The whole data set of a file and the sha256 of its bytes; the file is read once. Call it inside `limits.decoding`.

    Args:
        path: of the file.
        hashed: False leaves the sha256 out ("").
        reads: budget of a long header, see `dicom_budget`.

    Raises:
        DataError: `file-missing`, `image-empty`, `image-too-large`, `image-unreadable` (no DICOM).
    """
    size = limits.check_file(path)
    with open(path, "rb") as file:
        if size <= _IN_MEMORY:
            data = file.read(size)
            digest = hashlib.sha256(data).hexdigest() if hashed else ""
            return _dataset(io.BytesIO(data), size, _may_be_deflated(data), Budget(reads)), digest
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hashed else ""
        file.seek(0)
        return _dataset(file, size, True, Budget(reads)), digest


def open_header(path: Path) -> Dataset:
    """The data set up to its pixels. Call it inside `limits.decoding`.

    Raises:
        DataError: as `open_dataset`.
    """
    size = limits.check_file(path)
    with open(path, "rb") as file:
        if size <= _SMALL:  # parsing reads byte by byte: faster in memory, pixels and all
            data = file.read(size)
            return _dataset(io.BytesIO(data), size, _may_be_deflated(data), Budget(), header_only=True)
        return _dataset(file, size, True, Budget(), header_only=True)


def _may_be_deflated(data: bytes) -> bool:
    return DeflatedExplicitVRLittleEndian.encode() in data


def _dataset(stream: BinaryIO, size: int, may_be_deflated: bool, budget: Budget, header_only: bool = False) -> Dataset:
    head = stream.read(132)
    stream.seek(0)
    if not starts_as_dicom(head):
        raise DataError("image-unreadable", "The file is not DICOM: no DICM mark and no known first element.")
    inflated = _inflated(stream, size, budget, header_only) if may_be_deflated else None
    if inflated is not None:
        return inflated
    dataset = budget.parse(lambda counted: dcmread(counted, force=True, stop_before_pixels=header_only), stream, size)
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _inflated(stream: BinaryIO, size: int, budget: Budget, header_only: bool) -> Dataset | None:
    """The data set of a deflated file, which pydicom would inflate without a cap (3.0.2); None if it is not deflated."""
    read_preamble(stream, force=True)
    meta = FileMetaDataset(budget.parse(lambda counted: read_dataset(counted, False, True, stop_when=_behind_meta), stream, size))
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        stream.seek(0)
        return None
    plain = io.BytesIO()
    rest = iter(lambda: stream.read(limits.CHUNK_BYTES), b"")
    for piece in limits.inflate(rest, wbits=-15, max_bytes=min(limits.MAX_FILE_BYTES, MAX_DEFLATED_BYTES)):
        plain.write(piece)
    size = plain.tell()
    plain.seek(0)
    stop = _at_pixels if header_only else None
    dataset = budget.parse(lambda counted: read_dataset(counted, False, True, stop_when=stop), plain, size)
    dataset.file_meta = meta
    return dataset


def _behind_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != 2


def _at_pixels(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag in PIXELS


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
        _refuse_endless(dataset)
        return
    if not dataset.keys() and dataset.file_meta:  # pydicom drops all elements if one has no end
        native = dataset.file_meta.get("TransferSyntaxUID") in NATIVE
        raise (
            _no_length()
            if native
            else DataError("image-truncated", "The file ends inside one of its elements; copy it again from its origin.")
        )
    name = object_name(dataset)
    if has(dataset, "FloatPixelData") or has(dataset, "DoubleFloatPixelData"):
        raise DataError(
            "pixel-format-invalid", f"The file holds {name} with floating-point pixels; export it with integer PixelData."
        )
    if has(dataset, "Rows") and not text(dataset, "SOPClassUID").startswith(_WITHOUT_PIXELS):
        raise DataError(
            "image-truncated", f"The file describes {name} but ends before its PixelData; copy it again from its origin."
        )
    raise DataError("not-an-image", f"The file holds {name} without PixelData; leave reports and presentation states out.")


def _refuse_endless(dataset: Dataset) -> None:
    """Refuse PixelData of undefined length where only compressed pixels have it (PS3.5 A.4)."""
    if dataset.file_meta.get("TransferSyntaxUID") in NATIVE:
        element = dataset.get_item("PixelData")
        if element is not None and (
            getattr(element, "length", 0) == _UNDEFINED or getattr(element, "is_undefined_length", False)
        ):
            raise _no_length()


def _no_length() -> DataError:
    return DataError(
        "image-unreadable",
        "An element has no length where one must say it, as PixelData of undefined length in an uncompressed file; export it again.",
    )
