"""What is to be sent: the DICOM files of a folder, and a journal of what has become of each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medaug import storage
from medaug.errors import DataError
from medaug.io.dicom import is_dicom
from medaug.pacs.head import is_uid, read_file_head

MAX_FILES = 1_000_000


@dataclass(frozen=True)
class Letter:
    """One file to send."""

    path: Path
    sha256: str
    sop_class: str
    sop: str
    syntax: str
    synthetic: bool


def collect(folder: Path) -> tuple[list[Letter], int]:
    """The DICOM files below `folder`, in the order of their paths, and the number of other files.

    Hidden files and folders, DICOMDIR and links are left out.

    Raises:
        DataError: `folder-missing`, `no-dicom`, `too-many-files`, or a DICOM file that cannot be identified.
    """
    if not Path(folder).is_dir():
        raise DataError("folder-missing", "The folder to send is not there.")
    letters: list[Letter] = []
    others = 0
    for path in _walk(Path(folder)):
        if not is_dicom(path):
            others += 1
            continue
        head = read_file_head(path)
        if not (is_uid(head.sop_class) and is_uid(head.sop)):
            raise DataError(
                "image-unreadable", f"File {len(letters) + others + 1} in order of path has no valid SOP UIDs; export it again."
            )
        letters.append(Letter(path, storage.sha256_file(path), head.sop_class, head.sop, head.syntax, head.synthetic))
    if not letters:
        raise DataError("no-dicom", f"The folder holds no DICOM file ({others} others); make some with `medaug export`.")
    return letters, others


def _walk(folder: Path) -> Iterator[Path]:
    number = 0
    for root, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or name.upper() == "DICOMDIR" or path.is_symlink() or not path.is_file():
                continue
            number += 1
            if number > MAX_FILES:
                raise DataError("too-many-files", f"The folder holds more than {MAX_FILES} files; send it in parts.")
            yield path


class Journal:
    """One line of JSON per attempt: sha256 of the file, status, code. A torn last line is ignored when read.

    It is appended to, since rewriting it for each of many files would take longer than sending them. An entry that a
    crash loses costs one image sent twice, which an archive takes as the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status: dict[str, str] = {}
        with storage.storage_errors("the journal"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            self._stream.seek(0)
            for line in self._stream:
                self._take(line)
            if self._stream.tell() and not self._ends_with_newline():
                self._stream.write("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with storage.storage_errors("the journal"), self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def note(self, sha256: str, status: str, code: str = "") -> None:
        """Write down what became of a file."""
        self.status[sha256] = status
        entry: dict[str, Any] = {"sha256": sha256, "status": status} | ({"code": code} if code else {})
        with storage.storage_errors("the journal"):
            self._stream.write(json.dumps(entry) + "\n")
            self._stream.flush()

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self.status[str(entry["sha256"])] = str(entry["status"])
        except (ValueError, KeyError, TypeError):
            pass

    def _ends_with_newline(self) -> bool:
        with open(self.path, "rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"
