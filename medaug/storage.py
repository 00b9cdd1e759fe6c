"""Files that are whole or absent: temporary name, fsync, rename; one writer per folder."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from medaug.errors import DataError, StorageError

LOCK_NAME = ".medaug.lock"


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON text of `value` (sorted keys, no spaces)."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode())


def sha256_rows(rows: Iterable[Any]) -> str:
    """`sha256_json` of a list of values that come one after the other."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        digest.update(b"," * (number > 0) + json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode())
    digest.update(b"]")
    return digest.hexdigest()


@contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """Turn an OSError while writing `name` into a StorageError with a code the user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                "disk-full", f"No space left while writing {name}; free some space and run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                "not-writable", f"{name} cannot be written ({error.strerror}); choose an output folder you may write to."
            ) from error
        raise StorageError("storage-failed", f"Writing {name} failed: {error.strerror or error}.") from error


def write_bytes(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    A `private` file is its owner's alone (mode 0600), from its first byte on.

    Raises:
        StorageError: disk full, no permission, or any other fault of the file system.
    """
    write_pieces(path, (data,), private=private)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], *, private: bool = False) -> None:
    """`write_bytes` of what the pieces make together, which is never in memory as a whole."""
    path = Path(path)
    with storage_errors(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.writelines(pieces)
                stream.flush()
                os.fsync(stream.fileno())
            if not private:  # mkstemp gives 0600
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_staged(path: Path, data: bytes) -> None:
    """Write into a folder that nobody reads yet: neither atomic nor surely on the disk before `os.sync`.

    Raises:
        StorageError: as `write_bytes`.
    """
    with storage_errors(Path(path).name):
        Path(path).write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, default: Callable[[Any], Any] | None = None, *, private: bool = False) -> None:
    """`write_bytes` of indented JSON, ends with a newline. NaN is refused: use None and a reason.

    Args:
        default: makes JSON of an object that is none, when its turn comes.
        private: only the user may read it, see `write_bytes`.
    """
    # Piece by piece: json.dumps holds every token of an indented text in a list first, five times the text's own size.
    encoder = json.JSONEncoder(indent=2, allow_nan=False, ensure_ascii=False, default=default)
    write_pieces(path, (piece.encode() for piece in chain(encoder.iterencode(value), "\n")), private=private)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """`write_bytes` of a comma-separated table with a header line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            "file-missing", f"{Path(path).name} was expected in {Path(path).parent.name}/ and is not there."
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(
            "json-unreadable", f"{Path(path).name} is not readable JSON; make it again with the command that wrote it."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process until the block ends; the system releases it if the process dies.

    Raises:
        StorageError: another process holds it (code `folder-in-use`).
    """
    folder = Path(folder)
    with storage_errors(folder.name):
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / LOCK_NAME, "a+")  # noqa: SIM115 - closed below, after the lock
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                "folder-in-use",
                f"The output folder {folder.name} is in use by another medaug process; wait for it or choose another --out.",
            ) from error
        yield
    finally:
        stream.close()
