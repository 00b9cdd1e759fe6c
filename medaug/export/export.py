"""An accepted synthetic cohort becomes a folder of DICOM, NIfTI or PNG files: resumable, and the same bytes every time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medaug import __version__, storage
from medaug.cohort import FILE_NAME as COHORT_FILE
from medaug.cohort import Cohort, read_cohort
from medaug.errors import ConfigError
from medaug.export import manifest
from medaug.export.dicom import SOP_CLASSES, encode_dicom
from medaug.export.facts import ImageFacts
from medaug.export.nifti import encode_nifti
from medaug.export.plan import PlannedImage, check_exportable, choose_class, notes_of, plan_images
from medaug.export.png import encode_png
from medaug.io.raster import read_unit_png
from medaug.progress import progress

Format = Literal["dicom", "nifti", "png"]
LABELS = "labels.csv"
STUDIES = ("new", "linked")
_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+", re.ASCII)  # VR UI, PS3.5 9.1
_DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII)


def export_cohort(
    cohort_dir: Path,
    out: Path,
    *,
    format: str = "dicom",
    storage_class: str | None = None,
    study: str = "new",
    study_uid: str | None = None,
    bits: int | None = None,
    date: str = "",
    reference_cohort: Path | None = None,
    allow_ungated: bool = False,
) -> dict[str, Any]:
    """Write every image of an accepted synthetic cohort, a label table and a manifest.

    Run again with the same arguments it goes on; a file that is not as it should be is written again. The bytes depend
    on the cohorts, the options and the release alone: UIDs are hashes, and there is no date but the one given.

    Args:
        cohort_dir: cohort of `medaug gate`.
        out: new or empty folder, or one of the same export.
        format: "dicom", "nifti" or "png".
        storage_class: "ct", "dx", "cr" or "sc", for DICOM; None: by modality.
        study: "new" (one study per synthetic patient) or "linked" (all images in the study `study_uid`).
        study_uid: Study Instance UID to link to.
        bits: per sample, 8 or 16; None: 16 for grey, 8 for colour.
        date: StudyDate as YYYYMMDD for archives that demand one; "" leaves it empty.
        reference_cohort: the real cohort, for the geometry of the references.
        allow_ungated: also export images that no gate accepted.

    Returns:
        Summary for machines: files, images, storage_class, notes, manifest_sha256 ...

    Raises:
        ConfigError: options that do not fit, an output folder of something else.  DataError: real or ungated images,
            unknown geometry, a broken cohort.  StorageError: disk, lock.
    """
    cohort_dir, out = Path(cohort_dir), Path(out)
    _check_options(format, storage_class, study, study_uid, date)
    _check_place(out, [cohort_dir, *([reference_cohort] if reference_cohort else [])])
    cohort = read_cohort(cohort_dir, verify=True)
    check_exportable(cohort, allow_ungated)
    origin = None if reference_cohort is None else read_cohort(Path(reference_cohort))
    bits = _bits(bits, cohort, format)
    settings = {
        "product_version": __version__,
        "format": format,
        "storage_class": storage_class,
        "study": study,
        "study_uid": study_uid,
        "bits": bits,
        "date": date,
        "cohort_sha256": cohort.content_sha256,
        "cohort_json_sha256": storage.sha256_file(_folder(cohort_dir) / COHORT_FILE),
        "reference_cohort_sha256": None if origin is None else origin.content_sha256,
        "reference_json_sha256": None
        if reference_cohort is None
        else storage.sha256_file(_folder(reference_cohort) / COHORT_FILE),
    }
    images = plan_images(cohort, origin, settings, study_uid, date)
    chosen, notes = choose_class(cohort, images, storage_class) if format == "dicom" else (None, [])
    if chosen == "ct" and bits == 8:
        raise ConfigError("bits-invalid", "CT images have 16 allocated bits (PS3.3 C.8.2.1.1); leave --bits out or use sc.")
    notes += notes_of(images, chosen, study_uid)
    facts = _header(cohort, images, chosen, notes)
    with storage.locked(out):
        manifest.claim(out, settings)
        written, files = _write_images(out, cohort, images, format, chosen, bits)
        written += _write_table(out, images, files)
        _remove_leftovers(out)
        manifest.write(out, settings, facts, files)
    return {
        "out": out.name,
        "format": format,
        "storage_class": chosen,
        "images": len(images),
        "written": written,
        "patients": len({image.facts.patient_id for image in images}),
        "geometry_known": facts["geometry_known"],
        "notes": notes,
        "manifest_sha256": storage.sha256_file(out / manifest.FILE_NAME),
    }


def _check_options(format: str, storage_class: str | None, study: str, study_uid: str | None, date: str) -> None:
    for option, value, known in (("--format", format, manifest.SUFFIXES), ("--study", study, STUDIES)):
        if value not in known:
            raise ConfigError("option-unknown", f"{option} is one of {', '.join(known)}, got {value!r}.")
    if storage_class is not None and storage_class not in SOP_CLASSES:
        raise ConfigError("storage-class-unknown", f"--storage-class is one of {', '.join(SOP_CLASSES)}, got {storage_class!r}.")
    if format != "dicom" and (storage_class is not None or study != "new" or study_uid is not None or date):
        raise ConfigError("option-unused", f"--storage-class, --study, --study-uid and --date are for DICOM, not for {format}.")
    if (study == "linked") != (study_uid is not None):
        raise ConfigError("study-uid-missing", "--study linked and --study-uid UID are given together, or neither.")
    if study_uid is not None and not (_UID.fullmatch(study_uid) and len(study_uid) <= 64):
        raise ConfigError("study-uid-invalid", "--study-uid is no UID: digits and points, at most 64 characters (PS3.5 9.1).")
    if date and not _DATE.fullmatch(date):
        raise ConfigError("date-invalid", f"--date is YYYYMMDD, got {date!r}.")


def _check_place(out: Path, cohorts: Sequence[Path]) -> None:
    for folder in cohorts:
        if out.resolve().is_relative_to(_folder(folder).resolve()):
            raise ConfigError("out-inside-cohort", "The output folder lies inside a cohort; choose one outside of it.")


def _folder(cohort: Path) -> Path:
    return Path(cohort).parent if Path(cohort).name == COHORT_FILE else Path(cohort)


def _bits(bits: int | None, cohort: Cohort, format: str) -> int:
    if bits not in (None, 8, 16):
        raise ConfigError("bits-invalid", f"--bits is 8 or 16, got {bits}.")
    if cohort.channels == 3 and bits == 16:
        raise ConfigError("bits-invalid", "Colour images have 8 bits per channel; leave --bits out.")
    return bits or (8 if cohort.channels == 3 else 16)


def _header(cohort: Cohort, images: Sequence[PlannedImage], storage_class: str | None, notes: list[str]) -> dict[str, Any]:
    """What the manifest says about the whole export."""
    weights = sorted({image.facts.weights_sha256 for image in images} - {""})
    return {
        "cohort_sha256": cohort.content_sha256,
        "weights_sha256": weights,
        "storage_class": storage_class,
        "sop_class_uid": None if storage_class is None else str(SOP_CLASSES[storage_class]),
        "modality": cohort.modality,
        "classes": list(cohort.classes),
        "intensity": dict(cohort.intensity),
        "geometry_known": sum(image.facts.geometry.is_placed for image in images),
        "notes": notes,
    }


def _write_images(
    out: Path, cohort: Cohort, images: Sequence[PlannedImage], format: str, storage_class: str | None, bits: int
) -> tuple[int, list[dict[str, Any]]]:
    """Write what is not there yet; returns how many files that were, and the rows of the manifest."""
    written, rows = 0, []
    with progress("exporting", len(images)) as advance:
        for image in images:
            path = image.path(manifest.SUFFIXES[format])
            data = _encode(_stored(cohort, image, bits), image.facts, format, storage_class)
            written += _write(out / path, data)
            rows.append(_row(path, "image", data) | _uids(image.facts, format) | {"facts": image.facts.to_json()})
            advance(1)
    return written, rows


def _encode(stored: np.ndarray, facts: ImageFacts, format: str, storage_class: str | None) -> bytes:
    if format == "dicom":
        return encode_dicom(stored, facts, str(storage_class))
    return encode_nifti(stored, facts) if format == "nifti" else encode_png(stored, facts)


def _stored(cohort: Cohort, image: PlannedImage, bits: int) -> np.ndarray:
    """The pixels as integers of `bits` bits: at 16 bits exactly those of the cohort's PNG."""
    unit = read_unit_png(cohort.path(image.case)).astype(np.float64)
    return np.rint(unit * ((1 << bits) - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def _write(path: Path, data: bytes) -> int:
    """1 if the file had to be written, 0 if it was there with these bytes."""
    if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
        return 0
    storage.write_bytes(path, data)
    return 1


def _row(path: str, kind: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "kind": kind, "sha256": storage.sha256_bytes(data), "bytes": len(data)}


def _uids(facts: ImageFacts, format: str) -> dict[str, Any]:
    return {"sop": facts.sop_uid, "series": facts.series_uid, "study": facts.study_uid} if format == "dicom" else {}


def _write_table(out: Path, images: Sequence[PlannedImage], files: list[dict[str, Any]]) -> int:
    """``labels.csv``, which `medaug intake` reads: file, label, patient and, for DICOM, sop."""
    columns = ["file", "label", "patient", *(["sop"] if "sop" in files[0] else [])]
    rows = []
    for image, entry in zip(images, files, strict=True):
        row = {"file": entry["path"], "label": image.facts.label_name, "patient": image.facts.patient_id}
        rows.append(row | ({"sop": entry["sop"]} if "sop" in entry else {}))
    before = (out / LABELS).read_bytes() if (out / LABELS).is_file() else b""
    storage.write_csv(out / LABELS, rows, columns)
    data = (out / LABELS).read_bytes()
    files.append(_row(LABELS, "table", data))
    return int(data != before)


def _remove_leftovers(out: Path) -> None:
    with storage.storage_errors(out.name):
        for name, path in list(manifest.files_of(out)):
            if manifest.is_leftover(name):
                path.unlink()
