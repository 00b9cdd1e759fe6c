"""Intake from end to end: a source of labelled images becomes a cohort folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.cohort import FILE_NAME, QUARANTINE_COLUMNS, SPLITS, Cohort, created_by, read_cohort, write_cohort
from medaug.errors import ConfigError, StorageError
from medaug.intake import report
from medaug.intake.assemble import Assembly, assemble, no_usable_image
from medaug.intake.compose import compose
from medaug.intake.copies import discard_copies, publish_copies, write_copies
from medaug.intake.identity import known_patient
from medaug.intake.join import Table
from medaug.intake.labels import read_rows
from medaug.intake.processes import read_records
from medaug.intake.pseudonyms import Pseudonyms, write_mapping
from medaug.intake.read import Quarantine, Suspects
from medaug.intake.records import IntakeOptions, IntakeResult, Record, partial_folder
from medaug.intake.scan import Scan, scan, source_sha256
from medaug.intake.series import arrange
from medaug.intake.spool import Spool
from medaug.intake.tables import count_uncached
from medaug.intake.volumes import gather

__all__ = ["IntakeOptions", "IntakeResult", "run_intake"]

LISTED_ORPHANS = 1000

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def run_intake(options: IntakeOptions, progress: Progress | None = None) -> IntakeResult:
    """Make a cohort of a source of labelled images.

    A file that cannot be used goes to the quarantine with its reason and the rest goes on. The cohort is built beside
    `options.out` and gets its name when it is whole. Run again with the same options and source it returns the cohort
    that is there.

    Args:
        options: what to take in and how.
        progress: called as ``progress(description, total)``; gives a context manager that yields ``advance(steps)``,
            like `medaug.progress.progress`. None shows nothing.

    Raises:
        ConfigError: an option or column that cannot be meant.
        DataError: `no-usable-image`, `class-too-small`, `labels-not-classes`, unreadable table or datalist ...
        StorageError: `folder-not-empty` (the output holds something else), `folder-in-use`, disk full ...
    """
    options = options.checked()
    if options.labels is not None:
        read_rows(options)  # a wrong column or sheet shows before the source is read
    found = scan(options)
    source = source_sha256(found, options)
    if options.dry_run:
        # A key that does not exist yet is not made for a rehearsal.
        known = options.pseudonym_key is not None and options.pseudonym_key.exists()
        return _take_in(options, found, source, None, progress, Pseudonyms(options.pseudonym_key if known else None))
    pseudonyms = Pseudonyms(options.pseudonym_key)
    with reserved(options) as folder:
        existing = _existing(options, source, pseudonyms)
        if existing is not None:
            return existing
        result = _take_in(options, found, source, emptied(folder), progress, pseudonyms)
        publish_copies(options)
        publish(folder, options.out)
    result.cohort = replace(result.cohort, root=options.out)
    return result


@contextmanager
def reserved(options: IntakeOptions) -> Iterator[Path]:
    """Hold the output folder and the one beside it where the cohort is built; yields the latter."""
    out = options.out
    folder = partial_folder(out)
    if out.exists() and not out.is_dir():
        raise StorageError("folder-not-empty", "The output exists and is a file; choose another --out.")
    if out.is_mount():
        raise StorageError(
            "out-is-mount", "The output folder is a mount point and cannot be replaced; name a new folder inside it."
        )
    with _named_for_users(out), storage.locked(folder):
        try:
            with storage.locked(out) if out.is_dir() else nullcontext():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            discard_copies(options)


@contextmanager
def _named_for_users(out: Path) -> Iterator[None]:
    """Say the name of the output folder, not that of the hidden one beside it."""
    try:
        yield
    except StorageError as error:
        hidden = partial_folder(out).name
        if hidden not in error.message:
            raise
        raise StorageError(error.code, error.message.replace(hidden, out.name)) from error


def _existing(options: IntakeOptions, source: str, pseudonyms: Pseudonyms) -> IntakeResult | None:
    """The finished cohort of the same options and source; None if the output folder is absent or empty."""
    if not options.out.is_dir() or all(path.name == storage.LOCK_NAME for path in options.out.iterdir()):
        return None
    other = StorageError(
        "folder-not-empty", f"The output folder {options.out.name} holds something else; choose another --out or remove it."
    )
    if not (options.out / FILE_NAME).is_file():
        raise other
    cohort = read_cohort(options.out, spatial_dims=None)
    wanted = created_by("intake", options.config(), options.seed)
    if cohort.created_by.get("config_sha256") != wanted["config_sha256"] or cohort.source != f"sha256:{source}":
        raise other
    fingerprint = cohort.notes.get("pseudonym_key")
    if fingerprint is not None and fingerprint != pseudonyms.fingerprint:
        raise StorageError(
            "pseudonym-key-changed", "The cohort was made with another pseudonym key; name that one, or choose another --out."
        )
    late = (options.mapping and not options.mapping.exists()) or (options.keep_dicom and not options.keep_dicom.exists())
    if late:
        raise ConfigError(
            "cohort-already-there",
            "The cohort is finished; --mapping and --keep-dicom write along with it, so choose another --out.",
        )
    content = storage.read_json(options.out / "report.json")
    return IntakeResult(cohort, content["counts"], content["leak"], content["quarantine"], content["notes"], content, reused=True)


def emptied(folder: Path) -> Path:
    """Remove what an interrupted run left behind."""
    with storage.storage_errors(folder.name):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != storage.LOCK_NAME:
                path.unlink()
    return folder


def publish(folder: Path, out: Path) -> None:
    """Give the finished folder its name; an empty output folder makes way."""
    with storage.storage_errors(out.name):
        (folder / storage.LOCK_NAME).unlink(missing_ok=True)
        os.sync()  # once for all images: a flush for each would take longer than reading it
        if out.is_dir():
            (out / storage.LOCK_NAME).unlink(missing_ok=True)
            out.rmdir()
        os.replace(folder, out)


def _take_in(
    options: IntakeOptions, found: Scan, source: str, folder: Path | None, progress: Progress | None, pseudonyms: Pseudonyms
) -> IntakeResult:
    """Read, decide and, with a folder, write."""
    quarantine = Quarantine(list(found.quarantine), dict(found.places))
    if not found.items:
        raise no_usable_image(quarantine)
    notes = _arranged(found, options, quarantine)
    suspects, spool = Suspects(), Spool(folder)
    with progress("reading images", len(found.items)) if progress else nullcontext(lambda steps: None) as advance:
        records, table = read_records(found, options, folder, quarantine, advance, suspects, spool, pseudonyms)
    join = _join_facts(options, table, quarantine)
    notes = [*_reading_notes(options, found, table, suspects), *notes]
    files, found.items = len(found.items), []
    del table
    has_splits = options.split_column is not None or found.has_splits
    names = found.class_names | dict(options.class_names or ())
    assembly = assemble(records, options, has_splits, quarantine, names, pseudonyms, spool)
    del records
    assembly.notes.extend(notes)
    copies: dict[str, Any] = {}
    if folder is not None and options.keep_dicom is not None:
        copies = write_copies(assembly.records, options, pseudonyms, quarantine, frozenset(suspects.left_out))
        assembly.notes.append(f"{copies['files']} de-identified DICOM copies were written; {copies['refused']} were not kept.")
    cohort = compose(options, source, assembly, folder, pseudonyms)
    if options.mapping is None:
        assembly.records = []  # the cohort has what is needed of them
    counts = _counts(cohort, files, found, join["restored_zeros"], quarantine)
    content = report.content(cohort, counts, assembly, quarantine.sorted())
    content |= {"join": join, "burned_in_text": suspects.content(), "copies": copies}
    result = IntakeResult(cohort, counts, assembly.leak, quarantine.sorted(), assembly.notes, content)
    if folder is not None:
        _write(result, assembly, folder, suspects)
        if options.mapping is not None:
            write_mapping(options.mapping, _mapping_rows(assembly.records, quarantine, pseudonyms))
    return result


def _arranged(found: Scan, options: IntakeOptions, quarantine: Quarantine) -> list[str]:
    """Sort the items into series and volumes, leave out what does not belong; returns notes."""
    arrangement = arrange(found.items, options)
    found.items = gather(arrangement.items) if options.dimensions == 3 else arrangement.items
    quarantine.rows.extend(arrangement.quarantine)
    quarantine.places |= arrangement.places
    if not found.items:
        raise no_usable_image(quarantine)
    return arrangement.notes


def _mapping_rows(records: Sequence[Record], quarantine: Quarantine, pseudonyms: Pseudonyms) -> Iterator[tuple[str, str, str]]:
    """Which pseudonym means what: patients, UIDs of the DICOM copies, the file of every case and of every row left out."""
    for name, place in quarantine.places.items():
        yield "quarantine", name, place
    for record in records:
        yield "file", record.case_id, record.item.relative
        for kind, value in record.identities:
            if kind == "patient":
                yield kind, pseudonyms.patient(known_patient(value)), value
            elif kind in ("study", "series", "sop"):
                yield kind, pseudonyms.uid(value), value


def _join_facts(options: IntakeOptions, table: Table, quarantine: Quarantine) -> dict[str, Any]:
    """Both kinds of orphans: how many, and the rows' numbers; no identifier."""
    orphans = sorted(table.unused())
    return {
        "key": options.key if options.labels is not None else "",
        "rows": len(table.rows),
        "rows_without_image": len(orphans),
        "row_numbers_without_image": orphans[:LISTED_ORPHANS],
        "images_without_row": quarantine.by_code().get("image-without-label", 0),
        "restored_zeros": table.restored_zeros,
    }


def _reading_notes(options: IntakeOptions, found: Scan, table: Table, suspects: Suspects) -> list[str]:
    notes = []
    if table.restored_zeros:
        notes.append(
            f"{table.restored_zeros} identifier(s) matched the label table only without leading zeros; "
            "each fitted one image or patient."
        )
    uncached = count_uncached(options.labels, options.sheet) if options.labels is not None else 0
    if uncached:
        notes.append(
            f"{uncached} cell(s) of the label table are formulas without a stored value and were read as blank; "
            "open the table in a spreadsheet program and save it again."
        )
    if found.has_splits and options.split is not None:
        notes.append("The source's own splits were replaced, because --split was given.")
    if empty := found.ignored["empty-folder"]:
        notes.append(f"{empty} folder(s) of the source are empty; if one names a class, its images did not arrive.")
    if options.dimensions == 2 and options.slices == "every" and any(item.kind == "nifti" for item in found.items):
        notes.append("Every slice of a NIfTI volume takes the label of its volume.")
    suspected = sum(suspects.by_action.values())
    if suspected:
        done = {"quarantine": "left out", "mask": "blacked out", "keep": "kept as they are"}
        how = ", ".join(f"{count} {done[action]}" for action, count in sorted(suspects.by_action.items()))
        notes.append(f"{suspected} of {suspects.searched} images may hold text in their pixels: {how}.")
    return notes


def _counts(cohort: Cohort, files: int, found: Scan, restored_zeros: int, quarantine: Quarantine) -> dict[str, Any]:
    return {
        "files": files,
        "used": len(cohort.cases()),
        "quarantined": len(quarantine.rows),
        "splits": {split: dict(zip(cohort.classes, cohort.class_counts(split), strict=True)) for split in SPLITS},
        "groups": {split: len(cohort.groups(split)) for split in SPLITS},
        "patients": len({case.patient for case in cohort.cases()} - {""}),
        "quarantine": quarantine.by_code(),
        "ignored": dict(sorted(found.ignored.items())),
        "restored_zeros": restored_zeros,
    }


def _write(result: IntakeResult, assembly: Assembly, folder: Path, suspects: Suspects) -> None:
    """Everything but the images, which are there already; those that were left out go."""
    wanted = {case.image for case in result.cohort.cases()}
    for path in (folder / "images").iterdir():
        if f"images/{path.name}" not in wanted:
            path.unlink()
    result.cohort = write_cohort(result.cohort, folder)
    result.report["content_sha256"] = result.cohort.content_sha256
    storage.write_csv(folder / "quarantine.csv", result.quarantine, QUARANTINE_COLUMNS)
    storage.write_json(folder / "report.json", result.report)
    storage.write_text(folder / "report.html", report.html(result.report, result.cohort, assembly, suspects.shown))
