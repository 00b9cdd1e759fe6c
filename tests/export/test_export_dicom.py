from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export_cohorts import CHECKED, WEIGHTS, WINDOW, accepted_cohort, placed, real_cohort
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.uid import UID

from medaug.cohort import Case, Cohort, write_cohort
from medaug.export.dicom import encode_dicom
from medaug.export.export import export_cohort
from medaug.export.facts import MARK, ImageFacts
from medaug.export.geometry import Geometry
from medaug.io.dicom import read_dicom
from medaug.io.picture import Picture
from medaug.io.raster import read_unit_png, write_unit_png
from medaug.phantom import draw_patient
from medaug.transforms.prepare import square, to_unit

CLASSES = [("ct", "CT", 1), ("dx", "DX", 1), ("cr", "CR", 1), ("sc", "CT", 1), ("sc", "", 1), ("sc", "", 3)]
# The tool's dictionary may be older than the attribute (PS3.3 C.12.1); it then calls the tag unknown, and nothing else.
UNKNOWN_MARK = "Error - </(0008,001c)> - Attribute with an even group number is not a recognized standard attribute"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every offered class: name -> (export folder, accepted cohort)."""
    made = {}
    for storage_class, modality, channels in CLASSES:
        folder = tmp_path_factory.mktemp("export")
        real = real_cohort(folder / "real", modality=modality, channels=channels)
        accepted = accepted_cohort(real, folder / "accepted")
        export_cohort(accepted.root, folder / "out", storage_class=storage_class, reference_cohort=real.root)
        made[storage_class, modality, channels] = folder / "out", accepted
    return made


def files(folder):
    return sorted(folder.rglob("*.dcm"))


def tool(*names):
    """Path of a program; its absence is a failure in CI and a skip elsewhere."""
    for name in names:
        if path := shutil.which(name):
            return path
    message = f"{names[0]} is not installed (apt-get install dcmtk dicom3tools)"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# known answers


@pytest.mark.parametrize("key", CLASSES)
def test_every_object_says_what_it_is(exports, key):
    folder, accepted = exports[key]
    assert len(files(folder)) == len(accepted.training) == 12
    for path in files(folder):
        dataset = dcmread(path)
        assert path.read_bytes()[:128] == bytes(128)
        assert dataset.SyntheticData == "YES" and dataset.ContentQualification == "RESEARCH"
        assert list(dataset.ImageType)[:2] == ["DERIVED", "SECONDARY"]
        assert dataset.SeriesDescription == dataset.StudyDescription == MARK and str(dataset.ImageComments).startswith(MARK)
        assert str(dataset.PatientName) == f"SYNTHETIC^{dataset.PatientID}" and re.fullmatch("SYN[0-9A-F]{12}", dataset.PatientID)
        code = dataset.DerivationCodeSequence[0]
        assert (code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning) == ("123110", "DCM", "Artificial Intelligence")
        equipment = dataset.ContributingEquipmentSequence[0]
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
        assert (equipment.Manufacturer, equipment.ManufacturerModelName) == ("medaug", "medaug")
        assert list(equipment.SoftwareVersions) == [dataset.SoftwareVersions, WEIGHTS]
        for word in ("guided_ddpm", "seed 7", "verdict accept", "reference r"):
            assert word in dataset.DerivationDescription
        assert (dataset.PatientIdentityRemoved, dataset.BurnedInAnnotation) == ("YES", "NO") and dataset.DeidentificationMethod
        assert dataset.LossyImageCompression == "00"
        assert [dataset.get(name) for name in ("StudyDate", "AccessionNumber", "PatientBirthDate", "PatientSex")] == [""] * 4
        assert "SourceImageSequence" not in dataset and "InstitutionName" not in dataset


def test_the_private_element_holds_the_publishable_lineage_and_nothing_else(exports):
    folder, _ = exports["ct", "CT", 1]
    for path in files(folder):
        dataset = dcmread(path)
        facts = json.loads(dataset.private_block(0x0071, "MEDAUG SYNTHETIC 1")[0x01].value)
        assert facts["synthetic"] is True and facts["lineage"]["confidence"] == 0.93 and facts["class"] in ("low", "high")
        assert b"PLANTED" not in path.read_bytes()


@pytest.mark.parametrize(
    ("key", "sop_class", "modality"),
    [
        (("ct", "CT", 1), "1.2.840.10008.5.1.4.1.1.2", "CT"),
        (("dx", "DX", 1), "1.2.840.10008.5.1.4.1.1.1.1", "DX"),
        (("cr", "CR", 1), "1.2.840.10008.5.1.4.1.1.1", "CR"),
        (("sc", "CT", 1), "1.2.840.10008.5.1.4.1.1.7", "CT"),
        (("sc", "", 3), "1.2.840.10008.5.1.4.1.1.7", "OT"),
    ],
)
def test_class_and_modality(exports, key, sop_class, modality):
    for path in files(exports[key][0]):
        dataset = dcmread(path)
        assert (dataset.SOPClassUID, dataset.file_meta.MediaStorageSOPClassUID) == (sop_class, sop_class)
        assert dataset.Modality == modality
        if sop_class.endswith(".7"):
            assert dataset.ConversionType == "SYN"
        assert ("RescaleType" in dataset) == (key[1] in ("CT", "DX") and key[2] == 1)


def test_x_rays_get_no_invented_unit(exports):
    dx, cr = (dcmread(files(exports[key][0])[0]) for key in (("dx", "DX", 1), ("cr", "CR", 1)))
    assert (dx.RescaleType, dx.RescaleSlope, dx.RescaleIntercept, dx.PresentationLUTShape) == ("US", 1, 0, "IDENTITY")
    assert "RescaleSlope" not in cr and (cr.WindowCenter, cr.WindowWidth) == (32768, 65536)
    assert list(dx.ImagerPixelSpacing) == list(dx.PixelSpacing) == [1.6, 1.4]
    assert list(dx.PatientOrientation) == ["LP", "PR"]


def test_geometry_is_the_source_corrected_by_padding_and_resize(exports):
    """32 columns at 0.7 mm became 16 at 1.4; pixel 0 covers the padded rows -6 and -5 and the columns 0 and 1."""
    dataset = dcmread(files(exports["ct", "CT", 1][0])[0])
    assert list(dataset.PixelSpacing) == [1.6, 1.4] and dataset.SliceThickness == 2.5
    source = placed(dataset.InstanceNumber - 1)
    row, column = np.array(source["orientation"][3:]), np.array(source["orientation"][:3])
    expected = np.array(source["position_mm"]) + column * 0.7 * 0.5 + row * 0.8 * (0.5 - 6)
    assert np.allclose(dataset.ImagePositionPatient, expected, atol=1e-9)
    assert list(dataset.ImageOrientationPatient) == source["orientation"]


def test_unknown_stays_unknown(tmp_path):
    real = real_cohort(tmp_path / "real", geometry=False)
    accepted = accepted_cohort(real, tmp_path / "accepted", notes={})
    summary = export_cohort(accepted.root, tmp_path / "out")
    assert summary["storage_class"] == "sc" and summary["geometry_known"] == 0
    assert any("Secondary Capture instead of ct" in note for note in summary["notes"])
    for path in files(tmp_path / "out"):
        dataset = dcmread(path)
        for keyword in ("PixelSpacing", "ImagePositionPatient", "SliceThickness", "PatientIdentityRemoved", "BurnedInAnnotation"):
            assert keyword not in dataset
        assert "LossyImageCompression" not in dataset


def test_a_kept_suspect_is_no_checked_pixel(tmp_path):
    real = real_cohort(tmp_path / "real")
    kept = {"burned_in": {"checked": True, "policy": "keep", "suspects": 1}}
    accepted = accepted_cohort(real, tmp_path / "accepted", notes=kept)
    export_cohort(accepted.root, tmp_path / "out", storage_class="dx", reference_cohort=real.root)
    dataset = dcmread(files(tmp_path / "out")[0])
    assert "PatientIdentityRemoved" not in dataset and dataset.BurnedInAnnotation == "YES"  # type 1 in DX


@pytest.mark.parametrize(("words", "removed"), [("not found masked", True), ("not found kept", False), ("", False)])
def test_pixels_are_checked_if_the_real_cohort_shows_it(tmp_path, words, removed):
    """What the cases say counts more than a note, and one image without a search is enough to doubt."""
    real = real_cohort(tmp_path / "real")
    accepted = accepted_cohort(real, tmp_path / "accepted", notes=CHECKED if words else {})
    states = {"not found masked": ["not found", "masked"], "not found kept": ["not found", "kept"], "": []}[words]
    cases = [
        replace(case, acquisition={**case.acquisition, **({"burned_in_text": states[index % 2]} if states else {})})
        for index, case in enumerate(real.training)
    ]
    write_cohort(replace(real, training=tuple(cases)), tmp_path / "real")
    export_cohort(accepted.root, tmp_path / "out", reference_cohort=tmp_path / "real")
    assert {"PatientIdentityRemoved" in dcmread(path) for path in files(tmp_path / "out")} == {removed}


def test_phantom_hounsfield_units_survive(tmp_path):
    """HU -> cohort -> accepted -> DICOM -> HU, to half a stored step."""
    cases, expected = [], {}
    for drawn in (slice_ for patient in (1, 2) for slice_ in draw_patient(patient, patient % 4, 64, 0)):
        picture = Picture(drawn.hounsfield, "hu", "CT")
        unit, intensity = to_unit(picture)
        unit, _ = square(unit, 64)
        name = f"s{drawn.patient}{drawn.index}"
        write_unit_png(tmp_path / "accepted" / "images" / f"{name}.png", unit)
        expected[name] = np.clip(drawn.hounsfield.astype(np.float64), -1350, 150)
        cases.append(Case(name, f"images/{name}.png", 0, f"p{drawn.patient}", WEIGHTS, lineage={}))
    from medaug.cohort import fit_sha256

    fit = fit_sha256(["p1", "p2"])
    cases = [replace(case, lineage={"verdict": "accept", "fit_on": fit}) for case in cases]
    cohort = Cohort("phantom", "CT", ("any",), False, 64, intensity=intensity, training=tuple(cases), fit_on={fit: ["p1", "p2"]})
    write_cohort(cohort, tmp_path / "accepted")
    export_cohort(tmp_path / "accepted", tmp_path / "out")
    half_step = 1500 / 65535 / 2
    for path in files(tmp_path / "out"):
        picture = read_dicom(path)
        assert picture.unit == "hu"
        assert np.abs(picture.pixels - expected[path.stem]).max() <= half_step + 1e-4  # and float32 at 1350


# identities


def test_uids_are_new_valid_and_structured(exports):
    folder, accepted = exports["ct", "CT", 1]
    datasets = [dcmread(path) for path in files(folder)]
    for keyword, number in (("SOPInstanceUID", 12), ("StudyInstanceUID", 3), ("SeriesInstanceUID", 6), ("PatientID", 3)):
        assert len({dataset[keyword].value for dataset in datasets}) == number, keyword
    for dataset in datasets:
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            uid = UID(dataset[keyword].value)
            assert uid.is_valid and uid.startswith("2.25.") and len(uid) <= 44
    places = [(dataset.SeriesInstanceUID, tuple(dataset.ImagePositionPatient)) for dataset in datasets]
    assert len(set(places)) == 12  # no two images of one series share a position
    groups = {case.group for case in accepted.training}
    assert not any(group in str(dataset.PatientID) for group in groups for dataset in datasets)


def test_a_linked_study_is_reused_and_the_series_never(tmp_path):
    real = real_cohort(tmp_path / "real")
    accepted = accepted_cohort(real, tmp_path / "accepted")
    uid = "1.2.826.0.1.3680043.8.498.1"
    linked = export_cohort(accepted.root, tmp_path / "linked", study="linked", study_uid=uid, storage_class="sc")
    new = export_cohort(accepted.root, tmp_path / "new", storage_class="sc")
    assert any("linked to a study" in note for note in linked["notes"]) and not any("linked" in note for note in new["notes"])
    datasets, others = ([dcmread(path) for path in files(tmp_path / name)] for name in ("linked", "new"))
    assert {dataset.StudyInstanceUID for dataset in datasets} == {uid}
    assert len({dataset.PatientID for dataset in datasets}) == 1  # a study has one patient
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID"):
        assert not {dataset[keyword].value for dataset in datasets} & {dataset[keyword].value for dataset in others}


def test_a_date_is_written_only_if_given(tmp_path):
    real = real_cohort(tmp_path / "real")
    accepted = accepted_cohort(real, tmp_path / "accepted")
    export_cohort(accepted.root, tmp_path / "out", date="20240229")
    assert {dcmread(path).StudyDate for path in files(tmp_path / "out")} == {"20240229"}


# independent implementations


@pytest.mark.integration
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("key", CLASSES)
def test_dciodvfy_finds_no_error(tmp_path, key, checked):
    program = tool("dciodvfy")
    storage_class, modality, channels = key
    real = real_cohort(tmp_path / "real", modality=modality, channels=channels)
    accepted = accepted_cohort(real, tmp_path / "accepted", notes=CHECKED if checked else {})
    export_cohort(accepted.root, tmp_path / "out", storage_class=storage_class, reference_cohort=real.root)
    for path in files(tmp_path / "out")[:3]:
        report = run(program, "-new", path)
        errors = [line for line in report.splitlines() if line.startswith("Error") and line != UNKNOWN_MARK]
        assert errors == [], report
        dataset = dcmread(path)
        del dataset.SyntheticData
        dataset.save_as(tmp_path / "old.dcm")  # nothing else hides behind the tool's age
        assert "Error" not in run(program, "-new", tmp_path / "old.dcm")


@pytest.mark.integration
@pytest.mark.parametrize("date", ["", "20240229"])
def test_dciodvfy_accepts_secondary_capture_without_geometry_and_8_bits(tmp_path, date):
    program = tool("dciodvfy")
    real = real_cohort(tmp_path / "real", modality="US", geometry=False)
    accepted = accepted_cohort(real, tmp_path / "accepted")
    export_cohort(accepted.root, tmp_path / "out", bits=8, date=date)
    report = run(program, "-new", files(tmp_path / "out")[0])
    assert [line for line in report.splitlines() if line.startswith("Error") and line != UNKNOWN_MARK] == []


@pytest.mark.integration
@pytest.mark.parametrize("key", CLASSES)
def test_dcentvfy_finds_patients_studies_and_series_consistent(exports, key):
    program = tool("dcentvfy")
    report = run(program, *files(exports[key][0]))
    assert "Error" not in report and "Warning" not in report, report


@pytest.mark.integration
@pytest.mark.parametrize("key", CLASSES)
def test_dcmdump_reads_every_object(exports, key):
    program = tool("dcmdump")
    for path in files(exports[key][0])[:3]:
        text = run(program, path)
        assert "E:" not in text and "W:" not in text
        assert re.search(r"\(0008,001c\) CS \[YES\]", text) and "[SYNTHETIC - NOT FOR CLINICAL USE]" in text


@pytest.mark.integration
@pytest.mark.parametrize("key", CLASSES)
def test_dcmtk_shows_the_pixels_of_the_cohort(exports, key, tmp_path):
    """dcm2img (dcmj2pnm before dcmtk 3.6.8) applies rescale and window: unit 0 is black, 1 is white, and no step between lost."""
    program = tool("dcm2img", "dcmj2pnm")
    folder, accepted = exports[key]
    images = {case.id: accepted.path(case) for case in accepted.training}
    for path in files(folder)[:2]:
        options = ["+Wi", "1"] if key[2] == 1 else []
        report = run(program, *options, "+on", path, tmp_path / "shown.png")
        assert (tmp_path / "shown.png").is_file(), report
        shown = np.asarray(Image.open(tmp_path / "shown.png"), dtype=np.float64)
        # windowing keeps 256 levels: half a level, and half a level for the program's own table
        assert np.abs(shown - read_unit_png(images[path.stem]) * 255).max() <= (1.0 if key[2] == 1 else 0.01)


# laws


@given(
    lower=st.floats(-4000, 3000, allow_nan=False),
    width=st.floats(1, 6000, allow_nan=False),
    seed=st.integers(0, 2**32 - 1),
    storage_class=st.sampled_from(["ct", "sc"]),
)
@settings(deadline=None, max_examples=25)
def test_hounsfield_round_trip(tmp_path_factory, lower, width, seed, storage_class):
    upper = lower + width
    stored = np.random.default_rng(seed).integers(0, 65536, (5, 5), dtype=np.uint16)
    stored[0, :2] = 0, 65535
    geometry = Geometry((1.0, 1.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0))
    facts = ImageFacts(
        "s",
        0,
        "any",
        {},
        "SYN0",
        "2.25.1",
        "2.25.2",
        "2.25.3",
        "2.25.4",
        modality="CT",
        hounsfield=(lower, upper),
        geometry=geometry,
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.dcm"
    path.write_bytes(encode_dicom(stored, facts, storage_class))
    picture = read_dicom(path)
    expected = lower + stored / 65535 * (upper - lower)
    float32 = np.abs(expected).max() * 2**-23
    assert picture.unit == "hu"
    assert np.abs(picture.pixels - expected).max() <= width / 65535 / 2 + float32


@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    size=st.integers(1, 48),
    turn=st.floats(0, 6.28),
    spacing=st.floats(0.1, 5),
)
@settings(deadline=None, max_examples=50)
def test_the_centre_of_an_image_stays_in_its_place(rows, columns, size, turn, spacing):
    """Padding is the same on both sides up to one pixel, so the centre moves by that half pixel and no more."""
    from medaug.export.geometry import geometry_of

    directions = np.array([np.cos(turn), np.sin(turn), 0, -np.sin(turn), np.cos(turn), 0])
    _, square_facts = square(np.zeros((rows, columns), np.float32), size)
    facts = {
        **square_facts,
        "spacing_mm": [spacing, 2 * spacing],
        "orientation": directions.tolist(),
        "position_mm": [1.0, 2.0, 3.0],
    }
    geometry = geometry_of(facts, size)
    steps = np.stack([directions[:3] * 2 * spacing, directions[3:] * spacing])  # per column, per row
    before = np.array([1.0, 2.0, 3.0]) + steps[0] * (columns - 1) / 2 + steps[1] * (rows - 1) / 2
    top, bottom, left, right = square_facts["padding"]
    before += steps[0] * (right - left) / 2 + steps[1] * (bottom - top) / 2
    after = np.array(geometry.position_mm) + (size - 1) / 2 * (
        directions[:3] * geometry.spacing_mm[1] + directions[3:] * geometry.spacing_mm[0]
    )
    assert np.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("key", CLASSES)
def test_pixels_are_those_of_the_cohort(exports, key):
    folder, accepted = exports[key]
    images = {case.id: accepted.path(case) for case in accepted.training}
    for path in files(folder):
        dataset = dcmread(path)
        levels = 255 if key[2] == 3 else 65535
        assert np.array_equal(dataset.pixel_array, np.rint(read_unit_png(images[path.stem]).astype(np.float64) * levels))
        assert dataset.PixelData and dataset.BitsStored == dataset.BitsAllocated


def test_window_shows_the_whole_range(exports):
    dataset = dcmread(files(exports["ct", "CT", 1][0])[0])
    assert (dataset.WindowCenter, dataset.WindowWidth) == ((WINDOW["0"] + WINDOW["1"]) / 2, WINDOW["1"] - WINDOW["0"])


def test_the_document_lists_every_attribute_that_is_written(exports):
    """docs/export.md: keyword and classes of each, the letters c, d, r and s."""
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    listed = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 7 and re.fullmatch("[cdrs]+", cells[3]) and not cells[1].startswith((">", "(private)")):
            listed |= dict.fromkeys(cells[1].split(", "), cells[3])
    written = {}
    for (storage_class, _, _), (folder, _) in exports.items():
        for element in (element for path in files(folder) for element in dcmread(path) if not element.tag.is_private):
            written.setdefault(element.keyword, set()).add({"ct": "c", "dx": "d", "cr": "r", "sc": "s"}[storage_class])
    written["SeriesDate"] = set("cdrs")  # with --date
    assert {keyword: set(letters) for keyword, letters in listed.items()} == written
