"""Every file that comes with pydicom is read as pydicom reads it, or refused with a code."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medaug.errors import DataError
from medaug.io.dicom import is_dicom, read_dicom, read_frames, read_header
from medaug.io.dicomdir import is_dicomdir, read_dicomdir

DATA = Path(pydicom.__file__).parent / "data"
FILES = sorted(path for folder in ("test_files", "charset_files") for path in (DATA / folder).rglob("*") if path.is_file())
# What no installation of the declared decoders reads.
REFUSED = {
    "JPEG-lossy.dcm": "transfer-syntax-unsupported",  # JPEG Extended of 12 bits
    "JPGExtended.dcm": "transfer-syntax-unsupported",
    "JPEG2000-embedded-sequence-delimiter.dcm": "image-unreadable",
    "MR_truncated.dcm": "image-truncated",
    "badVR.dcm": "pixel-format-invalid",  # NumberOfFrames is no number
    "liver_1frame.dcm": "pixel-format-invalid",  # segmentations of 1 bit
    "liver_expb_1frame.dcm": "pixel-format-invalid",
    "rtplan.dcm": "not-an-image",
    "rtstruct.dcm": "not-an-image",
    "reportsi.dcm": "not-an-image",
    "waveform_ecg.dcm": "not-an-image",
    "test-SR.dcm": "not-an-image",
    "README.txt": "image-unreadable",
}


def expected(path) -> list[np.ndarray]:
    """Frames by pydicom's own functions and its own choice of decoder; values as DICOM means them, no padding replaced."""
    dataset = pydicom.dcmread(path, force=True)
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    array, _ = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)[..., :3]
        array = np.rint(array / 257) if array.dtype == np.uint16 else array
    elif dataset.SamplesPerPixel == 1:
        padding = array == dataset.get("PixelPaddingValue", 1 << 40)
        array = apply_modality_lut(array, dataset).astype(np.float64)
        if dataset.PhotometricInterpretation == "MONOCHROME1" and dataset.Modality != "CT":
            ends = apply_modality_lut(np.array([0, 2**dataset.BitsStored - 1]), dataset).astype(np.float64)
            array = ends.sum() - array
        if padding.any():
            array[padding] = array[~padding].min()
    return [array] if int(dataset.get("NumberOfFrames") or 1) == 1 else list(array)


def has_image(path) -> bool:
    """True if pydicom gives pixels for the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(expected(path))
        except (AttributeError, NotImplementedError, ValueError, RuntimeError):
            return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_read_as_pydicom_does_or_refused_with_a_code(path):
    for name in ("gdcm", "openjpeg", "jpeg_ls"):
        pytest.importorskip(name)
    try:
        pictures = list(read_frames(path))
    except DataError as error:
        assert error.code and (path.name not in REFUSED or REFUSED[path.name] == error.code)
        if path.name not in REFUSED:
            assert not is_dicom(path) or not has_image(path)
        return
    assert path.name not in REFUSED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = expected(path)
    assert len(pictures) == len(frames)
    for picture, frame in zip(pictures, frames, strict=True):
        np.testing.assert_array_equal(picture.pixels, frame.astype(np.float32))
    if len(pictures) == 1:
        np.testing.assert_array_equal(read_dicom(path).pixels, pictures[0].pixels)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_headers_of_all_files(path):
    try:
        header = read_header(path)
    except DataError as error:
        assert error.code
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
    assert header.sop == str(dataset.get("SOPInstanceUID", ""))
    assert header.series == str(dataset.get("SeriesInstanceUID", ""))
    if isinstance(dataset.get("Rows"), int):
        assert (header.rows, header.columns) == (dataset.Rows, dataset.Columns)


def test_the_dicomdirs_of_pydicom():
    found = [path for path in FILES if is_dicomdir(path)]
    assert len(found) >= 3
    for path in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = pydicom.dcmread(path).get("DirectoryRecordSequence") or []
        if not records:  # DICOMDIR-empty.dcm
            with pytest.raises(DataError, match="dicomdir-unreadable"):
                read_dicomdir(path)
            continue
        listing = read_dicomdir(path)
        named = {
            tuple([one] if isinstance(one := record.ReferencedFileID, str) else list(one))
            for record in records
            if "ReferencedFileID" in record
        }
        assert listing.records == len(records) and not listing.outside
        # Some of the listed files do not come with pydicom.
        assert len(listing.files) + len(listing.absent) == len(named)
        assert all(file.is_relative_to(path.parent.resolve()) for file in listing.files)
