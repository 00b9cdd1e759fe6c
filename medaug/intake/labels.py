"""Label tables as hospitals write them, and which row belongs to which image."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from medaug.errors import ConfigError, DataError
from medaug.intake.records import IntakeOptions, Item, normal_id
from medaug.intake.tables import USUAL_NAMES, is_column_name, iterate_cells


@dataclass(frozen=True, slots=True)
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
    cells = iterate_cells(options.labels, options.sheet)
    header = [text.strip() for text in next(cells)]
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
    for number, line in enumerate(cells, start=1):
        others = (sys.intern(_cell(line, column)) for column in (label, group, patient, split, reader, place))
        row = Row(number, _cell(line, key), *others)
        if row.key or row.label:
            rows.append(row)
    if not rows:
        raise DataError("table-empty", "The label table has a header but no row with a key and a label.")
    return rows


def _cell(line: Sequence[str], column: int | None) -> str:
    return line[column].strip() if column is not None and column < len(line) else ""


def _column(header: Sequence[str], wanted: str | None, usual: str | None, what: str) -> int | None:
    """Index of a column: by its name, else the only one with a usual name, of which two of the same are refused."""
    if wanted is not None:
        hits = [index for index, name in enumerate(header) if name == wanted.strip()]
        hits = hits or [index for index, name in enumerate(header) if name.casefold() == wanted.strip().casefold()]
        if len(hits) != 1:
            found = f"there {len(hits)} times (write it exactly, or give each a name of its own)" if hits else "not there"
            raise ConfigError(
                "column-missing",
                f"The {what} column that was asked for is {found} in the label table. {describe_columns(header)}",
            )
        return hits[0]
    plain = [re.sub(r"[^a-z]", "", name.casefold()) for name in header]
    for name in USUAL_NAMES[usual] if usual else ():
        hits = [index for index, found in enumerate(plain) if found == name]
        if len(hits) == 1:
            return hits[0]
        if hits and len({re.sub(r"[^a-z0-9]", "", header[index].casefold()) for index in hits}) == 1:  # not label_1 and label_2
            same = len({header[index] for index in hits}) == 1
            way_out = "give each a name of its own" if same else f"name one of them with --{what}-column, or rename one"
            raise ConfigError(
                "column-missing",
                f"{len(hits)} columns of the label table are called the same and could be the {what}; {way_out}. {describe_columns(header)}",
            )
    return None


def describe_columns(header: Sequence[str]) -> str:
    """How many columns the first row of a table has, and those with plain names; without a header it holds a patient.

    A name is repeated only if its words are usual ones for columns of label tables.
    """
    plain = [name for name in header if is_column_name(name)]
    text = f"Its first row has {len(header)} column(s)"
    text += f", among them: {', '.join(plain[:30])}{' ...' if len(plain) > 30 else ''}." if plain else "."
    if not plain and any(any(letter.isdigit() for letter in name) for name in header):
        text += " It looks like data: put a row with the names of the columns above it."
    return text


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
    """Rows by the identifier that the images hold: SOP, series, study, patient or accession.

    Made of the whole table once, and of a few rows (`near`) wherever a file is read.
    """

    def __init__(self, key: str, rows: Sequence[Row]) -> None:
        self.key = key
        self.restored: set[str] = set()
        self._exact: dict[str, list[Row]] = {}
        self._loose: dict[str, tuple[str, ...]] = {}  # without leading zeros -> spellings with them
        for row in rows:
            exact = _spelling(row.key)
            if not exact:
                continue
            exact = row.key if exact == row.key else exact  # one text instead of two equal ones
            normal = normal_id(row.key)
            if normal != exact and exact not in self._exact:
                self._loose[normal] = (*self._loose.get(normal, ()), exact)
            self._exact.setdefault(exact, []).append(row)

    def _spellings(self, exact: str) -> list[str]:
        """How the table writes an identifier, with leading zeros or without."""
        normal = normal_id(exact)
        return [spelling for spelling in (normal, *self._loose.get(normal, ())) if spelling in self._exact]

    def near(self, value: str) -> tuple[Row, ...]:
        """All rows that `find` could mean by an identifier."""
        exact = _spelling(value)
        return tuple(row for spelling in self._spellings(exact) for row in self._exact[spelling]) if exact else ()

    def find(self, identifiers: Mapping[str, str]) -> list[Row]:
        """The rows of an image; without leading zeros where only one identifier of the table fits then."""
        exact = _spelling(identifiers.get(self.key, ""))
        if not exact:
            return []
        spellings = self._spellings(exact)
        if exact not in self._exact and len(spellings) == 1:
            self.restored.add(exact)
            exact = spellings[0]
        return self._exact.get(exact, [])


def _spelling(value: str) -> str:
    text = " ".join(value.replace("\0", " ").split()).casefold()
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text
