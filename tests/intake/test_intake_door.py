"""The hospital's door: readers, pseudonyms, burned-in text, copies and processes, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openpyxl
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from test_intake_build import codes, fill, picture, save, take, write_dicom

from medaug.cohort import read_cohort
from medaug.errors import ConfigError, DataError, StorageError
from medaug.intake.burned_in import find_text


def texts_in(root: Path) -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def graded(root: Path, rows: list[str], header: str = "file,label,reader", count: int = 12) -> Path:
    for index in range(count):
        save(root / f"{index}.png", picture(31, index))
    table = root.parent / "t.csv"
    table.write_text("\n".join([header, *rows]))
    return table


@pytest.mark.parametrize(
    ("policy", "label"),
    [("quarantine", None), ("majority", "2"), ("senior", "1"), ("mean", "2")],
)
def test_conflicting_readers(tmp_path: Path, policy: str, label: str | None) -> None:
    rows = [f"{index}.png,{index % 3},Dr Huber" for index in range(12)]
    rows[4] = "4.png,1,Dr Huber"
    rows += ["4.png,2,Dr Maier", "4.png,II,Dr Weber", "7.png,1.0,Dr Maier", "3.png,grade 0,Dr Maier"]
    table = graded(tmp_path / "in", rows)
    result = take(tmp_path / "in", tmp_path / "out", labels=table, conflicts=policy, reader_column="reader", senior="dr huber")
    by_name = {case.name: result.cohort.classes[case.label] for case in result.cohort.cases()}
    assert by_name.get("4.png") == label and by_name["7.png"] == "1" and by_name["3.png"] == "0"
    assert codes(result).get("4.png") == (None if label else "conflicting-label")
    assert result.report["agreement"]["read_twice"] == 3 and result.report["agreement"]["disagreed"] == 1
    written = texts_in(tmp_path / "out")
    assert not any(name in written for name in (b"Huber", b"Maier", b"Weber")) and b"kappa" in written


def test_a_class_of_outvoted_readers_only_is_dropped(tmp_path: Path) -> None:
    rows = [f"{index}.png,{index % 2},a" for index in range(12)] + ["4.png,9,b", "4.png,0,c"]
    table = graded(tmp_path / "in", rows)
    result = take(tmp_path / "in", tmp_path / "out", labels=table, conflicts="majority", reader_column="reader")
    assert result.cohort.classes == ("0", "1") and any("no image of them remains" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"conflicts": "vote"}, "option-unknown"),
        ({"burned_in": "blur"}, "option-unknown"),
        ({"slices": "some"}, "option-unknown"),
        ({"dimensions": 4}, "option-unknown"),
        ({"conflicts": "senior"}, "senior-missing"),
        ({"conflicts": "senior", "reader_column": "reader", "senior": "nobody"}, "senior-unknown"),
        ({"reader_column": "nowhere"}, "column-missing"),
        ({"slices": "table"}, "slice-column-missing"),
        ({"slices": "lesion"}, "masks-missing"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path: Path, changes: dict, code: str) -> None:
    table = graded(tmp_path / "in", [f"{index}.png,{index % 2},a" for index in range(12)])
    with pytest.raises(ConfigError, match=code):
        take(tmp_path / "in", tmp_path / "out", labels=table, **changes)
    assert not (tmp_path / "out").exists()


def test_orphans_of_both_kinds_are_counted_without_identifiers(tmp_path: Path) -> None:
    rows = [f"{index}.png,{index % 2}" for index in range(10)] + ["SECRET77.png,1", "SECRET78.png,0"]
    table = graded(tmp_path / "in", rows, "file,label")
    result = take(tmp_path / "in", tmp_path / "out", labels=table)
    assert result.report["join"] == {
        "key": "file",
        "rows": 12,
        "rows_without_image": 2,
        "row_numbers_without_image": [11, 12],
        "images_without_row": 2,
        "restored_zeros": 0,
    }
    assert b"SECRET" not in texts_in(tmp_path / "out")
    assert "Rows without an image: 2 (rows 11, 12" in (tmp_path / "out" / "report.html").read_text()


def hospital_table(path: Path, kind: str) -> dict[str, object]:
    """A table of 12 patients in one of the shapes that hospitals send; returns what has to be said about it."""
    values = [[f"{index + 1}", str(index % 2)] for index in range(12)]
    if kind in ("merged", "formula", "floats"):
        book = openpyxl.Workbook()
        page = book.active
        page.append(["PatientID", "Grade"])
        ordered = sorted(values, key=lambda row: row[1]) if kind == "merged" else values
        for number, (patient, grade) in enumerate(ordered, start=2):
            page.append([int(patient), float(grade) if kind == "floats" else int(grade)])
            if kind == "formula":
                page.cell(number, 2).value = f"={grade}+0"
        if kind == "merged":
            for start, end in ((2, 7), (8, 13)):
                page.merge_cells(f"B{start}:B{end}")
        book.save(path)
        return {}
    spell = {"roman": ["0", "I", "1.0", "grade 1"], "plain": ["0", "1", "1", "1"]}["roman" if kind == "roman" else "plain"]
    lines = [[patient, spell[0] if grade == "0" else spell[1 + int(patient) % 3]] for patient, grade in values]
    if kind == "conflict":
        lines.append(["2", "0"])
    if kind == "orphan":
        lines.append(["999", "1"])
    if kind == "unlabelled":
        lines.pop()
    separator = ";" if kind == "semicolon" else ","
    text = "\r\n".join(separator.join(line) for line in [["PatientID", "Grade"], *lines])
    path.write_bytes(text.encode("utf-8-sig" if kind == "bom" else "utf-8"))
    return {}


@pytest.mark.parametrize(
    ("kind", "quarantined"),
    [
        ("bom", {}),
        ("semicolon", {}),
        ("merged", {}),
        ("floats", {}),
        ("roman", {}),
        ("conflict", {"conflicting-label": 1}),
        ("orphan", {"label-without-image": 1}),
        ("unlabelled", {"image-without-label": 1}),
        ("formula", None),
    ],
)
def test_every_shape_of_table_with_lost_zeros(tmp_path: Path, kind: str, quarantined: dict[str, int] | None) -> None:
    for index in range(12):
        write_dicom(tmp_path / "in" / f"{index}" / "IM0001", picture(32, index), f"{index + 1:06d}")
    table = tmp_path / "table.xlsx"  # content decides, not the extension
    hospital_table(table, kind)
    if quarantined is None:  # formulas without stored values: no label is known, and nothing is computed
        with pytest.raises(DataError, match="no-usable-image") as caught:
            take(tmp_path / "in", tmp_path / "out", labels=table, key="patient", label_column="Grade")
        assert "image-without-label" in caught.value.message
        return
    result = take(tmp_path / "in", tmp_path / "out", labels=table, key="patient", label_column="Grade")
    assert result.counts["quarantine"] == quarantined and result.counts["restored_zeros"] >= 11
    assert result.cohort.classes == ("0", "1") and result.cohort.ordinal
    assert result.counts["used"] == 12 - quarantined.get("conflicting-label", 0) - quarantined.get("image-without-label", 0)


def test_patients_keep_their_pseudonym_with_the_key_and_splits_do_not_depend_on_it(tmp_path: Path) -> None:
    for index in range(24):
        write_dicom(tmp_path / "in" / "ab"[index % 2] / f"IM{index}", picture(33, index), f"P{index // 2:04d}x")
    made = {}
    for name, key in (("one", "k1"), ("two", "k1"), ("three", "k2")):
        made[name] = take(tmp_path / "in", tmp_path / name, name="x", pseudonym_key=tmp_path / key).cohort
    one, two, three = ([(case.id, case.patient) for case in made[name].cases()] for name in ("one", "two", "three"))
    assert one == two and (tmp_path / "one" / "cohort.json").read_bytes() == (tmp_path / "two" / "cohort.json").read_bytes()
    assert [case for case, _ in one] == [case for case, _ in three] and not {p for _, p in one} & {p for _, p in three}
    # A part of the export, taken in later: the same patients have the same names.
    for path in sorted((tmp_path / "in").rglob("IM*"))[:6]:
        path.unlink()
    part = {
        case.id: case.patient for case in take(tmp_path / "in", tmp_path / "part", pseudonym_key=tmp_path / "k1").cohort.cases()
    }
    assert part and all(dict(one)[case] == patient for case, patient in part.items())
    with pytest.raises(StorageError, match="pseudonym-key-changed"):
        take(tmp_path / "in", tmp_path / "part", pseudonym_key=tmp_path / "k2")


def test_a_dry_run_makes_no_key_and_no_mapping(tmp_path: Path) -> None:
    for index in range(12):
        write_dicom(tmp_path / "in" / "ab"[index % 2] / f"IM{index}", picture(34, index), f"P{index:04d}x")
    wanted = {"pseudonym_key": tmp_path / "k", "mapping": tmp_path / "m.csv", "keep_dicom": tmp_path / "copies"}
    result = take(tmp_path / "in", tmp_path / "out", dry_run=True, **wanted)
    assert result.counts["patients"] == 12 and sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_labels_that_name_their_patients_are_refused(tmp_path: Path) -> None:
    for index in range(12):
        patient = f"MUELLER{index // 3}"
        write_dicom(tmp_path / "in" / patient / f"IM{index}", picture(35, index), patient)
    with pytest.raises(DataError, match="label-identifies") as caught:
        take(tmp_path / "in", tmp_path / "out")
    assert "MUELLER" not in str(caught.value)


def stamped(pixels: np.ndarray, text: str) -> np.ndarray:
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text((6, 6), text, fill=255, font=ImageFont.load_default(14))
    return np.asarray(image)


def smooth(*key: int) -> np.ndarray:
    return (np.kron(np.random.default_rng(key).uniform(20, 150, (8, 8)), np.ones((20, 20)))).astype(np.uint8)


@pytest.mark.parametrize("policy", ["quarantine", "mask", "keep"])
def test_burned_in_text(tmp_path: Path, policy: str) -> None:
    source = tmp_path / "in"
    for index in range(16):
        pixels = smooth(36, index)
        save(source / "ab"[index % 2] / f"{index}.png", stamped(pixels, "DOE^JANE 1953") if index in (2, 5) else pixels)
    result = take(source, tmp_path / "out", burned_in=policy)
    found = result.report["burned_in_text"]
    assert found == {"searched": 16, "suspected": 2, "reasons": {"pixels": 2}, "actions": {policy: 2}}
    assert {name for name, code in codes(result).items() if code == "burned-in-text"} == (
        {"2.png", "5.png"} if policy == "quarantine" else set()
    )
    assert result.counts["used"] == (14 if policy == "quarantine" else 16)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 are suspected" in page and page.count("suspected places, blacked out") == 2
    if policy == "mask":
        states = {case.name: case.acquisition["burned_in_text"] for case in result.cohort.cases()}
        assert states["2.png"] == states["5.png"] == "masked" and states["3.png"] == "not found"


def test_masked_copies_have_no_text_and_say_so(tmp_path: Path) -> None:
    for index in range(12):
        pixels = smooth(37, index)
        pixels = stamped(pixels, "DOE^JANE 1953") if index == 4 else pixels
        write_dicom(tmp_path / "in" / "ab"[index % 2] / f"IM{index:04d}", pixels // 2, f"Patientin{index}")
    options = {"burned_in": "mask", "keep_dicom": tmp_path / "copies", "window": (-1024, 1100)}
    result = take(tmp_path / "in", tmp_path / "out", **options)
    copies = [pydicom.dcmread(path) for path in sorted((tmp_path / "copies").rglob("*.dcm"))]
    cleaned = [copy for copy in copies if "113101" in [code.CodeValue for code in copy.DeidentificationMethodCodeSequence]]
    assert len(copies) == 12 and len(cleaned) == 1 and result.report["burned_in_text"]["actions"] == {"mask": 1}
    assert find_text(cleaned[0].pixel_array) == [] and cleaned[0].BurnedInAnnotation == "NO"
    assert json.loads((tmp_path / "copies" / "deidentified.json").read_text())["codes"].keys() == {"113100", "113101"}


def test_a_leftover_costs_the_copy_and_not_the_case(tmp_path: Path) -> None:
    for index in range(12):
        path = write_dicom(tmp_path / "in" / "ab"[index % 2] / f"IM{index:04d}", picture(38, index), f"Patientin{index}Q")
        if index == 3:
            data = pydicom.dcmread(path)
            data.Manufacturer = "Quixote Alonso Roentgen"  # the patient's name in an element that the profile keeps
            data.PatientName = "Roentgen^Quixote"
            data.save_as(path)
    result = take(tmp_path / "in", tmp_path / "out", keep_dicom=tmp_path / "copies")
    assert codes(result) == {"IM0003": "identity-leftover"}
    assert result.counts["used"] == 12 and len(list((tmp_path / "copies").rglob("*.dcm"))) == 11
    assert b"Quixote" not in texts_in(tmp_path / "copies")


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for index in range(90):
        write_dicom(source / f"{index % 30}" / f"IM{index:04d}", picture(39, index), f"{index % 30:05d}")
    save(source / "x.png", picture(1, 1))
    (source / "IM9999").write_bytes(b"\0" * 128 + b"DICM" + b"no elements")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["PatientID,label", *(f"{index},{'ab'[index % 2]}" for index in range(31))]))
    results = [
        take(source, tmp_path / f"out{workers}", labels=table, key="patient", name="x", workers=workers)
        for workers in (0, 1, 2, 3)
    ]
    assert results[0].counts["used"] == 90 and results[0].counts["restored_zeros"] == 30
    for workers, result in zip((1, 2, 3), results[1:], strict=True):
        assert result.report == results[0].report
        for path in sorted((tmp_path / "out0").rglob("*")):
            if path.is_file():
                assert path.read_bytes() == (tmp_path / f"out{workers}" / path.relative_to(tmp_path / "out0")).read_bytes()
    assert read_cohort(tmp_path / "out2", verify=True).content_sha256 == results[0].cohort.content_sha256


def test_class_folders_need_no_key(tmp_path: Path) -> None:
    cohort = take(fill(tmp_path / "in"), tmp_path / "out", pseudonym_key=tmp_path / "k").cohort
    assert not (tmp_path / "k").exists() and "pseudonym_key" not in cohort.notes
