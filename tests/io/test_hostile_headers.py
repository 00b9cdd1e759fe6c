"""DICOM headers made to fill the memory, to pass for something else, or to carry a name out."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from dicom_files import item, make_enhanced, make_image, save
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
)

from medaug.errors import DataError
from medaug.io import dicom_budget, dicom_frames
from medaug.io.dicom import read_dicom, read_frames, read_header
from medaug.io.dicom_file import open_dataset
from medaug.io.dicom_terms import IMAGE_TYPES, MODALITIES

PIXELS = np.arange(64, dtype=np.uint16).reshape(8, 8)
ITEM, END = struct.pack("<HHL", 0xFFFE, 0xE000, 0), struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
PIXEL_TAG = b"\xe0\x7f\x10\x00OW"


def with_elements(path, elements, deflated=False, **facts):
    """An image with raw elements before its pixels."""
    data = save(path, make_image(PIXELS, **facts)).read_bytes()
    place = data.rindex(PIXEL_TAG)
    data = data[:place] + elements + data[place:]
    if deflated:
        start = data.index(b"\x08\x00\x16\x00")
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        data = _with_syntax(data[:start]) + packer.compress(data[start:]) + packer.flush()
    path.write_bytes(data)
    return path


def _with_syntax(meta):
    old, new = (uid.encode() + b"\0" * (len(uid) % 2) for uid in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian))
    place = meta.index(b"UI" + struct.pack("<H", len(old)) + old)
    meta = meta[:place] + b"UI" + struct.pack("<H", len(new)) + new + meta[place + 4 + len(old) :]
    (length,) = struct.unpack_from("<L", meta, 140)
    return meta[:140] + struct.pack("<L", length + len(new) - len(old)) + meta[144:]


def swarm(kind, count):
    if kind == "undefined":
        return struct.pack("<HH2sHL", 0x2101, 0x1001, b"SQ", 0, 0xFFFFFFFF) + ITEM * count + END
    if kind == "defined":
        return struct.pack("<HH2sHL", 0x2101, 0x1001, b"SQ", 0, 8 * count) + ITEM * count
    if kind == "nested":
        inner = struct.pack("<HH2sHL", 0x2101, 0x1001, b"SQ", 0, 8 * count) + ITEM * count
        outer = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
        return struct.pack("<HH2sHL", 0x2101, 0x1001, b"SQ", 0, len(outer)) + outer
    return b"".join(struct.pack("<HH2sH", 0x2101 + 2 * (n // 60000), 16 + n % 60000, b"LO", 0) for n in range(count))


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("kind", ["undefined", "defined", "nested", "elements"])
def test_a_swarm_of_items_or_elements_is_too_large(tmp_path, monkeypatch, kind, deflated):
    monkeypatch.setattr(dicom_budget, "SHORT", 4000)
    monkeypatch.setattr("medaug.io.dicom_file.Budget", lambda reads=1000: dicom_budget.Budget(min(reads, 1000)))
    path = with_elements(tmp_path / "a", swarm(kind, 2000), deflated)
    for read in (read_header, read_dicom):
        with pytest.raises(DataError, match="header holds more") as caught:
            read(path)
        assert caught.value.code == "image-too-large"


@pytest.mark.parametrize("kind", ["undefined", "defined", "nested", "elements"])
@pytest.mark.parametrize("deflated", [False, True])
def test_what_is_within_the_budget_is_read_as_before(tmp_path, monkeypatch, kind, deflated):
    path = with_elements(tmp_path / "a", swarm(kind, 300), deflated)
    expected = read_dicom(path)
    np.testing.assert_array_equal(expected.pixels, PIXELS - 1024.0)
    plain, _ = open_dataset(path)
    monkeypatch.setattr(dicom_budget, "SHORT", 0)
    again, _ = open_dataset(path)
    assert again == plain and again.to_json_dict() == plain.to_json_dict()
    np.testing.assert_array_equal(read_dicom(path).pixels, expected.pixels)
    assert read_dicom(path).acquisition == expected.acquisition


@pytest.mark.parametrize("enhanced", [False, True])
def test_elements_are_not_copied_for_every_frame(tmp_path, enhanced):
    frames = np.zeros((6, 4, 4), np.uint16)
    dataset = make_enhanced(frames, [3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) if enhanced else make_image(frames)
    loaded, _ = open_dataset(save(tmp_path / "a", dataset))
    views = dicom_frames.frame_views(loaded, 6)
    assert not isinstance(views, list) and len(views) == 6
    kept = [view for view in vars(views).values() if isinstance(view, list)]
    assert not any(len(each) == 6 and "Rows" in each[0] for each in kept)
    assert len(list(views)) == 6 and [view.Rows for view in views[1:3]] == [4, 4]
    if enhanced:
        assert [dicom_frames.position_of(view)[2] for view in views] == [3, 1, 2, 6, 5, 4]


NAMED = ["ORIGINAL", "KRANKENMANN", "ILSE", "AXIAL"]


def test_only_defined_terms_of_the_image_type_are_published(tmp_path):
    path = save(
        tmp_path / "a",
        make_image(PIXELS, ImageType=NAMED, Modality="ILSE", VOILUTFunction="KRANKENMANN", WindowCenter=1, WindowWidth=2),
    )
    picture = read_dicom(path)
    assert picture.acquisition["image_type"] == ["ORIGINAL", "AXIAL"] and picture.modality == ""
    assert "KRANKENMANN" not in repr(picture.acquisition)
    assert read_header(path).image_type == tuple(NAMED)  # grouping sees what the file says
    path = save(tmp_path / "b", make_image(PIXELS, ImageType=["KRANKENMANN", "ILSE"]))
    assert "image_type" not in read_dicom(path).acquisition and read_dicom(path).modality == "CT"


def test_no_term_is_published_that_is_the_name_of_the_patient(tmp_path):
    path = save(
        tmp_path / "a", make_image(PIXELS, ImageType=["ORIGINAL", "PORTAL", "MIP"], PatientName="Portal^Ann", Modality="ANN")
    )
    assert read_dicom(path).acquisition["image_type"] == ["ORIGINAL", "MIP"] and read_dicom(path).modality == ""


def test_terms_are_code_strings():
    assert all(len(term) <= 16 and term == term.strip().upper() for term in MODALITIES | IMAGE_TYPES)
    assert {"CT", "DX", "MG", "MR", "US", "XA"} <= MODALITIES and {"ORIGINAL", "LOCALIZER", "MPR"} <= IMAGE_TYPES


def test_pixels_without_a_length_are_unreadable_where_they_must_have_one(tmp_path):
    data = save(tmp_path / "a", make_image(PIXELS)).read_bytes()
    place = data.rindex(PIXEL_TAG) + 8
    endless = data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :]
    for tail in (b"", END):
        (tmp_path / "a").write_bytes(endless + tail)
        with pytest.raises(DataError, match="no length") as caught:
            read_dicom(tmp_path / "a")
        assert caught.value.code == "image-unreadable"
    packed = make_image(PIXELS, syntax=JPEGBaseline8Bit)
    packed.PixelData = struct.pack("<HHLHHL", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, 64) + bytes(64) + END
    packed["PixelData"].is_undefined_length = True
    path = save(tmp_path / "b", packed)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="image-truncated"):
        read_dicom(path)


def test_a_report_that_carries_rows_is_no_truncated_image(tmp_path):
    report = make_image(PIXELS, SOPClassUID=BasicTextSRStorage, ContentSequence=[item(PatientComments="x")])
    del report.PixelData
    with pytest.raises(DataError, match="not-an-image.*Basic Text SR"):
        list(read_frames(save(tmp_path / "a", report)))
    image = make_image(PIXELS, syntax=ImplicitVRLittleEndian)
    del image.PixelData
    with pytest.raises(DataError, match="image-truncated"):
        read_dicom(save(tmp_path / "b", image))
