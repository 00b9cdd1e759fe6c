"""Reading every image once: joined with its label, prepared, written, and reduced to what has to be remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medaug.errors import DataError
from medaug.intake import duplicates
from medaug.intake.labels import IdentifierTable, Matches, Row, match_files, read_rows
from medaug.intake.records import IntakeOptions, Item, Record, known_patient, normal_id, quarantine_name
from medaug.intake.scan import SPLIT_NAMES, Scan, read_pictures
from medaug.io import raster
from medaug.io.picture import Picture
from medaug.transforms import prepare

SPLIT_RANK = {"test": 0, "validation": 1, "training": 2, None: 3}
IDENTIFYING = ("patient", "patient_name", "accession", "birth_date")


@dataclass
class Quarantine:
    """What is left out, and why."""

    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, file: str, code: str, reason: str) -> None:
        """One row; `file` must be a public name."""
        self.rows.append({"file": file, "code": code, "reason": reason})

    def by_code(self) -> dict[str, int]:
        """Rows per code, sorted by code."""
        codes = [row["code"] for row in self.rows]
        return {code: codes.count(code) for code in sorted(set(codes))}

    def sorted(self) -> list[dict[str, str]]:
        """The rows in an order that does not depend on the order of the files."""
        return sorted(self.rows, key=lambda row: (row["code"], row["file"], row["reason"]))


class Joiner:
    """Says for every image what folders, lists and the label table know about it."""

    def __init__(self, options: IntakeOptions, items: Sequence[Item]) -> None:
        self.rows = read_rows(options)
        self._has_table = options.labels is not None
        self._by_file: Matches | None = match_files(items, self.rows) if self._has_table and options.key == "file" else None
        self._by_identifier = IdentifierTable(options.key, self.rows) if self._has_table and options.key != "file" else None
        self._wants_split = options.split_column is not None

    @property
    def restored_zeros(self) -> int:
        """Identifiers that matched only without leading zeros."""
        return (self._by_file.restored_zeros if self._by_file else 0) + (
            len(self._by_identifier.restored) if self._by_identifier else 0
        )

    def is_ambiguous(self, index: int) -> bool:
        """True if a row of the table could mean this file among others."""
        return self._by_file is not None and index in self._by_file.ambiguous

    def table_rows(self, index: int, identifiers: Mapping[str, str]) -> list[Row]:
        """The rows of the label table for an image of item `index`."""
        if self._by_file is not None:
            return self._by_file.rows.get(index, [])
        return self._by_identifier.find(identifiers) if self._by_identifier else []

    def unused(self) -> list[Row]:
        """Rows that found no image."""
        used = (self._by_file.used if self._by_file else set()) | (self._by_identifier.used if self._by_identifier else set())
        return [row for row in self.rows if row.number not in used]

    def record(self, index: int, item: Item, picture: Picture, inner_split: str | None, inner_label: str | None) -> Record:
        """A record with all that is known about the picture before its pixels are looked at."""
        rows = self.table_rows(index, picture.identifiers)
        own = item.label if inner_label is None else inner_label
        labels = [row.label for row in rows] if self._has_table else [own or ""]
        patients = [row.patient for row in rows] or [item.patient]
        # What a table leaves blank, the file may know.
        patients = patients if any(known_patient(value) for value in patients) else [picture.identifiers.get("patient", "")]
        groups = [row.group for row in rows] if self._has_table else [item.group]
        return Record(
            item=item,
            source=picture.source,
            labels=tuple(sorted({label.strip() for label in labels if label.strip()})),
            split=self._split(rows, item.split if inner_split is None else inner_split),
            group_keys=_group_keys(patients, groups),
            secrets=tuple(
                value for value in {*patients, *(picture.identifiers.get(key, "") for key in IDENTIFYING)} if known_patient(value)
            ),
            position=_position(item, picture),
            volume=_volume(item, picture),
            modality=picture.modality,
            acquisition=dict(picture.acquisition),
        )

    def _split(self, rows: Sequence[Row], own: str | None) -> str | None:
        if not self._wants_split:
            return own
        named = [SPLIT_NAMES.get(row.split.casefold()) for row in rows]
        return min(named, key=lambda name: SPLIT_RANK[name], default=None)


def _group_keys(patients: Sequence[str], groups: Sequence[str]) -> tuple[tuple[str, str], ...]:
    known = sorted({known_patient(value) for value in patients} - {""})
    if known:
        return tuple(("patient", value) for value in known)
    return tuple(("column", value) for value in sorted({normal_id(value) for value in groups} - {""}))


def _position(item: Item, picture: Picture) -> str:
    """Where in its file an image lies, for its name; "" if the file holds one image."""
    if item.kind == "nifti" and "slice_index" in picture.acquisition:
        return f"_z{int(picture.acquisition['slice_index']):03d}"
    return ""


def _volume(item: Item, picture: Picture) -> str | None:
    """Key of what certainly is of one patient: a NIfTI file, a DICOM study."""
    if item.kind == "nifti":
        return f"file {picture.source}"
    study = normal_id(picture.identifiers.get("study", "")) or normal_id(picture.identifiers.get("series", ""))
    return f"study {study}" if study else None


def read_records(
    found: Scan, options: IntakeOptions, folder: Path | None, quarantine: Quarantine, advance: Callable[[int], None]
) -> tuple[list[Record], Joiner]:
    """Read all images, write those with a label to ``folder/images`` (None writes nothing), keep thumbnails.

    Faults of single files go to the quarantine, and so do images without label and labels without image.
    """
    joiner = Joiner(options, found.items)
    records: list[Record] = []
    taken: dict[str, tuple[str, str]] = {}
    for index, item in enumerate(found.items):
        try:
            for number, (picture, split, label) in enumerate(read_pictures(item)):
                record = joiner.record(index, item, picture, split, label)
                if item.kind == "npz":
                    record.position = f"#{number}"
                if not record.labels:
                    _leave_out_unlabelled(record, joiner.is_ambiguous(index), quarantine)
                    continue
                if _prepare(record, picture, options, folder, taken, quarantine):
                    records.append(record)
        except DataError as error:
            known = [row.patient for row in joiner.table_rows(index, {})]  # the table may tell that the name is a patient's
            quarantine.add(quarantine_name(item, known), error.code, error.message)
        advance(1)
    for row in joiner.unused():
        quarantine.add(
            f"table row {row.number}", "label-without-image", "No image of the source belongs to this row of the label table."
        )
    return records, joiner


def _leave_out_unlabelled(record: Record, ambiguous: bool, quarantine: Quarantine) -> None:
    reason = "Neither a folder, a list nor the label table gives this image a label."
    if ambiguous:
        reason = "The label table names a file that fits several images; write the path with its folders."
    quarantine.add(record.quarantine_name, "image-without-label", reason)


def _prepare(
    record: Record,
    picture: Picture,
    options: IntakeOptions,
    folder: Path | None,
    taken: dict[str, tuple[str, str]],
    quarantine: Quarantine,
) -> bool:
    """Scale, write and summarise one picture; False if it cannot be used."""
    try:
        unit, record.intensity = prepare.to_unit(picture, options.window)
        unit, geometry = prepare.square(unit, options.image_size)
    except DataError as error:
        quarantine.add(record.quarantine_name, error.code, error.message)
        return False
    record.acquisition["original_size"] = geometry["original_size"]
    record.acquisition["padding"] = geometry["padding"]
    record.is_colour = unit.ndim == 3
    record.is_blank = bool(unit.min() == unit.max())
    record.pixels = duplicates.pixel_sha256(unit)
    record.thumbnail = duplicates.thumbnail(unit)
    record.case_id = _case_id(record, taken)
    if folder is not None and not (folder / image_path(record)).exists():
        raster.write_unit_png(folder / image_path(record), unit)
    return True


def image_path(record: Record) -> str:
    """Path of a case's image inside the cohort."""
    return f"images/{record.case_id}.png"


def _case_id(record: Record, taken: dict[str, tuple[str, str]]) -> str:
    """First 12 hex digits of the source's sha256, with the slice; copies of one file share an id, and one of them stays."""
    own = (record.source, "" if record.item.kind == "npz" else record.position)
    base = record.source[:12] + own[1]
    name, number = base, 0
    while taken.setdefault(name, own) != own:
        number += 1
        name = f"{base}_{number:03d}"
    return name
