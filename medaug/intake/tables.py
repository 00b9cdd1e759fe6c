"""Cells of CSV and XLSX tables, row by row: a table is never in memory as a whole, and what it asks for is counted first."""

from __future__ import annotations

import codecs
import csv
import re
import zipfile
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from medaug.errors import ConfigError, DataError

MAX_TABLE_BYTES = 1 << 26
MAX_INFLATED_BYTES = 1 << 28
MAX_ROWS = 1_000_000
MAX_COLUMNS = 2_000
MAX_CELLS = 20_000_000
MAX_XLSX_CELLS = 1_000_000  # of all sheets; openpyxl takes some 10 seconds for so many
MAX_TAGS = 8_000_000  # of XML in one member of an XLSX; a cell takes four to six
MAX_LINE = 1 << 23  # characters of a CSV
MAX_MEMBERS = 10_000
CHUNK = 1 << 20
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

_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^<>]*?ref="([A-Z]{1,3})([0-9]{1,7}):([A-Z]{1,3})([0-9]{1,7})"')
_CELL = re.compile(rb"<(?:\w+:)?c[\s/>]")
_FORMULA = re.compile(rb"<(?:\w+:)?f[\s/>]")
_BEFORE = 256  # bytes of a chunk that are looked at again with the next one

Merge = tuple[int, int, int, int]  # first row, first column, last row, last column, from 1


def is_column_name(name: str) -> bool:
    """True for a name whose words are usual ones for columns of label tables."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold())
    return (
        name.isascii()
        and not re.search(r"[^A-Za-z _.()/-]", name)
        and bool(words)
        and all(word in COLUMN_WORDS for word in words)
    )


def read_cells(path: Path, sheet: str | None = None) -> list[list[str]]:
    """All rows of `iterate_cells` as a list, for small tables."""
    return list(iterate_cells(path, sheet))


def iterate_cells(path: Path, sheet: str | None = None) -> Iterator[list[str]]:
    """The rows of a CSV or XLSX table as text, header first, without empty ones; content decides which of the two it is.

    Raises:
        ConfigError: `sheet-missing`.  DataError: `table-unreadable`, `table-too-large`, `table-empty`.
    """
    size = path.stat().st_size
    if size > MAX_TABLE_BYTES:
        raise DataError(
            "table-too-large", f"The label table has {size} bytes, at most {MAX_TABLE_BYTES} are read; cut it down to the images."
        )
    number = 0
    with closing(_xlsx_rows(path, sheet) if _is_zip(path) else _csv_rows(path)) as rows:
        for line in rows:
            if any(text.strip() for text in line):
                number += 1
                yield line
    if not number:
        raise DataError("table-empty", "The label table holds no row.")


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\3\4"


def _csv_rows(path: Path) -> Generator[list[str], None, None]:
    number = 0
    with open(path, encoding=_encoding(path), newline="") as stream:
        lines = _Lines(stream)
        try:
            for line in csv.reader(lines, delimiter=lines.delimiter):
                lines.fields = 0
                number += 1
                _check_extent(number, len(line))
                yield line
        except csv.Error as error:
            raise DataError(
                "table-unreadable", f"The label table is no readable CSV (row {number + 1}); save it again as CSV UTF-8."
            ) from error


class _Lines:
    """Lines for `csv.reader`, which puts no cap on the fields of a row.

    Attributes:
        delimiter: what separates the fields of the first line.
        fields: delimiters since it was set to 0.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.fields = 0
        self._first = self._line()
        while self._first and not self._first.strip("\r\n"):
            self._first = self._line()
        if self._first.lower().startswith("sep=") and len(self._first.strip()) == 5:  # Excel's own hint
            self.delimiter = self._first.strip()[4]
            self._first = self._line()
        else:
            self.delimiter = max(",;\t|", key=re.sub(r'"[^"]*"', "", self._first).count)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, self._first = self._first or self._line(), ""
        if not line:
            raise StopIteration
        self.fields += line.count(self.delimiter)
        if self.fields > 10 * MAX_COLUMNS:  # some may be inside of quotes
            _check_extent(1, self.fields)
        return line

    def _line(self) -> str:
        line = self._stream.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise DataError("table-too-large", f"The label table has a line of {MAX_LINE} characters or more; cut it down.")
        return line


def _encoding(path: Path) -> str:
    """The first encoding in which the whole file can be read."""
    with open(path, "rb") as stream:
        start = stream.read(2)
    for encoding in ("utf-16",) if start in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            with open(path, "rb") as stream:
                texts = (decoder.decode(piece, final=not piece) for piece in _pieces(stream))
                if not any("\0" in text for text in texts):
                    return encoding
        except UnicodeDecodeError:
            continue
    raise DataError(
        "table-unreadable", "The label table is neither text (UTF-8, UTF-16, Windows-1252) nor XLSX; save it again as CSV UTF-8."
    )


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Chunks, and an empty one at the end."""
    while piece := stream.read(CHUNK):
        yield piece
    yield b""


def _xlsx_rows(path: Path, sheet: str | None) -> Generator[list[str], None, None]:
    merges, _ = _checked(path)
    try:
        with _Book(path, data_only=True) as book:
            page = book.page(sheet)
            yield from _with_merged(page.iter_rows(values_only=True), merges.get(page._worksheet_path, []))
    except (DataError, ConfigError):
        raise
    except Exception as error:  # noqa: BLE001 - openpyxl raises anything on arbitrary bytes
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> DataError:
    return DataError("table-unreadable", f"The XLSX cannot be read ({type(error).__name__}); save it again or as CSV UTF-8.")


class _Book:
    """An XLSX whose rows are read one at a time."""

    def __init__(self, path: Path, *, data_only: bool) -> None:
        import openpyxl

        self._stream = open(path, "rb")  # noqa: SIM115 - closed in __exit__; a path would be refused for its extension
        try:
            self._book = openpyxl.load_workbook(self._stream, read_only=True, data_only=data_only)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> _Book:
        return self

    def __exit__(self, *_: object) -> None:
        self._book.close()
        self._stream.close()

    def page(self, sheet: str | None) -> Any:
        """A worksheet by name, or the first one."""
        pages = {page.title: page for page in self._book.worksheets}
        if sheet is not None and sheet not in pages:
            raise ConfigError("sheet-missing", f"The XLSX has no sheet of that name; {_describe_sheets(list(pages))}.")
        page: Any = pages[sheet] if sheet is not None else self._book.worksheets[0]
        page.reset_dimensions()  # what the sheet says of its size is not believed
        return page


def _with_merged(rows: Iterator[Sequence[Any]], merges: Sequence[Merge]) -> Iterator[list[str]]:
    """Rows of text in which every cell of a merged range has the value of its first one."""
    waiting = sorted(merges, reverse=True)
    active: list[tuple[Merge, str]] = []
    for number, values in enumerate(rows, start=1):
        width = max((place for place, value in enumerate(values, start=1) if value is not None), default=0)
        line = [_text(value) for value in values[:width]]
        active = [(merge, text) for merge, text in active if merge[2] >= number]
        while waiting and waiting[-1][0] <= number:
            merge = waiting.pop()
            active.append((merge, line[merge[1] - 1] if merge[1] <= len(line) else ""))
        for (_, left, _, right), text in active:
            line += [""] * (right - len(line))
            line[left - 1 : right] = [text] * (right - left + 1)
        _check_extent(number, len(line))
        yield line


def _checked(path: Path) -> tuple[dict[str, list[Merge]], bool]:
    """Count what an XLSX asks for by a scan of its bytes, before anything is parsed.

    Returns:
        The merged ranges of each sheet by its place in the archive, and whether there are formulas.

    Raises:
        DataError: `table-too-large`, or `table-unreadable` for a broken archive and for XML with a DTD.
    """
    merges: dict[str, list[Merge]] = defaultdict(list)
    cells, has_formulas = 0, False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            inflated = sum(entry.file_size for entry in entries)
            if inflated > MAX_INFLATED_BYTES or len(entries) > MAX_MEMBERS:
                raise DataError(
                    "table-too-large",
                    f"The XLSX unpacks to {inflated} bytes, at most {MAX_INFLATED_BYTES} are read; save the rows needed as CSV.",
                )
            for entry in entries:
                tags = 0
                with archive.open(entry) as stream:  # which ends at the declared size
                    for part in _overlapping(stream):
                        if b"<!DOCTYPE" in part or b"<!ENTITY" in part:
                            raise DataError("table-unreadable", "The XLSX holds XML with a DTD; save it again or as CSV UTF-8.")
                        tags += part.count(b"<")
                        cells += len(_CELL.findall(part))
                        has_formulas = has_formulas or _FORMULA.search(part) is not None
                        merges[entry.filename] += map(_merge, _MERGED.findall(part))
                merges[entry.filename] = sorted(set(merges[entry.filename]))
                cells += sum((last - row + 1) * (right - left + 1) for row, left, last, right in merges[entry.filename])
                if cells > MAX_XLSX_CELLS or tags > MAX_TAGS:
                    raise DataError(
                        "table-too-large",
                        f"The XLSX has more than {MAX_XLSX_CELLS} cells, merged ones included; save the columns needed as CSV.",
                    )
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises anything on arbitrary bytes
        raise _unreadable(error) from None
    return merges, has_formulas


def _overlapping(stream: IO[bytes]) -> Iterator[bytes]:
    """Chunks without zero bytes, so that UTF-16 reads like ASCII; each begins with a tag that the one before may have cut."""
    before = b""
    for piece in _pieces(stream):
        part = before + piece.replace(b"\0", b"")
        cut = part.rfind(b"<", max(0, len(part) - _BEFORE)) if piece else -1
        before = part[cut:] if cut >= 0 else b""
        yield part[:cut] if cut >= 0 else part


def _merge(found: tuple[bytes, bytes, bytes, bytes]) -> Merge:
    from openpyxl.utils import column_index_from_string

    left, right = (column_index_from_string(name.decode()) for name in (found[0], found[2]))
    first, last = int(found[1]), int(found[3])
    return max(1, min(first, last)), min(left, right), max(first, last), max(left, right)


def _describe_sheets(names: Sequence[str]) -> str:
    """The number of sheets, and the names that are a spreadsheet program's own or usual words."""
    usual = [
        name
        for name in names
        if re.fullmatch(r"(Sheet|Tabelle|Table|Feuil|Hoja|Foglio|Blad) ?\d{0,3}", name) or is_column_name(name)
    ]
    return f"it has {len(names)} sheet(s)" + (f", among them: {', '.join(usual[:20])}" if usual else "")


def count_uncached(path: Path, sheet: str | None = None) -> int:
    """Cells of an XLSX sheet that are formulas without a stored value: `read_cells` gives them as blank.

    Programs that do not calculate write such cells. Returns 0 for a CSV.
    """
    if not _is_zip(path) or not _checked(path)[1]:
        return 0
    with _Book(path, data_only=True) as values, _Book(path, data_only=False) as formulas:
        rows = zip(values.page(sheet).iter_rows(), formulas.page(sheet).iter_rows(), strict=False)
        return sum(
            right.data_type == "f" and left.value is None
            for lefts, rights in rows
            for left, right in zip(lefts, rights, strict=False)
        )


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
