"""Label tables in the shapes that hospitals send, and classes from label texts."""

from __future__ import annotations

from pathlib import Path

import openpyxl
import pytest

from medaug.errors import ConfigError, DataError
from medaug.intake.classes import find_classes, number
from medaug.intake.labels import IdentifierTable, Row, match_files, read_rows
from medaug.intake.records import IntakeOptions, Item
from medaug.intake.tables import read_cells


def options(table: Path, **changes) -> IntakeOptions:
    return IntakeOptions(source=table.parent, out=table.parent / "out", labels=table, **changes)


def items(*paths: str) -> list[Item]:
    return [Item(path, Path("/nowhere") / path, "raster") for path in paths]


def matched(paths: list[str], keys: list[str]) -> dict[int, list[str]]:
    found = match_files(items(*paths), [Row(index, key, "x") for index, key in enumerate(keys, start=1)])
    return {index: [row.key for row in rows] for index, rows in found.rows.items()}


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbffile,label\na.png,1\n",
        "file;label\r\na.png;1\r\n".encode("utf-16"),
        b"sep=;\nfile;label\na.png;1\n",
        b'"file"\t"label"\n"a.png"\t"1"\n\n\n',
        "file|label\na.png|1\nö.png|\n".encode("cp1252"),
    ],
)
def test_csv_dialects(tmp_path, data):
    table = tmp_path / "labels.csv"
    table.write_bytes(data)
    assert read_rows(options(table))[0] == Row(1, "a.png", "1")


def test_xlsx_with_floats_merged_cells_and_formulas(tmp_path):
    book = openpyxl.Workbook()
    page = book.active
    for row in (["File", "Grade", "Patient"], ["a.png", 2.0, 7], ["b.png", None, 7], ["c.png", "=1+1", 8]):
        page.append(row)
    page.merge_cells("B2:B3")
    table = tmp_path / "labels.data"  # content decides
    book.save(table)
    rows = read_rows(options(table, label_column="grade", patient_column="Patient"))
    assert [(row.key, row.label, row.patient) for row in rows] == [("a.png", "2", "7"), ("b.png", "2", "7"), ("c.png", "", "8")]


def test_missing_columns_and_sheets_name_what_there_is(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("file,outcome\na.png,1\n")
    with pytest.raises(ConfigError, match="file, outcome"):
        read_rows(options(table))
    with pytest.raises(ConfigError, match="asked for is not there"):
        read_rows(options(table, label_column="klass"))
    book = openpyxl.Workbook()
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(ConfigError, match="sheet-missing"):
        read_cells(tmp_path / "t.xlsx", "second")


@pytest.mark.parametrize(
    ("header", "named", "words"),
    [
        ("file,label,label,class", {}, "2 columns .* could be the label; give each a name of its own"),
        ("file,label,Patient ID,patient_id", {}, "2 columns .* could be the patient.*--patient-column, or rename one"),
        ("File,file,label,image", {}, "2 columns .* could be the key.*--key-column"),
        ("file,label,label", {"label_column": "label"}, "there 2 times"),
        ("file,Label,label", {"label_column": "LABEL"}, "there 2 times .write it exactly"),
    ],
)
def test_of_two_columns_of_the_same_usual_name_none_is_taken(tmp_path, header, named, words):
    table = tmp_path / "t.csv"
    table.write_text(f"{header}\n0.png,1,1,0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"column-missing.*{words}"):
        read_rows(options(table, **named))


@pytest.mark.parametrize(
    ("header", "key", "label", "patient"),
    [
        ("name,label_1,label_2,diagnosis", "a", "d", ""),  # numbered columns are others than the label
        ("name,label,Patient_1,Patient_2", "a", "b", ""),
        ("image1,image2,path,label", "c", "d", ""),
        ("name,label,Patient ID,other", "a", "b", "c"),
    ],
)
def test_columns_with_numbers_are_not_the_same(tmp_path, header, key, label, patient):
    table = tmp_path / "t.csv"
    table.write_text(f"{header}\na,b,c,d\n", encoding="utf-8")
    (row,) = read_rows(options(table))
    assert (row.key, row.label, row.patient) == (key, label, patient)


@pytest.mark.parametrize("data", [b"PK\3\4broken", b"\x00\x01\x02\x00"])
def test_broken_tables_are_refused(tmp_path, data):
    table = tmp_path / "labels.xlsx"
    table.write_bytes(data)
    with pytest.raises(DataError, match="table-unreadable"):
        read_cells(table)


def test_table_caps(tmp_path, monkeypatch):
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n" + "a,1\n" * 20)
    monkeypatch.setattr("medaug.intake.tables.MAX_ROWS", 10)
    with pytest.raises(DataError, match="table-too-large"):
        read_cells(table)
    table.write_text("\n\n")
    with pytest.raises(DataError, match="table-empty"):
        read_cells(table)


def test_files_match_by_path_then_name_then_stem():
    paths = ["train/a/1.png", "train/b/1.png", "train/b/2.PNG", "c/0034.png"]
    assert matched(paths, ["train/a/1.png"]) == {0: ["train/a/1.png"]}
    assert matched(paths, ["D:\\data\\train\\b\\1.png"]) == {1: ["D:\\data\\train\\b\\1.png"]}
    assert matched(paths, ["2.png"]) == {2: ["2.png"]}
    assert matched(paths, ["2.dcm"]) == {2: ["2.dcm"]}
    assert matched(paths, ["1.png"]) == {}  # two files have that name


def test_ambiguous_names_and_restored_zeros_are_counted():
    found = match_files(items("a/1.png", "b/1.png", "c/0034.png"), [Row(1, "1.png", "x"), Row(2, "34", "y")])
    assert found.ambiguous == {0, 1} and found.restored_zeros == 1 and found.used == {2}
    # "034" and "34" may be two images: neither claims 0034.
    assert not match_files(items("0034.png"), [Row(1, "34", "x"), Row(2, "034", "y")]).rows


def test_identifiers_match_without_lost_zeros_only_if_unique():
    table = IdentifierTable("patient", [Row(1, "123", "a"), Row(2, "45", "b"), Row(3, "045", "c")])
    assert [row.number for row in table.find({"patient": " 000123 "})] == [1]
    assert [row.number for row in table.find({"patient": "045"})] == [3]
    assert table.find({"patient": "0045"}) == [] and table.find({}) == []
    assert table.restored == {"000123"}
    assert [row.number for row in table.near("0045")] == [2, 3] and not table.near("") and not table.near("46")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("2.0", 2), ("II", 2), ("grade 2", 2), ("Grade_II", 2), ("2,0", 2), ("2.5", None), ("mild", None)],
)
def test_numbers_in_labels(text, value):
    assert number(text) == value


def test_grades_written_in_three_ways_are_one_class():
    found = find_classes(["2.0", "II", "2", "10", "0"])
    assert found.names == ("0", "2", "10") and found.ordinal
    assert found.index["II"] == found.index["2.0"] == found.index["2"] == 1
    assert "2 label(s) written as '2.0', 'II'" in found.notes[0]


@pytest.mark.parametrize(
    ("labels", "names", "ordinal"),
    [
        (["b", "a", "A", "a"], ("a", "b"), False),
        (["grade10_x", "grade2_y"], ("grade2_y", "grade10_x"), True),
        (["grade 1", "grade 0"], ("grade 0", "grade 1"), True),
        (["X", "C"], ("C", "X"), False),
    ],
)
def test_class_order(labels, names, ordinal):
    found = find_classes(labels)
    assert (found.names, found.ordinal) == (names, ordinal)


def test_ordinal_can_be_overridden():
    assert not find_classes(["0", "1"], ordinal=False).ordinal
    assert find_classes(["low", "high"], ordinal=True).ordinal


def test_labels_that_are_no_classes_are_refused_without_quoting_them():
    with pytest.raises(DataError, match="labels-not-classes") as caught:
        find_classes([f"patient {index}" for index in range(50)])
    assert "patient 1" not in caught.value.message
    with pytest.raises(DataError, match="class-too-small"):
        find_classes(["a", "a"])
