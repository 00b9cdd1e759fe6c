from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import SECRETS, make_enhanced, make_image, make_slice, save, slice_pixels

from medaug.intake import series
from medaug.intake.records import IntakeOptions, Item
from medaug.intake.scan import read_pictures
from medaug.intake.series import arrange
from medaug.io.dicom import read_header


def options(**changes) -> IntakeOptions:
    return replace(IntakeOptions(source=Path("in"), out=Path("out")), **changes)


def items_of(folder, kind="dicom"):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [Item(path.relative_to(folder).as_posix(), path, kind) for path in files]


def codes(arrangement):
    found = [row["code"] for row in arrangement.quarantine]
    assert not any(secret in str(row) for row in arrangement.quarantine for secret in SECRETS)
    return sorted(found)


def places(arrangement):
    return {item.relative: item.slice_index for item in arrangement.items}


@pytest.fixture
def folder(tmp_path):
    """Six slices whose instance numbers count from the head, in files named at random."""
    names = random.Random(0).sample(range(100), 6)
    for index, name in enumerate(names):
        save(tmp_path / f"IM{name:03d}", make_slice(index))
    return tmp_path


def test_slices_are_sorted_by_position_not_by_number(folder):
    found = arrange(items_of(folder), options())
    assert not found.quarantine and not found.notes
    assert len({item.series for item in found.items}) == 1 and found.items[0].series
    for item in found.items:
        z = read_header(item.path).position[2]
        assert item.slice_index == round((z + 50) / 2.5)


def test_any_order_of_files_gives_the_same(folder):
    save(folder / "SCOUT", make_slice(50, z=0, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], Rows=8))
    save(folder / "AGAIN", make_slice(2, sop="1.2.3.77"))
    expected = arrange(items_of(folder), options())
    for seed in range(3):
        shuffled = items_of(folder)
        random.Random(seed).shuffle(shuffled)
        other = arrange(shuffled, options())
        assert [(item.relative, item.series, item.slice_index) for item in other.items] == [
            (item.relative, item.series, item.slice_index) for item in expected.items
        ]
        assert (other.quarantine, other.notes) == (expected.quarantine, expected.notes)


def test_processes_read_the_same_headers(folder, monkeypatch):
    expected = arrange(items_of(folder), options())
    monkeypatch.setattr(series, "MIN_PARALLEL", 2)
    assert places(arrange(items_of(folder), options(workers=2))) == places(expected)


def test_plain_x_rays_pass_untouched(tmp_path):
    without = ("PixelSpacing", "RescaleSlope", "RescaleIntercept")
    for index in range(3):
        uids = {"SOPInstanceUID": f"1.2.{index}", "SeriesInstanceUID": f"1.3.{index // 2}", "Modality": "DX"}
        save(tmp_path / f"IM{index}", make_image(slice_pixels(index, 8 + index), without=without, **uids))
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM")
    items = items_of(tmp_path)
    found = arrange(items, options(strict=True))
    assert found.items == items and not found.quarantine and not found.notes
    assert all((item.series, item.slice_index, item.slices) == ("", None, None) for item in found.items)


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "series": "1.2.3.2"},
        {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        {"pixels": np.ones((16, 8), np.uint16)},
        {"PixelSpacing": ["2", "2"]},
        {"FrameOfReferenceUID": "1.2.10"},
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_localizers_are_set_aside(folder, elements, strict):
    save(folder / "SCOUT", make_slice(50, sop="1.2.3.500", **elements))
    found = arrange(items_of(folder), options(strict=strict))
    assert codes(found) == ["localizer" if "ImageType" in elements else "geometry-differs"]
    assert sorted(places(found).values()) == list(range(6))


def test_two_stacks_in_one_series(folder):
    for index in range(4):
        other = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "ImagePositionPatient": [3 * index, 0, 0]}
        save(folder / f"SAG{index}", make_slice(index, sop=f"1.2.3.6{index}", **other))
    found = arrange(items_of(folder), options())
    assert len({item.series for item in found.items}) == 2 and not found.quarantine
    assert any("different plane geometry" in note for note in found.notes)
    assert codes(arrange(items_of(folder), options(strict=True))) == ["geometry-mixed"] * 10


def test_missing_and_uneven_slices(tmp_path):
    for name, heights in {"gap": [0, 2, 4, 8, 10], "uneven": [0, 2, 4, 5, 9]}.items():
        for index, z in enumerate(heights):
            save(tmp_path / name / f"IM{index}", make_slice(index, z=z))
        found = arrange(items_of(tmp_path / name), options())
        code = "slice-missing" if name == "gap" else "slice-spacing-uneven"
        assert len(found.items) == 5 and not found.quarantine
        assert [code in note for note in found.notes] == [True]
        strict = arrange(items_of(tmp_path / name), options(strict=True))
        assert codes(strict) == [code] * 5 and not strict.items


def test_images_without_position_among_slices(folder):
    save(folder / "EXTRA", make_image(slice_pixels(9), SOPInstanceUID="1.2.3.600"))
    found = arrange(items_of(folder), options())
    assert len(found.items) == 7 and any("no orientation" in note for note in found.notes)
    assert codes(arrange(items_of(folder), options(strict=True))) == ["geometry-missing"]


def test_the_same_instance_twice(folder):
    first = items_of(folder)[0]
    (folder / "COPY").mkdir()
    (folder / "COPY" / "IM1").write_bytes(first.path.read_bytes())
    found = arrange(items_of(folder), options(strict=True))
    assert codes(found) == ["duplicate-instance"] and len(found.items) == 6
    compressed = make_slice(0)  # other bytes, same pixels
    from pydicom.uid import RLELossless

    compressed.compress(RLELossless, generate_instance_uid=False)
    for path in (folder / "COPY").iterdir():
        path.unlink()
    save(folder / "COPY" / "IM2", compressed)
    assert codes(arrange(items_of(folder), options())) == ["duplicate-instance"]


def test_copies_with_labels_of_their_own_stay_for_the_comparison(folder):
    first = items_of(folder)[0]
    (folder / "COPY").mkdir()
    (folder / "COPY" / "IM1").write_bytes(first.path.read_bytes())
    items = items_of(folder)
    items[0].label, items[1].label = "a", "b"
    found = arrange(items, options(strict=True))
    assert len(found.items) == 7 and not found.quarantine
    assert set(places(found).values()) == set(range(6))
    assert places(found)["COPY/IM1"] == places(found)[first.relative]


def test_one_uid_for_two_different_images(folder):
    save(folder / "OTHER", make_slice(2, pixels=slice_pixels(2) + np.uint16(1)))
    found = arrange(items_of(folder), options())
    assert codes(found) == ["conflicting-instance"] * 2 and len(found.items) == 5


def test_a_broken_copy_condemns_no_sound_file(folder):
    first = items_of(folder)[0]
    (folder / "BROKEN").write_bytes(first.path.read_bytes()[:-20])
    found = arrange(items_of(folder), options(strict=True))
    assert len(found.items) == 7 and not found.quarantine
    assert places(found)["BROKEN"] is None and places(found)[first.relative] is not None


def test_two_slices_at_one_place(folder):
    save(folder / "AGAIN", make_slice(2, sop="1.2.3.77", number=1000))
    found = arrange(items_of(folder), options())
    assert codes(found) == ["duplicate-position"] and "AGAIN" not in places(found)
    assert sorted(places(found).values()) == list(range(6))
    assert codes(arrange(items_of(folder), options(strict=True))) == ["duplicate-position"] * 7


@pytest.mark.parametrize("keyword", ["TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber", "EchoTime"])
def test_phases_become_volumes(tmp_path, keyword):
    for phase in range(3):
        for index in range(4):
            elements = {keyword: 10 * (phase + 1), "sop": f"1.2.3.{phase}.{index}"}
            save(tmp_path / f"IM{phase}{index}", make_slice(index, **elements))
    found = arrange(items_of(tmp_path), options(strict=True))
    assert not found.quarantine and len({item.series for item in found.items}) == 3
    for item in found.items:
        phase, index = item.relative[2:]
        assert item.slice_index == int(index)
        assert item.series == next(other.series for other in found.items if other.relative == f"IM{phase}0")
    assert any("phases" in note for note in found.notes)


def test_series_are_told_apart_by_study_and_series(tmp_path):
    for series_number in range(2):
        for index in range(3):
            uid = f"1.2.3.{series_number + 1}"
            save(tmp_path / f"IM{series_number}{index}", make_slice(index, series=uid))
    found = arrange(items_of(tmp_path), options())
    assert len({item.series for item in found.items}) == 2
    assert sorted(places(found).values()) == [0, 0, 1, 1, 2, 2]


def test_multi_frame_files_are_checked_by_their_frames(tmp_path):
    frames = np.stack([slice_pixels(index) for index in range(5)])
    save(tmp_path / "IM1", make_enhanced(frames, [0, 2, 4, 8, 10]))
    assert len(arrange(items_of(tmp_path), options()).notes) == 1
    assert codes(arrange(items_of(tmp_path), options(strict=True))) == ["slice-missing"]


def write_mask(path, lesion, count, affine=None, size=8):
    data = np.zeros((size, size, count), np.uint8)
    data[2:4, 2:4, lesion] = 1
    data[2, 2, 0] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


@pytest.mark.parametrize("name", ["1.2.3.1.nii.gz", "scan.nii"])
def test_the_slice_with_the_largest_lesion(tmp_path, name):
    for index in range(6):
        save(tmp_path / "in" / "scan" / f"IM{index}", make_slice(index))
    affine = np.diag([0.5, 0.75, 2.5, 1])
    affine[2, 3] = -50
    write_mask(tmp_path / "masks" / name, 4, 6, affine)
    found = arrange(items_of(tmp_path / "in"), options(slices="lesion", masks=tmp_path / "masks"))
    assert places(found) == {"scan/IM4": 4} and not found.quarantine
    assert any("not chosen" in note for note in found.notes)


def test_lesions_of_nifti_and_multi_frame_volumes(tmp_path):
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 6), np.int16), np.eye(4)), tmp_path / "in" / "a.nii.gz")
    write_mask(tmp_path / "masks" / "a.nii.gz", 3, 6)
    chosen = options(slices="lesion", masks=tmp_path / "masks")
    (item,) = arrange(items_of(tmp_path / "in", "nifti"), chosen).items
    assert item.slices == (3,) and [p.acquisition["slice_index"] for p, _, _ in read_pictures(item)] == [3]
    frames = np.stack([slice_pixels(index) for index in range(5)])
    save(tmp_path / "dicom" / "b.dcm", make_enhanced(frames, [0, 2, 4, 6, 8]))
    mask = np.zeros((5, 8, 8), np.uint16)
    mask[1, :3], mask[3, :2] = 1001, 1001  # 1 after the rescale of -1000 ...
    mask[mask == 0] = 1000  # ... and 0
    save(tmp_path / "masks" / "b.dcm", make_enhanced(mask, [8, 6, 4, 2, 0]))  # stored from the head: the second is slice 3
    (item,) = arrange(items_of(tmp_path / "dicom"), chosen).items
    assert item.slices == (3,)


def test_a_mask_as_dicom_series(tmp_path):
    for index in range(5):
        save(tmp_path / "in" / "scan" / f"IM{index}", make_slice(index))
        mask = np.full((8, 8), index == 2, np.uint16)
        save(tmp_path / "masks" / "scan" / f"IM{index}", make_slice(index, pixels=mask, RescaleIntercept="0", Modality="OT"))
    found = arrange(items_of(tmp_path / "in"), options(slices="lesion", masks=tmp_path / "masks"))
    assert places(found) == {"scan/IM2": 2}


@pytest.mark.parametrize(("code", "count"), [("mask-missing", None), ("mask-mismatch", 9), ("mask-mismatch", 6)])
def test_masks_that_do_not_fit(tmp_path, code, count):
    for index in range(6):
        save(tmp_path / "in" / "scan" / f"IM{index}", make_slice(index))
    (tmp_path / "masks").mkdir()
    if count:
        affine = np.diag([0.5, 0.75, 2.5, 1])
        affine[2, 3] = 100  # at other places
        write_mask(tmp_path / "masks" / "scan.nii.gz", 2, count, affine)
    found = arrange(items_of(tmp_path / "in"), options(slices="lesion", masks=tmp_path / "masks"))
    assert codes(found) == [code] * 6 and not found.items


def test_a_bad_uid_names_no_file(tmp_path):
    for index in range(3):
        save(tmp_path / "in" / "scan" / f"IM{index}", make_slice(index, series="../../secret"))
    write_mask(tmp_path / "secret.nii.gz", 1, 3)
    (tmp_path / "masks" / "a").mkdir(parents=True)
    found = arrange(items_of(tmp_path / "in"), options(slices="lesion", masks=tmp_path / "masks" / "a"))
    assert codes(found) == ["mask-missing"] * 3
