"""What passes between the steps of intake: options, items found, records read, rows left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.cohort import Cohort
from medaug.errors import ConfigError
from medaug.intake.identity import PLACEHOLDER_IDS, PLAIN_DICOM_NAME, known_patient, may_write_name, normal_id, reveals
from medaug.intake.pseudonyms import check_outside, key_path
from medaug.io import limits

__all__ = [
    "PLACEHOLDER_IDS",
    "PLAIN_DICOM_NAME",
    "IntakeOptions",
    "IntakeResult",
    "Item",
    "Record",
    "known_patient",
    "normal_id",
    "partial_folder",
    "public_name",
    "quarantine_name",
    "reveals",
    "sha_of",
]

KEYS = ("file", "sop", "series", "study", "patient", "accession")
SLICES = ("every", "table", "lesion")
CONFLICTS = ("quarantine", "majority", "senior", "mean")
BURNED_IN = ("quarantine", "keep", "mask")
MAX_IMAGE_SIZE = 2048


@dataclass
class IntakeOptions:
    """What the user asked for.

    Attributes:
        source: folder (or DICOMDIR) of images, MedMNIST .npz, or MONAI datalist .json.
        out: folder of the cohort to make.
        labels: CSV or XLSX table; None takes labels from folders, archive or datalist.
        key: what the table's key column holds: file, sop, series, study, patient or accession.
        key_column: its name; None looks for a usual one.
        label_column, group_column, patient_column, split_column: names in the table (or fields of the datalist).
        image_size: side of the cohort's images in pixels.
        split: shares of training, validation, test; None keeps the source's own splits, else 0.7, 0.1, 0.2.
        training_images: how many training images are kept, in proportion to the classes; None keeps all. Validation and test
            stay whole. To learn what a small set would give.
        seed: key of the split, and of that choice.
        dry_run: count and report, write nothing.
        window: (lower, upper) in Hounsfield or stored units; None: see `transforms.prepare.to_unit`.
        ordinal: True or False overrides what the class names say.
        class_names: pairs of a label as the source gives it and the name that it gets; None leaves them.
        classes: names of the classes to take in; images of others are left out. None takes all.
        name: the cohort's name; None takes the name of the output folder.
        sheet: sheet of an XLSX table; None takes the first.
        modality: "CT", "CR" ... where the files do not say.
        strict: refuse series with gaps, uneven spacing or mixed geometry instead of reporting them.
        slices: of a volume take "every" slice, those that the "table" names, or the one with the largest "lesion" mask.
        slice_column: column of the table with the 0-based slice index or the position z in mm, for slices="table".
        masks: folder of masks named like the volumes, for slices="lesion".
        dimensions: 2 makes a cohort of slices, 3 keeps the volumes.
        conflicts: what readers who disagree lead to: "quarantine", the "majority", the "senior" reader's grade or the "mean".
        reader_column: column of the table that says who read.
        senior: the reader whose grade decides, for conflicts="senior".
        burned_in: what suspected text in the pixels leads to: "quarantine", "keep" or "mask".
        pseudonym_key: file of the key that makes pseudonyms; None takes the one of the user's configuration folder.
        mapping: file to write the table pseudonym -> original identifier into; None writes none.
        keep_dicom: folder for de-identified copies of the accepted DICOM files; None writes none.
        keep_names: write the names of image files that are not DICOM, because they hold no identity; without it only
            names that merely count are written, see `identity.may_write_name`.
        workers: processes that read images; 0 or 1 reads in this one.
    """

    source: Path
    out: Path
    labels: Path | None = None
    key: str = "file"
    key_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    patient_column: str | None = None
    split_column: str | None = None
    image_size: int = 64
    split: tuple[float, float, float] | None = None
    training_images: int | None = None
    seed: int = 0
    dry_run: bool = False
    window: tuple[float, float] | None = None
    ordinal: bool | None = None
    class_names: tuple[tuple[str, str], ...] | None = None
    classes: tuple[str, ...] | None = None
    name: str | None = None
    sheet: str | None = None
    modality: str = ""
    strict: bool = False
    slices: str = "every"
    slice_column: str | None = None
    masks: Path | None = None
    dimensions: int = 2
    conflicts: str = "quarantine"
    reader_column: str | None = None
    senior: str | None = None
    burned_in: str = "quarantine"
    pseudonym_key: Path | None = None
    mapping: Path | None = None
    keep_dicom: Path | None = None
    keep_names: bool = False
    workers: int = 0

    def config(self) -> dict[str, Any]:
        """What decides the content of the cohort: no path, so that its hash can be published."""
        left_out = ("source", "out", "labels", "dry_run", "masks", "pseudonym_key", "mapping", "keep_dicom", "workers")
        kept = {key: value for key, value in asdict(self).items() if key not in left_out} | {"has_table": self.labels is not None}
        # Cohorts from before these options stay what they were.
        later = ("training_images", "class_names", "classes")
        return {key: value for key, value in kept.items() if value is not None or key not in later}

    def checked(self) -> IntakeOptions:
        """These options with real paths.

        Raises:
            ConfigError: an option that cannot be meant.
        """
        self.check_values()
        if self.masks is not None and not Path(self.masks).is_dir():
            raise ConfigError("masks-missing", "The folder given with --masks does not exist; check the path.")
        source, out = Path(self.source), Path(self.out).resolve()
        if not source.exists():
            raise ConfigError("source-missing", "The source to take in does not exist; check the path.")
        if self.labels is not None and not Path(self.labels).is_file():
            raise ConfigError("labels-missing", "The label table does not exist; check the path given with --labels.")
        if source.resolve() == out.resolve():
            raise ConfigError("out-is-source", "The output folder is the source itself; choose another --out.")
        labels = None if self.labels is None else Path(self.labels)
        keep = None if self.keep_dicom is None else self._outside(Path(self.keep_dicom), source, out)
        # What may be handed on must not hold the key or the mapping.
        written = [out, *([keep] if keep else [])]
        handed_on = (
            source if source.is_dir() or source.suffix.lower() == ".npz" else source.parent
        )  # a list names files beside it
        public = [handed_on, *written, *map(partial_folder, written)]
        key = check_outside(key_path(self.pseudonym_key), public, "pseudonym key", "--pseudonym-key")
        mapping = None if self.mapping is None else check_outside(self.mapping, public, "mapping table", "--mapping")
        changed = {"source": source, "out": out, "labels": labels, "pseudonym_key": key, "mapping": mapping, "keep_dicom": keep}
        return IntakeOptions(**{**self.__dict__, **changed})

    def check_values(self) -> None:
        """Refuse what cannot be meant whatever the source holds; no file is looked at.

        Raises:
            ConfigError: an option that cannot be meant.
        """
        if self.key not in KEYS:
            raise ConfigError("key-unknown", f"--key must be one of {', '.join(KEYS)}, got {self.key!r}.")
        if not 8 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ConfigError("image-size-invalid", f"--image-size must be 8 to {MAX_IMAGE_SIZE} pixels, got {self.image_size}.")
        if self.classes is not None and len(set(self.classes)) < 2:
            raise ConfigError("class-too-small", f"--classes must name at least two classes, got {', '.join(self.classes)}.")
        if self.training_images is not None and self.training_images < 2:
            raise ConfigError("part-invalid", f"--training-images must be at least 2, got {self.training_images}.")
        for option, value, known in (
            ("slices", self.slices, SLICES),
            ("conflicts", self.conflicts, CONFLICTS),
            ("burned-in", self.burned_in, BURNED_IN),
            ("dimensions", self.dimensions, (2, 3)),
        ):
            if value not in known:
                raise ConfigError(
                    "option-unknown", f"--{option} must be one of {', '.join(map(str, known))}, got {str(value)[:40]!r}."
                )
        if self.conflicts == "senior" and not (self.reader_column and self.senior):
            raise ConfigError("senior-missing", "--conflicts senior needs --reader-column and --senior.")
        if self.slices == "table" and not (self.slice_column and self.labels):
            raise ConfigError("slice-column-missing", "--slices table needs --labels and --slice-column.")
        if self.slices == "lesion" and self.masks is None:
            raise ConfigError("masks-missing", "--slices lesion needs --masks, a folder of masks named like the volumes.")

    def _outside(self, keep: Path, source: Path, out: Path) -> Path:
        """The folder for DICOM copies, apart from source and cohort."""
        keep, folder = keep.resolve(), (source if source.is_dir() else source.parent).resolve()
        if any(keep.is_relative_to(other) or other.is_relative_to(keep) for other in (folder, out, partial_folder(out))):
            raise ConfigError("keep-dicom-inside", "--keep-dicom must be a folder apart from the source and the output.")
        return keep


@dataclass(slots=True)
class Item:
    """One image file (or archive) before it is read; `relative` is for joins only and never written.

    There is one for every file of the source for as long as intake runs: it holds texts, where a `Path` takes four
    times their memory.
    """

    relative: str
    location: str | os.PathLike[str]  # the path; text once the item is made
    kind: str  # "raster", "dicom", "nifti", "npz"
    label: str | None = None
    split: str | None = None
    group: str = ""
    patient: str = ""
    series: str = ""  # key shared by the items of one series
    slice_index: int | None = None  # 0-based place in the sorted series
    slices: tuple[int, ...] | None = None  # chosen 0-based slices or frames of this file; None takes all
    declared: Mapping[str, Any] | None = None  # what a DICOM header says about text in its pixels
    key: str = field(default="", repr=False)  # the identifier in a DICOM header that the label table is joined by
    members: tuple[Item, ...] = ()  # of a volume: all its files
    keep_name: bool = False  # the user says that file names hold no identity
    sha256: str = ""  # of the file when it was hashed
    stamp: int = -1  # its size and time of change then

    def __post_init__(self) -> None:
        self.location = os.fspath(self.location)

    @property
    def path(self) -> Path:
        """Where the file is."""
        return Path(self.location)

    def hash(self) -> None:
        """Hash the file; set `sha256` and `stamp`."""
        self.stamp = _stamp(self.path)  # first: a change while it is hashed must show
        self.sha256 = sha_of(self.path)

    def unchanged_sha256(self) -> str:
        """sha256 of the file if nothing says that it changed since it was hashed, else ""."""
        return self.sha256 if self.sha256 and self.stamp == _stamp(self.path) else ""


@dataclass(slots=True)
class Record:
    """One image as read and prepared: everything that is kept of it in memory.

    `label` and `split` are texts and lists of what the source says until `assemble` has decided on them.
    """

    item: Item
    source: str
    labels: tuple[str, ...]
    split: str | None
    group_keys: tuple[tuple[str, str], ...]
    secrets: tuple[str, ...] = field(repr=False)
    position: str = ""
    volume: str | None = None
    modality: str = ""
    acquisition: Mapping[str, Any] = field(default_factory=dict)
    intensity: dict[str, Any] = field(default_factory=dict)
    pixels: bytes = b""  # sha256
    thumbnail: np.ndarray | None = None  # until it is spooled
    place: int = -1  # of the thumbnail in the spool
    is_colour: bool = False
    is_blank: bool = False
    case_id: str = ""
    label: int = -1
    votes: tuple[tuple[int, str, str], ...] = ()  # of the table, where it has several: row, reader, label
    burned_in: str = ""  # "not found", "masked", "kept"; "" if it was not searched
    boxes: tuple[tuple[int, int, int, int], ...] = ()  # what was masked: top, left, bottom, right
    frame: int = 0  # 0-based frame of the file
    staged: str = ""  # name of the image in the folder until its case has an id
    unit_image: np.ndarray | None = None  # only while it is prepared
    suffix: str = ".png"
    identities: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # for the mapping table only
    patient: str = ""
    group: str = ""
    unit: str = ""  # the group by the content of its files, which no key changes: what the split goes by

    def order(self) -> tuple[str, str, str]:
        """Sort key that does not depend on the order in which files are found."""
        return self.source, self.position, self.item.relative

    @property
    def name(self) -> str:
        """File name that may be written, with the place in its file, or "" if it could identify someone."""
        base = public_name(self.item, self.secrets)
        return base + self.position if base else ""

    @property
    def quarantine_name(self) -> str:
        """What the quarantine calls this image."""
        return self.name or f"sha256:{self.source[:12]}"


@dataclass
class IntakeResult:
    """What intake did.

    Attributes:
        cohort: as written; for a dry run as it would have been, without a folder.
        counts: files, images used and left out, images per split and class, groups, patients.
        leak: see `leak.leak_indicator`.
        quarantine: rows of file, code, reason.
        notes: what was assumed or changed, one sentence each.
        report: the content of report.json.
        reused: True if the folder already held this very cohort.
    """

    cohort: Cohort
    counts: dict[str, Any]
    leak: dict[str, Any]
    quarantine: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    reused: bool = False


def partial_folder(out: Path) -> Path:
    """Where a folder is built before it gets its name."""
    return out.parent / f".{out.name}.partial"


def public_name(item: Item, secrets: Sequence[str]) -> str:
    """The base name of an item, or "" where it may hold an identifier of its patient.

    Files are often named after the patient: only names that merely count pass (IM0001), or with `keep_names` every name
    of a file that is not DICOM. None passes that holds one of the `secrets`: the patient's identifier, name, dates ...
    """
    allowed = may_write_name(item.path, item.kind, (item.patient, *secrets), keep=item.keep_name)
    return item.path.name if allowed else ""


def quarantine_name(item: Item, secrets: Sequence[str] = ()) -> str:
    """What the quarantine calls a file that gave no image: its public name, else the start of its sha256."""
    return public_name(item, secrets) or f"sha256:{sha_of(item.path)[:12]}"


def _stamp(path: Path) -> int:
    """Size and time of change of a file in one number, -1 if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return -1
    return found.st_size << 80 | (found.st_mtime_ns & (1 << 80) - 1)


def sha_of(path: Path) -> str:
    """sha256 of a file, of nothing if it cannot be read or is no regular file (a device may never end, a pipe never begin).

    Of a file larger than any that is read as an image: of its size and its first bytes, since a disk image or a sparse file
    among the images would take hours.
    """
    try:
        if not path.is_file():
            return storage.sha256_bytes(b"")
        size = path.stat().st_size
        if size <= (limits.MAX_ARCHIVE_BYTES if path.suffix.lower() == ".npz" else limits.MAX_FILE_BYTES):
            return storage.sha256_file(path)
        with open(path, "rb") as stream:
            return storage.sha256_bytes(str(size).encode() + stream.read(limits.CHUNK_BYTES))
    except (OSError, ValueError):  # a name that no file can have
        return storage.sha256_bytes(b"")
