"""3-D cohorts: the files of a volume become one case, kept on its own grid as a NIfTI of 16 bits."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medaug import storage
from medaug.errors import DataError
from medaug.intake.records import IntakeOptions, Item
from medaug.io.picture import Picture

if TYPE_CHECKING:
    from medaug.io.volume import Volume

MIN_SLICES = 2
_HEADER_BYTES = 352


def gather(items: Sequence[Item]) -> list[Item]:
    """One item for each volume: the images of a series are joined, files that hold a volume stay as they are.

    Args:
        items: as arranged, so that images of one volume share their `series`.

    Returns:
        items in the order of their first file; `members` are the items of all files, in order.
    """
    volumes: dict[str, list[Item]] = defaultdict(list)
    for index, item in enumerate(items):
        alone = not item.series or item.slice_index is None
        volumes[f"{index}" if alone else f"series {item.series}"].append(item)
    gathered = []
    for own in volumes.values():
        own.sort(key=lambda item: (item.slice_index or 0, item.relative))
        gathered.append(replace(own[0], members=tuple(own), slice_index=None))
    return sorted(gathered, key=lambda item: item.relative)


def read_item(item: Item, options: IntakeOptions) -> tuple[Picture, np.ndarray | None]:
    """The volume of an item as a picture with pixels (D, H, W), and its affine (see `Volume`) or None.

    Raises:
        DataError: `not-a-volume`, `image-too-large`, and whatever reading a slice raises.
    """
    from medaug.io.volume import read_volume

    if item.kind not in ("dicom", "nifti"):
        raise DataError("not-a-volume", "A 3-D cohort is made of DICOM series and NIfTI files; use --dimensions 2 for pictures.")
    volume: Volume = read_volume([member.path for member in item.members or (item,)], strict=options.strict)
    if volume.pixels.ndim != 3 or volume.pixels.shape[0] < MIN_SLICES:
        raise DataError("not-a-volume", "The series or file has a single slice, or colour; a 3-D cohort needs grey volumes.")
    facts = dict(volume.acquisition)
    if volume.fault:
        facts["spacing_fault"] = volume.fault
    return Picture(volume.pixels, volume.unit, volume.modality, facts, volume.identifiers, volume.source), volume.affine


def encode(unit: np.ndarray, affine: np.ndarray | None) -> bytes:
    """A unit volume as .nii.gz: uint16 with 65535 for 1, axes columns, rows, slices; the same bytes for the same volume.

    Args:
        unit: (D, H, W) in [0, 1].
        affine: (d, h, w, 1) to patient coordinates in mm as in DICOM; None leaves qform and sform codes 0: unknown.
    """
    return b"".join(_encoded(unit, affine))


def _encoded(unit: np.ndarray, affine: np.ndarray | None) -> Iterator[bytes]:
    import nibabel

    # The header of an image without data: its voxels are compressed slice by slice and are never in memory as a whole.
    header = nibabel.Nifti1Header()
    header.set_data_shape(unit.shape[::-1])
    header.set_data_dtype(np.uint16)
    header.set_slope_inter(1, 0)
    if affine is not None:
        # NIfTI counts to the right and front where DICOM counts to the left and back.
        matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine)[:, [2, 1, 0, 3]]
        header.set_sform(matrix, code=1)
        header.set_qform(matrix, code=1, strip_shears=True)
        header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = b"n+1", _HEADER_BYTES
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    yield compressor.compress(header.binaryblock.ljust(_HEADER_BYTES, b"\0"))
    for plane in unit:  # columns run fastest
        yield compressor.compress(np.rint(plane.astype(np.float64) * 65535).astype("<u2").tobytes())
    yield compressor.flush()


def write(path: Path, unit: np.ndarray, affine: np.ndarray | None) -> None:
    """`encode` into a file of a folder that has no name yet, as `storage.write_staged` writes.

    Raises:
        StorageError: as `storage.write_bytes`.
    """
    with storage.storage_errors(path.name), open(path, "wb") as stream:
        stream.writelines(_encoded(unit, affine))


def read(path: Path) -> np.ndarray:
    """A volume of a cohort: (D, H, W) float32 in [0, 1]."""
    import nibabel

    data: Any = nibabel.load(path).dataobj  # type: ignore[attr-defined]
    return np.asarray(data, dtype=np.float32).transpose(2, 1, 0) / np.float32(65535)
