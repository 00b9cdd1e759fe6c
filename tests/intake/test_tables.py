"""Tables that ask for more memory than they are worth, and those of every day beside them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import openpyxl
import pytest

from medaug.errors import DataError
from medaug.intake import tables
from medaug.intake.labels import read_rows
from medaug.intake.records import IntakeOptions

SHEET = "xl/worksheets/sheet1.xml"


def workbook(path: Path, rows: list[list[object]], merged: tuple[str, ...] = ()) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for place in merged:
        book.active.merge_cells(place)
    book.save(path)
    return path


def changed(path: Path, old: bytes, new: bytes, member: str = SHEET) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert old in members[member]
    members[member] = members[member].replace(old, new, 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refused(path: Path, code: str) -> None:
    for read in (tables.read_cells, tables.count_uncached):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.code == code


def test_a_merge_of_millions_of_cells_is_too_large(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", [["file", "label"], ["a.png", "1"]], ("B1:B2",))
    assert tables.read_cells(path) == [["file", "label"], ["a.png", "label"]]
    refused(changed(path, b'ref="B1:B2"', b'ref="E1:ZZ60000"'), "table-too-large")


def test_many_cells_and_many_tags_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "t.xlsx", [["file", "label"]] + [[f"{n}.png", "1"] for n in range(50)])
    assert len(tables.read_cells(path)) == 51
    with monkeypatch.context() as patch:
        patch.setattr(tables, "MAX_XLSX_CELLS", 100)
        refused(path, "table-too-large")
    monkeypatch.setattr(tables, "MAX_TAGS", 100)
    refused(path, "table-too-large")


def test_the_size_that_a_sheet_claims_is_not_believed(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", [["file", "label"], ["a.png", "1"]])
    changed(path, b'<dimension ref="A1:B2"', b'<dimension ref="A1:XFD1048576"')
    assert tables.read_cells(path) == [["file", "label"], ["a.png", "1"]]
    refused_row = changed(path, b'<row r="2"', b'<row r="99999999"')
    with pytest.raises(DataError, match="table-too-large"):
        tables.read_cells(refused_row)


def test_xml_with_a_dtd_is_refused_in_any_encoding(tmp_path: Path) -> None:
    for number, encoding in enumerate(("utf-8", "utf-16")):
        path = workbook(tmp_path / f"{number}.xlsx", [["file", "label"]])
        text = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><worksheet/>'
        with zipfile.ZipFile(path) as archive:
            whole = archive.read(SHEET)
        refused(changed(path, whole, text.encode(encoding)), "table-unreadable")


def test_tags_that_two_chunks_share_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "t.xlsx", [["file", "label"]] + [[f"{n}.png", "=1+1"] for n in range(30)], ("A3:A5", "B7:B9"))
    expected = tables._checked(path)
    assert len(expected[0][SHEET]) == 2 and expected[1] and tables.count_uncached(path) == 28
    for size in (300, 333, 1001):
        monkeypatch.setattr(tables, "CHUNK", size)
        assert tables._checked(path) == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_of_every_day(tmp_path: Path, newline: str) -> None:
    lines = ["", 'file;label;"a; b"', '"x;\n1.png";2;', "", "ü.png;3;"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "t.csv").write_bytes(newline.join(lines).encode(encoding))
        assert tables.read_cells(tmp_path / "t.csv") == [["file", "label", "a; b"], ["x;\n1.png", "2", ""], ["ü.png", "3", ""]]
    (tmp_path / "t.csv").write_text("sep=|\nfile|label\na,b|1\n")
    assert tables.read_cells(tmp_path / "t.csv") == [["file", "label"], ["a,b", "1"]]


def test_a_row_of_too_many_fields_ends_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_COLUMNS", 5)
    path = tmp_path / "t.csv"
    for text in ("a,b\n" + "1," * 60 + "\n", 'a,b\n"' + '\n",1,2,3,"' * 60 + '"\n'):
        path.write_text(text)
        with pytest.raises(DataError, match="table-too-large"):
            tables.read_cells(path)
    monkeypatch.setattr(tables, "MAX_LINE", 50)
    path.write_text("a,b\n" + "x" * 60)
    with pytest.raises(DataError, match="table-too-large.*line"):
        tables.read_cells(path)


def test_only_the_wanted_columns_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("file,label," + ",".join(f"c{n}" for n in range(500)) + "\n" + "a.png,1" + ",secret" * 500 + "\n")
    (row,) = read_rows(IntakeOptions(source=tmp_path, out=tmp_path / "out", labels=path))
    assert (row.key, row.label) == ("a.png", "1") and not hasattr(row, "__dict__") and "secret" not in repr(row)
