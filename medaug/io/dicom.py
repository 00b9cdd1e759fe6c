"""Plain single-frame DICOM: pixels in Hounsfield units (CT) or stored values, and the facts the file gives.

Nothing in a file is trusted: sizes are checked before pixels are decoded, a file extension means nothing, and no
message, warning or log line repeats an element that could belong to a patient.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.picture import Picture

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
IDENTIFIERS = {
    "patient": "PatientID",
    "patient_name": "PatientName",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "sop": "SOPInstanceUID",
    "accession": "AccessionNumber",
}
# Elements an identifying-group file without preamble may start with (PS3.6): group 2, or the first ones of group 8.
_FIRST_ELEMENTS = {(0x0002, element) for element in (0x00, 0x01, 0x02)} | {
    (0x0008, element) for element in (0x00, 0x01, 0x05, 0x06, 0x08, 0x12, 0x13, 0x14, 0x16, 0x18, 0x20)
}
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # VR DS, PS3.5 6.2: no comma, no NaN
_CODE = re.compile(r"[A-Z0-9 _]{1,16}")  # VR CS


def is_dicom(path: Path) -> bool:
    """True if the file starts as DICOM does: "DICM" after 128 bytes, or, without preamble, a first known element."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(132)
    except OSError:
        return False
    if head[128:] == b"DICM":
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


def read_dicom(path: Path) -> Picture:
    """Read one single-frame DICOM image.

    CT with a rescale (PS3.3 C.11.1) comes in Hounsfield units. Other grey images come after the modality LUT or
    rescale, MONOCHROME1 inverted so that more is brighter; HU are never inverted, since they mean density whatever the
    display. Padding (PS3.3 C.7.5.1.1.2) takes the smallest real value. The VOI window is recorded, not applied.

    Raises:
        DataError: `image-unreadable`, `image-truncated`, `image-too-large`, `image-empty`, `not-an-image`,
            `multi-frame-unsupported`, `transfer-syntax-unsupported`, `pixel-format-invalid`, `rescale-invalid`.
    """
    path = Path(path)
    limits.check_file(path)
    if not is_dicom(path):
        raise DataError("image-unreadable", "The file is not DICOM: no DICM mark and no known first element.")
    with limits.decoding("DICOM"), _quiet():
        dataset = _read(path)
        _refuse_other_objects(dataset)
        _check_pixel_format(dataset)
        stored = _decode(dataset)
        pixels, unit = _colour(stored, dataset) if _is_colour(dataset) else _grey(stored, dataset)
        acquisition, identifiers = _acquisition(dataset), _identifiers(dataset)
    limits.check_finite(pixels)
    return Picture(pixels, unit, _code(dataset, "Modality"), acquisition, identifiers, storage.sha256_file(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence pydicom, whose warnings and log lines quote element values."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _read(path: Path) -> Dataset:
    with open(path, "rb") as stream:
        read_preamble(stream, force=True)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        body = stream.tell()
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        for _ in limits.inflate(limits.pieces(path, body), wbits=-15, max_bytes=limits.MAX_FILE_BYTES):
            pass  # pydicom inflates without a cap (3.0.2), so measure first
    dataset = dcmread(path, force=True)
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def _refuse_other_objects(dataset: Dataset) -> None:
    """Refuse what is no image, and images whose frames or geometry this reader would get wrong."""
    name = _object_name(dataset)
    if "PixelData" not in dataset:
        if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
            raise DataError(
                "pixel-format-invalid", f"The file holds {name} with floating-point pixels; export it with integer PixelData."
            )
        if "Rows" in dataset:
            raise DataError(
                "image-truncated", f"The file describes {name} but ends before its PixelData; copy it again from its origin."
            )
        raise DataError("not-an-image", f"The file holds {name} without PixelData; leave reports and presentation states out.")
    frames = _texts(dataset, "NumberOfFrames")
    count = frames[0] if frames else "1"
    if not count.isdigit() or int(count) < 1:
        raise DataError("pixel-format-invalid", "(0028,0008) NumberOfFrames must be a whole number of at least 1.")
    if int(count) > 1:
        raise DataError(
            "multi-frame-unsupported",
            f"The file holds {name} with {int(count)} frames, one was expected; export it as single-frame (classic) DICOM.",
        )
    if "SharedFunctionalGroupsSequence" in dataset or "PerFrameFunctionalGroupsSequence" in dataset:
        # Its rescale and spacing sit inside the functional groups (PS3.3 C.7.6.16).
        raise DataError(
            "multi-frame-unsupported", f"The file holds {name}, an enhanced object; export it as single-frame (classic) DICOM."
        )


def _object_name(dataset: Dataset) -> str:
    """Name of the SOP class from the standard's own list, never text of the file."""
    uid = UID((_texts(dataset, "SOPClassUID") or [""])[0])
    return uid.name if uid and uid.name != uid else "an object of unknown SOP class"


def _check_pixel_format(dataset: Dataset) -> None:
    """Check the Image Pixel module (PS3.3 C.7.6.3) against itself, the caps, and the length of uncompressed data."""
    rows, columns = _integer(dataset, "Rows"), _integer(dataset, "Columns")
    samples = _integer(dataset, "SamplesPerPixel", 1)
    allocated, stored = _integer(dataset, "BitsAllocated"), _integer(dataset, "BitsStored")
    photometric = _code(dataset, "PhotometricInterpretation")
    limits.check_shape((rows, columns, samples))
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
    if _integer(dataset, "HighBit", stored - 1) != stored - 1:
        raise DataError("pixel-format-invalid", f"(0028,0102) HighBit must be BitsStored - 1 = {stored - 1} (PS3.5 8.1.1).")
    if _integer(dataset, "PixelRepresentation", 0) not in (0, 1):
        raise DataError("pixel-format-invalid", "(0028,0103) PixelRepresentation must be 0 or 1.")
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        subsampled = 2 if photometric == "YBR_FULL_422" else 3
        needed = rows * columns * (samples if samples == 1 else subsampled) * allocated // 8
        length = len(dataset.PixelData or b"")
        if length < needed:
            raise DataError(
                "image-truncated",
                f"{rows} x {columns} pixels need {needed} bytes of PixelData, got {length}; copy the file again.",
            )


def _decode(dataset: Dataset) -> np.ndarray:
    """Stored values, (rows, columns) or (rows, columns, 3) with YBR turned into RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        name = syntax.name if syntax.name != syntax else "an unknown transfer syntax"
        raise DataError(
            "transfer-syntax-unsupported", f"The pixels are in {name}; export the file as Explicit VR Little Endian."
        ) from None
    if not decoder.is_available:
        raise DataError(
            "transfer-syntax-unsupported",
            f"The pixels are in {syntax.name}, whose decoder is not installed ({'; '.join(decoder.missing_dependencies)}); "
            "install one of these packages with pip.",
        )
    # Unused high bits stay for now: a padding value may use them.
    array, _ = decoder.as_array(dataset, correct_unused_bits=False)  # type: ignore[arg-type] # an option like the others
    shape = (int(dataset.Rows), int(dataset.Columns))
    if array.shape[:2] != shape:
        raise DataError(
            "image-unreadable",
            f"The header declares {shape[0]} x {shape[1]} pixels, the data hold others; export the file again.",
        )
    return array


def _is_colour(dataset: Dataset) -> bool:
    return _code(dataset, "PhotometricInterpretation") in COLOUR


def _colour(stored: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, str]:
    if _code(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)[..., :3]
        if stored.dtype == np.uint16:  # palette entries span 16 bits (PS3.3 C.7.6.3.1.5)
            stored = np.rint(stored / 257).astype(np.uint8)
    unit = "uint8" if stored.dtype == np.uint8 else "stored"
    return np.ascontiguousarray(stored, dtype=np.float32), unit


def _grey(stored: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, str]:
    bits, signed = int(dataset.BitsStored), _integer(dataset, "PixelRepresentation", 0) == 1
    padding = _padding(stored, dataset)
    if padding.all():
        raise DataError("image-empty", "Every pixel has the padding value; leave the file out.")
    stored = _low_bits(stored, bits, signed)
    lowest = -float(1 << (bits - 1)) if signed else 0.0
    highest = lowest + (1 << bits) - 1
    rescale = _rescale(dataset)
    if "ModalityLUTSequence" in dataset:
        values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
        lowest, highest = 0.0, float(1 << int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])) - 1.0
    else:
        slope, intercept = rescale or (1.0, 0.0)
        values = stored.astype(np.float64) * slope + intercept
        lowest, highest = lowest * slope + intercept, highest * slope + intercept
    unit = _grey_unit(dataset, rescale, bits, signed)
    if unit != "hu" and _code(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        values = lowest + highest - values
    if padding.any():
        values[padding] = values[~padding].min()
    return values.astype(np.float32), unit


def _grey_unit(dataset: Dataset, rescale: tuple[float, float] | None, bits: int, signed: bool) -> str:
    if "ModalityLUTSequence" in dataset:
        return "stored"
    # PS3.3 C.11.1.1.2: RescaleType of a CT image is HU unless it says otherwise.
    if _code(dataset, "Modality") == "CT" and rescale and _code(dataset, "RescaleType") in ("", "HU"):
        return "hu"
    return "uint8" if bits == 8 and not signed and rescale in (None, (1.0, 0.0)) else "stored"


def _low_bits(stored: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Keep the BitsStored low bits; those above HighBit carry no meaning (PS3.5 8.1.1)."""
    low = stored.astype(np.int64) & ((1 << bits) - 1)
    if signed:
        low -= (low >> (bits - 1)) << bits
    dtype = stored.dtype.newbyteorder("=")
    return low.astype(dtype)


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Mask of the pixels between PixelPaddingValue and PixelPaddingRangeLimit, compared on the allocated bits.

    The two elements have VR US or SS; files mix them up, so the limit is read in the signedness of the pixels.
    """
    if dataset.get("PixelPaddingValue") in (None, ""):
        return np.zeros(stored.shape, dtype=bool)
    allocated = int(dataset.BitsAllocated)
    ends = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if dataset.get(keyword) not in (None, ""):
            value = _integer(dataset, keyword) & ((1 << allocated) - 1)
            ends.append(value - (1 << allocated) if stored.dtype.kind == "i" and value >> (allocated - 1) else value)
    return (stored >= min(ends)) & (stored <= max(ends))


def _rescale(dataset: Dataset) -> tuple[float, float] | None:
    """RescaleSlope and RescaleIntercept, or None if the file has neither."""
    texts = [_texts(dataset, keyword) for keyword in ("RescaleSlope", "RescaleIntercept")]
    if not any(texts):
        return None
    slope, intercept = (_decimal(text[0]) if text else None for text in texts)
    if not slope or intercept is None:
        raise DataError(
            "rescale-invalid",
            "(0028,1053) RescaleSlope must be a decimal number other than 0 and (0028,1052) RescaleIntercept a decimal number; "
            "export the file again.",
        )
    return slope, intercept


def _acquisition(dataset: Dataset) -> dict[str, Any]:
    """Facts without patient data; what the file does not give, or gives wrongly, is absent."""
    facts: dict[str, Any] = {
        "original_size": [int(dataset.Rows), int(dataset.Columns)],
        "bits": int(dataset.BitsStored),
        "photometric": _code(dataset, "PhotometricInterpretation"),
        "format": "DICOM",
    }
    spacing = [_decimal(text) for text in _texts(dataset, "PixelSpacing")]
    if len(spacing) == 2 and all(value is not None and value > 0 for value in spacing):
        facts["spacing_mm"] = spacing
    center, width = ([_decimal(text) for text in _texts(dataset, keyword)] for keyword in ("WindowCenter", "WindowWidth"))
    if center and width and center[0] is not None and width[0] is not None and width[0] >= 1:  # PS3.3 C.11.2.1.2
        facts["window_center"], facts["window_width"] = center[0], width[0]
    image_type = _texts(dataset, "ImageType")
    if image_type and all(_CODE.fullmatch(text) for text in image_type):
        facts["image_type"] = image_type
    if _code(dataset, "LossyImageCompression") == "01":
        facts["lossy"] = True
    return facts


def _identifiers(dataset: Dataset) -> dict[str, str]:
    found = {}
    for name, keyword in IDENTIFIERS.items():
        try:
            text = str(dataset.get(keyword) or "").strip(" \0")
        except (ValueError, LookupError, TypeError, AttributeError):  # a broken character set
            text = "\\".join(_texts(dataset, keyword))
        if text:
            found[name] = text
    return found


def _texts(dataset: Dataset, keyword: str) -> list[str]:
    """The values of a text element as written, stripped; [] if absent or empty. Never converts, so never fails."""
    if keyword not in dataset:
        return []
    item = dataset.get_item(keyword)
    value = item.value if item is not None else None
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    elif isinstance(value, str) or not hasattr(value, "__iter__"):
        value = [] if value is None else [value]
    texts = [_original(part).strip(" \0") for part in value]
    return texts if any(texts) else []


def _original(part: Any) -> str:
    return str(getattr(part, "original_string", part))


def _decimal(text: str) -> float | None:
    value = float(text) if _DECIMAL.fullmatch(text) else None
    return value if value is not None and np.isfinite(value) else None


def _code(dataset: Dataset, keyword: str) -> str:
    """First value of a code string (VR CS), "" if absent or malformed."""
    text = (_texts(dataset, keyword) or [""])[0]
    return text if _CODE.fullmatch(text) else ""


def _integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    value = dataset.get(keyword)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise DataError("pixel-format-invalid", f"{keyword} must be one whole number; export the file again.")
    return int(value)
