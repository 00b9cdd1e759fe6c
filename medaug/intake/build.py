"""Intake from end to end: a source of labelled images becomes a cohort folder, whole or not at all."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.cohort import FILE_NAME, QUARANTINE_COLUMNS, SPLITS, Case, Cohort, created_by, read_cohort, write_cohort
from medaug.errors import StorageError
from medaug.intake import report
from medaug.intake.assemble import Assembly, assemble, no_usable_image
from medaug.intake.labels import read_rows
from medaug.intake.read import Joiner, Quarantine, image_path, read_records
from medaug.intake.records import IntakeOptions, IntakeResult, Record
from medaug.intake.scan import Scan, partial_folder, scan, source_sha256
from medaug.io import raster

__all__ = ["IntakeOptions", "IntakeResult", "run_intake"]

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
        return _take_in(options, found, source, None, progress)
    with _reserved(options.out) as folder:
        existing = _existing(options, source)
        if existing is not None:
            return existing
        result = _take_in(options, found, source, _emptied(folder), progress)
        _publish(folder, options.out)
    result.cohort = read_cohort(options.out)
    return result


@contextmanager
def _reserved(out: Path) -> Iterator[Path]:
    """Hold the output folder and the one beside it where the cohort is built; yields the latter."""
    folder = partial_folder(out)
    if out.exists() and not out.is_dir():
        raise StorageError("folder-not-empty", "The output exists and is a file; choose another --out.")
    if out.is_mount():
        raise StorageError(
            "out-is-mount", "The output folder is a mount point and cannot be replaced; name a new folder inside it."
        )
    with storage.locked(folder):
        try:
            with storage.locked(out) if out.is_dir() else nullcontext():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _existing(options: IntakeOptions, source: str) -> IntakeResult | None:
    """The finished cohort of the same options and source; None if the output folder is absent or empty."""
    if not options.out.is_dir() or all(path.name == storage.LOCK_NAME for path in options.out.iterdir()):
        return None
    other = StorageError(
        "folder-not-empty", f"The output folder {options.out.name} holds something else; choose another --out or remove it."
    )
    if not (options.out / FILE_NAME).is_file():
        raise other
    cohort = read_cohort(options.out)
    wanted = created_by("intake", options.config(), options.seed)
    if cohort.created_by.get("config_sha256") != wanted["config_sha256"] or cohort.source != f"sha256:{source}":
        raise other
    content = storage.read_json(options.out / "report.json")
    return IntakeResult(cohort, content["counts"], content["leak"], content["quarantine"], content["notes"], content, reused=True)


def _emptied(folder: Path) -> Path:
    """Remove what an interrupted run left behind."""
    with storage.storage_errors(folder.name):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != storage.LOCK_NAME:
                path.unlink()
    return folder


def _publish(folder: Path, out: Path) -> None:
    """Give the finished folder its name; an empty output folder makes way."""
    with storage.storage_errors(out.name):
        (folder / storage.LOCK_NAME).unlink(missing_ok=True)
        if out.is_dir():
            (out / storage.LOCK_NAME).unlink(missing_ok=True)
            out.rmdir()
        os.replace(folder, out)


def _take_in(options: IntakeOptions, found: Scan, source: str, folder: Path | None, progress: Progress | None) -> IntakeResult:
    """Read, decide and, with a folder, write."""
    quarantine = Quarantine(list(found.quarantine))
    if not found.items:
        raise no_usable_image(quarantine)
    with progress("reading images", len(found.items)) if progress else nullcontext(lambda steps: None) as advance:
        records, joiner = read_records(found, options, folder, quarantine, advance)
    has_splits = options.split_column is not None or found.has_splits
    assembly = assemble(records, options, has_splits, quarantine, found.class_names)
    assembly.notes.extend(_reading_notes(options, found, joiner))
    cohort = _cohort(options, source, assembly, folder)
    counts = _counts(cohort, found, joiner, quarantine)
    content = report.content(cohort, counts, assembly, quarantine.sorted())
    result = IntakeResult(cohort, counts, assembly.leak, quarantine.sorted(), assembly.notes, content)
    if folder is not None:
        _write(result, assembly, folder)
    return result


def _reading_notes(options: IntakeOptions, found: Scan, joiner: Joiner) -> list[str]:
    notes = []
    if joiner.restored_zeros:
        notes.append(
            f"{joiner.restored_zeros} identifier(s) matched the label table only without leading zeros; "
            "each fitted one image or patient."
        )
    if found.has_splits and options.split is not None:
        notes.append("The source's own splits were replaced, because --split was given.")
    if any(item.kind == "nifti" for item in found.items):
        notes.append("Every slice of a NIfTI volume takes the label of its volume.")
    return notes


def _cohort(options: IntakeOptions, source: str, assembly: Assembly, folder: Path | None) -> Cohort:
    """The cohort of an assembly; writes nothing but, in a folder, images that change between grey and colour."""
    records = assembly.records
    intensity = _intensity(records)
    channels = 3 if 2 * sum(record.is_colour for record in records) >= len(records) else 1
    changed = [record for record in records if record.is_colour != (channels == 3)]
    if changed:
        kind = "grey images became colour" if channels == 3 else "colour images became grey (ITU-R BT.601 luma)"
        assembly.notes.append(f"{len(changed)} {kind}, like most of the cohort.")
    if folder is not None:
        for record in changed:
            _change_channels(folder / image_path(record), channels)
    splits = {split: tuple(_case(record, intensity) for record in records if record.split == split) for split in SPLITS}
    cohort = Cohort(
        name=options.name or options.out.name,
        modality=_modality(records, options, assembly.notes),
        classes=assembly.classes.names,
        ordinal=assembly.classes.ordinal,
        image_size=options.image_size,
        channels=channels,
        intensity=intensity,
        created_by=created_by("intake", options.config(), options.seed),
        source=f"sha256:{source}",
        notes={"leak": assembly.leak, "intake": assembly.notes, "groups": assembly.groups},
    )
    return cohort.with_cases(**splits)


def _case(record: Record, intensity: dict[str, Any]) -> Case:
    acquisition = _plain(record.acquisition)
    if intensity["kind"] in ("percentile", "mixed"):
        acquisition["intensity"] = _plain(record.intensity)
    return Case(
        id=record.case_id,
        image=image_path(record),
        label=record.label,
        group=record.group,
        source=record.source,
        patient=record.patient,
        name=record.name or record.case_id,
        acquisition=acquisition,
    )


def _intensity(records: Sequence[Record]) -> dict[str, Any]:
    """What 0 and 1 mean in every image; where that differs, each case says it in its acquisition."""
    first = records[0].intensity
    if first["kind"] != "percentile" and all(record.intensity == first for record in records):
        return _plain(first)
    kinds = sorted({record.intensity["kind"] for record in records})
    kind = "percentile" if kinds == ["percentile"] else "mixed"
    return {
        "kind": kind,
        "kinds": kinds,
        "0": "differs per image: acquisition.intensity",
        "1": "differs per image: acquisition.intensity",
    }


def _plain(value: Any) -> Any:
    """A value as JSON holds it; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _modality(records: Sequence[Record], options: IntakeOptions, notes: list[str]) -> str:
    counts = Counter(record.modality for record in records if record.modality)
    if not counts:
        return options.modality
    if len(counts) > 1:
        found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        notes.append(f"The images are of several modalities ({found}); a network can mistake that for the class.")
    return max(sorted(counts), key=lambda name: counts[name])


def _change_channels(path: Path, channels: int) -> None:
    image = raster.read_unit_png(path)
    if channels == 3 and image.ndim == 2:
        raster.write_unit_png(path, np.repeat(image[..., None], 3, axis=-1))
    elif channels == 1 and image.ndim == 3:
        raster.write_unit_png(path, np.clip(image @ np.array([0.299, 0.587, 0.114], np.float32), 0.0, 1.0))


def _counts(cohort: Cohort, found: Scan, joiner: Joiner, quarantine: Quarantine) -> dict[str, Any]:
    return {
        "files": len(found.items),
        "used": len(cohort.cases()),
        "quarantined": len(quarantine.rows),
        "splits": {split: dict(zip(cohort.classes, cohort.class_counts(split), strict=True)) for split in SPLITS},
        "groups": {split: len(cohort.groups(split)) for split in SPLITS},
        "patients": len({case.patient for case in cohort.cases()} - {""}),
        "quarantine": quarantine.by_code(),
        "ignored": dict(sorted(found.ignored.items())),
        "restored_zeros": joiner.restored_zeros,
    }


def _write(result: IntakeResult, assembly: Assembly, folder: Path) -> None:
    """Everything but the images, which are there already; those that were left out go."""
    wanted = {Path(case.image).name for case in result.cohort.cases()}
    for path in (folder / "images").iterdir():
        if path.name not in wanted:
            path.unlink()
    result.cohort = write_cohort(result.cohort, folder)
    result.report["content_sha256"] = result.cohort.content_sha256
    storage.write_csv(folder / "quarantine.csv", result.quarantine, QUARANTINE_COLUMNS)
    storage.write_json(folder / "report.json", result.report)
    storage.write_text(folder / "report.html", report.html(result.report, result.cohort, assembly))
