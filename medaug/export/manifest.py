"""The manifest of an export: what was asked, what every file holds, and the check that it is still so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from medaug import __version__, storage
from medaug.errors import ConfigError, DataError
from medaug.export import dicom, nifti, png
from medaug.io import limits

FILE_NAME = "manifest.json"
FORMAT = 1
SUFFIXES = {"dicom": ".dcm", "nifti": ".nii", "png": ".png"}
_MARKED: dict[str, Callable[[bytes], bool]] = {
    "dicom": dicom.says_synthetic,
    "nifti": nifti.says_synthetic,
    "png": png.says_synthetic,
}
MAX_JOURNAL_BYTES = 1 << 28
_JOURNAL = re.compile(r"\.medaug/sent-[0-9a-f]{16}\.jsonl")
_ENTRY = re.compile(rb'\{"sha256": "[0-9a-f]{64}", "status": "[a-z]+"(, "code": "[\w. -]{0,64}")?\}')
Problem = tuple[str, str]  # code, words


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make `out` the folder of an export with these settings, or find that it is one already.

    Raises:
        ConfigError: `folder-not-empty` or `export-other-settings`.  DataError: the manifest is unreadable.
    """
    path = out / FILE_NAME
    if not path.is_file():
        foreign = [name for name, _ in files_of(out) if not is_leftover(name)]
        if foreign:
            raise ConfigError(
                "folder-not-empty",
                f"The output folder {out.name} holds {len(foreign)} file(s) of something else; choose a new one.",
            )
        storage.write_json(path, header(settings) | {"complete": False})
        return
    if _read(out)["settings"] != dict(settings):
        raise ConfigError(
            "export-other-settings",
            f"{out.name} holds an export of another cohort, with other options or by another release; choose a new --out.",
        )


def header(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The first lines of a manifest."""
    return {
        "format": FORMAT,
        "product": "medaug",
        "product_version": __version__,
        "notice": "Synthetic images, for research only, not for clinical use.",
        "settings": dict(settings),
    }


def write(out: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], files: list[dict[str, Any]]) -> None:
    """Write the manifest of a finished export: `files` with path, sha256, bytes and facts each."""
    content = header(settings) | {"complete": True} | dict(facts) | {"files_sha256": storage.sha256_json(files), "files": files}
    storage.write_json(out / FILE_NAME, content)


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative POSIX name and path of everything in `folder` that is no directory, sorted; links are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [Path(parent) / name for name in [*names, *links]]
    for path in sorted(found):
        name = path.relative_to(folder).as_posix()
        if name not in (FILE_NAME, storage.LOCK_NAME) and not _is_send_state(name, path):
            yield name, path


def _is_send_state(name: str, path: Path) -> bool:
    """True for what `medaug send` keeps beside the files: journals of hashes and its lock, and nothing that looks alike."""
    if path.is_symlink() or not path.is_file():
        return False
    if name == f".medaug/{storage.LOCK_NAME}":
        return path.stat().st_size == 0
    if not _JOURNAL.fullmatch(name) or path.stat().st_size > MAX_JOURNAL_BYTES:
        return False
    *lines, torn = path.read_bytes().split(b"\n")
    # A torn line is what a crash leaves, here or before a later run went on.
    return all(_ENTRY.fullmatch(line) or _is_torn(line) for line in [*lines, torn])


def _is_torn(line: bytes) -> bool:
    """True for the beginning of an entry."""
    start = b'{"sha256": "'
    if start.startswith(line):
        return True
    found = re.fullmatch(rb'\{"sha256": "([0-9a-f]{0,64})(.*)', line)
    if found is None or (found[2] and len(found[1]) < 64):
        return False
    for status in (b"sent", b"failed", b"waiting"):
        whole = b'", "status": "' + status + b'", "code": "'
        if whole.startswith(found[2]) or (
            found[2].startswith(whole) and re.fullmatch(rb"[\w. -]{0,64}\"?", found[2][len(whole) :])
        ):
            return True
    return False


def is_leftover(name: str) -> bool:
    """True for a temporary file that a killed process left behind, see `storage.write_bytes`."""
    last = PurePosixPath(name).name
    return last.startswith(".") and last.endswith(".tmp")


def verify_export(folder: Path) -> dict[str, Any]:
    """Check an export against its manifest.

    Every file must be there with its sha256, none may be missing or extra, and every image must still say, inside,
    that it is synthetic.

    Returns:
        Numbers of files and bytes, format, product version.

    Raises:
        DataError: names the first problem and the number of all. Codes: `export-missing`, `export-manifest-malformed`,
            `export-incomplete`, `export-manifest-changed`, `export-file-missing`, `export-file-changed`,
            `export-not-synthetic`, `export-file-extra`.
    """
    folder = Path(folder)
    if not (folder / FILE_NAME).is_file():
        raise DataError("export-missing", f"{folder.name} is no export (no {FILE_NAME}); make one with `medaug export`.")
    manifest = _read(folder)
    if manifest["complete"] is not True:
        raise DataError("export-incomplete", f"The export {folder.name} was not finished; run the same command again to go on.")
    files = manifest["files"]
    problems = list(_problems(folder, manifest))
    if problems:
        code, words = problems[0]
        raise DataError(
            code,
            f"The export {folder.name} has {len(problems)} problem(s), the first: {words}; export it again into a new folder.",
        )
    return {
        "files": len(files),
        "images": sum(row["kind"] == "image" for row in files),
        "bytes": sum(row["bytes"] for row in files),
        "format": manifest["settings"]["format"],
        "product_version": manifest["product_version"],
        "verified": True,
    }


def _problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    files = manifest["files"]
    if storage.sha256_json(files) != manifest["files_sha256"]:
        yield "export-manifest-changed", f"the list of files in {FILE_NAME} is not the one that was written"
    marked = _MARKED[manifest["settings"]["format"]]
    present = dict(files_of(folder))
    for row in files:
        path = present.pop(row["path"], None)
        problem = ("export-file-missing", f"{row['path']} is missing") if path is None else _problem_of(path, row, marked)
        if problem:
            yield problem
    for name in present:
        yield "export-file-extra", f"{name} does not belong to it"


def _problem_of(path: Path, row: Mapping[str, Any], marked: Callable[[bytes], bool]) -> Problem | None:
    changed = ("export-file-changed", f"{row['path']} was changed")
    if path.is_symlink() or not path.is_file() or path.stat().st_size != row["bytes"]:
        return changed
    data = path.read_bytes()
    if storage.sha256_bytes(data) != row["sha256"]:
        return changed
    if row["kind"] == "image" and not _is_marked(data, marked):
        return "export-not-synthetic", f"{row['path']} does not say that it is synthetic"
    return None


def _is_marked(data: bytes, marked: Callable[[bytes], bool]) -> bool:
    try:
        return marked(data)
    except DataError:
        return False


def _read(folder: Path) -> dict[str, Any]:
    """The manifest, with every field that is relied on of the right type."""
    limits.check_file(folder / FILE_NAME)
    try:
        manifest = storage.read_json(folder / FILE_NAME)
    except DataError as error:
        raise _malformed(folder) from error
    if not _is_well_formed(manifest):
        raise _malformed(folder)
    return dict(manifest)


def _malformed(folder: Path) -> DataError:
    return DataError(
        "export-manifest-malformed",
        f"{FILE_NAME} of {folder.name} is no JSON, or lacks or mistypes a field; export again into a new folder.",
    )


def _is_well_formed(manifest: Any) -> bool:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("settings"), dict):
        return False
    if manifest["settings"].get("format") not in SUFFIXES or not isinstance(manifest.get("complete"), bool):
        return False
    if not manifest["complete"]:
        return True
    files = manifest.get("files")
    types = {"path": str, "sha256": str, "bytes": int, "kind": str}
    rows_good = isinstance(files, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in types.items()) for row in files
    )
    return rows_good and isinstance(manifest.get("files_sha256"), str) and "product_version" in manifest
