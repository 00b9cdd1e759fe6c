"""Label tables as hospitals write them, and which row belongs to which image."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medaug.errors import ConfigError, DataError
from medaug.intake.records import IntakeOptions, Item, normal_id

MAX_TABLE_BYTES = 1 << 26
MAX_INFLATED_BYTES = 1 << 28
MAX_ROWS = 1_000_000
MAX_COLUMNS = 2_000
MAX_CELLS = 20_000_000
USUAL_NAMES = {
    "file": ("file", "filename", "image", "imagefile", "path", "filepath", "imagepath", "imageindex", "imageid", "name"),
    "sop": ("sop", "sopinstanceuid", "sopuid", "instanceuid"),
    "series": ("series", "seriesinstanceuid", "seriesuid"),
    "study": ("study", "studyinstanceuid", "studyuid"),
    "patient": ("patient", "patientid", "subject", "subjectid"),
    "accession": ("accession", "accessionnumber"),
    "label": ("label", "class", "grade", "diagnosis", "target", "category"),
}


# Words of column names that may be repeated in a message; whatever else the first row holds may be a patient.
COLUMN_WORDS = frozenset(word for names in USUAL_NAMES.values() for word in names) | frozenset(
    re.findall(
        r"\w+",
        "id ids no nr num number code key index uid instance image file path name names date time birth born dob sex "
        "gender age weight height group split fold set reader rater radiologist doctor physician senior score stage "
        "severity finding findings result comment comments note notes remark remarks site hospital department ward "
        "center centre side slice position location mm z x y modality outcome scanner device study series sop accession "
        "patient subject case label class grade diagnosis target category first last given family surname exam "
        "examination visit order referral report text type status quality mask lesion volume frame ",
    )
)


@dataclass(frozen=True)
class Row:
    """One row of the label table that concerns us; `number` counts from 1 below the header."""

    number: int
    key: str
    label: str
    group: str = ""
    patient: str = ""
    split: str = ""
    reader: str = ""
    place: str = ""  # which slice of the image or series: 0-based index, or position in mm


@dataclass
class Matches:
    """Which rows belong to which images, by item or by identifier.

    Attributes:
        rows: item index -> rows.
        restored_zeros: identifiers that only matched without their leading zeros.
        ambiguous: items that a row could mean among others.
        used: numbers of the rows that found an image.
    """

    rows: dict[int, list[Row]] = field(default_factory=lambda: defaultdict(list))
    restored_zeros: int = 0
    ambiguous: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)


def read_rows(options: IntakeOptions) -> list[Row]:
    """The rows of the label table with a key, in the columns that the options name.

    Raises:
        ConfigError: a column is missing or ambiguous (`column-missing`), or the sheet is (`sheet-missing`).
        DataError: the table is unreadable, too large or empty.
    """
    if options.labels is None:
        return []
    cells = read_cells(options.labels, options.sheet)
    header = [text.strip() for text in cells[0]]
    key = _column(header, options.key_column, options.key, "key")
    if key is None:
        raise ConfigError(
            "column-missing",
            f"The label table has no column for --key {options.key}; name it with --key-column. {describe_columns(header)}",
        )
    label = _column(header, options.label_column, "label", "label")
    if label is None:
        raise ConfigError(
            "column-missing",
            f"The label table has no column that looks like a label; name it with --label-column. {describe_columns(header)}",
        )
    group = _column(header, options.group_column, None, "group")
    patient = _column(header, options.patient_column, "patient", "patient")
    split = _column(header, options.split_column, None, "split")
    reader = _column(header, options.reader_column, None, "reader")
    place = _column(header, options.slice_column, None, "slice")
    rows = []
    for number, line in enumerate(cells[1:], start=1):
        row = Row(number, *(_cell(line, column) for column in (key, label, group, patient, split, reader, place)))
        if row.key or row.label:
            rows.append(row)
    if not rows:
        raise DataError("table-empty", "The label table has a header but no row with a key and a label.")
    return rows


def _cell(line: Sequence[str], column: int | None) -> str:
    return line[column].strip() if column is not None and column < len(line) else ""


def _column(header: Sequence[str], wanted: str | None, usual: str | None, what: str) -> int | None:
    """Index of a column: by its name, else the only one with a usual name."""
    if wanted is not None:
        hits = [index for index, name in enumerate(header) if name == wanted.strip()]
        hits = hits or [index for index, name in enumerate(header) if name.casefold() == wanted.strip().casefold()]
        if len(hits) != 1:
            found = "twice" if hits else "not there"
            raise ConfigError(
                "column-missing",
                f"The {what} column that was asked for is {found} in the label table. {describe_columns(header)}",
            )
        return hits[0]
    plain = [re.sub(r"[^a-z]", "", name.casefold()) for name in header]
    for name in USUAL_NAMES[usual] if usual else ():
        if plain.count(name) == 1:
            return plain.index(name)
    return None


def describe_columns(header: Sequence[str]) -> str:
    """How many columns the first row of a table has, and those with plain names; without a header it holds a patient.

    A name is repeated only if its words are usual ones for columns of label tables.
    """
    plain = [name for name in header if _is_column_name(name)]
    text = f"Its first row has {len(header)} column(s)"
    text += f", among them: {', '.join(plain[:30])}{' ...' if len(plain) > 30 else ''}." if plain else "."
    if not plain and any(any(letter.isdigit() for letter in name) for name in header):
        text += " It looks like data: put a row with the names of the columns above it."
    return text


def _is_column_name(name: str) -> bool:
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold())
    return (
        name.isascii()
        and not re.search(r"[^A-Za-z _.()/-]", name)
        and bool(words)
        and all(word in COLUMN_WORDS for word in words)
    )


def read_cells(path: Path, sheet: str | None = None) -> list[list[str]]:
    """A CSV or XLSX table as text, header first; content decides which of the two it is.

    Raises:
        ConfigError: the sheet does not exist.  DataError: unreadable, too large or empty.
    """
    size = path.stat().st_size
    if size > MAX_TABLE_BYTES:
        raise DataError(
            "table-too-large", f"The label table has {size} bytes, at most {MAX_TABLE_BYTES} are read; cut it down to the images."
        )
    with open(path, "rb") as stream:
        is_zip = stream.read(4) == b"PK\3\4"
    cells = _read_xlsx(path, sheet) if is_zip else _read_csv(path.read_bytes())
    cells = [line for line in cells if any(text.strip() for text in line)]
    if not cells:
        raise DataError("table-empty", "The label table holds no row.")
    return cells


def _read_csv(data: bytes) -> list[list[str]]:
    text = _decode(data)
    first = text.lstrip("\r\n").split("\n", 1)[0]
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own hint
        text, delimiter = text.split("\n", 1)[1] if "\n" in text else "", first.strip()[4]
    else:
        unquoted = re.sub(r'"[^"]*"', "", first)
        delimiter = max(",;\t|", key=unquoted.count)
    rows: list[list[str]] = []
    try:
        for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            rows.append(line)
            _check_extent(len(rows), len(line))
    except csv.Error as error:
        raise DataError(
            "table-unreadable", f"The label table is no readable CSV (row {len(rows) + 1}); save it again as CSV UTF-8."
        ) from error
    return rows


def _decode(data: bytes) -> str:
    encodings = ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise DataError(
        "table-unreadable", "The label table is neither text (UTF-8, UTF-16, Windows-1252) nor XLSX; save it again as CSV UTF-8."
    )


def _read_xlsx(path: Path, sheet: str | None) -> list[list[str]]:
    import openpyxl

    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
        if inflated > MAX_INFLATED_BYTES:
            raise DataError(
                "table-too-large",
                f"The XLSX unpacks to {inflated} bytes, at most {MAX_INFLATED_BYTES} are read; save the rows needed as CSV.",
            )
        # Values, not formulas; not read_only, which does not know merged cells.
        with open(path, "rb") as stream:  # a path would be refused for its extension
            book = openpyxl.load_workbook(stream, data_only=True)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - openpyxl raises anything on arbitrary bytes
        raise DataError(
            "table-unreadable", f"The XLSX cannot be read ({type(error).__name__}); save it again or as CSV UTF-8."
        ) from None
    try:
        if sheet is not None and sheet not in book.sheetnames:
            raise ConfigError("sheet-missing", f"The XLSX has no sheet of that name; {_describe_sheets(book.sheetnames)}.")
        page = book[sheet] if sheet is not None else book.worksheets[0]
        _check_extent(page.max_row, page.max_column)
        grid = [[_text(value) for value in line] for line in page.iter_rows(values_only=True)]
        for merged in page.merged_cells.ranges:
            for row in range(merged.min_row - 1, merged.max_row):
                for column in range(merged.min_col - 1, merged.max_col):
                    grid[row][column] = grid[merged.min_row - 1][merged.min_col - 1]
        return grid
    finally:
        book.close()


def _describe_sheets(names: Sequence[str]) -> str:
    """The number of sheets, and the names that are a spreadsheet program's own or usual words."""
    usual = [
        name
        for name in names
        if re.fullmatch(r"(Sheet|Tabelle|Table|Feuil|Hoja|Foglio|Blad) ?\d{0,3}", name) or _is_column_name(name)
    ]
    return f"it has {len(names)} sheet(s)" + (f", among them: {', '.join(usual[:20])}" if usual else "")


def count_uncached(path: Path, sheet: str | None = None) -> int:
    """Cells of an XLSX sheet that are formulas without a stored value: `read_cells` gives them as blank.

    Programs that do not calculate write such cells. Returns 0 for a CSV.
    """
    import openpyxl

    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\3\4":
            return 0
    with zipfile.ZipFile(path) as archive:
        pages = [entry.filename for entry in archive.infolist() if entry.filename.startswith("xl/worksheets/")]
        if not any(re.search(rb"<(\w+:)?f[ />]", archive.read(name)) for name in pages):
            return 0
    with open(path, "rb") as stored, open(path, "rb") as written:
        values, formulas = (openpyxl.load_workbook(file, data_only=only) for file, only in ((stored, True), (written, False)))
        try:
            pages = [sheet if sheet is not None else book.worksheets[0].title for book in (values, formulas)]
            rows = zip(values[pages[0]].iter_rows(), formulas[pages[1]].iter_rows(), strict=False)
            return sum(
                right.data_type == "f" and left.value is None
                for lefts, rights in rows
                for left, right in zip(lefts, rights, strict=False)
            )
        finally:
            values.close()
            formulas.close()


def _check_extent(rows: int, columns: int) -> None:
    if rows > MAX_ROWS or columns > MAX_COLUMNS or rows * columns > MAX_CELLS:
        raise DataError(
            "table-too-large",
            f"The label table has {rows} rows and {columns} columns; at most {MAX_ROWS} and {MAX_COLUMNS}, "
            f"{MAX_CELLS} cells, are read.",
        )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def match_files(items: Sequence[Item], rows: Sequence[Row]) -> Matches:
    """Join rows to image files by relative path, else by the end of the path, by file name, by stem.

    A row that could mean several files by its bare name means none of them: they are `ambiguous`.
    """
    found = Matches()
    levels: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(4)]
    for index, item in enumerate(items):
        for level, key in zip(levels, _file_keys(item.relative), strict=True):
            level[key].append(index)
    claimed: dict[str, set[str]] = defaultdict(set)  # stem without zeros -> the tables' own spellings
    for row in rows:
        claimed[_file_keys(row.key)[3]].add(_file_keys(row.key)[2])
    for row in rows:
        keys = _file_keys(row.key)
        hits: list[int] = []
        for depth, (level, key) in enumerate(zip(levels, keys, strict=True)):
            hits = level.get(key, [])
            hits = _nearest_path(items, hits, keys[0]) if depth else hits
            if depth == 3 and len(claimed[key]) > 1:
                hits = []
            if hits:
                break
        if len(hits) > 1 and len({items[index].relative for index in hits}) > 1:
            found.ambiguous.update(hits)
        elif hits:
            found.restored_zeros += int(_file_keys(items[hits[0]].relative)[2] != keys[2])
            found.used.add(row.number)
            for index in hits:
                found.rows[index].append(row)
    found.ambiguous -= set(found.rows)
    return found


def _file_keys(value: str) -> tuple[str, str, str, str]:
    """Relative path, base name, stem, stem without leading zeros; each in one form of Unicode and one case."""
    text = unicodedata.normalize("NFC", value.strip().replace("\\", "/")).casefold()
    path = PurePosixPath(text.removeprefix("./"))
    stem = re.sub(r"(\.nii\.gz|\.nii|\.png|\.jpe?g|\.tiff?|\.bmp|\.webp|\.dcm|\.dicom|\.ima)$", "", path.name)
    return str(path), path.name, stem, normal_id(stem)


def _nearest_path(items: Sequence[Item], hits: Sequence[int], wanted: str) -> list[int]:
    """Of several files with the wanted name, those that share the longest end of the path with it."""
    if len(hits) < 2 or "/" not in wanted:
        return list(hits)
    folders = PurePosixPath(wanted).parts[:-1][::-1]
    lengths = []
    for index in hits:
        own = PurePosixPath(_file_keys(items[index].relative)[0]).parts[:-1][::-1]
        lengths.append(
            next(
                (depth for depth, (left, right) in enumerate(zip(own, folders, strict=False)) if left != right),
                min(len(own), len(folders)),
            )
        )
    return [index for index, length in zip(hits, lengths, strict=True) if length == max(lengths)]


class IdentifierTable:
    """Rows by the identifier that the images hold: SOP, series, study, patient or accession."""

    def __init__(self, key: str, rows: Sequence[Row]) -> None:
        self.key = key
        self.used: set[int] = set()
        self.restored: set[str] = set()
        self._exact: dict[str, list[Row]] = defaultdict(list)
        self._loose: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            exact = _spelling(row.key)
            if exact:
                self._exact[exact].append(row)
                self._loose[normal_id(row.key)].add(exact)

    def find(self, identifiers: Mapping[str, str]) -> list[Row]:
        """The rows of an image; without leading zeros where only one identifier of the table fits then."""
        exact = _spelling(identifiers.get(self.key, ""))
        if not exact:
            return []
        spellings = self._loose.get(normal_id(exact), set())
        if exact not in self._exact and len(spellings) == 1:
            self.restored.add(exact)
            exact = next(iter(spellings))
        rows = self._exact.get(exact, [])
        self.used.update(row.number for row in rows)
        return rows


def _spelling(value: str) -> str:
    text = " ".join(value.replace("\0", " ").split()).casefold()
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text
