"""A folder of received DICOM files: whole or absent, one file per SOP instance, names that say nothing.

    FOLDER/ab/ab12....dcm       first 32 hex digits of the sha256 of the SOP Instance UID
    FOLDER/.medaug/             state, mode 0700; `incoming` holds what is still being written

Files have mode 0600 and folders 0700: they hold patients.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from medaug import storage
from medaug.errors import StorageError
from medaug.io.limits import MAX_FILE_BYTES

RECEIVED, ALREADY, CONFLICT = "received", "already", "conflict"
ABORTED = "transfer-aborted"  # the connection ended in the middle of a file
_CHUNK = 1 << 20


class Incoming:
    """One file on its way in. Faults of the disk are kept, not raised, so that a network thread can answer them."""

    def __init__(self, store: Store) -> None:
        self.fault: OSError | None = None
        self._size = 0
        self._stream: BinaryIO | None = None
        self.path = store.next_path()
        try:
            self._stream = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: SIM115
        except OSError as error:
            self._fail(error)

    def write(self, data: bytes | memoryview) -> None:
        """Append; does nothing after the first fault."""
        if self._stream is None:
            return
        self._size += len(data)
        try:
            if self._size > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, "file larger than the cap")
            self._stream.write(data)
        except OSError as error:
            self._fail(error)

    def finish(self) -> OSError | None:
        """Write everything through to the disk and close; the fault, if there was one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                with stream:
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                self._fail(error)
        return self.fault

    def discard(self) -> None:
        """Remove the file, unless it has got its name."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):  # flushes what is thrown away anyway
                stream.close()
        self.path.unlink(missing_ok=True)

    def _fail(self, error: OSError) -> None:
        self.fault = error
        self.discard()

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self.discard()


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter; one that is there already keeps its mode.

    Raises:
        StorageError: `not-writable`, `disk-full`, `storage-failed`.
    """
    with storage.storage_errors(Path(folder).name):
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """`storage.locked` on a private folder; one that cannot be made is said with the way out."""
    entered = False
    try:
        make_private(folder)
        with storage.locked(folder):
            entered = True
            yield
    except StorageError as error:
        if entered or error.code != "storage-failed":
            raise
        raise StorageError("not-writable", "The output folder cannot be made there; choose another --out.") from error


class Store:
    """The folder, held by this process until `close`.

    Attributes:
        counts: files by outcome: received, already, and the code of each refusal.
        fault: the last fault of the disk.
        changed: set whenever a file has come in or been refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.state = self.folder / ".medaug"
        self.counts: Counter[str] = Counter()
        self.fault: OSError | None = None
        self.changed = threading.Event()
        self._lock = threading.Lock()
        self._number = 0

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        """Lock the folder and remove what an earlier process left unfinished.

        Raises:
            StorageError: `folder-in-use`, `not-writable`, `disk-full`.
        """
        with _locked(folder):
            store = cls(folder)
            with storage.storage_errors("the output folder"):
                store.state.mkdir(mode=0o700, exist_ok=True)
                store.incoming.mkdir(mode=0o700, exist_ok=True)
                store._clear()
            try:
                yield store
            finally:
                store._clear()

    @property
    def incoming(self) -> Path:
        """Folder of unfinished files."""
        return self.state / "incoming"

    def path_of(self, sop: str) -> Path:
        """Where the image with this SOP Instance UID is, or would be."""
        name = storage.sha256_bytes(sop.encode())[:32]
        return self.folder / name[:2] / f"{name}.dcm"

    def has(self, sop: str) -> bool:
        """True if the image is here; what is here is whole."""
        return self.path_of(sop).exists()

    def number_of_files(self) -> int:
        """Images in the folder."""
        return sum(1 for _ in self.folder.glob("[0-9a-f][0-9a-f]/*.dcm"))

    def next_path(self) -> Path:
        """A fresh name in it."""
        with self._lock:
            self._number += 1
            return self.incoming / f"{self._number}.tmp"

    def commit(self, incoming: Incoming, sop: str) -> str:
        """Give a finished file its name. The first file of a SOP instance stays, whatever comes later.

        Returns:
            "received", "already" (the same bytes are here) or "conflict" (others are).

        Raises:
            StorageError: a fault of the disk, now or while the file was written; the file is gone then.
        """
        fault = incoming.finish()
        target = self.path_of(sop)
        try:
            if fault is None:
                with self._lock:
                    outcome = self._name(incoming.path, target)
        except OSError as error:
            fault = error
        if fault is not None:
            incoming.discard()
            if fault.errno != errno.EFBIG:  # of one file, not of the disk
                self.fault = fault
            with storage.storage_errors("a received image"):
                raise fault
        return outcome

    def count(self, outcome: str) -> None:
        """Note what became of one file."""
        with self._lock:
            self.counts[outcome] += 1
        self.changed.set()

    def raise_fault(self) -> None:
        """Raise the fault of the disk that a network thread met, if there was one.

        Raises:
            StorageError: `disk-full`, `not-writable`, `storage-failed`.
        """
        if self.fault is not None:
            with storage.storage_errors("a received image"):
                raise self.fault

    def _name(self, temporary: Path, target: Path) -> str:
        if target.exists():
            same = _same_bytes(temporary, target)
            temporary.unlink()
            return ALREADY if same else CONFLICT
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(temporary, target)
        return RECEIVED

    def _clear(self) -> None:
        for path in self.incoming.glob("*.tmp"):
            path.unlink(missing_ok=True)


def _same_bytes(left: Path, right: Path) -> bool:
    if left.stat().st_size != right.stat().st_size:
        return False
    with open(left, "rb") as first, open(right, "rb") as second:
        while chunk := first.read(_CHUNK):
            if chunk != second.read(_CHUNK):
                return False
    return True
