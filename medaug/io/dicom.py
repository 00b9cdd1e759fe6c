"""DICOM images: pixels in Hounsfield units (CT) or stored values, and the facts the file gives.

Nothing in a file is trusted: sizes are checked before pixels are decoded, a file extension means nothing, and no
message, warning or log line repeats an element that could belong to a patient. Overlays are not drawn into the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydicom import Dataset

from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom_decode import check_pixel_format, decode_frames
from medaug.io.dicom_elements import code, integer, quiet
from medaug.io.dicom_file import frame_count, is_dicom, object_name, open_dataset, refuse_other_objects
from medaug.io.dicom_frames import frame_order, frame_views, geometry_facts, spacing_of
from medaug.io.dicom_header import DicomHeader, identifiers_of, read_header, secrets_of
from medaug.io.dicom_pixels import Values, values_of, window_facts
from medaug.io.dicom_terms import published_modality
from medaug.io.picture import Picture

__all__ = ["DicomHeader", "is_dicom", "read_dicom", "read_frames", "read_header"]


def read_dicom(path: Path) -> Picture:
    """Read one single-frame DICOM image.

    CT with a rescale (PS3.3 C.11.1) comes in Hounsfield units. Other grey images come after the modality LUT or
    rescale, MONOCHROME1 inverted so that more is brighter; HU are never inverted, since they mean density whatever the
    display. Padding (PS3.3 C.7.5.1.1.2) takes the smallest real value. The VOI window is recorded, not applied.

    Raises:
        DataError: `image-unreadable`, `image-truncated`, `image-too-large`, `image-empty`, `not-an-image`,
            `multi-frame-unsupported`, `transfer-syntax-unsupported`, `pixel-format-invalid`, `rescale-invalid`.
    """
    with limits.decoding("DICOM"), quiet():
        dataset, source = open_dataset(Path(path))
        refuse_other_objects(dataset)
        frames = frame_count(dataset)
        if frames > 1:
            raise DataError(
                "multi-frame-unsupported",
                f"The file holds {object_name(dataset)} with {frames} frames, one was expected; read it with `read_frames`.",
            )
        check_pixel_format(dataset)
        (view,) = frame_views(dataset, 1)
        (stored,) = decode_frames(dataset, 1)
        return _picture(values_of(stored, view), view, identifiers_of(dataset), source)


def read_frames(path: Path, chosen: Sequence[int] | None = None, source: str = "") -> Iterator[Picture]:
    """Read a DICOM file frame by frame; a single-frame file gives the one picture of `read_dicom`.

    Frames of enhanced CT and MR come with the rescale, window and geometry of their functional groups (PS3.3
    C.7.6.16), sorted by phase and by position along their normal; frames without a position come as stored. Each
    tells its 1-based `frame` in the file and its 0-based `slice_index` in this order. All checks but those of the
    compressed streams run before the first frame is yielded, and only one frame is decoded at a time.

    Args:
        path: of the file.
        chosen: 0-based places in that order; None yields all.
        source: sha256 of the file where it is known; "" hashes it.

    Raises:
        DataError: as `read_dicom`; `slice-outside-volume` for a place that the file does not have.
    """
    with limits.decoding("DICOM"), quiet():
        dataset, digest = open_dataset(Path(path), hashed=not source)
        source = source or digest
        refuse_other_objects(dataset)
        frames = frame_count(dataset)
        if frames > limits.MAX_FRAMES:
            raise DataError(
                "image-too-large",
                f"The header declares {frames} frames, more than the cap of {limits.MAX_FRAMES}; split the file.",
            )
        check_pixel_format(dataset, frames)
        views = frame_views(dataset, frames)
        order = frame_order(views)
        identifiers = identifiers_of(dataset)
    places = range(frames) if chosen is None else sorted(set(chosen))
    if any(not 0 <= place < frames for place in places):
        raise DataError("slice-outside-volume", f"A slice was chosen that the file does not have: its {frames} count from 0.")
    decoded = decode_frames(dataset, frames, [order[place] for place in places])
    for place in places:
        with limits.decoding("DICOM"), quiet():
            stored = next(decoded)
            view = views[order[place]]
            picture = _picture(values_of(stored, view), view, identifiers, source)
            if frames > 1:
                picture.acquisition.update(frame=order[place] + 1, slice_index=place)
        yield picture


def _picture(values: Values, view: Dataset, identifiers: dict[str, str], source: str) -> Picture:
    limits.check_finite(values.pixels)
    secrets = secrets_of(identifiers)
    modality = published_modality(code(view, "Modality"), secrets)
    return Picture(values.pixels, values.unit, modality, _acquisition(view, values, secrets), identifiers, source)


def _acquisition(view: Dataset, values: Values, secrets: Sequence[str]) -> dict[str, Any]:
    """Facts without patient data; what the file does not give, or gives wrongly, is absent."""
    facts: dict[str, Any] = {
        "original_size": [integer(view, "Rows"), integer(view, "Columns")],
        "bits": integer(view, "BitsStored"),
        "photometric": code(view, "PhotometricInterpretation"),
        "format": "DICOM",
    }
    spacing = spacing_of(view)
    if spacing is not None:
        facts["spacing_mm"] = list(spacing)
    facts |= geometry_facts(view, secrets)
    facts |= window_facts(view, values.mirror)
    if code(view, "LossyImageCompression") == "01":
        facts["lossy"] = True
    return facts
