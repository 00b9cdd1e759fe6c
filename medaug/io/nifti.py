"""NIfTI-1 and -2: one picture per slice, shown as radiologists look at it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.orientations import aff2axcodes, io_orientation

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.picture import Picture

SUFFIXES = (".nii", ".nii.gz")
PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}  # by the canonical axis (x, y, z) that the slices are stacked along
_HEADER_SIZES = {348: (nib.Nifti1Image, b"n+1\0"), 540: (nib.Nifti2Image, b"n+2\0\r\n\x1a\n")}
_MAGIC_OFFSETS = {348: 344, 540: 4}
_IN_MEMORY = 1 << 26  # bytes; those of larger volumes stay on the disk
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # by code: metre, millimetre, micrometre (nifti1.h, NIFTI_UNITS_METER ...)


def read_nifti(path: Path, *, strict: bool = False, chosen: Sequence[int] | None = None) -> Iterator[Picture]:
    """Read a 2-D image or the axial slices of a 3-D volume, from the feet to the head.

    Every slice is turned, by the affine, to the radiological view: the patient's right is on the left of the picture
    and the front (anterior) on top. A file of one slice is shown in its own plane; coronal and sagittal ones have the
    head on top, sagittal ones the front on the left. All checks run before the first slice is yielded.

    A scl_slope of 0 or NaN means "not scaled" (NIfTI-1 standard, nifti1.h). Where qform and sform are both given, the
    sform counts; if they turn the axes differently the file is refused, if they differ otherwise (by more than a
    hundredth of a voxel at any corner) the acquisition says ``"geometry_note": "qform-sform-differ"``.

    Args:
        path: .nii or .nii.gz, whatever its name.
        strict: refuse files whose qform and sform differ at all.
        chosen: 0-based slices to yield, in this order from feet to head; None yields all.

    Returns:
        Pictures of unit "stored", since NIfTI names neither modality nor unit, after scl_slope and scl_inter.

    Raises:
        DataError: `image-unreadable`, `image-truncated`, `image-too-large`, `shape-invalid`, `image-not-finite`,
            `multi-frame-unsupported` (4-D and more), `pixel-format-invalid` (complex, RGB), `orientation-unknown`,
            `orientation-conflict` (strict), `slice-outside-volume`.
    """
    path = Path(path)
    limits.check_file(path)
    with limits.decoding("NIfTI"):
        image = open_nifti(path)
        shape = _check_header(image)
        orientation = _orientation(image)
        agree = forms_agree(image)
        if strict and not agree:
            raise DataError(
                "orientation-conflict",
                "The qform and sform of the NIfTI header differ, so the place of the voxels is not certain.",
            )
        _check_values(image, shape)
    return _slices(image, shape, orientation, storage.sha256_file(path), agree, chosen)


@dataclass(frozen=True)
class NiftiHeader:
    """What `read_nifti` will yield: the number of slices, and where each is along its axis in mm (None if unknown)."""

    num_slices: int
    positions: tuple[float, ...] | None


def read_nifti_header(path: Path) -> NiftiHeader:
    """The slices of a NIfTI file without their values.

    Positions are along the canonical axis of the slices (for axial ones z, from feet to head), of the first voxel.

    Raises:
        DataError: as `read_nifti`.
    """
    path = Path(path)
    limits.check_file(path)
    with limits.decoding("NIfTI"):
        image = open_nifti(path)
        shape = _check_header(image)
        orientation = _orientation(image)
    axis = _slice_axis(image, shape, orientation)
    factor = _factor(image)
    if factor is None or not _known(image):
        return NiftiHeader(shape[axis], None)
    canonical, sign = int(orientation[axis, 0]), int(orientation[axis, 1])
    start, step = float(image.affine[canonical, 3]) * factor, float(image.affine[canonical, axis]) * factor
    places = range(shape[axis]) if sign > 0 else range(shape[axis] - 1, -1, -1)
    return NiftiHeader(shape[axis], tuple(start + step * place for place in places))


def _known(image: nib.Nifti1Image) -> bool:
    return int(image.header["qform_code"]) > 0 or int(image.header["sform_code"]) > 0


def _factor(image: nib.Nifti1Image) -> float | None:
    """Millimetres per unit of the affine; None where the header says none, or a code that the standard does not know."""
    return _MM_PER_UNIT.get(int(image.header["xyzt_units"]) % 8)


def forms_agree(image: nib.Nifti1Image) -> bool:
    """False if qform and sform are both given and put a corner of the volume more than 0.01 voxels apart."""
    header = image.header
    if int(header["qform_code"]) <= 0 or int(header["sform_code"]) <= 0:
        return True
    shape = (*image.shape, 1, 1, 1)[:3]
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], dtype=float).T
    apart = np.linalg.norm(((header.get_qform() - header.get_sform()) @ corners)[:3], axis=0).max()
    return bool(apart <= 0.01 * float(np.linalg.norm(image.affine[:3, :3], axis=0).min()))


def _slice_axis(image: nib.Nifti1Image, shape: tuple[int, int, int], orientation: np.ndarray) -> int:
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if len(image.shape) == 2:
        return 2
    return thin[0] if len(thin) == 1 else int(np.flatnonzero(orientation[:, 0] == 2)[0])


def open_nifti(path: Path) -> nib.Nifti1Image:
    """The image over its bytes in memory, or over a file if they are many; nothing is scaled or converted yet.

    Call it inside `limits.decoding`.

    Raises:
        DataError: as `read_nifti`.  StorageError: no room for the temporary file of a large packed volume.
    """
    stream = limits.pieces(path)
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    if is_packed:
        stream = limits.inflate(stream, wbits=31)
    start = io.BytesIO()
    buffer: IO[bytes] = start
    found = None
    needed = 0
    for piece in stream:
        if found is not None and buffer.tell() >= needed:
            continue  # bytes behind the voxels are counted against the cap, not kept
        with storage.storage_errors("a temporary file"):
            buffer.write(piece)
        if found is None and buffer.tell() >= 4:
            found = _kind(start.getvalue()[:544])
            if found is None and buffer.tell() >= 544:
                break
            if found is not None:
                # Checked before the rest is inflated: a bomb with a small header, or a huge header, ends here.
                needed = _check_raw_header(found.header_class(start.getvalue()[: found.header_class.sizeof_hdr], check=False))
                if needed > _IN_MEMORY and not is_packed:
                    buffer = open(path, "rb")  # noqa: SIM115 - the image reads from it as long as it lives
                    buffer.seek(0, io.SEEK_END)
                    break
                if needed > _IN_MEMORY:
                    buffer = tempfile.TemporaryFile()  # noqa: SIM115 - as above; it has no name and ends with the process
                    buffer.write(start.getvalue())
    if found is None:
        raise DataError(
            "image-unreadable", "The file is no single-file NIfTI (.nii or .nii.gz); convert it, for example with dcm2niix."
        )
    if buffer.tell() < needed:
        raise DataError(
            "image-truncated", f"The NIfTI header declares {needed} bytes, the file holds {buffer.tell()}; copy it again."
        )
    buffer.seek(0)
    holder = FileHolder(fileobj=buffer)  # type: ignore[arg-type]
    return found.from_file_map({"header": holder, "image": holder})


def _kind(head: bytes) -> type[nib.Nifti1Image] | None:
    """NIfTI-1 or -2 by the size and the mark in the first bytes."""
    for size, (kind, magic) in _HEADER_SIZES.items():
        start = _MAGIC_OFFSETS[size]
        sizes = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
        if size in sizes and head[start:].startswith(magic) and len(head) >= size:
            return kind
    return None


def _check_raw_header(header: nib.Nifti1Header) -> int:
    """Check the fields as they are in the file, since nibabel would trust or replace them; returns the bytes needed."""
    # 0 and NaN mean "no scaling"; nibabel takes infinity for that too
    if np.isinf(float(header["scl_slope"])) or np.isinf(float(header["scl_inter"])):
        raise DataError("rescale-invalid", "The NIfTI scl_slope and scl_inter must be finite numbers; repair the header.")
    num_dims = int(header["dim"][0])
    if not 1 <= num_dims <= 7:
        raise DataError("shape-invalid", f"The NIfTI header declares {num_dims} dimensions; 2 or 3 were expected.")
    sizes = [int(size) for size in header["dim"][1 : num_dims + 1]]
    limits.check_shape(sizes, limits.MAX_VOXELS)
    offset = float(header["vox_offset"])
    if not 0 <= offset <= limits.MAX_INFLATED_BYTES:
        raise DataError("image-unreadable", "The NIfTI vox_offset points outside the file; repair the header.")
    needed = prod(sizes) * int(header["bitpix"]) // 8 + int(offset)
    if needed > limits.MAX_INFLATED_BYTES:
        raise DataError(
            "image-too-large",
            f"The NIfTI voxels take {needed} bytes, more than the cap of {limits.MAX_INFLATED_BYTES}; crop them.",
        )
    return needed


def _check_header(image: nib.Nifti1Image) -> tuple[int, int, int]:
    """The shape with three sizes; a 2-D image has 1 as the third."""
    sizes = [int(size) for size in image.shape]
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) == 2:
        sizes.append(1)
    if len(sizes) != 3:
        text = " x ".join(map(str, image.shape))
        raise DataError(
            "multi-frame-unsupported", f"A NIfTI image of 2 or 3 dimensions was expected, got {text}; save one volume per file."
        )
    if image.get_data_dtype().kind not in "iuf":
        raise DataError("pixel-format-invalid", "The NIfTI data are complex or colour; grey real numbers were expected.")
    limits.check_shape(sorted(sizes)[1:])
    return sizes[0], sizes[1], sizes[2]


def _orientation(image: nib.Nifti1Image) -> np.ndarray:
    """Per stored axis: the canonical axis it runs along and +1 or -1, as `nibabel.orientations.io_orientation` (3, 2)."""
    affine = np.asarray(image.affine, dtype=np.float64)
    header = image.header
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(
            "orientation-unknown", "The NIfTI affine is singular or not finite, so left and right are unknown; repair the header."
        )
    if int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0 and aff2axcodes(header.get_qform()) != aff2axcodes(affine):
        raise DataError(
            "orientation-unknown", "The qform and sform of the NIfTI header turn the axes differently; repair the header."
        )
    return io_orientation(affine).astype(int)


def _check_values(image: nib.Nifti1Image, shape: tuple[int, int, int]) -> None:
    for index in range(shape[2]):
        # float64 to float32 and large scales may overflow, so look at what will be handed out
        limits.check_finite(_plane(image, shape, axis=2, index=index))


def _plane(image: nib.Nifti1Image, shape: tuple[int, int, int], axis: int, index: int) -> np.ndarray:
    """One stored plane as float32, the two other axes in stored order."""
    slicer: list[Any] = [slice(None)] * 3 + [0] * (len(image.shape) - 3)
    slicer[axis] = index
    sizes = [size for other, size in enumerate(shape) if other != axis]
    with np.errstate(over="ignore"):
        return np.asarray(image.dataobj[tuple(slicer[: len(image.shape)])]).reshape(sizes).astype(np.float32)


def _slices(
    image: nib.Nifti1Image,
    shape: tuple[int, int, int],
    orientation: np.ndarray,
    source: str,
    agree: bool,
    chosen: Sequence[int] | None,
) -> Iterator[Picture]:
    canonical, sign = orientation[:, 0], orientation[:, 1]
    axis = _slice_axis(image, shape, orientation)
    first, second = (other for other in range(3) if other != axis)
    places = range(shape[axis]) if chosen is None else sorted(set(chosen))
    if any(not 0 <= index < shape[axis] for index in places):
        raise DataError(
            "slice-outside-volume", f"A slice was chosen that the file does not have: its {shape[axis]} count from 0."
        )
    for index in places:
        stored_index = index if sign[axis] > 0 else shape[axis] - 1 - index
        plane = _plane(image, shape, axis, stored_index)
        # Canonical axes grow to the right, front and head of the patient. A picture's columns run against the lower
        # axis and its rows against the higher one: right of the patient on the left, front or head on top.
        plane = plane[:: -sign[first], :: -sign[second]]
        turned = bool(canonical[first] < canonical[second])
        pixels = plane.T if turned else plane
        facts = _facts(image, pixels.shape, (first, second), orientation, axis, index, shape[axis])
        facts |= _geometry(image, shape, axis, stored_index, orientation, (first, second) if turned else (second, first))
        if not agree:
            facts["geometry_note"] = "qform-sform-differ"
        yield Picture(np.ascontiguousarray(pixels), "stored", acquisition=facts, source=source)


def _geometry(
    image: nib.Nifti1Image,
    shape: tuple[int, int, int],
    axis: int,
    stored_index: int,
    orientation: np.ndarray,
    column_and_row: tuple[int, int],
) -> dict[str, Any]:
    """orientation and position_mm as DICOM means them (patient axes to the left, back and head), where the header knows.

    Args:
        column_and_row: the stored axes along which the columns and the rows of the picture are counted.
    """
    factor = _factor(image)
    if factor is None or not _known(image):
        return {}
    to_dicom = np.array([-1.0, -1.0, 1.0])
    corner = np.zeros(3)
    corner[axis] = stored_index
    directions = []
    for stored in column_and_row:
        step = -int(orientation[stored, 1])  # pictures run against the canonical axes
        corner[stored] = 0 if step > 0 else shape[stored] - 1
        vector = image.affine[:3, stored] * step * to_dicom
        directions += (vector / np.linalg.norm(vector)).tolist()
    position = (image.affine[:3, :3] @ corner + image.affine[:3, 3]) * factor * to_dicom
    return {"orientation": [float(value) for value in directions], "position_mm": [float(value) for value in position]}


def _facts(
    image: nib.Nifti1Image,
    size: tuple[int, ...],
    in_plane: tuple[int, int],
    orientation: np.ndarray,
    axis: int,
    index: int,
    num_slices: int,
) -> dict[str, Any]:
    header = image.header
    facts: dict[str, Any] = {
        "original_size": [int(size[0]), int(size[1])],
        "bits": int(header["bitpix"]),
        "format": "NIfTI",
        "plane": PLANES[int(orientation[axis, 0])] if _known(image) else "unknown",
    }
    if num_slices > 1:
        facts["slice_index"] = index
    factor = _factor(image)
    if factor is not None:
        spacing = np.linalg.norm(image.affine[:3, :3], axis=0) * factor
        columns, rows = sorted(in_plane, key=lambda other: orientation[other, 0])
        facts["spacing_mm"] = [float(spacing[rows]), float(spacing[columns])]
        if num_slices > 1:
            facts["slice_spacing_mm"] = float(spacing[axis])
    return facts
