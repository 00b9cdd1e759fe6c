"""Joining images with what is known about them: folders, lists, the label table and the header of the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medaug.errors import ConfigError
from medaug.intake.identity import known_patient, normal_id, patient_of
from medaug.intake.labels import IdentifierTable, Matches, Row, match_files, read_rows
from medaug.intake.readers import same_reader
from medaug.intake.records import IntakeOptions, Item, Record
from medaug.intake.scan import SPLIT_NAMES
from medaug.io.dicom_header import secrets_of
from medaug.io.picture import Picture
from medaug.io.stacks import slice_unit

SPLIT_RANK = {"test": 0, "validation": 1, "training": 2, None: 3}
MAPPED = ("patient", "study", "series", "sop", "accession")
IS_POSITION = re.compile(r"(^|[^a-z])z([^a-z]|$)|pos|loc|mm", re.IGNORECASE)
POSITION_TOLERANCE_MM = 0.05


@dataclass(frozen=True, slots=True)
class Known:
    """What the label table may know about the images of one item: all that a process that reads it needs of the table.

    Attributes:
        rows: of its file; where the join is by identifier, every row that could mean one of its images.
        ambiguous: a row of the table could mean this file among others.
    """

    rows: Sequence[Row] = ()
    ambiguous: bool = False


class Table:
    """The label table, joined with the items of a source: which rows each of them needs, and which were used."""

    def __init__(self, options: IntakeOptions, items: Sequence[Item]) -> None:
        self.rows = read_rows(options)
        has_table = options.labels is not None
        self._by_file: Matches | None = match_files(items, self.rows) if has_table and options.key == "file" else None
        self._by_identifier = IdentifierTable(options.key, self.rows) if has_table and options.key != "file" else None
        self._used: set[int] = set(self._by_file.used) if self._by_file and not options.slice_column else set()
        self._restored: set[str] = set()
        unit = slice_unit(row.place for row in self.rows) if options.slice_column else "index"
        self.by_position = unit == "mm" or bool(IS_POSITION.search(options.slice_column or ""))
        if options.conflicts == "senior" and not any(same_reader(row.reader, options.senior) for row in self.rows):
            raise ConfigError("senior-unknown", "The reader given with --senior is not in the reader column; check the spelling.")

    @property
    def restored_zeros(self) -> int:
        """Identifiers that matched only without leading zeros."""
        return (self._by_file.restored_zeros if self._by_file else 0) + len(self._restored)

    def known(self, index: int, item: Item) -> Known:
        """What is known about item `index`."""
        if self._by_file is not None:
            return Known(self._by_file.rows.get(index, ()), index in self._by_file.ambiguous)
        if self._by_identifier is None:
            return Known()
        keys = dict.fromkeys(member.key for member in item.members or (item,))
        rows = {row.number: row for key in keys for row in self._by_identifier.near(key)}
        return Known(tuple(rows.values()))

    def add_seen(self, used: set[int], restored: set[str]) -> None:
        """Take over which rows were used and which identifiers matched without leading zeros."""
        self._used |= used
        self._restored |= restored

    def unused(self) -> list[int]:
        """Numbers of the rows that found no image, as far as images were read."""
        return [row.number for row in self.rows if row.number not in self._used]


class Joiner:
    """Says for the images of one item what folders, lists and the label table know about them.

    Args:
        by_position: see `Table`.

    Attributes:
        used: numbers of the rows that found an image; by file this is known before.
    """

    def __init__(self, options: IntakeOptions, item: Item, known: Known, by_position: bool) -> None:
        self.used: set[int] = set()
        self._item, self._known = item, known
        self._has_table = options.labels is not None
        self._table = IdentifierTable(options.key, known.rows) if self._has_table and options.key != "file" else None
        self._wants_split = options.split_column is not None
        self._slices = options.slices if options.slice_column else ""
        self._by_position = by_position
        self._maps = options.mapping is not None

    @property
    def restored(self) -> set[str]:
        """Identifiers that matched only without leading zeros."""
        return self._table.restored if self._table else set()

    @property
    def is_ambiguous(self) -> bool:
        """True if a row of the table could mean this file among others."""
        return self._known.ambiguous

    def file_rows(self) -> Sequence[Row]:
        """The rows that are known before the file is read."""
        return () if self._table else self._known.rows

    def rows(self, identifiers: Mapping[str, str]) -> Sequence[Row]:
        """The rows of the label table for an image."""
        rows = self._known.rows if self._table is None else self._table.find(identifiers)
        if self._table is not None and not self._slices:
            self.used.update(row.number for row in rows)
        return rows

    def is_chosen(self, picture: Picture) -> bool:
        """False for a slice of a volume that the table knows but does not choose."""
        if self._slices != "table":
            return True
        rows = self.rows(picture.identifiers)
        return not rows or bool(self._of_slice(rows, picture))

    def _of_slice(self, rows: Sequence[Row], picture: Picture) -> Sequence[Row]:
        """The rows that mean the slice (or no slice in particular)."""
        if not self._slices:
            return rows
        kept = [row for row in rows if not row.place or _is_place(row.place, picture.acquisition, self._by_position)]
        self.used.update(row.number for row in kept)
        return kept

    def record(self, picture: Picture, inner_split: str | None, inner_label: str | None) -> Record:
        """A record with all that is known about the picture before its pixels are looked at."""
        item = self._item
        rows = self._of_slice(self.rows(picture.identifiers), picture)
        own = item.label if inner_label is None else inner_label
        labels = [row.label for row in rows] if self._has_table else [own or ""]
        patients = [row.patient for row in rows] or [item.patient]
        # What a table leaves blank, the file may know.
        patients = patients if any(known_patient(value) for value in patients) else [_patient(picture.identifiers)]
        votes = tuple((row.number, row.reader, row.label.strip()) for row in rows if row.label.strip())
        groups = [row.group for row in rows] if self._has_table else [item.group]
        return Record(
            item=item,
            source=picture.source,
            labels=tuple(sorted({label.strip() for label in labels if label.strip()})),
            split=self._split(rows, item.split if inner_split is None else inner_split),
            group_keys=_group_keys(patients, groups),
            secrets=tuple(sorted(value for value in {*patients, *secrets_of(picture.identifiers)} if known_patient(value))),
            position=_position(item, picture),
            volume=_volume(item, picture),
            modality=picture.modality,
            acquisition=dict(picture.acquisition),
            votes=votes if len(votes) > 1 else (),
            identities=self._identities(patients, picture) if self._maps else (),
        )

    def _identities(self, patients: Sequence[str], picture: Picture) -> tuple[tuple[str, str], ...]:
        known = {("patient", value.strip()) for value in patients if known_patient(value)}
        return tuple(sorted(known | {(kind, picture.identifiers[kind]) for kind in MAPPED[1:] if picture.identifiers.get(kind)}))

    def _split(self, rows: Sequence[Row], own: str | None) -> str | None:
        if not self._wants_split:
            return own
        named = [SPLIT_NAMES.get(row.split.casefold()) for row in rows]
        return min(named, key=lambda name: SPLIT_RANK[name], default=None)


def _patient(identifiers: Mapping[str, str]) -> str:
    """The patient's identifier; where it is blank, the name with the birth date."""
    return patient_of(*(identifiers.get(key, "") for key in ("patient", "patient_name", "birth_date")))


def _group_keys(patients: Sequence[str], groups: Sequence[str]) -> tuple[tuple[str, str], ...]:
    known = sorted({known_patient(value) for value in patients} - {""})
    if known:
        return tuple(("patient", value) for value in known)
    return tuple(("column", value) for value in sorted({normal_id(value) for value in groups} - {""}))


def _is_place(text: str, facts: Mapping[str, Any], by_position: bool) -> bool:
    """True if a table's slice index (0-based), or position along z in mm, is that of an image with these facts."""
    try:
        wanted = float(text.replace(",", "."))
    except ValueError:
        return False
    if not by_position:
        return facts.get("slice_index", facts["frame"] - 1 if "frame" in facts else None) == int(wanted)
    position = facts.get("position_mm")
    return position is not None and math.isclose(float(position[2]), wanted, abs_tol=POSITION_TOLERANCE_MM)


def _position(item: Item, picture: Picture) -> str:
    """Where in its file an image lies, for its name; "" if the file holds one image."""
    if item.kind == "nifti" and "slice_index" in picture.acquisition:
        return f"_z{int(picture.acquisition['slice_index']):03d}"
    if item.kind == "dicom" and "frame" in picture.acquisition:
        return f"_f{int(picture.acquisition['frame']):03d}"
    return ""


def _volume(item: Item, picture: Picture) -> str | None:
    """Key of what certainly is of one patient: a NIfTI file, a DICOM study."""
    if item.kind == "nifti":
        return f"file {picture.source}"
    study = normal_id(picture.identifiers.get("study", "")) or normal_id(picture.identifiers.get("series", ""))
    return f"study {study}" if study else None
