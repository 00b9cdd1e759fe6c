"""What the steps of intake need of every image, but seldom: on the disk instead of in memory.

The files have no name, so that they are gone when the process ends, however it ends. They are read piece by piece and never
mapped into memory, for mapped pages count as memory in use.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage

THUMBNAIL_SIZE = 32
_THUMBNAIL_BYTES = 2 * THUMBNAIL_SIZE**2  # float16


def plain(value: Any) -> Any:
    """A value as JSON holds it; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class Spool:
    """Facts and thumbnails of the images of one intake.

    Args:
        folder: on whose disk they lie; None takes the system's folder for temporary files.

    Raises:
        StorageError: `disk-full` and others, also by `put` and `add`.
    """

    def __init__(self, folder: Path | None) -> None:
        with storage.storage_errors("temporary files"):
            self._facts = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as someone looks at it
            self._thumbnails = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._size = self._count = 0
        self._last: tuple[int, dict[str, Any]] = (-1, {})

    def put(self, facts: Mapping[str, Any]) -> Facts:
        """Store facts as JSON holds them: see `plain`."""
        data = json.dumps(plain(facts)).encode() + b"\n"
        with storage.storage_errors("temporary files"):
            self._facts.seek(0, os.SEEK_END)
            self._facts.write(data)
        start, self._size = self._size, self._size + len(data)
        return Facts(self, start)

    def facts_at(self, start: int) -> dict[str, Any]:
        """The facts that begin at a byte; the last ones are kept, for they are looked at field by field."""
        if self._last[0] != start:
            self._facts.seek(start)
            self._last = start, json.loads(self._facts.readline())
        return self._last[1]

    def add(self, thumbnail: np.ndarray) -> int:
        """Store a thumbnail, (32, 32) float16; returns its place."""
        with storage.storage_errors("temporary files"):
            self._thumbnails.seek(0, os.SEEK_END)
            self._thumbnails.write(np.asarray(thumbnail, np.float16).tobytes())
        self._count += 1
        return self._count - 1

    def thumbnail(self, place: int) -> bytes:
        """The bytes of one thumbnail."""
        self._thumbnails.seek(place * _THUMBNAIL_BYTES)
        return self._thumbnails.read(_THUMBNAIL_BYTES)


class Facts(Mapping[str, Any]):
    """Facts of one image in a `Spool`, read when they are looked at; copied and pickled as a plain dict."""

    __slots__ = ("_spool", "_start")

    def __init__(self, spool: Spool, start: int) -> None:
        self._spool, self._start = spool, start

    def __getitem__(self, key: str) -> Any:
        return self._spool.facts_at(self._start)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spool.facts_at(self._start))

    def __len__(self) -> int:
        return len(self._spool.facts_at(self._start))

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    def extended(self, **more: Any) -> Facts:
        """These facts with others at the end."""
        return self._spool.put({**self, **more})


class Thumbnails:
    """Thumbnails of a `Spool` at chosen places: an array (N, 32, 32) float16 of which only a part is in memory at a time.

    A slice gives an array, a list of indices other thumbnails.
    """

    def __init__(self, spool: Spool, places: Sequence[int] | np.ndarray) -> None:
        self._spool, self._places = spool, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray):
            return Thumbnails(self._spool, self._places[key])
        places = self._places[key]
        found = np.empty((np.size(places), THUMBNAIL_SIZE**2), np.float16)
        for row, place in zip(found, np.atleast_1d(places), strict=True):
            row[:] = np.frombuffer(self._spool.thumbnail(int(place)), np.float16)
        return found.reshape(*np.shape(places), THUMBNAIL_SIZE, THUMBNAIL_SIZE)
