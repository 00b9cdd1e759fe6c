"""Which slices make one volume: planes of the same geometry, phases, order, gaps; and the choice of slices.

Positions are along the normal of the planes, turned so that axial slices run from feet to head; for axial slices they
are the z of the patient's coordinates (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medaug.errors import DataError
from medaug.io.dicom_frames import PHASE_KEYWORDS, PHASE_SEPARATOR, projected
from medaug.io.dicom_header import DicomHeader

ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine: 0.06 degrees
SPACING_TOLERANCE = 1e-3  # relative, in the plane
SAME_POSITION_MM = 1e-2
UNEVEN_SHARE = 0.05  # of the median distance: headers round positions
_WHOLE = re.compile(r"\d+")
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a stack: a code and a sentence without any name or identifier."""

    code: str
    reason: str


def same_plane(first: DicomHeader, second: DicomHeader) -> bool:
    """True if two images can belong to one stack: size, orientation, pixel spacing and frame of reference agree."""
    if (first.rows, first.columns, first.frame_of_reference) != (second.rows, second.columns, second.frame_of_reference):
        return False
    if (first.orientation is None) != (second.orientation is None) or (first.spacing is None) != (second.spacing is None):
        return False
    turns = zip(first.orientation or (), second.orientation or (), strict=True)
    if any(abs(a - b) > ORIENTATION_TOLERANCE for a, b in turns):
        return False
    if first.spacing is None or second.spacing is None:
        return True
    return all(abs(a - b) <= SPACING_TOLERANCE * a for a, b in zip(first.spacing, second.spacing, strict=True))


def cluster(headers: Sequence[DicomHeader]) -> list[list[int]]:
    """Indices of images that share a plane geometry, the largest cluster first.

    The result does not depend on how the headers came about, only on their order: sort them first.
    """
    clusters: list[list[int]] = []
    for index, header in enumerate(headers):
        home = next((members for members in clusters if same_plane(headers[members[0]], header)), None)
        if home is None:
            clusters.append([index])
        else:
            home.append(index)
    return sorted(clusters, key=lambda members: (-len(members), members[0]))


def positions_of(headers: Sequence[DicomHeader]) -> list[float]:
    """Position in mm of every header along the normal of the first; all have orientation and position."""
    orientation = headers[0].orientation
    assert orientation is not None
    return [projected(orientation, header.position) for header in headers if header.position is not None]


def repeated(positions: Sequence[float]) -> bool:
    """True if two slices are at one place."""
    ordered = np.sort(positions)
    return bool(len(ordered) > 1 and np.diff(ordered).min() < SAME_POSITION_MM)


def split_phases(headers: Sequence[DicomHeader]) -> list[list[int]] | None:
    """Indices by phase, for images of one plane geometry that repeat positions.

    The surest element that tells them apart is used (temporal position, cardiac phase, trigger time, b-value, echo time,
    acquisition number ...): within each of its values no position may repeat, and every value has as many slices.

    Returns:
        Phases in ascending order of that element; None if no element tells them apart.
    """
    positions = positions_of(headers)
    columns = [header.temporal.split(PHASE_SEPARATOR) if header.temporal else [""] * len(PHASE_KEYWORDS) for header in headers]
    for place in range(len(PHASE_KEYWORDS)):
        values = [column[place] for column in columns]
        if "" in values or len(set(values)) < 2:
            continue
        phases = [[index for index, value in enumerate(values) if value == phase] for phase in sorted(set(values), key=float)]
        even = len({len(members) for members in phases}) == 1
        if even and not any(repeated([positions[index] for index in members]) for members in phases):
            return phases
    return None


def spacing_fault(positions: Sequence[float]) -> Fault | None:
    """What is wrong with the distances of sorted slices: `slice-missing`, `slice-spacing-uneven`, or nothing.

    The usual distance is the median one. Where all others are whole multiples of it, slices are missing.
    """
    if len(positions) < 3:
        return None
    steps = np.diff(positions)
    usual = float(np.median(steps))
    tolerance = max(UNEVEN_SHARE * usual, 2 * SAME_POSITION_MM)
    if np.abs(steps - usual).max() <= tolerance:
        return None
    multiples = np.rint(steps / usual)
    if (np.abs(steps - multiples * usual) <= tolerance).all() and multiples.min() >= 1:
        missing = int((multiples - 1).sum())
        return Fault(
            "slice-missing", f"{missing} slice(s) seem to be missing: gaps are multiples of the usual distance of {usual:.3g} mm."
        )
    return Fault(
        "slice-spacing-uneven",
        f"The slices are {steps.min():.3g} to {steps.max():.3g} mm apart, while {usual:.3g} mm is usual.",
    )


def slice_unit(values: Iterable[str]) -> str:
    """What a column of a label table holds: "index" (0-based from the feet) if all are whole numbers, else "mm".

    One decimal or negative number makes the whole column positions in mm: a table does not mix the two.

    Raises:
        DataError: `slice-invalid` for a value that is no number.
    """
    found = [value.strip() for value in values if value.strip()]
    if any(not _NUMBER.fullmatch(value) for value in found):
        raise DataError(
            "slice-invalid", "The slice column must hold 0-based slice numbers or positions in mm; some are no numbers."
        )
    return "index" if all(_WHOLE.fullmatch(value) for value in found) else "mm"


def repeated_counts(positions: Sequence[float]) -> int:
    """How many slices are at the place of another one."""
    counts = Counter(round(position / SAME_POSITION_MM) for position in positions)
    return sum(count - 1 for count in counts.values())
