"""The frames of multi-frame DICOM: what holds for each one, from the functional groups, and their order in space."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from pydicom import Dataset
from pydicom.tag import BaseTag

from medaug.errors import DataError
from medaug.io.dicom_elements import codes, decimals, double, has, items, tag_of
from medaug.io.dicom_terms import published_types

# Functional group macro -> the elements of it that concern us (PS3.3 C.7.6.16.2, C.8.13, C.8.15)
MACROS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    "CTImageFrameTypeSequence": ("FrameType",),
    "MRImageFrameTypeSequence": ("FrameType",),
    "PETFrameTypeSequence": ("FrameType",),
    "FrameContentSequence": ("TemporalPositionIndex", "FrameAcquisitionNumber", "StackID", "InStackPositionNumber"),
    "TemporalPositionSequence": ("TemporalPositionTimeOffset",),
    "CardiacSynchronizationSequence": ("NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime"),
    "MREchoSequence": ("EffectiveEchoTime",),
    "MRDiffusionSequence": ("DiffusionBValue",),
}
_LEFT_OUT = ("PixelData", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# What may tell the phases of a 4-D series apart, the surest first.
PHASE_KEYWORDS = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "TemporalPositionTimeOffset",
    "NominalPercentageOfCardiacPhase",
    "NominalCardiacTriggerDelayTime",
    "TriggerTime",
    "FrameReferenceTime",
    "DiffusionBValue",
    "EffectiveEchoTime",
    "EchoTime",
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
)
PHASE_SEPARATOR = "|"
MAX_POSITION_MM = 1e5  # 100 m; scanners count from their isocentre or table, within a few


def is_enhanced(dataset: Dataset) -> bool:
    """True if the facts of the frames are in functional groups (PS3.3 C.7.6.16)."""
    return has(dataset, "SharedFunctionalGroupsSequence") or has(dataset, "PerFrameFunctionalGroupsSequence")


def frame_views(dataset: Dataset, frames: int) -> Sequence[Dataset]:
    """One small data set per frame with the elements that hold for it, without pixels.

    Per-frame groups come before shared ones, and those before elements outside of the groups. The data set itself for a
    plain single frame. Without groups the frames of one file have no position of their own.

    Raises:
        DataError: `frame-groups-missing`: fewer groups than frames, so that nobody knows where the others are.
    """
    if frames == 1 and not is_enhanced(dataset):
        return [dataset]
    shared, per_frame = items(dataset, "SharedFunctionalGroupsSequence"), items(dataset, "PerFrameFunctionalGroupsSequence")
    if 0 < len(per_frame) < frames:
        raise DataError(
            "frame-groups-missing",
            f"The file declares {frames} frames and has functional groups for {len(per_frame)} (PS3.3 C.7.6.16); export it again.",
        )
    left_out = {tag_of(keyword)[0] for keyword in (*_LEFT_OUT, *(("ImagePositionPatient",) if frames > 1 else ()))}
    common = {tag: dataset.get_item(tag) for tag in dataset.keys() if tag not in left_out}  # noqa: SIM118 - iterating converts
    common |= _of_group(shared[0]) if shared else {}
    return _Views(dataset, common, per_frame, frames)


class _Views(Sequence[Dataset]):
    """Made one at a time: every element once for every frame is more than a small file may ask for."""

    def __init__(self, dataset: Dataset, common: dict[BaseTag, Any], per_frame: Sequence[Dataset], frames: int) -> None:
        self._meta = dataset.file_meta
        self._common, self._per_frame, self._frames = common, per_frame, frames
        self._same = None if per_frame else self._view({})

    def __len__(self) -> int:
        return self._frames

    @overload
    def __getitem__(self, index: int) -> Dataset: ...
    @overload
    def __getitem__(self, index: slice) -> list[Dataset]: ...

    def __getitem__(self, index: int | slice) -> Dataset | list[Dataset]:
        if isinstance(index, slice):
            return [self[place] for place in range(self._frames)[index]]
        place = range(self._frames)[index]
        return self._same if self._same is not None else self._view(_of_group(self._per_frame[place]))

    def _view(self, own: dict[BaseTag, Any]) -> Dataset:
        view = Dataset(self._common | own)
        view.file_meta = self._meta
        return view


def _of_group(group: Dataset) -> dict[BaseTag, Any]:
    """The elements of a functional group item that concern us."""
    found = {}
    for macro, keywords in MACROS.items():
        for item in items(group, macro)[:1]:
            for keyword in keywords:
                if has(item, keyword):
                    element = item.get_item(tag_of(keyword)[0])
                    found[tag_of(keyword)[0]] = element
    return found


def orientation_of(view: Dataset) -> tuple[float, ...] | None:
    """ImageOrientationPatient (PS3.3 C.7.6.2.1.1): two perpendicular unit vectors, else None."""
    values = decimals(view, "ImageOrientationPatient", 6)
    if values is None:
        return None
    row, column = values[:3], values[3:]
    is_unit = all(abs(math.hypot(*vector) - 1) < 0.01 for vector in (row, column))
    return values if is_unit and abs(sum(map(operator.mul, row, column))) < 0.01 else None


def position_of(view: Dataset) -> tuple[float, ...] | None:
    """ImagePositionPatient in mm, or None; a place farther than `MAX_POSITION_MM` from the origin is no place."""
    values = decimals(view, "ImagePositionPatient", 3)
    return values if values is not None and max(map(abs, values)) <= MAX_POSITION_MM else None


def spacing_of(view: Dataset) -> tuple[float, ...] | None:
    """PixelSpacing [between rows, between columns] in mm, or None."""
    values = decimals(view, "PixelSpacing", 2)
    return values if values is not None and min(values) > 0 else None


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """Unit normal of a plane, turned so that its largest component is positive: axial slices run from feet to head."""
    normal = np.cross(orientation[:3], orientation[3:])
    normal = normal / np.linalg.norm(normal)
    return normal if normal[np.abs(normal).argmax()] > 0 else -normal


def projected(orientation: Sequence[float], position: Sequence[float]) -> float:
    """Position of a slice in mm along `normal_of` its plane."""
    return float(normal_of(orientation) @ np.array(position))


def phase_of(view: Dataset) -> str:
    """What may tell 4-D phases apart: the values of `PHASE_KEYWORDS`, joined; "" if none is there."""
    values = [double(view, keyword) if has(view, keyword) else None for keyword in PHASE_KEYWORDS]
    return (
        PHASE_SEPARATOR.join("" if value is None else f"{value:g}" for value in values)
        if any(value is not None for value in values)
        else ""
    )


def frame_order(views: Sequence[Dataset]) -> list[int]:
    """0-based frames sorted by stack, phase and projected position; as stored where a position is missing or planes differ."""
    places: list[tuple[Any, ...]] = []
    first = orientation_of(views[0])
    for index, view in enumerate(views):
        orientation, position = orientation_of(view), position_of(view)
        if orientation is None or position is None or first is None or np.abs(np.subtract(orientation, first)).max() > 1e-3:
            return list(range(len(views)))
        places.append((phase_of(view), round(projected(first, position), 4), index))
    return [place[-1] for place in sorted(places, key=lambda place: (_phase_key(place[0]), place[1], place[2]))]


def _phase_key(phase: str) -> tuple[float, ...]:
    return tuple(float(part) if part else -np.inf for part in phase.split(PHASE_SEPARATOR)) if phase else ()


def geometry_facts(view: Dataset, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """orientation, position_mm, slice_thickness_mm, slice_spacing_mm, detector_spacing_mm and image_type, where valid.

    Args:
        view: the elements that hold for the frame.
        secrets: what leads to the patient, of which image_type holds nothing.
    """
    facts: dict[str, Any] = {}
    for name, values in (("orientation", orientation_of(view)), ("position_mm", position_of(view))):
        if values is not None:
            facts[name] = list(values)
    for name, keyword in (("slice_thickness_mm", "SliceThickness"), ("slice_spacing_mm", "SpacingBetweenSlices")):
        length = decimals(view, keyword, 1)
        if length is not None and length[0] > 0:
            facts[name] = length[0]
    detector = decimals(view, "ImagerPixelSpacing", 2)  # at the detector, not in the patient (PS3.3 10.7.1.3)
    if detector is not None and min(detector) > 0:
        facts["detector_spacing_mm"] = list(detector)
    image_type = published_types(codes(view, "FrameType") or codes(view, "ImageType"), secrets)
    if image_type:
        facts["image_type"] = image_type
    return facts
