from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import item, make_enhanced, make_image, make_slice, save, slice_pixels
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from medaug.errors import DataError
from medaug.intake.records import IntakeOptions, Item
from medaug.intake.scan import read_pictures, scan


@pytest.fixture
def medium(tmp_path):
    """A DICOMDIR of two images, one of them absent; a third image that it does not name, and one outside."""
    root = tmp_path / "cd"
    for index, name in enumerate(("cd/DICOM/IM1", "cd/DICOM/IM3", "outside/IM4")):
        save(tmp_path / name, make_slice(index))
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    names = (["DICOM", "IM1"], ["DICOM", "IM2"], ["..", "outside", "IM4"])
    directory.DirectoryRecordSequence = [item(DirectoryRecordType="IMAGE", ReferencedFileID=name) for name in names]
    save(root / "DICOMDIR", directory)
    return root


def test_a_dicomdir_as_source_counts_alone(medium):
    found = scan(IntakeOptions(source=medium / "DICOMDIR", out=medium.parent / "out"))
    assert [each.relative for each in found.items] == ["DICOM/IM1"]
    assert [(row["file"], row["code"]) for row in found.quarantine] == [
        ("DICOMDIR record 2", "image-missing"),
        ("DICOMDIR record 3", "path-outside-source"),
    ]


def test_its_folder_as_source_is_taken_as_it_is(medium):
    found = scan(IntakeOptions(source=medium, out=medium.parent / "out"))
    assert [each.relative for each in found.items] == ["DICOM/IM1", "DICOM/IM3"] and not found.quarantine


def test_a_broken_dicomdir_is_an_error(medium):
    data = (medium / "DICOMDIR").read_bytes()
    (medium / "DICOMDIR").write_bytes(data[:250])
    with pytest.raises(DataError):
        scan(IntakeOptions(source=medium / "DICOMDIR", out=Path("out")))


def test_pictures_of_a_multi_frame_file(tmp_path):
    frames = np.stack([slice_pixels(index) for index in range(4)])
    path = save(tmp_path / "IM1", make_enhanced(frames, [3, 2, 1, 0]))
    pictures = [picture for picture, _, _ in read_pictures(Item("IM1", path, "dicom"))]
    assert [picture.acquisition["frame"] for picture in pictures] == [4, 3, 2, 1]
    chosen = [picture for picture, _, _ in read_pictures(Item("IM1", path, "dicom", slices=(1,)))]
    assert [picture.acquisition["frame"] for picture in chosen] == [3]


def test_a_slice_says_its_place_in_the_series(tmp_path):
    path = save(tmp_path / "IM1", make_image(slice_pixels(0)))
    ((picture, _, _),) = read_pictures(Item("IM1", path, "dicom", slice_index=7))
    assert picture.acquisition["slice_index"] == 7


def test_strict_reading_of_nifti(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    image.set_qform(np.diag([1, 1, 1.5, 1]), 1)
    image.set_sform(np.eye(4), 1)
    nib.save(image, tmp_path / "a.nii")
    assert len(list(read_pictures(Item("a.nii", tmp_path / "a.nii", "nifti")))) == 3
    with pytest.raises(DataError, match="orientation-conflict"):
        list(read_pictures(Item("a.nii", tmp_path / "a.nii", "nifti"), strict=True))


def test_a_file_that_changes_after_it_was_hashed_is_hashed_again(tmp_path):
    path = tmp_path / "IM0001"
    path.write_bytes(b"one")
    item = Item("IM0001", path, "dicom")
    assert item.unchanged_sha256() == ""
    item.hash()
    assert item.unchanged_sha256() == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"other")
    assert item.unchanged_sha256() == ""
