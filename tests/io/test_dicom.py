from __future__ import annotations

import io
import logging
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_modality_lut
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom import is_dicom, read_dicom

STORED = np.random.default_rng(0).integers(0, 4096, (6, 8), dtype=np.uint16)
SECRETS = ("DOE^JANE", "MRN-4711", "ACC-0815", "19700101")


def make(pixels=STORED, syntax=ExplicitVRLittleEndian, without=(), **elements) -> Dataset:
    """A small CT image; `elements` are added or replaced, those in `without` are left out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    bits = pixels.dtype.itemsize * 8
    facts = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "PatientName": SECRETS[0],
        "PatientID": SECRETS[1],
        "AccessionNumber": SECRETS[2],
        "PatientBirthDate": SECRETS[3],
        "Modality": "CT",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "RescaleSlope": "1",
        "RescaleIntercept": "-1024",
        "PixelSpacing": ["0.75", "0.5"],
    }
    for keyword, value in (facts | elements).items():
        if keyword not in without:
            setattr(dataset, keyword, value)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


def save(path, dataset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def read(tmp_path):
    def write_and_read(pixels=STORED, **options):
        return read_dicom(save(tmp_path / "IM1", make(pixels, **options)))

    return write_and_read


@pytest.fixture
def refusal(read):
    def code_of(pixels=STORED, **options) -> str:
        with pytest.raises(DataError) as caught:
            read(pixels, **options)
        assert not any(secret in str(caught.value) for secret in SECRETS)
        return caught.value.code

    return code_of


def test_ct_comes_in_hounsfield_units(tmp_path):
    path = save(tmp_path / "IM1", make(WindowCenter=["-600", "40"], WindowWidth=["1500", "400"]))
    picture = read_dicom(path)
    np.testing.assert_array_equal(picture.pixels, STORED.astype(np.float32) - 1024)
    assert (picture.unit, picture.modality, picture.pixels.dtype) == ("hu", "CT", np.float32)
    assert picture.acquisition == {
        "original_size": [6, 8],
        "bits": 16,
        "photometric": "MONOCHROME2",
        "format": "DICOM",
        "spacing_mm": [0.75, 0.5],
        "window_center": -600,
        "window_width": 1500,
        "num_windows": 2,
        "window": [-1350, 149],
    }
    assert picture.identifiers == {
        "patient": "MRN-4711",
        "patient_name": "DOE^JANE",
        "study": "1.2.3",
        "series": "1.2.3.1",
        "sop": "1.2.3.4",
        "accession": "ACC-0815",
        "birth_date": "19700101",
    }
    assert picture.source == storage.sha256_file(path)
    assert not any(secret in repr(picture) for secret in SECRETS)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_transfer_syntaxes_agree(read, syntax):
    np.testing.assert_array_equal(read(syntax=syntax).pixels, STORED.astype(np.float32) - 1024)


def test_run_length_encoding(tmp_path):
    dataset = make()
    dataset.compress(RLELossless, generate_instance_uid=False)
    np.testing.assert_array_equal(read_dicom(save(tmp_path / "a", dataset)).pixels, STORED.astype(np.float32) - 1024)


@pytest.mark.parametrize("implicit", [True, False])
def test_missing_preamble_and_meta_are_accepted(tmp_path, implicit):
    dataset = make()
    del dataset.file_meta
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=implicit, little_endian=True)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert is_dicom(tmp_path / "a.png")
    np.testing.assert_array_equal(read_dicom(tmp_path / "a.png").pixels, STORED.astype(np.float32) - 1024)


def test_is_dicom_by_content(tmp_path):
    for name, data in {"text.dcm": b"hello, no image here", "empty.dcm": b"", "png.dcm": b"\x89PNG\r\n\x1a\n" * 30}.items():
        (tmp_path / name).write_bytes(data)
        assert not is_dicom(tmp_path / name)
        with pytest.raises(DataError):
            read_dicom(tmp_path / name)
    assert not is_dicom(tmp_path / "absent") and not is_dicom(tmp_path)


def test_missing_facts_stay_unknown(read):
    picture = read(without=("PixelSpacing", "RescaleSlope", "RescaleIntercept", "Modality", "PatientID"))
    assert picture.modality == "" and "patient" not in picture.identifiers
    assert not {"spacing_mm", "window_center", "window_width"} & set(picture.acquisition)
    np.testing.assert_array_equal(picture.pixels, STORED)
    assert picture.unit == "stored"


def test_ct_without_rescale_or_with_another_type_is_not_hounsfield(read):
    assert read(without=("RescaleSlope", "RescaleIntercept")).unit == "stored"
    assert read(RescaleType="US").unit == "stored"
    assert read(RescaleType="HU").unit == "hu"
    assert read(Modality="MR").unit == "stored"


def test_signed_pixels_and_negative_slope(read):
    pixels = np.array([[-2000, -5], [0, 1000]], np.int16)
    np.testing.assert_array_equal(read(pixels, RescaleIntercept="0").pixels, pixels)
    np.testing.assert_array_equal(read(pixels, RescaleSlope="-2", RescaleIntercept="3").pixels, 3 - 2.0 * pixels)


def test_bits_above_high_bit_are_ignored(read):
    unsigned = np.array([[0x0FFF, 0xF001]], np.uint16)
    assert read(unsigned, BitsStored=12, HighBit=11, RescaleIntercept="0").pixels.tolist() == [[4095, 1]]
    signed = np.array([[0x0FFF, 0x07FF]], np.int16)  # twelve bits: -1, 2047
    assert read(signed, BitsStored=12, HighBit=11, RescaleIntercept="0").pixels.tolist() == [[-1, 2047]]


@pytest.mark.parametrize(("dtype", "padding"), [(np.int16, -2000), (np.uint16, 63536), (np.uint16, 0)])
def test_padding_takes_the_smallest_real_value(read, dtype, padding):
    pixels = np.array([[100, 300], [padding, 700]], np.int64).astype(dtype)
    np.testing.assert_array_equal(read(pixels, PixelPaddingValue=padding).pixels, [[-924, -724], [-924, -324]])


def test_padding_range_written_in_the_other_signedness(read):
    pixels = np.array([[-2000, -1500], [100, 300]], np.int16)
    picture = read(pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)
    np.testing.assert_array_equal(picture.pixels, [[-924, -924], [-924, -724]])
    with_high_bits = np.array([[0xF830, 5], [6, 7]], np.uint16)
    picture = read(with_high_bits, BitsStored=12, HighBit=11, PixelPaddingValue=0xF830, RescaleIntercept="0")
    np.testing.assert_array_equal(picture.pixels, [[5, 5], [6, 7]])


def test_monochrome1_is_inverted_except_hounsfield_units(read):
    pixels = np.array([[0, 10], [200, 255]], np.uint8)
    options = {"PhotometricInterpretation": "MONOCHROME1", "Modality": "DX", "without": ("RescaleSlope", "RescaleIntercept")}
    picture = read(pixels, **options)
    assert picture.unit == "uint8"
    np.testing.assert_array_equal(picture.pixels, 255.0 - pixels)
    twelve = read(pixels.astype(np.uint16), BitsStored=12, HighBit=11, **options)
    np.testing.assert_array_equal(twelve.pixels, 4095.0 - pixels)
    padded = read(pixels, PixelPaddingValue=0, **options)
    np.testing.assert_array_equal(padded.pixels, [[0, 245], [55, 0]])
    np.testing.assert_array_equal(read(PhotometricInterpretation="MONOCHROME1").pixels, STORED - 1024.0)


def test_modality_lut_against_pydicom(read):
    lut = Dataset()
    lut.LUTDescriptor = [256, 0, 16]
    lut["LUTDescriptor"].VR = "US"
    lut.LUTData = (np.arange(256) ** 2).astype("<u2").tobytes()
    lut["LUTData"].VR = "OW"
    lut.ModalityLUTType = "US"
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    options = {"Modality": "CR", "ModalityLUTSequence": [lut], "without": ("RescaleSlope", "RescaleIntercept")}
    picture = read(pixels, **options)
    np.testing.assert_array_equal(picture.pixels, apply_modality_lut(pixels, make(pixels, **options)))
    assert picture.unit == "stored"
    np.testing.assert_array_equal(read(pixels, PhotometricInterpretation="MONOCHROME1", **options).pixels, 65535 - picture.pixels)


def test_colour_and_palette(read):
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    colour = {
        "PhotometricInterpretation": "RGB",
        "SamplesPerPixel": 3,
        "without": ("RescaleSlope", "RescaleIntercept"),
        "Modality": "OT",
    }
    picture = read(rgb, PlanarConfiguration=0, **colour)
    np.testing.assert_array_equal(picture.pixels, rgb)
    assert picture.unit == "uint8"
    tables = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
    tables |= {
        f"{name}PaletteColorLookupTableData": (np.arange(256) * 257).astype("<u2").tobytes() for name in ("Red", "Green", "Blue")
    }
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8)
    palette = read(indices, PhotometricInterpretation="PALETTE COLOR", without=colour["without"], **tables)
    np.testing.assert_array_equal(palette.pixels, np.repeat(indices[..., None], 3, axis=2))


@pytest.mark.parametrize("slope", ["0", "NaN", "1,0", "inf", "1_0", "", "one"])
def test_bad_rescale_is_refused(tmp_path, slope):
    data = save(tmp_path / "a", make(RescaleSlope="77777777")).read_bytes()
    path = tmp_path / "b"
    path.write_bytes(data.replace(b"77777777", slope.encode().ljust(8)))
    with pytest.raises(DataError) as caught:
        read_dicom(path)
    assert caught.value.code == "rescale-invalid"


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"NumberOfFrames": "3"}, "multi-frame-unsupported"),
        ({"BitsStored": 17}, "pixel-format-invalid"),
        ({"BitsStored": 0}, "pixel-format-invalid"),
        ({"HighBit": 7}, "pixel-format-invalid"),
        ({"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11}, "pixel-format-invalid"),
        ({"PhotometricInterpretation": "ARGB"}, "pixel-format-invalid"),
        ({"SamplesPerPixel": 3}, "pixel-format-invalid"),
        ({"PixelRepresentation": 2}, "pixel-format-invalid"),
        ({"Rows": 0}, "shape-invalid"),
        ({"Rows": 65535, "Columns": 65535}, "image-too-large"),
        ({"Rows": 600}, "image-truncated"),
        ({"without": ("Rows",)}, "pixel-format-invalid"),
    ],
)
def test_headers_that_contradict_themselves_or_the_pixels(refusal, elements, code):
    assert refusal(**elements) == code


def test_all_padding_is_empty(refusal):
    assert refusal(np.zeros((4, 4), np.uint16), PixelPaddingValue=0) == "image-empty"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # from writing it
def test_bad_optional_facts_are_left_out(read):
    picture = read(WindowCenter="40", WindowWidth="0", PixelSpacing=["0", "1"], ImageType=["ORIGINAL", "doe^jane"])
    assert not {"spacing_mm", "window_center", "window_width", "image_type"} & set(picture.acquisition)


def test_reports_are_no_images(tmp_path):
    dataset = make(SOPClassUID=BasicTextSRStorage, without=("Rows", "Columns"))
    del dataset.PixelData
    with pytest.raises(DataError, match=r"not-an-image.*Basic Text SR"):
        read_dicom(save(tmp_path / "a", dataset))


def test_deflate_bomb_is_stopped(tmp_path, monkeypatch):
    path = save(tmp_path / "a", make(syntax=DeflatedExplicitVRLittleEndian))
    data = path.read_bytes()
    squeezer = zlib.compressobj(wbits=-15)
    plain = save(tmp_path / "b", make()).read_bytes()
    meta_end = 132 + 12 + int.from_bytes(data[140:144], "little")
    plain_end = 132 + 12 + int.from_bytes(plain[140:144], "little")
    bomb = squeezer.compress(plain[plain_end:] + bytes(5_000_000)) + squeezer.flush()
    path.write_bytes(data[:meta_end] + bomb)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(DataError) as caught:
        read_dicom(path)
    assert caught.value.code == "image-too-large"


def test_deep_nesting_is_a_coded_error_or_read(tmp_path):
    """A thousand nested sequences of undefined length."""
    data = save(tmp_path / "a", make()).read_bytes()
    cut = data.index(b"\xe0\x7f\x10\x00")
    opening = b"\x09\x00\x15\x12SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    (tmp_path / "b").write_bytes(data[:cut] + opening * 2000 + data[cut:])
    with pytest.raises(DataError):
        read_dicom(tmp_path / "b")


def test_pydicom_is_silent_about_values(tmp_path, caplog, recwarn):
    data = save(tmp_path / "a", make(StudyInstanceUID="9.9.9.9.9.9.9")).read_bytes()
    (tmp_path / "a").write_bytes(data.replace(b"9.9.9.9.9.9.9", b"DOE^JANE secr").replace(b"19700101", b"DOE^JANE"))
    with caplog.at_level(logging.DEBUG):
        assert read_dicom(tmp_path / "a").identifiers["study"].startswith("DOE")
    assert not caplog.records and not recwarn.list
    assert logging.getLogger("pydicom").disabled is False


def test_every_truncation_is_refused(tmp_path):
    data = save(tmp_path / "a", make()).read_bytes()
    for length in range(0, len(data), 5):
        (tmp_path / "b").write_bytes(data[:length])
        with pytest.raises(DataError):
            read_dicom(tmp_path / "b")


def test_broken_character_set_keeps_the_joins(read):
    picture = read(SpecificCharacterSet="NO_SUCH_SET")
    assert picture.identifiers["patient"] == "MRN-4711"


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0, 1),
    st.integers(0, 255),
    st.booleans(),
    st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless]),
)
def test_damaged_bytes_give_only_data_errors(tmp_path_factory, share, value, cut, syntax):
    dataset = make()
    if syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    elif syntax == ImplicitVRLittleEndian:
        dataset = make(syntax=syntax)
    path = save(tmp_path_factory.mktemp("fuzz") / "a", dataset)
    data = bytearray(path.read_bytes())
    position = min(int(share * len(data)), len(data) - 1)
    if cut:
        data = data[:position]
    else:
        data[position] = value
    path.write_bytes(data)
    try:
        read_dicom(path)
    except DataError as error:
        assert error.code and not any(secret in str(error) for secret in SECRETS)
