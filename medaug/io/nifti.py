"""NIfTI-1 and -2: one picture per slice, shown as radiologists look at it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}


def read_nifti(path: Path) -> Iterator[Picture]:
    """Read a 2-D image or the axial slices of a 3-D volume, from the feet to the head.

    Every slice is turned, by the affine, to the radiological view: the patient's right is on the left of the picture
    and the front (anterior) on top. A file of one slice is shown in its own plane; coronal and sagittal ones have the
    head on top, sagittal ones the front on the left. All checks run before the first slice is yielded.

    Returns:
        Pictures of unit "stored", since NIfTI names neither modality nor unit, after scl_slope and scl_inter.

    Raises:
        DataError: `image-unreadable`, `image-truncated`, `image-too-large`, `shape-invalid`, `image-not-finite`,
            `multi-frame-unsupported` (4-D and more), `pixel-format-invalid` (complex, RGB), `orientation-unknown`.
    """
    path = Path(path)
    limits.check_file(path)
    with limits.decoding("NIfTI"):
        image = _open(path)
        shape = _check_header(image)
        orientation = _orientation(image)
        _check_values(image, shape)
    return _slices(image, shape, orientation, storage.sha256_file(path))


def _open(path: Path) -> nib.Nifti1Image:
    """The image over its bytes in memory; nothing is scaled or converted yet."""
    stream = limits.pieces(path)
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            stream = limits.inflate(stream, wbits=31)
    data = b"".join(stream)
    for size, (kind, magic) in _HEADER_SIZES.items():
        start = _MAGIC_OFFSETS[size]
        if size in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big")) and data[start:].startswith(magic):
            if len(data) < size:
                break
            holder = FileHolder(fileobj=io.BytesIO(data))
            _check_raw_header(kind.header_class(data[:size], check=False), len(data))
            return kind.from_file_map({"header": holder, "image": holder})
    raise DataError(
        "image-unreadable", "The file is no single-file NIfTI (.nii or .nii.gz); convert it, for example with dcm2niix."
    )


def _check_raw_header(header: nib.Nifti1Header, num_bytes: int) -> None:
    """Check the fields as they are in the file, since nibabel would trust or replace them."""
    # 0 and NaN mean "no scaling"; nibabel takes infinity for that too
    if np.isinf(float(header["scl_slope"])) or np.isinf(float(header["scl_inter"])):
        raise DataError("rescale-invalid", "The NIfTI scl_slope and scl_inter must be finite numbers; repair the header.")
    num_dims = int(header["dim"][0])
    if not 1 <= num_dims <= 7:
        raise DataError("shape-invalid", f"The NIfTI header declares {num_dims} dimensions; 2 or 3 were expected.")
    sizes = [int(size) for size in header["dim"][1 : num_dims + 1]]
    limits.check_shape(sizes, limits.MAX_VOXELS)
    needed = int(np.prod(sizes)) * int(header["bitpix"]) // 8 + int(header["vox_offset"])
    if num_bytes < needed:
        raise DataError(
            "image-truncated", f"The NIfTI header declares {needed} bytes, the file holds {num_bytes}; copy it again."
        )


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


def _slices(image: nib.Nifti1Image, shape: tuple[int, int, int], orientation: np.ndarray, source: str) -> Iterator[Picture]:
    canonical, sign = orientation[:, 0], orientation[:, 1]
    thin = [axis for axis in range(3) if shape[axis] == 1]
    axis = thin[0] if len(thin) == 1 else int(np.flatnonzero(canonical == 2)[0])
    if len(image.shape) == 2:
        axis = 2
    first, second = (other for other in range(3) if other != axis)
    for index in range(shape[axis]):
        stored_index = index if sign[axis] > 0 else shape[axis] - 1 - index
        plane = _plane(image, shape, axis, stored_index)
        # Canonical axes grow to the right, front and head of the patient. A picture's columns run against the lower
        # axis and its rows against the higher one: right of the patient on the left, front or head on top.
        plane = plane[:: -sign[first], :: -sign[second]]
        pixels = plane.T if canonical[first] < canonical[second] else plane
        yield Picture(
            np.ascontiguousarray(pixels),
            "stored",
            acquisition=_facts(image, pixels.shape, (first, second), orientation, axis, index, shape[axis]),
            source=source,
        )


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
    known = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
    facts: dict[str, Any] = {
        "original_size": [int(size[0]), int(size[1])],
        "bits": int(header["bitpix"]),
        "format": "NIfTI",
        "plane": PLANES[int(orientation[axis, 0])] if known else "unknown",
    }
    if num_slices > 1:
        facts["slice_index"] = index
    factor = _MM_PER_UNIT.get(header.get_xyzt_units()[0])
    if factor is not None:
        spacing = np.linalg.norm(image.affine[:3, :3], axis=0) * factor
        columns, rows = sorted(in_plane, key=lambda other: orientation[other, 0])
        facts["spacing_mm"] = [float(spacing[rows]), float(spacing[columns])]
        if num_slices > 1:
            facts["slice_spacing_mm"] = float(spacing[axis])
    return facts
