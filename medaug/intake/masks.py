"""Lesion masks: which files are the mask of a volume, and in which slice the lesion is largest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medaug.errors import DataError
from medaug.intake.records import IntakeOptions
from medaug.io import dicom, paths, volume

_SUFFIX = re.compile(r"(\.nii(\.gz)?|\.dcm|\.dicom|\.ima)$", re.IGNORECASE)


def stem_of(path: Path) -> str:
    """The name of a volume's file without its extension."""
    return _SUFFIX.sub("", path.name)


def find_mask(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the lesion mask of a volume.

    Args:
        folder: of masks.
        names: what the volume is called, the surest first: for a NIfTI or multi-frame file its name without extension;
            for a DICOM series its SeriesInstanceUID, then the name of the one folder that holds it.

    Returns:
        ``folder/<name>.nii.gz``, ``folder/<name>.nii`` or ``folder/<name>.dcm``, or the DICOM files in
        ``folder/<name>/``; [] if there is none. Voxels above 0 are the lesion.
    """
    for name in names:
        for suffix in (".nii.gz", ".nii", ".dcm"):
            if paths.is_file(folder / (name + suffix)):
                return [folder / (name + suffix)]
        files = [path for path in paths.children(folder / name) if paths.is_file(path) and dicom.is_dicom(path)]
        if files:
            return files
    return []


def lesion_slice(options: IntakeOptions, names: Sequence[str], num_slices: int, positions: Sequence[float] | None) -> int:
    """The slice with the largest mask.

    Raises:
        DataError: `mask-missing`, `mask-mismatch`, `mask-empty`, or what reading the mask raises.
    """
    files = find_mask(options.masks, names) if options.masks is not None else []
    if not files:
        raise DataError("mask-missing", "The folder of masks holds no mask of this volume, so no slice can be chosen.")
    mask = volume.read_volume(files)
    known = positions is not None and mask.positions_mm is not None and len(mask.positions_mm) == num_slices > 1
    apart = max(abs(a - b) for a, b in zip(positions or (), mask.positions_mm or (), strict=True)) if known else 0.0
    if len(mask.pixels) != num_slices or (known and apart > abs(positions[-1] - positions[0]) / (num_slices - 1) / 2):  # type: ignore[index]
        raise DataError(
            "mask-mismatch",
            f"The mask has {len(mask.pixels)} slices where the volume has {num_slices}, or they are at other places.",
        )
    return volume.largest_slice(mask)
