"""De-identified DICOM copies of the files that a cohort was made from, in a folder of their own, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.errors import DataError, StorageError
from medaug.intake.deidentify import CODES, METHOD, PROFILE, deidentified
from medaug.intake.pseudonyms import Pseudonyms
from medaug.intake.read import Quarantine
from medaug.intake.records import IntakeOptions, Record, partial_folder
from medaug.io import limits
from medaug.io.dicom_elements import quiet
from medaug.io.dicom_file import open_dataset

FACTS = "deidentified.json"


def write_copies(
    records: Sequence[Record], options: IntakeOptions, pseudonyms: Pseudonyms, quarantine: Quarantine, withheld: frozenset[str]
) -> dict[str, Any]:
    """Write ``PATIENT/SERIES/IMAGE.dcm`` by pseudonyms for every DICOM file behind the records, beside the final folder.

    Every copy is searched for what could identify its patient; a copy in which something was found is deleted and
    its file gets a row in the quarantine (`identity-leftover`), while its image stays in the cohort.

    Args:
        records: the cases of the cohort.
        withheld: sha256 of files of which a frame was left out for text in its pixels.

    Returns:
        files, refused, method, codes: for the report.

    Raises:
        StorageError: `folder-not-empty` if the folder holds something else.
    """
    assert options.keep_dicom is not None
    _check_free(options.keep_dicom)
    folder = partial_folder(options.keep_dicom)
    shutil.rmtree(folder, ignore_errors=True)
    by_source: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.item.kind == "dicom":
            by_source[record.source].append(record)
    written = refused = 0
    with storage.storage_errors(options.keep_dicom.name):
        folder.mkdir(parents=True)
    for source, own in sorted(by_source.items()):
        first = own[0]
        files = first.item.members or (first.item,)
        for number, file in enumerate(files):
            try:
                if source in withheld:
                    raise DataError(
                        "burned-in-text", "A frame of this file was left out for text in its pixels; no copy was written."
                    )
                series, data = _copy(own, file.relative, file.path, pseudonyms)
            except DataError as error:
                refused += 1
                quarantine.leave_out(first, error.code, error.message)
                continue
            name = f"{source[:12]}_{number:04d}.dcm" if len(files) > 1 else f"{source[:12]}.dcm"
            storage.write_bytes(folder / (first.patient or first.group) / series / name, data)
            written += 1
    facts = {"files": written, "refused": refused, "method": f"{METHOD}.", "codes": _codes(records), "table": PROFILE}
    storage.write_json(folder / FACTS, facts)
    return facts


def _copy(own: Sequence[Record], relative: str, path: Path, pseudonyms: Pseudonyms) -> tuple[str, bytes]:
    """The folder of its series, and the file without its patient."""
    first = own[0]
    boxes = {record.frame: record.boxes for record in own if record.boxes}
    with limits.decoding("DICOM"), quiet():
        dataset, _ = open_dataset(path, hashed=False)
        series = pseudonyms.hexadecimal("series", first.item.series or str(dataset.get("SeriesInstanceUID", "")))
        return series, deidentified(dataset, relative, first.patient or first.group, pseudonyms, boxes)


def _codes(records: Sequence[Record]) -> dict[str, str]:
    """The codes of the options that were used on any file."""
    masked = any(record.boxes for record in records)
    return {value: meaning for value, meaning in CODES.items() if masked or value == "113100"}


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / FACTS).is_file())):
        raise StorageError("folder-not-empty", "The folder given with --keep-dicom holds something else; choose another one.")


def discard_copies(options: IntakeOptions) -> None:
    """Remove what an intake that failed has written."""
    if options.keep_dicom is not None:
        shutil.rmtree(partial_folder(options.keep_dicom), ignore_errors=True)


def publish_copies(options: IntakeOptions) -> None:
    """Give the finished folder of copies its name, in place of an earlier one of ours."""
    if options.keep_dicom is None:
        return
    folder = partial_folder(options.keep_dicom)
    with storage.storage_errors(options.keep_dicom.name):
        if options.keep_dicom.exists():
            shutil.rmtree(options.keep_dicom)
        os.replace(folder, options.keep_dicom)
