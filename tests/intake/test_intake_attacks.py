"""Sources made to get an identity out of the door, or the batch down."""

from __future__ import annotations

import csv
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from dicom_files import make_image, make_slice
from dicom_files import save as save_dicom
from PIL import Image
from test_intake_build import codes, fill, picture, save, take

from medaug import storage
from medaug.errors import ConfigError, DataError, StorageError
from medaug.intake.build import partial_folder
from medaug.intake.labels import describe_columns
from medaug.intake.scan import kind_of
from medaug.intake.tables import read_cells
from medaug.io import limits

NAME = "ZEPHYRINE_QUORRA"


def texts_in(root: Path) -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def dicom(path: Path, index: int, **elements: object) -> Path:
    pixels = np.random.default_rng(index).integers(0, 2000, (20, 20)).astype(np.uint16)
    uids = {"SOPInstanceUID": f"1.2.5.{index}", "StudyInstanceUID": f"1.2.6.{index}", "SeriesInstanceUID": f"1.2.7.{index}"}
    return save_dicom(path, make_image(pixels, **(uids | elements)))


def test_a_dicom_with_a_tiff_header_in_its_preamble_is_a_dicom(tmp_path: Path) -> None:
    for index in range(12):
        path = dicom(tmp_path / "in" / f"grade{index % 2}" / f"{NAME}_{index}.dcm", index, PatientID=f"MRN-47{index // 2}")
        data = bytearray(path.read_bytes())
        data[:8] = b"II*\0" + struct.pack("<I", 8)
        path.write_bytes(data)
        assert kind_of(path) == "dicom"
    result = take(tmp_path / "in", tmp_path / "out")
    assert result.cohort.intensity["kind"] == "window_hu" and result.counts["patients"] == 6
    assert b"QUORRA" not in texts_in(tmp_path / "out")


def test_file_names_stay_inside_and_the_mapping_finds_the_files(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    (source / "a" / "a_0.png").rename(source / "a" / f"{NAME}.png")
    (source / "a" / f"{NAME}_1943.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    result = take(source, tmp_path / "out", mapping=tmp_path / "secret" / "map.csv")
    assert b"QUORRA" not in texts_in(tmp_path / "out")
    (row,) = result.quarantine
    assert row["file"].startswith("sha256:")
    mapping = tmp_path / "secret" / "map.csv"
    assert stat.S_IMODE(mapping.stat().st_mode) == 0o600
    rows = list(csv.reader(mapping.open()))
    assert ["quarantine", row["file"], f"a/{NAME}_1943.png"] in rows
    assert any(kind == "file" and place == f"a/{NAME}.png" for kind, _, place in rows)
    kept = take(source, tmp_path / "kept", keep_names=True)
    assert codes(kept).keys() == {f"{NAME}_1943.png"} and f"{NAME}.png" in {case.name for case in kept.cohort.cases()}


@pytest.mark.parametrize("folder", ["17.12.1943", "Mueller Joerg", "QUORRA MUELLER"])
def test_one_image_of_its_patient_makes_a_folder_a_name(tmp_path: Path, folder: str) -> None:
    for index in range(12):
        elements = {"PatientID": f"Q{index:05d}", "PatientName": "ELSE^BODY", "PatientBirthDate": "19500101"}
        if index == 1:
            elements |= {
                "PatientName": "Müller^Jörg^Quorra",
                "PatientBirthDate": "19431217",
                "SpecificCharacterSet": "ISO_IR 192",
            }
        dicom(tmp_path / "in" / (folder if index % 2 else "grade2") / f"P{index}" / f"IM{index:04d}", index, **elements)
    with pytest.raises(DataError, match="label-identifies") as caught:
        take(tmp_path / "in", tmp_path / "out")
    assert folder not in str(caught.value)


def test_a_folder_with_one_part_of_a_name_may_hold_a_stranger(tmp_path: Path) -> None:
    for index in range(12):
        name = "QUORRA^Z" if index > 2 else "OTHER^GUY"
        dicom(tmp_path / "in" / ("Quorra" if index % 2 else "grade2") / f"IM{index:04d}", index, PatientName=name)
    with pytest.raises(DataError, match="label-identifies"):
        take(tmp_path / "in", tmp_path / "out")


def test_a_small_class_that_was_not_checked_is_not_named(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    save(source / "Quorra Zephyrine" / "1.png", picture(5, 5))
    with pytest.raises(DataError, match="class-too-small") as caught:
        take(source, tmp_path / "out")
    assert "Quorra" not in str(caught.value) and "number 1 of 3" in str(caught.value)


def test_a_study_id_is_no_counting_name(tmp_path: Path) -> None:
    for index in range(12):
        path = tmp_path / "in" / f"grade{index % 2}" / f"IM{170000 + index}.dcm"
        others = {"StudyID": "170001"} if index < 6 else {"OtherPatientIDs": [f"{170000 + index}", "X-1"]}
        dicom(path, index, PatientID=f"Q{index:05d}", **others)
    written = {case.name for case in take(tmp_path / "in", tmp_path / "out").cohort.cases()}
    assert "IM170000.dcm" in written and not written & {"IM170001.dcm", *(f"IM{170000 + index}.dcm" for index in range(6, 12))}


def two_patients(root: Path, **elements: object) -> None:
    """Four series that two patients share each, and four of one patient."""
    for index in range(48):
        patient, series = index // 4, index // 4 if index < 16 else 4 + (index - 16) // 8
        facts = {
            "PatientID": f"Q{patient}",
            "PatientName": f"Z^Q{patient}",
            "PatientBirthDate": f"19{40 + patient}0101",
        } | elements
        pixels = np.random.default_rng(index).integers(0, 2000, (20, 20)).astype(np.uint16)
        uids = {"sop": f"1.2.9.{index}", "series": f"1.2.8.{series}", "StudyInstanceUID": f"1.2.7.{series}"}
        save_dicom(root / f"grade{series % 2}" / f"IM{index:04d}", make_slice(index % 8, pixels=pixels, **uids, **facts))


@pytest.mark.parametrize("blank", [{}, {"PatientID": ""}])
def test_patients_who_share_a_series_are_two(tmp_path: Path, blank: dict) -> None:
    two_patients(tmp_path / "in", **blank)
    result = take(tmp_path / "in", tmp_path / "out")
    assert result.counts["patients"] == 12 and any(
        "4 series" in note and "patients-in-one-series" in note for note in result.notes
    )
    by_series: dict[str, set[str]] = {}
    for case in result.cohort.cases():
        by_series.setdefault(case.acquisition["series"], set()).add(case.patient)
    assert len(by_series) == 12 and all(len(patients) == 1 for patients in by_series.values())
    strict = take(tmp_path / "in", tmp_path / "strict", strict=True)
    assert strict.counts["quarantine"] == {"patients-in-one-series": 32}


def test_one_person_with_a_blank_identifier_is_one_patient(tmp_path: Path) -> None:
    for index in range(12):
        person = {"PatientID": "", "PatientName": f"Z^Q{index // 2}", "PatientBirthDate": "19400101"}
        dicom(tmp_path / "in" / f"grade{index // 2 % 2}" / f"IM{index:04d}", index, **person)
    cohort = take(tmp_path / "in", tmp_path / "out").cohort
    assert len({case.patient for case in cohort.cases()}) == len({case.group for case in cohort.cases()}) == 6


def test_one_stray_grade_does_not_stop_the_batch(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / "in" / f"{index}.png", picture(31, index))
    table = tmp_path / "t.csv"
    table.write_text("file,label\n" + "".join(f"{index}.png,{index % 2}\n" for index in range(12)) + "4.png,9\n")
    result = take(tmp_path / "in", tmp_path / "out", labels=table)
    assert result.cohort.classes == ("0", "1") and codes(result) == {"4.png": "conflicting-label"}
    assert any("1 class(es) were dropped" in note and "'9'" in note for note in result.notes)


@pytest.mark.parametrize("what", ["mapping", "pseudonym_key"])
@pytest.mark.parametrize("folder", ["out", "copies"])
def test_secrets_do_not_go_where_an_output_is_built(tmp_path: Path, what: str, folder: str) -> None:
    source = fill(tmp_path / "in")
    place = partial_folder(tmp_path / folder) / "secret"
    with pytest.raises(ConfigError, match="secret-inside"):
        take(source, tmp_path / "out", keep_dicom=tmp_path / "copies", **{what: place})


def test_a_busy_folder_is_called_by_its_name(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    with storage.locked(partial_folder(tmp_path / "out")), pytest.raises(StorageError, match="folder-in-use") as caught:
        take(source, tmp_path / "out")
    assert "folder out " in str(caught.value) and ".partial" not in str(caught.value)


def test_a_table_without_header_shows_no_patient(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    table = tmp_path / "t.csv"
    table.write_text("4711;ZEPHYRINE QUORRA;17.12.1943;2\n4712;A B;1.1.1950;1\n")
    with pytest.raises(ConfigError, match="column-missing.*4 column.*looks like data") as caught:
        take(source, tmp_path / "out", labels=table)
    assert not any(text in str(caught.value) for text in ("4711", "QUORRA", "1943"))
    assert describe_columns(["patient_id", "QUORRA", "Grade", "PatientName"]).endswith("patient_id, Grade, PatientName.")
    book = openpyxl.Workbook()
    book.active.title = "ZEPHYRINE QUORRA"
    book.create_sheet("Sheet2")
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(ConfigError, match="sheet-missing.*2 sheet.*Sheet2") as caught:
        read_cells(tmp_path / "t.xlsx", "labels")
    assert "QUORRA" not in str(caught.value)


def test_formulas_without_a_value_are_noted(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    book = openpyxl.Workbook()
    book.active.append(["file", "label"])
    for index in range(8):
        book.active.append([f"a_{index}.png", "1"])
        book.active.append([f"b_{index}.png", "=1+1" if index == 0 else "2"])
    book.save(tmp_path / "t.xlsx")
    result = take(source, tmp_path / "out", labels=tmp_path / "t.xlsx")
    assert codes(result) == {"b_0.png": "image-without-label"}
    assert any("1 cell(s)" in note and "formulas" in note for note in result.notes)


def test_decoders_cannot_write_to_the_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with limits.silenced(), limits.silenced():
        os.write(2, b"Not a JPEG file: QUORRA")
    os.write(2, b"afterwards")
    with pytest.raises(KeyError), limits.silenced():
        os.write(2, b"QUORRA")
        raise KeyError
    os.write(2, b" still")
    assert capfd.readouterr().err == "afterwards still"


def test_a_broken_stream_is_quiet(tmp_path: Path) -> None:
    """In a process of its own, whose standard error is the real one."""
    Image.fromarray(picture(1)).save(tmp_path / "a.tif", compression="jpeg")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    start = data.find(b"\xff\xd8")
    data[start : start + 2] = b"\xe8\xfc"
    (tmp_path / "a.tif").write_bytes(data)
    code = (
        "import sys, pathlib\nfrom medaug.io.raster import read_raster\nfrom medaug.errors import DataError\n"
        "try:\n    read_raster(pathlib.Path(sys.argv[1]))\nexcept DataError as error:\n    print(error.code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tif")], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.strip() == "image-unreadable"


def test_the_config_knows_of_names(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    take(source, tmp_path / "out")
    with pytest.raises(StorageError, match="folder-not-empty"):
        take(source, tmp_path / "out", keep_names=True)
    assert json.loads((tmp_path / "out" / "cohort.json").read_text())
