from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import UID

from medaug.errors import ConfigError
from medaug.io.dicom import read_dicom
from medaug.phantom import draw_cohort, draw_patient, write_phantom_export
from medaug.phantom_drawing import draw_anatomy, draw_nodules


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    return folder, write_phantom_export(folder, num_patients=8, size=64, seed=3)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_export_looks_like_a_pacs_export(export):
    folder, table = export
    assert table == folder / "labels.csv"
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    images = sorted((folder / "DICOM").rglob("IM*"))
    assert len(rows) == len(images)
    assert images[0].relative_to(folder).as_posix() == "DICOM/PA000001/ST000001/IM000001"
    assert list(rows[0]) == ["sop", "patient_id", "grade"]
    pictures = [read_dicom(path) for path in images]
    assert {picture.identifiers["sop"] for picture in pictures} == {row["sop"] for row in rows}
    assert {picture.identifiers["patient"] for picture in pictures} == {row["patient_id"] for row in rows}
    for picture in pictures:
        assert picture.unit == "hu" and picture.modality == "CT" and picture.acquisition["spacing_mm"][0] > 1
        assert picture.pixels.shape == (64, 64) and picture.pixels.min() >= -1024


def test_every_object_says_that_it_is_a_phantom_and_is_valid(export):
    folder, _ = export
    uids = set()
    for path in (folder / "DICOM").rglob("IM*"):
        dataset = dcmread(path)  # no force: preamble and meta are there
        assert dataset.PatientName.family_name == "PHANTOM"
        for keyword in ("PatientID", "SeriesDescription", "ImageComments"):
            assert "PHANTOM" in dataset[keyword].value
        assert dataset.SyntheticData == "YES"
        assert (dataset.BitsStored, dataset.RescaleIntercept, dataset.pixel_array.dtype) == (12, -1024, np.uint16)
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert UID(dataset[keyword].value).is_valid
        uids.add(dataset.SOPInstanceUID)
    assert len(uids) == len(list((folder / "DICOM").rglob("IM*")))


def test_same_seed_same_bytes_and_another_seed_another_patient(export, tmp_path):
    folder, _ = export
    write_phantom_export(tmp_path / "a", num_patients=8, size=64, seed=3)
    assert files(tmp_path / "a") == files(folder)
    write_phantom_export(tmp_path / "b", num_patients=1, size=64, seed=4)
    first = "DICOM/PA000001/ST000001/IM000001"
    assert files(tmp_path / "b")[first] != files(folder)[first]


def test_grades_are_balanced_and_some_patients_have_several_slices():
    drawn = list(draw_cohort(16, 32))
    grades = {one.patient: one.grade for one in drawn}
    assert Counter(grades.values()) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert set(Counter(one.patient for one in drawn).values()) >= {1, 2}


def test_tissues_have_their_density():
    for drawn in draw_cohort(4, 128):
        image = drawn.hounsfield
        assert image.dtype == np.float32
        assert np.median(image[:6]) == pytest.approx(-1000, abs=10)
        shares = [np.mean((image > low) & (image < high)) for low, high in ((-930, -750), (-150, -50), (0, 120), (250, 1500))]
        assert shares[0] > 0.05 and shares[1] > 0.01 and shares[2] > 0.05 and shares[3] > 0.01, shares


def test_burden_grows_with_the_grade_and_the_rest_stays_the_same():
    for patient in range(1, 7):
        anatomy = draw_anatomy(("phantom", 0, patient))
        areas = [sum(nodule.radius**2 for nodule in draw_nodules(anatomy, grade)) for grade in range(4)]
        spicules = [max((nodule.spiculation for nodule in draw_nodules(anatomy, grade)), default=0) for grade in range(4)]
        assert areas == sorted(areas) and areas[0] == 0 and spicules == sorted(spicules)
        healthy, ill = (next(draw_patient(patient, grade, 64, 0)).hounsfield for grade in (0, 3))
        changed = np.abs(healthy - ill) > 1
        assert 0.01 < changed.mean() < 0.5


def test_slices_of_a_patient_are_alike_but_not_equal():
    slices: dict[int, list[np.ndarray]] = {}
    for drawn in draw_cohort(12, 64):
        slices.setdefault(drawn.patient, []).append(drawn.hounsfield)
    several = [images for images in slices.values() if len(images) > 1]
    between = [np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1] for a in several for b in several if a is not b]
    for images in several:
        alike = np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1]
        assert not np.array_equal(images[0], images[1])
        assert alike > max(0.93, np.mean(between))


def test_too_small_is_refused():
    with pytest.raises(ConfigError, match="phantom-invalid"):
        list(draw_cohort(0))
    with pytest.raises(ConfigError, match="phantom-invalid"):
        list(draw_cohort(4, 8))


@pytest.mark.slow
def test_the_whole_phantom_of_the_quickstart_is_taken_in(tmp_path: Path) -> None:
    """All 120 patients: their numbers must not be mistaken for grades, nor their nodules for letters."""
    from medaug.intake.build import run_intake
    from medaug.intake.records import IntakeOptions

    table = write_phantom_export(tmp_path / "export", size=64)
    result = run_intake(
        IntakeOptions(
            source=tmp_path / "export",
            out=tmp_path / "cohort",
            labels=table,
            key="sop",
            label_column="grade",
            image_size=32,
            burned_in="keep",
            dry_run=True,
        )
    )
    assert result.quarantine == []
    assert (result.counts["used"], result.counts["patients"]) == (188, 120)
