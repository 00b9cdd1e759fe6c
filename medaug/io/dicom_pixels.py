"""From stored values to pixels: padding, unused bits, modality LUT or rescale, MONOCHROME1, palettes and windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut

from medaug.errors import DataError
from medaug.io.blocks import row_blocks
from medaug.io.dicom_decode import COLOUR
from medaug.io.dicom_elements import code, decimal, has, integer, texts
from medaug.io.dicom_terms import VOI_FUNCTIONS

_EXACT = 1 << 24  # whole numbers below it are exact in float32


@dataclass(frozen=True)
class Values:
    """Pixels of one frame.

    Attributes:
        pixels: (H, W) or (H, W, 3), float32.
        unit: as `Picture.unit`.
        mirror: where values were inverted, the sum of a value before and after; None where they were not.
    """

    pixels: np.ndarray
    unit: str
    mirror: float | None = None


def values_of(stored: np.ndarray, dataset: Dataset) -> Values:
    """Pixels in Hounsfield units (CT with a rescale), else after the modality LUT or rescale, more being brighter.

    Args:
        stored: (rows, columns) or (rows, columns, 3) as decoded.
        dataset: the elements that hold for this frame.

    Raises:
        DataError: `image-empty`, `rescale-invalid`, `pixel-format-invalid`.
    """
    return _colour(stored, dataset) if code(dataset, "PhotometricInterpretation") in COLOUR else _grey(stored, dataset)


def _colour(stored: np.ndarray, dataset: Dataset) -> Values:
    if code(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)[..., :3]
        if stored.dtype == np.uint16:  # palette entries span 16 bits (PS3.3 C.7.6.3.1.5)
            stored = np.rint(stored / 257).astype(np.uint8)
    unit = "uint8" if stored.dtype == np.uint8 else "stored"
    return Values(np.ascontiguousarray(stored, dtype=np.float32), unit)


def _grey(stored: np.ndarray, dataset: Dataset) -> Values:
    bits, signed = integer(dataset, "BitsStored"), integer(dataset, "PixelRepresentation", 0) == 1
    padding = _padding(stored, dataset)
    if padding is not None and padding.all():
        raise DataError("image-empty", "Every pixel has the padding value; leave the file out.")
    stored = _low_bits(stored, bits)
    lowest = -float(1 << (bits - 1)) if signed else 0.0
    highest = lowest + (1 << bits) - 1
    rescale = rescale_of(dataset)
    unit = _grey_unit(dataset, rescale, bits, signed)
    inverted = unit != "hu" and code(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    if has(dataset, "ModalityLUTSequence"):
        lowest, highest = 0.0, float(1 << int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])) - 1.0
        mirror = lowest + highest if inverted else None
        values = _linear(np.asarray(apply_modality_lut(stored, dataset)), 1.0, 0.0, mirror)
    else:
        slope, intercept = rescale or (1.0, 0.0)
        lowest, highest = lowest * slope + intercept, highest * slope + intercept
        mirror = lowest + highest if inverted else None
        values = _linear(stored, slope, intercept, mirror)
    if padding is not None:
        values[padding] = values[~padding].min()
    return Values(values, unit, mirror)


def _linear(stored: np.ndarray, slope: float, intercept: float, mirror: float | None) -> np.ndarray:
    """slope * stored + intercept, or `mirror` minus that, rounded to float32 once."""
    whole = slope == 1 and intercept.is_integer() and abs(intercept) + abs(mirror or 0) < _EXACT - (1 << 17)
    if whole and stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2:
        values = stored.astype(np.float32)  # every step is exact for whole numbers of this size
        if intercept:
            values += np.float32(intercept)
        return values if mirror is None else np.subtract(np.float32(mirror), values, out=values)
    values = np.empty(stored.shape, dtype=np.float32)
    for block in row_blocks(stored):
        exact = stored[block].astype(np.float64) * slope + intercept
        values[block] = exact if mirror is None else mirror - exact
    return values


def _grey_unit(dataset: Dataset, rescale: tuple[float, float] | None, bits: int, signed: bool) -> str:
    if has(dataset, "ModalityLUTSequence"):
        return "stored"
    # PS3.3 C.11.1.1.2: RescaleType of a CT image is HU unless it says otherwise.
    if code(dataset, "Modality") == "CT" and rescale and code(dataset, "RescaleType") in ("", "HU"):
        return "hu"
    return "uint8" if bits == 8 and not signed and rescale in (None, (1.0, 0.0)) else "stored"


def _low_bits(stored: np.ndarray, bits: int) -> np.ndarray:
    """Keep the BitsStored low bits; those above HighBit carry no meaning (PS3.5 8.1.1), old files keep overlays there."""
    unused = stored.dtype.itemsize * 8 - bits
    if unused <= 0:
        return stored
    if stored.dtype.kind == "i":
        return (stored << unused) >> unused  # the second shift copies the sign bit
    return stored & stored.dtype.type((1 << bits) - 1)


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Mask of the pixels between PixelPaddingValue and PixelPaddingRangeLimit, compared on the allocated bits.

    The two elements have VR US or SS; files mix them up, so the limit is read in the signedness of the pixels.
    None if there are no such pixels (PS3.3 C.7.5.1.1.2).
    """
    if not has(dataset, "PixelPaddingValue") or dataset.get("PixelPaddingValue") in (None, ""):
        return None
    allocated = integer(dataset, "BitsAllocated")
    ends = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if dataset.get(keyword) not in (None, ""):
            value = integer(dataset, keyword) & ((1 << allocated) - 1)
            ends.append(value - (1 << allocated) if stored.dtype.kind == "i" and value >> (allocated - 1) else value)
    mask = stored == ends[0] if len(ends) == 1 else (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() else None


def rescale_of(dataset: Dataset) -> tuple[float, float] | None:
    """RescaleSlope and RescaleIntercept, or None if the file has neither.

    Raises:
        DataError: `rescale-invalid` if only one is there, or one is no number, or the slope is 0.
    """
    found = [texts(dataset, keyword) for keyword in ("RescaleSlope", "RescaleIntercept")]
    if not any(found):
        return None
    slope, intercept = (decimal(values[0]) if values else None for values in found)
    if not slope or intercept is None:
        raise DataError(
            "rescale-invalid",
            "(0028,1053) RescaleSlope must be a decimal number other than 0 and (0028,1052) RescaleIntercept a decimal number; "
            "export the file again.",
        )
    return slope, intercept


def window_facts(dataset: Dataset, mirror: float | None) -> dict[str, object]:
    """What the file says about display (PS3.3 C.11.2): recorded, never applied.

    Returns:
        window_center and window_width as in the file; window [lower, upper] in the unit of the pixels, inverted with
        them; num_windows where there are several (the first one counts); voi_lut_function if it is not LINEAR; voi_lut
        True where there is a VOI LUT. What is absent or cannot be meant is left out.
    """
    facts: dict[str, object] = {}
    if has(dataset, "VOILUTSequence"):
        facts["voi_lut"] = True
    centers, widths = ([decimal(value) for value in texts(dataset, name)] for name in ("WindowCenter", "WindowWidth"))
    if not centers or not widths or centers[0] is None or widths[0] is None:
        return facts
    center, width = centers[0], widths[0]
    function = code(dataset, "VOILUTFunction") or "LINEAR"
    exact = function in ("LINEAR_EXACT", "SIGMOID")
    if width <= 0 or (width < 1 and not exact):  # PS3.3 C.11.2.1.2
        return facts
    facts["window_center"], facts["window_width"] = center, width
    if function != "LINEAR" and function in VOI_FUNCTIONS:
        facts["voi_lut_function"] = function
    if len(centers) > 1:
        facts["num_windows"] = len(centers)
    ends = [center - width / 2, center + width / 2]
    if not exact:  # PS3.3 C.11.2.1.2.1
        ends = [center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2]
    if mirror is not None:
        ends = [mirror - ends[1], mirror - ends[0]]
    if ends[0] < ends[1] and function in ("LINEAR", "LINEAR_EXACT"):
        facts["window"] = ends
    return facts
