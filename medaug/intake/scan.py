"""Finding images: what the source is, which files hold images, and what folders and lists say about them.

Content decides what a file is, never its extension. Links that leave the source are not followed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medaug import storage
from medaug.errors import DataError
from medaug.intake.records import IntakeOptions, Item, partial_folder, quarantine_name, sha_of
from medaug.io import dicom, nifti, npz, paths, raster
from medaug.io.dicomdir import is_dicomdir, read_dicomdir
from medaug.io.picture import Picture

SPLIT_NAMES = {
    **dict.fromkeys(("training", "train", "trn"), "training"),
    **dict.fromkeys(("validation", "val", "valid"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "dicomdir", "ehthumbs.db", "icon\r"})
IGNORED_FOLDERS = frozenset({"__macosx", "$recycle.bin"})
SIDE_FILES = (
    ".csv",
    ".tsv",
    ".xlsx",
    ".xls",
    ".txt",
    ".md",
    ".json",
    ".yaml",
    ".yml",
    ".xml",
    ".html",
    ".htm",
    ".pdf",
    ".exe",
    ".inf",
    ".ini",
)
IMAGE_SUFFIXES = {
    **dict.fromkeys((*raster.SUFFIXES, ".gif"), "raster"),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "dicom"),
    **dict.fromkeys((".nii", ".nii.gz"), "nifti"),
}
RASTER_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8")
MAX_FILES = 1_000_000
MAX_LISTED = 1_000_000
PATIENT_FIELDS = ("patient", "patient_id", "subject", "subject_id")


@dataclass
class Scan:
    """What was found in a source.

    Attributes:
        items: image files, sorted by relative path.
        layout: "folder", "npz" or "datalist".
        has_splits: the source itself says which split every image is in.
        ignored: files that were skipped, counted by why.
        quarantine: rows for files that should be images and cannot be.
        places: what the quarantine calls such a file -> its path inside the source; for the mapping table only.
        class_names: names for integer labels, where the source has a table of them.
    """

    items: list[Item]
    layout: str
    has_splits: bool = False
    ignored: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, str]] = field(default_factory=list)
    class_names: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict, repr=False)

    def leave_out(self, item: Item, code: str, reason: str) -> None:
        """One row of the quarantine."""
        name = quarantine_name(item)
        self.places[name] = item.relative
        self.quarantine.append({"file": name, "code": code, "reason": reason})


def scan(options: IntakeOptions) -> Scan:
    """Find the images of a source without decoding them.

    A folder is taken in as it is, with all files in it, listed in a DICOMDIR or not. Where the DICOMDIR itself is the
    source, its list counts: files beside it that it does not name are left alone.

    Raises:
        DataError: the source is no folder, DICOMDIR, .npz or datalist, or has too many files; `dicomdir-unreadable`.
    """
    source = options.source
    if source.is_dir():
        return _scan_folder(options)
    if source.suffix.lower() == ".json":
        return _scan_datalist(options)
    if source.suffix.lower() == ".npz":
        return Scan([Item(source.name, source, "npz", keep_name=options.keep_names)], "npz", has_splits=True)
    if is_dicomdir(source):
        return _scan_dicomdir(source, options)
    raise DataError(
        "source-unknown",
        f"The source must be a folder, a DICOMDIR, a MedMNIST .npz or a datalist .json; got a {source.suffix or 'plain'} file.",
    )


def read_pictures(item: Item, strict: bool = False) -> Iterator[tuple[Picture, str | None, str | None]]:
    """The pictures of one item with the split and label that the file itself gives (archives only).

    One for each chosen slice of a volume or frame of a multi-frame file; `acquisition` says which ("slice_index").

    Args:
        item: a file of the source.
        strict: refuse NIfTI whose qform and sform differ.

    Raises:
        DataError: the file cannot be used.
    """
    if item.kind == "npz":
        for split, label, picture in npz.read_medmnist(item.path):
            yield picture, split, str(label)
    elif item.kind == "nifti":
        yield from ((picture, None, None) for picture in nifti.read_nifti(item.path, strict=strict, chosen=item.slices))
    elif item.kind == "dicom":
        for picture in dicom.read_frames(item.path, item.slices, item.unchanged_sha256()):
            if item.slice_index is not None:
                picture.acquisition["slice_index"] = item.slice_index
            yield picture, None, None
    else:
        yield raster.read_raster(item.path), None, None


def _scan_folder(options: IntakeOptions) -> Scan:
    found = Scan([], "folder")
    root = options.source.resolve()
    skipped = {options.out.resolve(), partial_folder(options.out).resolve()}
    table = paths.resolved(options.labels) if options.labels else None
    for path in _walk(root, skipped, found.ignored):
        if path == table:
            continue
        relative = path.relative_to(root).as_posix()
        kind = kind_of(path)
        if kind:
            found.items.append(Item(relative, path, kind, keep_name=options.keep_names))
        elif path.name.lower().endswith(SIDE_FILES):
            found.ignored["side-file"] += 1
        else:
            reason = "The content is no PNG, JPEG, TIFF, BMP, DICOM or NIfTI image."
            found.leave_out(Item(relative, path, "dicom"), "not-an-image", reason)
    found.items.sort(key=lambda item: item.relative)
    if len(found.items) == 1 and found.items[0].kind == "npz":
        return Scan(found.items, "npz", True, found.ignored, found.quarantine, places=found.places)
    _read_folders(found)
    return found


def _scan_dicomdir(source: Path, options: IntakeOptions) -> Scan:
    """The files that a DICOMDIR names inside its folder; rows for those that are absent or outside."""
    listing = read_dicomdir(source)
    found = Scan([], "folder")
    root = source.parent.resolve()
    for path in listing.files:
        item = Item(path.relative_to(root).as_posix(), path, "dicom", keep_name=options.keep_names)
        if kind_of(path) == "dicom":
            found.items.append(item)
        else:
            found.leave_out(item, "not-an-image", "The DICOMDIR names a file that is no DICOM.")
    for numbers, code, reason in (
        (listing.absent, "image-missing", "The DICOMDIR names a file that is not there."),
        (listing.outside, "path-outside-source", "The DICOMDIR names a file outside its folder, which is not read."),
    ):
        found.quarantine += [{"file": f"DICOMDIR record {number}", "code": code, "reason": reason} for number in numbers]
    found.items.sort(key=lambda item: item.relative)
    return found


def _walk(root: Path, skipped: set[Path], ignored: Counter[str]) -> Iterator[Path]:
    """Regular files below `root`, in sorted order, without hidden and system files and without links that leave it."""
    total = 0
    for folder, names, files in os.walk(root, followlinks=False):
        kept = []
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or name.lower() in IGNORED_FOLDERS or path in skipped:
                ignored["hidden-or-system"] += 1
            elif path.is_symlink():
                ignored["linked-folder"] += 1
            else:
                kept.append(name)
        names[:] = kept
        if not kept and not files:
            ignored["empty-folder"] += 1
        for name in sorted(files):
            path = Path(folder, name)
            total += 1
            if total > MAX_FILES:
                raise DataError("too-many-files", f"The source has more than {MAX_FILES} files; take it in by parts.")
            if name.startswith(".") or name.lower() in IGNORED_NAMES:
                ignored["hidden-or-system"] += 1
            elif path.is_symlink() and paths.resolved(path) is None:
                ignored["link-in-a-loop"] += 1
            elif path.is_symlink() and not paths.is_inside(path, root):
                ignored["link-outside-source"] += 1
            elif paths.is_file(path):
                yield path
            else:
                ignored["not-a-regular-file"] += 1


def kind_of(path: Path) -> str | None:
    """ "raster", "dicom", "nifti", "npz" by content; by extension where broken content says nothing; else None."""
    name = path.name.lower()
    try:
        with open(path, "rb") as stream:
            head = stream.read(352)
    except (OSError, ValueError):
        head = b""
    # First: the preamble may hold anything, and a TIFF header is foreseen there (PS3.10 7.1).
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(RASTER_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "raster"
    if head[344:348] in (b"n+1\0", b"n+2\0") or head[4:8] == b"n+2\0" or (head[:2] == b"\x1f\x8b" and name.endswith(".nii.gz")):
        return "nifti"
    if head[:4] == b"PK\3\4" and name.endswith(".npz"):
        return "npz"
    for suffix, kind in IMAGE_SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    if name.endswith(SIDE_FILES) or not head:
        return None
    return "dicom" if dicom.is_dicom(path) else None


def _read_folders(found: Scan) -> None:
    """Labels from <class>/..., splits and labels from <split>/<class>/..., below any folder that holds everything."""
    parts = [PurePosixPath(item.relative).parts[:-1] for item in found.items]
    while parts and all(len(part) >= 2 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    top = {part[0].casefold() for part in parts if part}
    splits = {SPLIT_NAMES[name] for name in top if name in SPLIT_NAMES}
    by_split = "training" in splits and (len(splits) >= 2 or len(top) == 1)
    for item, part in zip(found.items, parts, strict=True):
        if by_split:
            item.split = SPLIT_NAMES.get(part[0].casefold()) if part else None
            part = part[1:] if item.split else ()
        item.label = part[0] if part else None
    found.has_splits = by_split and len(splits) >= 2


def _scan_datalist(options: IntakeOptions) -> Scan:
    path = options.source
    if path.stat().st_size > 1 << 28:
        raise DataError("datalist-too-large", "The datalist has more than 256 MB; split it.")
    data = storage.read_json(path)
    lists = (
        {key: value for key, value in data.items() if key.casefold() in SPLIT_NAMES and isinstance(value, list)}
        if isinstance(data, dict)
        else {}
    )
    if not lists or sum(map(len, lists.values())) > MAX_LISTED:
        raise DataError(
            "datalist-malformed",
            "A datalist is a JSON object with lists named training, validation or test; none was found, or it is too long.",
        )
    found = Scan([], "datalist", class_names=_class_names(data))
    root = path.parent.resolve()
    for key, entries in lists.items():
        for entry in entries:
            _add_entry(found, root, SPLIT_NAMES[key.casefold()], entry, options)
    found.items.sort(key=lambda item: (item.relative, item.split or ""))
    found.has_splits = len({item.split for item in found.items}) >= 2 and any(item.split == "training" for item in found.items)
    return found


def _class_names(data: Mapping[str, Any]) -> dict[str, str]:
    names = data.get("labels")
    return {str(key): str(value) for key, value in names.items()} if isinstance(names, dict) else {}


def _add_entry(found: Scan, root: Path, split: str, entry: Any, options: IntakeOptions) -> None:
    fields = {"image": entry} if isinstance(entry, str) else entry
    image = fields.get("image") if isinstance(fields, dict) else None
    image = image[0] if isinstance(image, list) and len(image) == 1 else image
    if not isinstance(image, str) or not image or "\0" in image:
        found.quarantine.append(
            {"file": "datalist entry", "code": "datalist-malformed", "reason": "An entry names no single image."}
        )
        return
    path = Path(root, image)
    item = Item(image, path, "raster", _scalar(fields.get(options.label_column or "label")), split)
    item.keep_name = options.keep_names
    item.group = _scalar(fields.get(options.group_column or "group")) or ""
    names = (options.patient_column,) if options.patient_column else PATIENT_FIELDS
    item.patient = next((value for name in names if (value := _scalar(fields.get(name)))), "")
    code, reason = "", ""
    real = paths.resolved(path)
    if real is not None and not real.is_relative_to(root):
        code, reason = "path-outside-source", "The entry points outside the folder of the datalist."
    elif real is None or not paths.is_file(path):
        code, reason = "image-missing", "The datalist names an image that is not there."
    elif (kind := kind_of(path)) in (None, "npz"):
        code, reason = "not-an-image", "The content is no PNG, JPEG, TIFF, BMP, DICOM or NIfTI image."
    if code or real is None:
        found.leave_out(item, code, reason)
        return
    item.kind, item.relative = str(kind), real.relative_to(root).as_posix()
    found.items.append(item)


def _scalar(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or isinstance(value, (list, dict)) else str(value)


def source_sha256(found: Scan, options: IntakeOptions) -> str:
    """sha256 over every image file's place and content and the label table: tells whether a source changed."""
    threads = max(1, options.workers)  # hashing and reading let other threads run
    with ThreadPoolExecutor(threads) as pool:
        # A task for each thread, not for each file: tasks that wait take more memory than the items.
        for _ in pool.map(_hash_all, (found.items[first::threads] for first in range(threads))):
            pass
    rows = sorted((item.relative, item.sha256) for item in found.items)
    extra = [sha_of(path) for path in (options.labels, options.source if found.layout == "datalist" else None) if path]
    return storage.sha256_json([rows, extra, sorted(row["file"] for row in found.quarantine)])


def _hash_all(items: Sequence[Item]) -> None:
    for item in items:
        item.hash()
