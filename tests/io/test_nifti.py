from __future__ import annotations

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.nifti import read_nifti

VOLUME = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)


def write(path, data=VOLUME, affine=None, kind=nib.Nifti1Image, units="mm", **header):
    image = kind(data, np.diag([0.7, 0.8, 2.5, 1]) if affine is None else affine)
    image.header.set_xyzt_units(units)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def radiological(path):
    """Slices by nibabel's own reorientation: right of the patient on the left, front on top."""
    volume = nib.as_closest_canonical(nib.load(path)).get_fdata()
    return [volume[::-1, ::-1, index].T for index in range(volume.shape[2])]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_a_canonical_volume(tmp_path, kind, suffix):
    path = write(tmp_path / f"a{suffix}", kind=kind)
    pictures = list(read_nifti(path))
    assert len(pictures) == 7
    for index, (picture, expected) in enumerate(zip(pictures, radiological(path), strict=True)):
        np.testing.assert_array_equal(picture.pixels, expected)
        assert picture.unit == "stored" and picture.source == storage.sha256_file(path)
        assert picture.acquisition["slice_index"] == index
        assert picture.acquisition["plane"] == "axial"
        assert picture.acquisition["spacing_mm"] == pytest.approx([0.8, 0.7])
        assert picture.acquisition["slice_spacing_mm"] == pytest.approx(2.5)


def test_right_is_left_and_front_is_top(tmp_path):
    data = np.zeros((5, 6, 3), np.int16)
    data[-1, 2, 1] = 7  # RAS: the last x is the patient's right
    data[1, -1, 1] = 9  # the last y is the front
    _, middle, _ = read_nifti(write(tmp_path / "a.nii", data))
    assert middle.pixels[:, 0].max() == 7
    assert middle.pixels[0].max() == 9


ORIENTATIONS = [(axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(ORIENTATIONS), st.floats(-0.2, 0.2))
def test_any_stored_orientation_gives_the_same_view(tmp_path_factory, orientation, tilt):
    axes, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = 0
    for stored, (canonical, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[canonical, stored] = sign * (1 + stored)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    path = write(tmp_path_factory.mktemp("nifti") / "a.nii", affine=turn @ affine)
    pictures, expected = list(read_nifti(path)), radiological(path)
    assert len(pictures) == len(expected)
    for picture, other in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(picture.pixels, other)


def test_two_dimensional_image_and_trailing_ones(tmp_path):
    (flat,) = read_nifti(write(tmp_path / "a.nii", VOLUME[:, :, 0]))
    np.testing.assert_array_equal(flat.pixels, VOLUME[::-1, ::-1, 0].T)
    assert "slice_index" not in flat.acquisition
    assert len(list(read_nifti(write(tmp_path / "b.nii", VOLUME[..., None])))) == 7


def test_single_coronal_slice_stands_on_its_feet(tmp_path):
    (picture,) = read_nifti(write(tmp_path / "a.nii", VOLUME[:, :1, :]))
    np.testing.assert_array_equal(picture.pixels, VOLUME[::-1, 0, ::-1].T)
    assert picture.acquisition["plane"] == "coronal"


def test_scale_slope_and_big_endian(tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(VOLUME.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(2, -5)
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    assert raw[:4] == (348).to_bytes(4, "big")
    raw[112:120] = np.array([2, -5], ">f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(raw)
    pictures = list(read_nifti(path))
    for picture, expected in zip(pictures, radiological(path), strict=True):
        np.testing.assert_allclose(picture.pixels, expected)
    assert pictures[0].pixels[-1, -1] == 2 * float(nib.load(path).dataobj.get_unscaled()[0, 0, 0]) - 5


def test_unknown_units_leave_the_spacing_unknown(tmp_path):
    first = next(read_nifti(write(tmp_path / "a.nii", units="unknown")))
    assert "spacing_mm" not in first.acquisition
    first = next(read_nifti(write(tmp_path / "b.nii", units="micron")))
    assert first.acquisition["spacing_mm"] == pytest.approx([0.0008, 0.0007])


def patched(path, offset, values, dtype):
    raw = bytearray(path.read_bytes())
    data = np.asarray(values, dtype).tobytes()
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("offset", "values", "dtype", "code"),
    [
        (40, [3, 5, 0, 7], "<i2", "shape-invalid"),
        (40, [3, 5, -6, 7], "<i2", "shape-invalid"),
        (40, [9], "<i2", "shape-invalid"),
        (40, [3, 32767, 32767, 32767], "<i2", "image-too-large"),
        (40, [3, 50, 60, 70], "<i2", "image-truncated"),
        (280, np.zeros(12), "<f4", "orientation-unknown"),
        (280, np.full(12, np.nan), "<f4", "orientation-unknown"),
        (112, [np.inf], "<f4", "rescale-invalid"),
        (70, [1234], "<i2", "image-unreadable"),
        (0, [347], "<i4", "image-unreadable"),
    ],
)
def test_broken_headers(tmp_path, offset, values, dtype, code):
    with pytest.raises(DataError) as caught:
        read_nifti(patched(write(tmp_path / "a.nii"), offset, values, dtype))
    assert caught.value.code == code


def test_other_kinds_are_refused_at_once(tmp_path):
    cases = {
        "multi-frame-unsupported": np.zeros((3, 3, 3, 2), np.int16),
        "pixel-format-invalid": np.zeros((3, 3, 3), np.complex64),
        "image-not-finite": np.array([[[0.0, 1], [np.nan, 2]]] * 2, np.float32),
    }
    for code, data in cases.items():
        with pytest.raises(DataError) as caught:
            read_nifti(write(tmp_path / "a.nii", data))
        assert caught.value.code == code


def test_qform_and_sform_that_disagree(tmp_path):
    image = nib.Nifti1Image(VOLUME, np.eye(4))
    image.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(DataError, match="orientation-unknown"):
        read_nifti(tmp_path / "a.nii")


def test_gzip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(limits.inflate, "__defaults__", (1 << 20,))
    path = write(tmp_path / "a.nii", np.zeros((128, 128, 128), np.int16))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="image-too-large"):
        read_nifti(tmp_path / "a.nii.gz")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 347), st.integers(0, 255), st.booleans(), st.booleans())
@example(123, 4, False, False)  # a unit code that the standard does not know
def test_damaged_bytes_give_only_data_errors(tmp_path_factory, position, value, cut, zipped):
    path = write(tmp_path_factory.mktemp("fuzz") / ("a.nii.gz" if zipped else "a.nii"))
    data = bytearray(path.read_bytes())
    if cut:
        data = data[: position * 2]
    else:
        data[position] = value
    path.write_bytes(data)
    try:
        list(read_nifti(path))
    except DataError as error:
        assert error.code


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_large_volumes_stay_on_the_disk_and_read_alike(tmp_path, monkeypatch, name):
    volume = np.random.default_rng(0).integers(-100, 100, (4, 5, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / name)
    in_memory = [picture.pixels for picture in read_nifti(tmp_path / name)]
    monkeypatch.setattr("medaug.io.nifti._IN_MEMORY", 10)
    np.testing.assert_array_equal([picture.pixels for picture in read_nifti(tmp_path / name)], in_memory)
