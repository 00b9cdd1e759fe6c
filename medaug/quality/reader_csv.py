"""Tables that a reader exports from a page of medaug: decisions of a review, answers of a reader test."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medaug import storage
from medaug.errors import DataError

MAX_BYTES = 1 << 26
READER = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # the pages ask for the same

__all__ = ["ReaderTable", "read_reader_csv"]


@dataclass(frozen=True)
class ReaderTable:
    """Rows of a CSV by their id, in the file's order, and the sha256 of its bytes."""

    rows: Mapping[str, Mapping[str, str]]
    sha256: str


def read_reader_csv(path: Path, choices: Mapping[str, Sequence[str]], known: Collection[str], what: str) -> ReaderTable:
    """Read a table with the columns id, reader and those of `choices`; others are left out.

    Args:
        path: UTF-8, with or without a byte order mark, comma-separated, one header line.
        choices: column -> the values that it may hold.
        known: ids that exist.
        what: the page that wrote such files, for the messages; they quote no cell, since a wrong file may hold anything.

    Raises:
        DataError: `reader-csv-unreadable`, `reader-csv-not-utf8`, `reader-csv-empty`, `reader-csv-columns`,
            `reader-csv-value`, `reader-csv-name`, `reader-csv-id-unknown`, `reader-csv-id-twice`.
    """
    data = _bytes(path, what)
    columns = ("id", *choices, "reader")
    rows: dict[str, dict[str, str]] = {}
    unknown = []
    for number, row in enumerate(_rows(data, columns, what), start=1):
        for column, allowed in choices.items():
            if row[column] not in allowed:
                text = f"Row {number} has another {column} than {', '.join(allowed)}; correct it, or export the table again."
                raise DataError("reader-csv-value", text)
        if READER.fullmatch(row["reader"]) is None:
            raise DataError(
                "reader-csv-name",
                f"Row {number} needs a reader's pseudonym of 1 to 40 letters, digits, dots, - or _; enter one on the page.",
            )
        if row["id"] not in known:
            unknown.append(number)
        elif row["id"] in rows:
            raise DataError("reader-csv-id-twice", f"Row {number} speaks of image {row['id']} a second time; leave one row in.")
        rows[row["id"]] = row
    if unknown:
        raise DataError(
            "reader-csv-id-unknown",
            f"{len(unknown)} of {len(rows)} row(s), the first of them row {unknown[0]}, name images that are not of this {what}; "
            "give the CSV that was exported from its own page.",
        )
    return ReaderTable(rows, storage.sha256_bytes(data))


def _bytes(path: Path, what: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        text = f"The CSV of the {what} cannot be read ({error.strerror}); name the file that its page exported."
        raise DataError("reader-csv-unreadable", text) from None
    if len(data) > MAX_BYTES:
        raise DataError("reader-csv-unreadable", f"The CSV of the {what} is larger than {MAX_BYTES >> 20} MB, so it is none.")
    return data


def _rows(data: bytes, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """The wanted columns of every row that is not blank, without the blanks around a cell."""
    wanted = ",".join(columns)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("reader-csv-not-utf8", f"The CSV of the {what} is not UTF-8 text; save it as CSV UTF-8.") from None
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error:
        raise DataError("reader-csv-columns", f"The CSV of the {what} is no table with the columns {wanted}.") from None
    table = [[cell.strip() for cell in row] for row in table if any(cell.strip() for cell in row)]
    if len(table) < 2:
        raise DataError("reader-csv-empty", f"The CSV of the {what} has no rows; decide on at least one image and export again.")
    header, *body = table
    missing = [name for name in columns if header.count(name) != 1]
    if missing or any(len(row) != len(header) for row in body):
        got = f"{', '.join(missing)} missing or doubled" if missing else "rows of another length than the header"
        raise DataError("reader-csv-columns", f"The CSV of the {what} needs the columns {wanted}, separated by commas; {got}.")
    return [{name: row[header.index(name)] for name in columns} for row in body]
