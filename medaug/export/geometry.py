"""Where the pixels of a cohort image lie, computed from the source image and the padding and resize of intake."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """Geometry of a square cohort image; what is unknown is None, never a default.

    Attributes:
        spacing_mm: (between rows, between columns) of the cohort image.
        orientation: direction cosines of a row and of a column in the patient's LPS system (PS3.3 C.7.6.2.1.1).
        position_mm: centre of the first pixel in the same system.
        thickness_mm: slice thickness.
        slice_spacing_mm: distance to the next slice of the source series.
        detector_spacing_mm: as spacing_mm, but on the detector of a projection image.
    """

    spacing_mm: tuple[float, float] | None = None
    orientation: tuple[float, ...] | None = None
    position_mm: tuple[float, ...] | None = None
    thickness_mm: float | None = None
    slice_spacing_mm: float | None = None
    detector_spacing_mm: tuple[float, float] | None = None

    @property
    def is_placed(self) -> bool:
        """True if every pixel has a place in the patient's system."""
        return None not in (self.spacing_mm, self.orientation, self.position_mm)

    @property
    def patient_orientation(self) -> tuple[str, str] | None:
        """Where rows and columns run to, as letters in order of weight, such as ("L", "P") (PS3.3 C.7.6.1.1.1)."""
        if self.orientation is None:
            return None
        return _letters(self.orientation[:3]), _letters(self.orientation[3:])

    def affine(self) -> np.ndarray | None:
        """Voxel (column, row, slice) to RAS+ millimetres, (4, 4), or None unless all of it is known.

        DICOM's x and y grow to the left and to the back (LPS), NIfTI's to the right and to the front (RAS).
        """
        depth = self.slice_spacing_mm or self.thickness_mm
        if self.spacing_mm is None or self.orientation is None or self.position_mm is None or depth is None:
            return None
        along_row, along_column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        affine = np.eye(4)
        affine[:3, 0] = along_row * self.spacing_mm[1]
        affine[:3, 1] = along_column * self.spacing_mm[0]
        affine[:3, 2] = np.cross(along_row, along_column) * depth
        affine[:3, 3] = self.position_mm
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def geometry_of(acquisition: Mapping[str, Any], image_size: int) -> Geometry:
    """The geometry of a cohort image of `image_size` pixels whose source image had the facts of `acquisition`.

    `medaug.transforms.prepare.square` pads the source to a square of side S and resizes it to N pixels. Output pixel i
    therefore has its centre at (i + 1/2) S / N - 1/2 of the padded source, and spacings grow by S / N.

    Args:
        acquisition: original_size and padding as intake wrote them; spacing_mm, detector_spacing_mm, orientation, position_mm,
            slice_thickness_mm and slice_spacing_mm of the source. A malformed fact counts as unknown.
        image_size: side of the cohort's images in pixels.
    """
    known: dict[str, Any] = {
        "orientation": _orientation(acquisition.get("orientation")),
        "thickness_mm": _positive(acquisition.get("slice_thickness_mm")),
        "slice_spacing_mm": _positive(acquisition.get("slice_spacing_mm")),
    }
    size = _numbers(acquisition.get("original_size"), 2)
    padding = None if size is None or min(size) < 1 or acquisition.get("crop") else _padding(acquisition, size)
    if size is None or padding is None:
        return Geometry(**known)
    zoom = max(size) / image_size
    for name in ("spacing_mm", "detector_spacing_mm"):
        spacing = _numbers(acquisition.get(name), 2)
        if spacing is not None and min(spacing) > 0:
            known[name] = (spacing[0] * zoom, spacing[1] * zoom)
    position = _numbers(acquisition.get("position_mm"), 3)
    if position is not None and known["orientation"] and "spacing_mm" in known:
        directions, steps = np.array(known["orientation"]), np.array(known["spacing_mm"]) / zoom
        row, column = (0.5 * zoom - 0.5 - before for before in (padding[0], padding[2]))
        moved = np.array(position) + directions[:3] * steps[1] * column + directions[3:] * steps[0] * row
        known["position_mm"] = tuple(float(value) for value in moved)
    return Geometry(**known)


def _padding(acquisition: Mapping[str, Any], size: Sequence[float]) -> Sequence[float] | None:
    """[top, bottom, left, right] as recorded; None if it does not make a square, so that nothing is guessed."""
    padding = _numbers(acquisition.get("padding"), 4)
    if padding is None and "padding" not in acquisition and size[0] == size[1]:
        return (0.0, 0.0, 0.0, 0.0)
    if padding is None or min(padding) < 0:
        return None
    padded = (size[0] + padding[0] + padding[1], size[1] + padding[2] + padding[3])
    return padding if padded == (max(size), max(size)) else None


def _orientation(value: Any) -> tuple[float, ...] | None:
    """Six direction cosines of two perpendicular unit vectors, else None."""
    cosines = _numbers(value, 6)
    if cosines is None:
        return None
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    good = np.allclose([row @ row, column @ column, row @ column], [1.0, 1.0, 0.0], atol=1e-3)
    return cosines if good else None


def _letters(direction: Sequence[float]) -> str:
    weighed = sorted(zip((abs(value) for value in direction), direction, ("LR", "PA", "HF"), strict=True), reverse=True)
    return "".join(letters[value < 0] for weight, value, letters in weighed if weight > 1e-3)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    good = all(isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part) for part in value)
    return tuple(float(part) for part in value) if good else None


def _positive(value: Any) -> float | None:
    number = _numbers([value], 1)
    return number[0] if number and number[0] > 0 else None
