"""Reading every image once: joined with its label, prepared, written, and reduced to what has to be remembered."""

from __future__ import annotations

import contextlib
import heapq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.errors import DataError
from medaug.intake import burned_in, duplicates, volumes
from medaug.intake.join import Joiner, Known
from medaug.intake.records import IntakeOptions, Item, Record, quarantine_name
from medaug.intake.scan import read_pictures
from medaug.io import dicom, raster
from medaug.io.picture import Picture
from medaug.transforms import prepare

SHOWN = 48  # suspects with a picture in the report
SEARCHED = ("dicom", "raster")


@dataclass
class Quarantine:
    """What is left out, and why."""

    rows: list[dict[str, str]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict, repr=False)  # what a row calls a file -> its path; never published

    def add(self, file: str, code: str, reason: str, place: str = "") -> None:
        """One row; `file` must be a public name, `place` is the path inside the source, for the mapping table."""
        self.rows.append({"file": file, "code": code, "reason": reason})
        if place:
            self.places[file] = place

    def leave_out(self, record: Record, code: str, reason: str) -> None:
        """One row for a record."""
        self.add(record.quarantine_name, code, reason, record.item.relative)

    def by_code(self) -> dict[str, int]:
        """Rows per code, sorted by code."""
        codes = [row["code"] for row in self.rows]
        return {code: codes.count(code) for code in sorted(set(codes))}

    def sorted(self) -> list[dict[str, str]]:
        """The rows in an order that does not depend on the order of the files."""
        return sorted(self.rows, key=lambda row: (row["code"], row["file"], row["reason"]))


@dataclass
class Suspect:
    """One picture that may hold text: for the report. The thumbnail shows none of it, see `burned_in.thumbnail`."""

    place: tuple[str, str]  # source and position, which sort alike in every run
    name: str
    reasons: tuple[str, ...]
    boxes: int
    action: str  # "quarantine", "mask" or "keep"
    thumbnail: np.ndarray | None


@dataclass
class Suspects:
    """Counts of all suspects, and the first few of them by content with their thumbnails."""

    searched: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)
    by_action: dict[str, int] = field(default_factory=dict)
    shown: list[Suspect] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)  # sha256 of the files

    def add(self, found: Suspect) -> None:
        """Count one; keep its picture if it is among the first."""
        for reason in found.reasons:
            self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        self.by_action[found.action] = self.by_action.get(found.action, 0) + 1
        if found.action == "quarantine":
            self.left_out.add(found.place[0])
        self.shown = heapq.nsmallest(SHOWN, [*self.shown, found], key=lambda suspect: suspect.place)

    def content(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "searched": self.searched,
            "suspected": sum(self.by_action.values()),
            "reasons": dict(sorted(self.by_reason.items())),
            "actions": dict(sorted(self.by_action.items())),
        }


@dataclass
class Done:
    """What became of one item."""

    records: list[Record] = field(default_factory=list)
    quarantine: Quarantine = field(default_factory=Quarantine)
    suspects: list[Suspect] = field(default_factory=list)
    searched: int = 0
    not_chosen: int = 0
    used: set[int] = field(default_factory=set)
    restored: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Reader:
    """Reads items; each process has one.

    Attributes:
        by_position: see `join.Table`.
        folder: where images are written; None writes nothing.
    """

    options: IntakeOptions
    by_position: bool
    folder: Path | None

    def read(self, index: int, item: Item, known: Known) -> Done:
        """Read all pictures of an item; a fault of its file becomes a row of the quarantine."""
        done = Done()
        joiner = Joiner(self.options, item, known, self.by_position)
        try:
            if self.options.dimensions == 3:
                self._take_volume(done, joiner, index, item)
            else:
                for number, (picture, split, label) in enumerate(read_pictures(item, self.options.strict)):
                    self._take(done, joiner, f"{index:07d}_{number:05d}", number, picture, split, label)
        except DataError as error:
            done.quarantine.add(quarantine_name(item, _secrets(joiner, item)), error.code, error.message, item.relative)
        except MemoryError:
            reason = "The image does not fit into the memory that is left."
            done.quarantine.add(quarantine_name(item, _secrets(joiner, item)), "image-too-large", reason, item.relative)
        done.used, done.restored = joiner.used, joiner.restored
        return done

    def window_of(self, picture: Picture) -> tuple[float, float] | None:
        """The stored values that become 0 and 1, see `prepare.to_unit`."""
        return self.options.window

    def _take(
        self, done: Done, joiner: Joiner, name: str, number: int, picture: Picture, split: str | None, label: str | None
    ) -> None:
        if not joiner.is_chosen(picture):
            done.not_chosen += 1
            return
        record = joiner.record(picture, split, label)
        record.frame = int(picture.acquisition.get("frame", 1)) - 1
        if record.item.kind == "npz":
            record.position = f"#{number}"
        if not record.labels:
            _leave_out_unlabelled(record, joiner.is_ambiguous, done.quarantine)
            return
        checked = self._without_text(done, record, picture)
        if checked is not None and _prepare(record, checked, self.options.image_size, self.window_of(checked), done.quarantine):
            if self.folder is not None and record.unit_image is not None:
                record.staged = f".{name}.png"
                storage.write_staged(self.folder / "images" / record.staged, raster.encode_unit_png(record.unit_image))
            record.unit_image = None
            done.records.append(record)

    def _take_volume(self, done: Done, joiner: Joiner, index: int, item: Item) -> None:
        picture, affine = volumes.read_item(item, self.options)
        record = joiner.record(picture, None, None)
        record.position, record.suffix = "", ".nii.gz"
        if not record.labels:
            _leave_out_unlabelled(record, joiner.is_ambiguous, done.quarantine)
            return
        done.searched += 1
        if item.kind == "dicom" and self.options.burned_in != "keep":
            for plane in picture.pixels:
                found = burned_in.suspect(plane, item.declared or {})
                if found is not None:  # a volume is not masked: text in a slice means that it is no scan
                    small = burned_in.thumbnail(plane, found.boxes) if found.boxes else None
                    name, place = record.quarantine_name, (record.source, "")
                    done.suspects.append(Suspect(place, name, found.reasons, len(found.boxes), "quarantine", small))
                    done.quarantine.add(name, "burned-in-text", burned_in.explain(found, "quarantine"), item.relative)
                    return
            record.burned_in = "not found"
        try:
            unit, record.intensity = prepare.to_unit(picture, self.options.window, overwrite=True)
        except DataError as error:
            done.quarantine.leave_out(record, error.code, error.message)
            return
        record.acquisition = {**record.acquisition, "original_size": list(unit.shape)} | _text_fact(record)
        record.is_blank = bool(unit.min() == unit.max())
        record.pixels = bytes.fromhex(duplicates.pixel_sha256(unit))
        record.thumbnail = duplicates.thumbnail(prepare.square(unit[len(unit) // 2], 64)[0])
        if self.folder is not None:
            record.staged = f".{index:07d}.nii.gz"
            volumes.write(self.folder / "images" / record.staged, unit, affine)
        done.records.append(record)

    def _without_text(self, done: Done, record: Record, picture: Picture) -> Picture | None:
        """The picture after the policy for burned-in text; None if it is left out."""
        item = record.item
        if item.kind not in SEARCHED:
            return picture
        done.searched += 1
        found = burned_in.suspect(picture.pixels, item.declared or {})
        if found is None:
            record.burned_in = "not found"
            return picture
        action = self.options.burned_in
        if action == "mask" and not found.boxes:
            action = "quarantine"  # nothing says where the text is
        name = record.quarantine_name
        small = burned_in.thumbnail(picture.pixels, found.boxes) if found.boxes else None
        done.suspects.append(Suspect((record.source, record.position), name, found.reasons, len(found.boxes), action, small))
        if action == "quarantine":
            done.quarantine.add(name, "burned-in-text", burned_in.explain(found, self.options.burned_in), item.relative)
            return None
        record.burned_in = "masked" if action == "mask" else "kept"
        if action == "keep":
            return picture
        record.boxes = found.boxes
        pixels = burned_in.masked(picture.pixels, found.boxes)
        return Picture(pixels, picture.unit, picture.modality, picture.acquisition, picture.identifiers, picture.source)


def _secrets(joiner: Joiner, item: Item) -> list[str]:
    """What table and header know of the patient of a file whose pixels cannot be read."""
    known = [row.patient for row in joiner.file_rows()]
    if item.kind == "dicom":
        with contextlib.suppress(DataError):
            known += dicom.read_header(item.path).secrets
    return known


def _text_fact(record: Record) -> dict[str, str]:
    """Whether text was found in the pixels, if it was searched for."""
    return {"burned_in_text": record.burned_in} if record.burned_in else {}


def _leave_out_unlabelled(record: Record, ambiguous: bool, quarantine: Quarantine) -> None:
    reason = "Neither a folder, a list nor the label table gives this image a label."
    if ambiguous:
        reason = "The label table names a file that fits several images; write the path with its folders."
    quarantine.leave_out(record, "image-without-label", reason)


def _prepare(record: Record, picture: Picture, size: int, window: tuple[float, float] | None, quarantine: Quarantine) -> bool:
    """Scale and summarise one picture; False if it cannot be used."""
    try:
        unit, record.intensity = prepare.to_unit(picture, window)
        unit, geometry = prepare.square(unit, size)
    except DataError as error:
        quarantine.leave_out(record, error.code, error.message)
        return False
    square = {key: geometry[key] for key in ("original_size", "padding")}
    record.acquisition = {**record.acquisition, **square} | _text_fact(record)
    record.is_colour = unit.ndim == 3
    record.is_blank = bool(unit.min() == unit.max())
    record.pixels = bytes.fromhex(duplicates.pixel_sha256(unit))
    record.thumbnail = duplicates.thumbnail(unit)
    record.unit_image = unit
    return True
