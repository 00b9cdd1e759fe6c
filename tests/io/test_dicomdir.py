from __future__ import annotations

import numpy as np
import pytest
from dicom_files import item, make_image, save
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from medaug.errors import DataError
from medaug.io.dicomdir import MEDIA_STORAGE_DIRECTORY, is_dicomdir, read_dicomdir

PIXELS = np.arange(16, dtype=np.uint16).reshape(4, 4)


def write_dicomdir(folder, references, in_use=0xFFFF, offset=0):
    """A DICOMDIR whose image records name `references`; `offset` is what every link between records says."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = MEDIA_STORAGE_DIRECTORY
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.FileSetID = "EXPORT"
    dataset.DirectoryRecordSequence = [
        item(
            OffsetOfTheNextDirectoryRecord=offset,
            RecordInUseFlag=in_use,
            OffsetOfReferencedLowerLevelDirectoryEntity=offset,
            DirectoryRecordType="IMAGE",
            **({} if reference is None else {"ReferencedFileID": reference}),
        )
        for reference in references
    ]
    return save(folder / "DICOMDIR", dataset)


@pytest.fixture
def medium(tmp_path):
    """A folder with two images, and a third one beside it."""
    for name in ("cd/IMG/IM1", "cd/IMG/IM2", "secret/IM3"):
        save(tmp_path / name, make_image(PIXELS))
    return tmp_path / "cd"


def test_records_give_files_in_order_and_once(medium):
    listing = read_dicomdir(write_dicomdir(medium, [["IMG", "IM2"], None, ["IMG", "IM1"], ["IMG", "IM2"]]))
    assert [path.name for path in listing.files] == ["IM2", "IM1"]
    assert (listing.records, listing.absent, listing.outside) == (4, [], [])


def test_letter_case_may_have_changed(medium):
    listing = read_dicomdir(write_dicomdir(medium, [["img", "im1"]]))
    assert [path.name for path in listing.files] == ["IM1"]


@pytest.mark.parametrize(
    "reference",
    [
        ["..", "secret", "IM3"],
        ["IMG", "..", "..", "secret", "IM3"],
        ["/etc/passwd"],
        ["IMG/../../secret/IM3"],
        ["LINK", "IM3"],
        ["."],
    ],
)
def test_nothing_outside_its_folder_is_followed(medium, reference):
    (medium / "LINK").symlink_to(medium.parent / "secret")
    listing = read_dicomdir(write_dicomdir(medium, [reference]))
    assert not listing.files and listing.outside == [1]


def test_absent_files_and_records_out_of_use(medium):
    listing = read_dicomdir(write_dicomdir(medium, [["IMG", "IM9"], ["NONE", "IM1"], ["IMG"]]))
    assert listing.absent == [1, 2, 3] and not listing.files
    assert not read_dicomdir(write_dicomdir(medium, [["IMG", "IM1"]], in_use=0)).files


@pytest.mark.parametrize("offset", [1, 200, 0xFFFFFFFF])
def test_links_between_records_cannot_loop(medium, offset):
    listing = read_dicomdir(write_dicomdir(medium, [["IMG", "IM1"], ["IMG", "IM2"]], offset=offset))
    assert len(listing.files) == 2


def test_folder_links_that_loop(medium):
    (medium / "IMG" / "AGAIN").symlink_to(medium / "IMG")
    listing = read_dicomdir(write_dicomdir(medium, [["IMG", "AGAIN", "AGAIN", "IM1"]]))
    assert len(listing.files) <= 1 and not listing.outside


def test_what_is_no_dicomdir(tmp_path):
    path = save(tmp_path / "IM1", make_image(PIXELS))
    assert not is_dicomdir(path) and not is_dicomdir(tmp_path) and not is_dicomdir(tmp_path / "absent")
    with pytest.raises(DataError, match="dicomdir-unreadable"):
        read_dicomdir(path)


def test_truncated_anywhere_is_a_coded_error_or_a_shorter_list(medium):
    path = write_dicomdir(medium, [["IMG", "IM1"], ["IMG", "IM2"]])
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        try:
            assert len(read_dicomdir(path).files) <= 2
        except DataError as error:
            assert error.code


def test_a_name_that_no_file_can_have_and_a_loop_of_links_are_absent(medium):
    (medium / "LOOP").symlink_to("LOOP")
    listing = read_dicomdir(write_dicomdir(medium, [["A" * 5000], ["LOOP"], ["LOOP", "X"], ["IMG", "IM1"]]))
    assert [path.name for path in listing.files] == ["IM1"] and listing.absent == [1, 2, 3]
