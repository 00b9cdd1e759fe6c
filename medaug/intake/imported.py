"""Images made elsewhere, with a table of labels, become a synthetic cohort that says what their generator was trained on.

They are read, labelled and left out as intake does it. What they must not be is the same as for images that medaug made: of a
held-out group, made from a held-out image, or a held-out image itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.cohort import (
    FILE_NAME,
    QUARANTINE_COLUMNS,
    Case,
    Cohort,
    check_against,
    created_by,
    fit_sha256,
    read_cohort,
    write_cohort,
)
from medaug.errors import ConfigError, DataError, LeakageError, StorageError
from medaug.intake.assemble import no_usable_image
from medaug.intake.build import emptied, publish, reserved
from medaug.intake.classes import number, tidy
from medaug.intake.compose import change_channels, text_note
from medaug.intake.join import Joiner, Table
from medaug.intake.labels import read_rows
from medaug.intake.processes import case_id_of, image_path, settle_image
from medaug.intake.read import Done, Quarantine, Reader
from medaug.intake.records import IntakeOptions, Item, Record
from medaug.intake.scan import Scan, scan, source_sha256
from medaug.intake.series import arrange
from medaug.intake.spool import plain
from medaug.io.picture import Picture
from medaug.io.pixels import held_out_images, held_out_pixels, shared_pixels

FULL_RANGE = {"uint16": (0.0, 65535.0)}  # of picture files: 0 and 1 are black and white, whatever an image holds
LISTED_ORPHANS = 1000
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

__all__ = ["ImportOptions", "ImportResult", "run_import"]


@dataclass(frozen=True)
class ImportOptions:
    """What the user asked for.

    Attributes:
        source: folder of images: PNG, JPEG, TIFF, DICOM, NIfTI.
        labels: CSV or XLSX table with a label for every image, out of the classes of `like`.
        like: real cohort that the images belong to: its size, channels and intensity are theirs.
        out: folder of the synthetic cohort to make.
        fit_on: real cohort on whose training split the generator was trained.
        allow_untrusted: nothing is known of the generator; exactly one of the two must be given.
        key, key_column, label_column, sheet: as for intake.
        reference_column: of the table: id or name of the training case that an image was made from.
        name: of the cohort; None takes the name of the output folder.
        burned_in: what suspected text in the pixels leads to: "quarantine", "keep" or "mask".
    """

    source: Path
    labels: Path
    like: Path
    out: Path
    fit_on: Path | None = None
    allow_untrusted: bool = False
    key: str = "file"
    key_column: str | None = None
    label_column: str | None = None
    sheet: str | None = None
    reference_column: str | None = None
    name: str | None = None
    burned_in: str = "quarantine"

    def for_intake(self, image_size: int) -> IntakeOptions:
        """The options of the steps shared with intake; the column of references travels as that of groups."""
        return IntakeOptions(
            self.source,
            self.out,
            labels=self.labels,
            key=self.key,
            key_column=self.key_column,
            label_column=self.label_column,
            group_column=self.reference_column,
            sheet=self.sheet,
            name=self.name,
            burned_in=self.burned_in,
            image_size=image_size,
            keep_names=True,
        ).checked()


@dataclass
class ImportResult:
    """What the import did: the cohort as written, the content of report.json, and whether it was there already."""

    cohort: Cohort
    report: dict[str, Any]
    reused: bool = False


@dataclass(frozen=True)
class _Reader(Reader):
    """Reads images so that 0 and 1 mean what they mean in a cohort; remembers what each says it was made from.

    Attributes:
        like: the cohort.
        references: what the table says of each record, by its id().
    """

    like: Cohort
    references: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def window_of(self, picture: Picture) -> tuple[float, float] | None:
        intensity = self.like.intensity
        kinds = {"hu": "window_hu", "stored": "window_stored"}
        if kinds.get(picture.unit) == intensity.get("kind"):
            return float(intensity["0"]), float(intensity["1"])
        return FULL_RANGE.get(picture.unit)

    def _take(
        self, done: Done, joiner: Joiner, name: str, number: int, picture: Picture, split: str | None, label: str | None
    ) -> None:
        before = len(done.records)
        super()._take(done, joiner, name, number, picture, split, label)
        named = {row.group for row in joiner.rows(picture.identifiers) if row.group}
        for record in done.records[before:]:
            self.references[id(record)] = tuple(sorted(named))


def run_import(options: ImportOptions, progress: Progress | None = None) -> ImportResult:
    """Make a synthetic cohort of images made elsewhere, whole or not at all; run again, it returns the one that is there.

    Raises:
        ConfigError: `origin-undeclared` unless exactly one of `fit_on` and `allow_untrusted` is given; an option or column
            that cannot be meant.
        LeakageError: `fit-on-held-out`, `fit-unknown` (the generator saw groups that are no training groups of `like`),
            `reference-held-out`, `pixels-held-out`.
        DataError: no usable image, or no cohort.  StorageError: `folder-not-empty`, `folder-in-use`, disk full ...
    """
    if (options.fit_on is not None) == options.allow_untrusted:
        raise ConfigError(
            "origin-undeclared",
            "Say what the generator was trained on: --fit-on COHORT, or --allow-untrusted if nobody knows; exactly one of them.",
        )
    like = read_cohort(options.like, verify=True)
    groups = _fit_groups(options, like)
    intake = options.for_intake(like.image_size)
    read_rows(intake)  # a wrong column or sheet shows before the source is read
    found = scan(intake)
    config = intake.config() | {"like": like.content_sha256, "fit_on": None if groups is None else fit_sha256(groups)}
    made = created_by("medaug import", config, 0)
    source = f"sha256:{source_sha256(found, intake)}"
    with reserved(intake) as folder:
        existing = _existing(intake.out, made, source)
        if existing is not None:
            return existing
        maker = _Maker(intake, like, groups, emptied(folder))
        result = maker.make(found, made, source, progress)
        publish(folder, intake.out)
    return ImportResult(read_cohort(intake.out), result.report)


def _fit_groups(options: ImportOptions, like: Cohort) -> list[str] | None:
    """The groups that the generator saw, after the checks of every synthetic cohort; None if nobody knows."""
    if options.fit_on is None:
        return None
    cohort = read_cohort(options.fit_on)
    groups = sorted(cohort.groups("training").union(*cohort.fit_on.values()))
    if not groups:
        raise DataError("split-empty", "The cohort of --fit-on has no training case, so no generator was trained on it.")
    check_against(replace(like, training=(), validation=(), test=(), fit_on={fit_sha256(groups): groups}), like)
    if seen := held_out_images(cohort, like):  # names of groups may agree by chance
        raise LeakageError(
            "fit-on-held-out",
            f"The training split of --fit-on holds {len(seen)} validation or test image(s) of --like ({', '.join(seen[:5])}).",
        )
    return groups


def _existing(out: Path, made: dict[str, Any], source: str) -> ImportResult | None:
    """The finished cohort of the same options and source; None if the output folder is absent or empty."""
    if not out.is_dir() or all(path.name == storage.LOCK_NAME for path in out.iterdir()):
        return None
    if (out / FILE_NAME).is_file():
        cohort = read_cohort(out)
        if cohort.created_by.get("config_sha256") == made["config_sha256"] and cohort.source == source:
            return ImportResult(cohort, storage.read_json(out / "report.json"), reused=True)
    raise StorageError(
        "folder-not-empty", f"The output folder {out.name} holds something else; choose another --out or remove it."
    )


def label_of(text: str, classes: Sequence[str]) -> int | None:
    """Index of the class that a label text means: by name, in any case, or by number ("2.0", "II"); None if it means none."""
    for same in (tidy, lambda name: tidy(name).casefold(), lambda name: number(tidy(name))):
        wanted = same(text)
        hits = [index for index, name in enumerate(classes) if wanted is not None and same(name) == wanted]
        if len(hits) == 1:
            return hits[0]
    return None


class References:
    """Training cases by id and by name; held-out ones are known, to be refused."""

    def __init__(self, like: Cohort) -> None:
        self._cases: dict[str, dict[str, Case]] = defaultdict(dict)
        for case in like.cases():
            for key in {case.id, case.name, re.sub(r"\.[A-Za-z0-9]{1,5}$", "", case.name)} - {""}:
                self._cases[key][case.id] = case
        self._training = {case.id for case in like.training}

    def find(self, texts: Sequence[str]) -> Case | str | None:
        """The case that the texts mean, None for no text, or the code of what is wrong.

        Raises:
            LeakageError: `reference-held-out`.
        """
        if not texts:
            return None
        hits = {case_id: case for text in texts for case_id, case in self._cases.get(text.strip(), {}).items()}
        if hits and not self._training & set(hits):
            raise LeakageError(
                "reference-held-out",
                f"An image was made from validation or test case {min(hits)}; leave out all that were made from held-out images.",
            )
        if len(hits) != 1:
            return "reference-ambiguous" if hits else "reference-unknown"
        return next(iter(hits.values()))


_REASONS = {
    "reference-unknown": "The table says that it was made from an image that is no case of the real cohort.",
    "reference-ambiguous": "The table says that it was made from an image whose name several cases have; write the case's id.",
}


@dataclass
class _Maker:
    """One import."""

    options: IntakeOptions
    like: Cohort
    groups: list[str] | None
    folder: Path
    quarantine: Quarantine = field(default_factory=Quarantine)

    def make(self, found: Scan, made: dict[str, Any], source: str, progress: Progress | None) -> ImportResult:
        """Read, decide, check and write into the folder."""
        self.quarantine = Quarantine(list(found.quarantine))
        arrangement = arrange(found.items, self.options)
        self.quarantine.rows.extend(arrangement.quarantine)
        with storage.storage_errors("images"):
            (self.folder / "images").mkdir(exist_ok=True)
        table = Table(self.options, arrangement.items)
        records, references = self._read(arrangement.items, table, progress)
        orphans = sorted(table.unused())
        for row in orphans:
            self.quarantine.add(
                f"table row {row}", "label-without-image", "No image of the source belongs to this row of the label table."
            )
        cases = self._cases(records, references)
        if not cases:
            raise no_usable_image(self.quarantine)
        cohort = self._cohort(
            cases, [record for record in records if record.case_id in {case.id for case in cases}], made, source
        )
        report = self._report(cohort, table, orphans)
        storage.write_csv(self.folder / "quarantine.csv", report["quarantine"], QUARANTINE_COLUMNS)
        storage.write_json(self.folder / "report.json", report)
        return ImportResult(cohort, report)

    def _read(
        self, items: Sequence[Item], table: Table, progress: Progress | None
    ) -> tuple[list[Record], dict[int, tuple[str, ...]]]:
        reader = _Reader(self.options, table.by_position, self.folder, self.like)
        records: list[Record] = []
        taken: dict[str, int] = {}
        with progress("reading images", len(items)) if progress else nullcontext(lambda steps: None) as advance:
            for index, item in enumerate(items):
                done = reader.read(index, item, table.known(index, item))
                table.add_seen(done.used, done.restored)
                self.quarantine.rows.extend(done.quarantine.rows)
                for record in done.records:
                    record.case_id = case_id_of(record, taken, records)
                    settle_image(self.folder, record)
                    records.append(record)
                advance(1)
        return sorted(records, key=Record.order), reader.references

    def _cases(self, records: Sequence[Record], references: dict[int, tuple[str, ...]]) -> list[Case]:
        """One case for every image with one label out of the cohort's classes and no doubt about its reference."""
        known = References(self.like)
        origins: dict[int, Case | None] = {}
        usable: list[Record] = []
        for record in records:
            labels = {label_of(text, self.like.classes) for text in record.labels}
            origin = known.find(references[id(record)])
            if None in labels:
                reason = f"Its label is none of the classes {', '.join(self.like.classes)}."
                self.quarantine.leave_out(record, "label-unknown", reason)
            elif len(labels) > 1:
                self.quarantine.leave_out(record, "conflicting-label", "The label table gives this image several classes.")
            elif isinstance(origin, str):
                self.quarantine.leave_out(record, origin, _REASONS[origin])
            else:
                record.label = next(label for label in labels if label is not None)
                origins[id(record)] = origin
                usable.append(record)
        return [self._case(record, origins[id(record)]) for record in self._distinct(usable)]

    def _distinct(self, records: Sequence[Record]) -> list[Record]:
        """The first of identical images; none where their labels differ."""
        same: dict[bytes, list[Record]] = defaultdict(list)
        for record in records:
            same[record.pixels].append(record)
        kept = []
        for first, *others in same.values():
            if any(record.label != first.label for record in others):
                for record in (first, *others):
                    self.quarantine.leave_out(record, "conflicting-label", "Identical images have different labels.")
                continue
            kept.append(first)
            for record in others:
                reason = f"The image is identical to case {first.case_id}, which stays."
                self.quarantine.leave_out(record, "duplicate-image", reason)
        return kept

    def _case(self, record: Record, origin: Case | None) -> Case:
        path = self.folder / image_path(record)
        if record.is_colour != (self.like.channels == 3):
            change_channels(path, self.like.channels)
        lineage: dict[str, Any] = {
            "bundle": "imported",
            "intended_label": record.label,
            "image_sha256": storage.sha256_file(path),
        }
        if origin is not None:
            lineage["reference"] = origin.id
        lineage |= {"untrusted": True} if self.groups is None else {"fit_on": fit_sha256(self.groups)}
        return Case(
            id=record.case_id,
            image=image_path(record),
            label=record.label,
            group=f"imported-{record.case_id}" if origin is None else origin.group,
            source=record.source,
            name=record.name or record.case_id,
            acquisition=plain(record.acquisition) | {"intensity": plain(record.intensity)},
            lineage=lineage,
        )

    def _cohort(self, cases: Sequence[Case], records: Sequence[Record], made: dict[str, Any], source: str) -> Cohort:
        """The cohort, checked against the real one and written; images of cases that were left out go."""
        wanted = {Path(case.image).name for case in cases}
        for path in (self.folder / "images").iterdir():
            if path.name not in wanted:
                path.unlink()
        cohort = replace(
            self.like,
            name=self.options.name or self.options.out.name,
            created_by=made,
            source=source,
            training=tuple(cases),
            validation=(),
            test=(),
            fit_on={} if self.groups is None else {fit_sha256(self.groups): self.groups},
            notes=text_note(records, self.options),
            root=self.folder,
        )
        check_against(cohort, self.like, allow_untrusted=self.groups is None)
        shared = shared_pixels(cohort, cohort.training, held_out_pixels(self.like))
        if shared:
            raise LeakageError(
                "pixels-held-out",
                f"{len(shared)} imported image(s) have the very pixels of a validation or test image ({', '.join(shared[:5])}); "
                "leave them out, and ask how they came among generated ones.",
            )
        return write_cohort(cohort, self.folder)

    def _report(self, cohort: Cohort, table: Table, orphans: Sequence[int]) -> dict[str, Any]:
        rows = self.quarantine.sorted()
        return {
            "cases": len(cohort.training),
            "per_class": dict(zip(cohort.classes, cohort.class_counts("training"), strict=True)),
            "content_sha256": cohort.content_sha256,
            "trusted": self.groups is not None,
            "with_reference": sum("reference" in (case.lineage or {}) for case in cohort.training),
            "table_rows": len(table.rows),
            "rows_without_image": len(orphans),
            "row_numbers_without_image": list(orphans[:LISTED_ORPHANS]),
            "images_without_row": self.quarantine.by_code().get("image-without-label", 0),
            "left_out": self.quarantine.by_code(),
            "quarantine": rows,
        }
