from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from dicom_files import item, make_enhanced, make_image, make_slice, save, slice_pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.errors import DataError
from medaug.io import stacks, volume
from medaug.io.dicom_header import read_header
from medaug.io.volume import largest_slice, read_volume


def series(folder, count=5, **elements):
    return [save(folder / f"IM{index}", make_slice(index, **elements)) for index in range(count)]


def test_a_series_in_any_order_is_one_volume_from_feet_to_head(tmp_path):
    paths = series(tmp_path)
    expected = np.stack([slice_pixels(index) - 1024.0 for index in range(5)])
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        found = read_volume([paths[index] for index in order])
        np.testing.assert_array_equal(found.pixels, expected)
        assert found.pixels.dtype == np.float32 and found.unit == "hu" and not found.fault
        assert found.spacing_mm == (2.5, 0.75, 0.5)
        np.testing.assert_allclose(found.positions_mm, -50 + 2.5 * np.arange(5))
        # voxel (d, h, w) lies at x = -10 + 0.5 w, y = -20 + 0.75 h, z = -50 + 2.5 d
        np.testing.assert_allclose(found.affine @ [2, 3, 4, 1], [-8, -17.75, -45, 1])
        assert found.source == read_volume(paths).source


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(9)))
def test_reordering_in_place(order):
    planes = np.arange(9 * 4, dtype=np.float32).reshape(9, 2, 2)
    np.testing.assert_array_equal(volume._reordered(planes.copy(), np.array(order)), planes[order])


def test_an_enhanced_file_is_the_volume_of_its_frames(tmp_path):
    frames = np.random.default_rng(0).integers(0, 4096, (4, 6, 8), dtype=np.uint16)
    found = read_volume([save(tmp_path / "a", make_enhanced(frames, [5, -2.5, 0, 2.5]))])
    np.testing.assert_array_equal(found.pixels, frames[[1, 2, 3, 0]] - 1000.0)
    assert found.spacing_mm == (2.5, 0.5, 0.25)
    mixed = make_enhanced(frames, [0, 1, 0, 1])
    for group, phase in zip(mixed.PerFrameFunctionalGroupsSequence, (1, 1, 2, 2), strict=True):
        group.FrameContentSequence = [item(TemporalPositionIndex=phase)]
    with pytest.raises(DataError, match="phases-mixed"):
        read_volume([save(tmp_path / "b", mixed)])


def test_nifti_and_dicom_of_the_same_scan_agree(tmp_path):
    """The same voxels written with nibabel (axes to the right, front, head) and as DICOM (left, back, head)."""
    stored = np.random.default_rng(1).integers(0, 500, (5, 6, 7)).astype(np.int16)  # x, y, z
    affine = np.diag([0.5, 0.75, 2.5, 1.0])
    affine[:3, 3] = [-3, -4, -50]
    image = nib.Nifti1Image(stored, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "a.nii.gz")
    found = read_volume([tmp_path / "a.nii.gz"])
    planes = [stored[::-1, ::-1, z].T for z in range(7)]
    # The first pixel of a slice is the rightmost, foremost voxel.
    corner = affine @ [4, 5, 0, 1] * [-1, -1, 1, 1]
    paths = [
        save(
            tmp_path / f"IM{z}",
            make_slice(
                z,
                pixels=plane.astype(np.uint16),
                RescaleIntercept="0",
                Modality="MR",
                ImagePositionPatient=[float(corner[0]), float(corner[1]), float(corner[2] + 2.5 * z)],
            ),
        )
        for z, plane in enumerate(planes)
    ]
    other = read_volume(paths)
    np.testing.assert_array_equal(found.pixels, other.pixels)
    np.testing.assert_allclose(found.affine, other.affine, atol=1e-5)
    np.testing.assert_allclose(found.spacing_mm, other.spacing_mm, rtol=1e-6)


def test_nothing_is_invented(tmp_path):
    plain = [save(tmp_path / f"IM{z}", make_image(slice_pixels(z), without=("PixelSpacing",))) for z in range(3)]
    found = read_volume(plain)
    assert found.spacing_mm is None and found.affine is None and found.positions_mm is None
    np.testing.assert_array_equal(found.pixels[2], slice_pixels(2) - 1024.0)


def test_gaps(tmp_path):
    paths = series(tmp_path, 8)
    gap = paths[:3] + paths[4:]
    assert read_volume(gap).fault == "slice-missing"
    with pytest.raises(DataError, match="slice-missing"):
        read_volume(gap, strict=True)


@pytest.mark.parametrize(
    "elements",
    [
        {"PixelSpacing": ["1", "1"]},
        {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        {"pixels": np.zeros((4, 4), np.uint16)},
        {"Modality": "MR"},
    ],
)
def test_slices_that_do_not_fit(tmp_path, elements):
    other = save(tmp_path / "other" / "IM9", make_slice(9, **elements))
    with pytest.raises(DataError, match="volume-inconsistent"):
        read_volume([*series(tmp_path), other])


def test_two_slices_at_one_place(tmp_path):
    with pytest.raises(DataError, match="phases-mixed"):
        read_volume([*series(tmp_path), save(tmp_path / "again", make_slice(2, sop="1.2.3.99"))])


def test_largest_slice(tmp_path):
    mask = np.zeros((4, 4, 6), np.uint8)
    mask[1, 1, 1], mask[:2, :2, 3], mask[:2, 2:, 4] = 1, 1, 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / "m.nii.gz")
    assert largest_slice(read_volume([tmp_path / "m.nii.gz"])) == 3  # the one nearer to the feet of two equal ones
    nib.save(nib.Nifti1Image(mask * 0, np.eye(4)), tmp_path / "e.nii.gz")
    with pytest.raises(DataError, match="mask-empty"):
        largest_slice(read_volume([tmp_path / "e.nii.gz"]))


@pytest.mark.parametrize(
    ("values", "unit"), [(["1", "20", ""], "index"), (["1", "2.5"], "mm"), (["-3", "4"], "mm"), (["1,5"], "mm"), ([], "index")]
)
def test_what_a_slice_column_holds(values, unit):
    assert stacks.slice_unit(values) == unit


def test_a_slice_that_is_no_number_is_refused():
    with pytest.raises(DataError, match="slice-invalid"):
        stacks.slice_unit(["middle"])


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 30), st.floats(0.3, 10), st.floats(-500, 500), st.data())
def test_spacing_faults(count, step, start, data):
    places = start + step * np.arange(count)
    assert stacks.spacing_fault(places) is None
    if count >= 6:
        gap = data.draw(st.integers(1, count - 2))
        assert stacks.spacing_fault(np.delete(places, gap)).code == "slice-missing"
        moved = places.copy()
        moved[gap] += 0.3 * step
        assert stacks.spacing_fault(moved).code == "slice-spacing-uneven"


def test_positions_along_an_oblique_normal(tmp_path):
    turn = 0.3
    orientation = [np.cos(turn), 0, -np.sin(turn), 0, 1, 0]
    normal = np.array([np.sin(turn), 0, np.cos(turn)])
    headers = [
        read_header(
            save(
                tmp_path / f"a{index}",
                make_slice(
                    index, ImageOrientationPatient=orientation, ImagePositionPatient=list(np.round(normal * 3 * index, 6))
                ),
            )
        )
        for index in range(4)
    ]
    np.testing.assert_allclose(stacks.positions_of(headers), 3.0 * np.arange(4), atol=1e-4)
