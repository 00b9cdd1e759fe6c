"""Whole volumes: of a DICOM series, a multi-frame DICOM file or a NIfTI file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom import is_dicom, read_frames, read_header
from medaug.io.dicom_frames import normal_of
from medaug.io.nifti import read_nifti, read_nifti_header
from medaug.io.picture import Picture
from medaug.io.stacks import repeated, spacing_fault

# Facts of one slice that do not hold for the volume.
_OF_A_SLICE = (
    "position_mm",
    "slice_index",
    "frame",
    "slice_spacing_mm",
    "window",
    "window_center",
    "window_width",
    "num_windows",
)


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as read; what the files do not give is None or absent.

    Attributes:
        pixels: (D, H, W) float32 in `unit`; D from feet to head for axial slices, H rows and W columns of the slices.
        unit: as `Picture.unit`.
        spacing_mm: between slices, rows and columns; None unless all three are known.
        affine: (4, 4) from (d, h, w, 1) to patient coordinates in mm as in DICOM (left, back, head); None if unknown.
        positions_mm: of the slices along their normal, ascending; None if unknown.
        modality, acquisition, identifiers: as `Picture`, of the first slice and as far as they hold for all.
        source: sha256 of the file; for a series of the sorted sha256 of its files.
        fault: code of what is wrong with the distances of the slices, "" if nothing is.
    """

    pixels: np.ndarray
    unit: str
    spacing_mm: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None
    positions_mm: tuple[float, ...] | None = None
    modality: str = ""
    acquisition: dict[str, Any] = field(default_factory=dict)
    identifiers: dict[str, str] = field(default_factory=dict, repr=False)
    source: str = ""
    fault: str = ""


def read_volume(files: Sequence[Any], *, strict: bool = False) -> Volume:
    """Read the volume that the files make together.

    Args:
        files: paths, or objects with a `path`: the slices of one DICOM series in any order, or one multi-frame DICOM or
            NIfTI file. Slices with positions are sorted by them, others stay in the given order.
        strict: refuse missing slices, uneven distances, and NIfTI whose qform and sform differ.

    Raises:
        DataError: whatever reading a slice raises; `volume-inconsistent` (sizes, planes, units or colour differ),
            `phases-mixed` (two slices at one place), `image-too-large`; in strict mode `slice-missing`,
            `slice-spacing-uneven`, `orientation-conflict`.
    """
    paths = [Path(getattr(file, "path", file)) for file in files]
    if not paths:
        raise DataError("volume-inconsistent", "A volume needs at least one file.")
    count, pictures = _pictures(paths, strict)
    pixels: np.ndarray | None = None
    first: Picture | None = None
    places: list[tuple[float, ...] | None] = []
    sources: list[str] = []
    for index, picture in enumerate(pictures):
        if first is None or pixels is None:
            if picture.is_colour:
                raise DataError("volume-inconsistent", "A volume is grey; colour slices were found.")
            limits.check_shape((count, *picture.pixels.shape), limits.MAX_VOXELS)
            first, pixels = picture, np.empty((count, *picture.pixels.shape), np.float32)
        _refuse_other(first, picture)
        pixels[index] = picture.pixels
        position = picture.acquisition.get("position_mm")
        places.append(None if position is None else tuple(position))
        sources.append(picture.source)
    if first is None or pixels is None or len(places) != count:
        raise DataError("image-truncated", "The volume holds fewer slices than its header declares; copy it again.")
    return _assembled(pixels, first, places, sources, strict)


def _pictures(paths: list[Path], strict: bool) -> tuple[int, Iterator[Picture]]:
    if not is_dicom(paths[0]):
        if len(paths) > 1:
            raise DataError("volume-inconsistent", "A NIfTI volume is one file; several were given.")
        return read_nifti_header(paths[0]).num_slices, read_nifti(paths[0], strict=strict)
    if len(paths) == 1:
        return read_header(paths[0]).frames, read_frames(paths[0])
    return len(paths), (picture for path in paths for picture in _single(path))


def _single(path: Path) -> Iterator[Picture]:
    for number, picture in enumerate(read_frames(path)):
        if number:
            raise DataError("volume-inconsistent", "A multi-frame file is a volume of its own; it was given among others.")
        yield picture


def _refuse_other(first: Picture, picture: Picture) -> None:
    same = first.pixels.shape == picture.pixels.shape and first.unit == picture.unit
    for name, tolerance in (("orientation", 1e-3), ("spacing_mm", 1e-3)):
        one, other = (np.asarray(each.acquisition.get(name, ()), float) for each in (first, picture))
        same = same and one.shape == other.shape and bool(np.allclose(one, other, rtol=tolerance, atol=tolerance))
    if not same:
        raise DataError("volume-inconsistent", "The slices of a volume differ in size, unit, orientation or pixel spacing.")


def _assembled(
    pixels: np.ndarray, first: Picture, places: list[tuple[float, ...] | None], sources: list[str], strict: bool
) -> Volume:
    facts = {name: value for name, value in first.acquisition.items() if name not in _OF_A_SLICE}
    source = sources[0] if len(set(sources)) == 1 else storage.sha256_json(sorted(sources))
    orientation, spacing = first.acquisition.get("orientation"), first.acquisition.get("spacing_mm")
    volume = Volume(pixels, first.unit, modality=first.modality, acquisition=facts, identifiers=first.identifiers, source=source)
    known = [place for place in places if place is not None]
    if orientation is None or len(known) != len(places):
        return volume
    corners = np.array(known)
    along = corners @ normal_of(orientation)
    if repeated(along.tolist()):
        raise DataError("phases-mixed", "Two slices of the volume are at one place; its phases must be read one by one.")
    order = np.argsort(along, kind="stable")
    if (order != np.arange(len(order))).any():
        pixels = _reordered(pixels, order)
    corners, along = corners[order], along[order]
    fault = spacing_fault(along.tolist())
    if strict and fault is not None:
        raise DataError(fault.code, fault.reason)
    between = float(np.median(np.diff(along))) if len(along) > 1 else first.acquisition.get("slice_spacing_mm")
    affine = None
    if spacing is not None and len(along) > 1:
        affine = np.eye(4)
        affine[:3, 0] = (corners[-1] - corners[0]) / (len(corners) - 1)  # of a tilted gantry not along the normal
        affine[:3, 1] = np.array(orientation[3:]) * spacing[0]  # down a column: from row to row
        affine[:3, 2] = np.array(orientation[:3]) * spacing[1]
        affine[:3, 3] = corners[0]
    if between is not None:
        facts["slice_spacing_mm"] = between
    return Volume(
        pixels,
        first.unit,
        None if spacing is None or between is None else (between, float(spacing[0]), float(spacing[1])),
        affine,
        tuple(float(value) for value in along),
        first.modality,
        facts,
        first.identifiers,
        source,
        "" if fault is None else fault.code,
    )


def _reordered(pixels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Slices in another order, in place: following the cycles of the permutation keeps one slice aside, not a volume."""
    done = np.zeros(len(order), dtype=bool)
    for start in range(len(order)):
        if done[start]:
            continue
        aside, place = pixels[start].copy(), start
        while not done[place]:
            done[place] = True
            following = int(order[place])
            pixels[place] = aside if following == start else pixels[following]
            place = following
    return pixels


def largest_slice(mask: Volume) -> int:
    """The 0-based slice with the most voxels above 0, the one nearest to the feet among equals.

    Raises:
        DataError: `mask-empty`.
    """
    areas = np.array([np.count_nonzero(plane > 0) for plane in mask.pixels])
    if not areas.any():
        raise DataError("mask-empty", "The lesion mask holds no voxel above 0, so no slice can be chosen by it.")
    return int(areas.argmax())
