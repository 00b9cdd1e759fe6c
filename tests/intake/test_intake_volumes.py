"""3-D cohorts: volumes on their own grid with their affine, refused by steps that work on pictures."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from test_intake_build import picture, take, write_dicom

from medaug.cohort import read_cohort
from medaug.errors import DataError
from medaug.intake import volumes
from medaug.intake.records import Item


def write_series(root: Path, patients: int = 8, depth: int = 4) -> np.ndarray:
    """Series with slices at 3 mm, written from the head to the feet; returns the HU of the first one, feet first."""
    first = []
    for patient in range(patients):
        for index in range(depth):
            path = root / "ab"[patient % 2] / f"{patient}" / f"IM{depth - index:04d}"
            pixels = picture(41, patient, index) // 2
            write_dicom(path, pixels, f"Patientin{patient}Q", name=f"n{patient}")
            data = pydicom.dcmread(path)
            data.ImagePositionPatient, data.ImageOrientationPatient = [-10, -20, 100 + 3 * index], [1, 0, 0, 0, 1, 0]
            data.PixelSpacing = [0.5, 0.75]
            data.save_as(path)
            if patient == 0:
                first.append(pixels.astype(np.float64) * 8 - 1024)
    return np.stack(first)


def test_series_become_volumes_with_geometry(tmp_path: Path) -> None:
    hounsfield = write_series(tmp_path / "in")
    result = take(tmp_path / "in", tmp_path / "out", dimensions=3, window=(-1024, 1024), keep_dicom=tmp_path / "copies")
    assert result.counts["used"] == 8 and result.cohort.spatial_dims == 3 and result.cohort.image_size == 20
    case = next(
        case
        for case in result.cohort.cases()
        if np.allclose(volumes.read(result.cohort.path(case)) * 2048 - 1024, hounsfield, atol=0.02)
    )
    assert case.image == f"images/{case.id}.nii.gz" and len(case.acquisition["series"]) == 16
    image = nib.load(result.cohort.path(case))
    assert image.shape == (18, 20, 4) and image.get_data_dtype() == np.uint16
    expected = np.array([[-0.75, 0, 0, 10], [0, -0.5, 0, 20], [0, 0, 3, 100], [0, 0, 0, 1]])
    assert np.allclose(image.affine, expected) and int(image.header["sform_code"]) == 1
    assert len(list((tmp_path / "copies").rglob("*.dcm"))) == 32
    again = take(tmp_path / "in", tmp_path / "again", dimensions=3, window=(-1024, 1024), name="out").cohort
    assert again.content_sha256 == result.cohort.content_sha256
    assert (tmp_path / "out" / "report.html").read_text().count("images of class") == 2


def test_steps_that_work_on_pictures_refuse_volumes(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    take(tmp_path / "in", tmp_path / "out", dimensions=3)
    assert read_cohort(tmp_path / "out", spatial_dims=3, verify=True).spatial_dims == 3
    with pytest.raises(DataError, match="cohort-dimensions"):
        read_cohort(tmp_path / "out")


def test_nifti_without_known_orientation_gets_none(tmp_path: Path) -> None:
    for index in range(8):
        path = tmp_path / "in" / "ab"[index % 2] / f"scan{index}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        stack = np.stack([picture(42, index, depth) for depth in range(3)], axis=-1).astype(np.float32)
        nib.save(nib.Nifti1Image(stack, None), path)
    cohort = take(tmp_path / "in", tmp_path / "out", dimensions=3).cohort
    assert len(cohort.cases()) == 8
    header = nib.load(cohort.path(cohort.cases()[0])).header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 0


def test_pictures_are_no_volumes(tmp_path: Path) -> None:
    write_dicom(tmp_path / "in" / "a" / "IM1", picture(1), "P1Q")
    with pytest.raises(DataError, match="1 not-a-volume"):
        take(tmp_path / "in", tmp_path / "out", dimensions=3)


def test_gathering_joins_a_series_and_leaves_files_of_volumes_alone() -> None:
    items = [Item(f"{index}", Path(f"{index}"), "dicom", series="s", slice_index=3 - index) for index in range(3)]
    items += [Item("8", Path("8"), "nifti"), Item("9", Path("9"), "dicom", series="t")]
    gathered = volumes.gather(items)
    assert [[member.relative for member in item.members] for item in gathered] == [["8"], ["9"], ["2", "1", "0"]] or [
        [member.relative for member in item.members] for item in gathered
    ] == [["2", "1", "0"], ["8"], ["9"]]


def test_encoding_is_the_same_every_time_and_reads_back() -> None:
    unit = np.random.default_rng(0).uniform(size=(3, 4, 5)).astype(np.float32)
    assert volumes.encode(unit, None) == volumes.encode(unit, None)
    assert volumes.encode(unit, np.eye(4)) != volumes.encode(unit, None)
