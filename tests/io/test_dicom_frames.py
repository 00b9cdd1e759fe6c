from __future__ import annotations

import numpy as np
import pytest
from dicom_files import SECRETS, item, make_enhanced, make_image, save
from pydicom import Dataset

from medaug.errors import DataError
from medaug.io import limits
from medaug.io.dicom import read_dicom, read_frames, read_header

VOLUME = np.random.default_rng(0).integers(0, 4096, (4, 6, 8), dtype=np.uint16)
POSITIONS = [5.0, -2.5, 0.0, 2.5]


def test_enhanced_frames_come_by_position_with_their_own_facts(tmp_path):
    path = save(tmp_path / "a", make_enhanced(VOLUME, POSITIONS, slopes=[1, 2, 3, 4]))
    pictures = list(read_frames(path))
    order = [1, 2, 3, 0]
    for place, (picture, frame) in enumerate(zip(pictures, order, strict=True)):
        np.testing.assert_array_equal(picture.pixels, VOLUME[frame].astype(np.float32) * (frame + 1) - 1000)
        facts = picture.acquisition
        assert (picture.unit, facts["frame"], facts["slice_index"]) == ("hu", frame + 1, place)
        assert facts["position_mm"] == [0, 0, POSITIONS[frame]] and facts["orientation"] == [1, 0, 0, 0, 1, 0]
        assert facts["spacing_mm"] == [0.5, 0.25] and facts["slice_thickness_mm"] == 3
        assert facts["window_width"] == 100 + frame
        assert picture.identifiers["patient"] == SECRETS[1]
    header = read_header(path)
    assert header.frames == 4 and header.frame_indices == (1, 2, 3, 0)
    assert header.frame_positions == tuple((0, 0, z) for z in sorted(POSITIONS))
    assert (header.orientation, header.spacing) == ((1, 0, 0, 0, 1, 0), (0.5, 0.25))


def test_shared_groups_hold_for_frames_without_their_own(tmp_path):
    pictures = list(read_frames(save(tmp_path / "a", make_enhanced(VOLUME, sorted(POSITIONS)))))
    np.testing.assert_array_equal([picture.pixels for picture in pictures], VOLUME.astype(np.float32) - 1000)


def test_enhanced_file_of_one_frame_is_one_picture(tmp_path):
    path = save(tmp_path / "a", make_enhanced(VOLUME[:1], [7.0], slopes=[2]))
    np.testing.assert_array_equal(read_dicom(path).pixels, VOLUME[0] * 2.0 - 1000)
    (picture,) = read_frames(path)
    assert picture.acquisition == read_dicom(path).acquisition and "frame" not in picture.acquisition


def test_empty_functional_groups_leave_the_file_as_it_is(tmp_path):
    dataset = make_image(VOLUME[0], SharedFunctionalGroupsSequence=[Dataset()])
    np.testing.assert_array_equal(read_dicom(save(tmp_path / "a", dataset)).pixels, VOLUME[0] - 1024.0)


def test_frames_without_groups_keep_their_order_and_have_no_position(tmp_path):
    path = save(tmp_path / "a", make_image(VOLUME, ImagePositionPatient=[1, 2, 3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    pictures = list(read_frames(path))
    np.testing.assert_array_equal([picture.pixels for picture in pictures], VOLUME - 1024.0)
    assert all("position_mm" not in picture.acquisition for picture in pictures)
    with pytest.raises(DataError, match="multi-frame-unsupported.*4 frames"):
        read_dicom(path)


def test_single_frame_is_what_read_dicom_gives(tmp_path):
    path = save(tmp_path / "a", make_image(VOLUME[0]))
    (picture,) = read_frames(path)
    other = read_dicom(path)
    np.testing.assert_array_equal(picture.pixels, other.pixels)
    assert (picture.acquisition, picture.source, picture.unit) == (other.acquisition, other.source, other.unit)


def test_phases_come_one_after_the_other(tmp_path):
    dataset = make_enhanced(VOLUME, [0.0, 2.5, 0.0, 2.5])
    for group, phase in zip(dataset.PerFrameFunctionalGroupsSequence, (2, 2, 1, 1), strict=True):
        group.FrameContentSequence = [item(TemporalPositionIndex=phase)]
    pictures = list(read_frames(save(tmp_path / "a", dataset)))
    assert [picture.acquisition["frame"] for picture in pictures] == [3, 4, 1, 2]


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"NumberOfFrames": "0"}, "pixel-format-invalid"),
        ({"NumberOfFrames": "400"}, "image-truncated"),
        ({"NumberOfFrames": "99999"}, "image-too-large"),
        ({"NumberOfFrames": "16384", "Rows": 4096, "Columns": 4096}, "image-too-large"),
        ({"Rows": 65535, "Columns": 65535}, "image-too-large"),
    ],
)
def test_declared_sizes_are_checked_before_decoding(tmp_path, elements, code):
    with pytest.raises(DataError) as caught:
        next(read_frames(save(tmp_path / "a", make_image(VOLUME, **elements))))
    assert caught.value.code == code


def test_fewer_groups_than_frames(tmp_path):
    dataset = make_enhanced(VOLUME, POSITIONS)
    del dataset.PerFrameFunctionalGroupsSequence[2:]
    with pytest.raises(DataError, match="frame-groups-missing.*4 frames.*groups for 2"):
        list(read_frames(save(tmp_path / "a", dataset)))


def test_a_place_far_outside_the_room_is_unknown(tmp_path):
    picture = read_dicom(save(tmp_path / "a", make_image(VOLUME[0], ImagePositionPatient=["1e308"] * 3)))
    assert "position_mm" not in picture.acquisition


@pytest.mark.parametrize(
    ("orientation", "valid"),
    [([1, 0, 0, 0, 1, 0], True), ([1, 0, 0, 1, 0, 0], False), ([0, 0, 0, 0, 0, 0], False), ([2, 0, 0, 0, 2, 0], False)],
)
def test_orientation_is_recorded_only_if_it_is_one(tmp_path, orientation, valid):
    picture = read_dicom(save(tmp_path / "a", make_image(VOLUME[0], ImageOrientationPatient=orientation)))
    assert ("orientation" in picture.acquisition) is valid
    assert "position_mm" not in picture.acquisition  # not given: not invented


def test_windows_in_the_unit_of_the_pixels(tmp_path):
    options = {"without": ("RescaleSlope", "RescaleIntercept"), "Modality": "DX", "BitsStored": 12, "HighBit": 11}
    window = {"WindowCenter": "1000", "WindowWidth": "201"}
    plain = read_dicom(save(tmp_path / "a", make_image(VOLUME[0], **window, **options)))
    inverse = read_dicom(
        save(tmp_path / "b", make_image(VOLUME[0], PhotometricInterpretation="MONOCHROME1", **window, **options))
    )
    assert plain.acquisition["window"] == [899.5, 1099.5]  # PS3.3 C.11.2.1.2.1
    assert inverse.acquisition["window"] == [4095 - 1099.5, 4095 - 899.5]
    exact = read_dicom(save(tmp_path / "c", make_image(VOLUME[0], VOILUTFunction="LINEAR_EXACT", **window, **options)))
    assert exact.acquisition["window"] == [899.5, 1100.5]
    lut = item(LUTDescriptor=[4, 0, 8], LUTData=bytes(4))
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    with_lut = read_dicom(save(tmp_path / "d", make_image(VOLUME[0], VOILUTSequence=[lut], **options)))
    assert with_lut.acquisition["voi_lut"] is True and "window" not in with_lut.acquisition
    np.testing.assert_array_equal(with_lut.pixels, VOLUME[0])


def test_overlays_are_not_drawn(tmp_path):
    dataset = make_image(VOLUME[0] & 0x0FFF, BitsStored=12, HighBit=11)
    dataset.add_new(0x60000010, "US", 6)
    dataset.add_new(0x60000011, "US", 8)
    dataset.add_new(0x60003000, "OW", b"\xff" * 6)
    np.testing.assert_array_equal(read_dicom(save(tmp_path / "a", dataset)).pixels, (VOLUME[0] & 0x0FFF) - 1024.0)


def test_frame_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_FRAMES", 3)
    with pytest.raises(DataError, match="image-too-large"):
        next(read_frames(save(tmp_path / "a", make_image(VOLUME))))
