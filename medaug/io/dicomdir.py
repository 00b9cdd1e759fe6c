"""DICOMDIR (PS3.10, PS3.3 F): the list of files on a medium, of which only those inside its folder are followed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydicom import Dataset

from medaug.errors import DataError
from medaug.io import limits, paths
from medaug.io.dicom_elements import items, quiet, text, texts
from medaug.io.dicom_file import open_dataset

MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
MAX_RECORDS = 1_000_000
MAX_READS = 5_000_000  # of about 150,000 records; a DVD holds 10,000 images


@dataclass
class Listing:
    """What a DICOMDIR refers to.

    Attributes:
        files: existing regular files inside its folder, in the order of the records, each once.
        absent: numbers (from 1) of the records whose file is not there.
        outside: numbers of the records that point out of the folder: "..", absolute paths, links.
        records: number of directory records.
    """

    files: list[Path] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)
    records: int = 0


def is_dicomdir(path: Path) -> bool:
    """True for a file whose meta information says that it is a media storage directory, whatever its name."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(1024)
    except OSError:
        return False
    return head[128:132] == b"DICM" and MEDIA_STORAGE_DIRECTORY.encode() in head


def read_dicomdir(path: Path) -> Listing:
    """Read the records of a DICOMDIR.

    The records are taken one after the other as they are stored, so links between them, which may form loops, are not
    followed. Records out of use (PS3.3 F.3.2.2, RecordInUseFlag 0) are skipped. A file name is looked for as written,
    then in any letter case, since media are often copied to file systems that change it.

    Raises:
        DataError: `dicomdir-unreadable`; `image-too-large`, `image-empty`, `file-missing` as for images.
    """
    path = Path(path)
    root = path.parent.resolve()
    with limits.decoding("DICOMDIR"), quiet():
        dataset, _ = open_dataset(path, hashed=False, reads=MAX_READS)
        if text(dataset.file_meta, "MediaStorageSOPClassUID") != MEDIA_STORAGE_DIRECTORY:
            raise DataError("dicomdir-unreadable", "The file is no DICOMDIR; name its folder to take in all of it.")
        records = items(dataset, "DirectoryRecordSequence")
        if len(records) > MAX_RECORDS:
            raise DataError("dicomdir-unreadable", f"The DICOMDIR has more than {MAX_RECORDS} records; name its folder instead.")
        if not records:
            raise DataError("dicomdir-unreadable", "The DICOMDIR holds no records; name its folder to take in all of it.")
        referenced = [_reference(record) for record in records]
    listing = Listing(records=len(records))
    names: dict[Path, dict[str, str]] = {}
    seen: set[Path] = set()
    for number, parts in enumerate(referenced, start=1):
        if not parts:
            continue
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            listing.outside.append(number)
            continue
        found = _find(root, parts, names)
        if found is None:
            listing.absent.append(number)
        elif not paths.is_inside(found, root):
            listing.outside.append(number)
        elif found not in seen:
            seen.add(found)
            listing.files.append(found)
    return listing


def _reference(record: Dataset) -> list[str]:
    """The components of ReferencedFileID; [] for records without a file or out of use."""
    in_use = record.get("RecordInUseFlag")
    if isinstance(in_use, int) and in_use == 0:
        return []
    values = texts(record, "ReferencedFileID")
    # A single value with separators is not valid, and is read as one path all the same.
    return values[0].split("\\") if len(values) == 1 else values


def _find(root: Path, parts: list[str], names: dict[Path, dict[str, str]]) -> Path | None:
    """The regular file at this place; every folder is listed at most once."""
    place = root
    for part in parts:
        if not paths.exists(place / part):
            if place not in names:
                names[place] = {child.name.casefold(): child.name for child in paths.children(place)}
            part = names[place].get(part.casefold(), "")
            if not part:
                return None
        place = place / part
    return place if paths.is_file(place) else None
