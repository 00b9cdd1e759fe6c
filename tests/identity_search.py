"""Looks for identifying strings in everything that a run leaves behind: files whatever their packing, names, text.

    search = IdentitySearch(["Quixote^Alonso", "19530917"])
    search.folder(tmp_path / "cohort"); search.text(caplog.text)
    assert search.found == []

Independent of the package: it must not share a mistake with what it checks.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ENCODINGS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "utf-32-le")
START = 4  # bytes; every pattern has as many


class IdentitySearch:
    """Collects where any of the strings occurs.

    Args:
        secrets: looked for in any case, in UTF-8, Latin-1, UTF-16 and UTF-32, percent- and JSON-escaped.

    Attributes:
        found: (place, secret) of every hit.
        looked_at: number of byte strings seen, unpacked ones included; of equal ones the first is searched.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self.patterns: dict[bytes, str] = {}
        for secret in secrets:
            escaped = secret.encode("ascii", "backslashreplace").decode()
            percent = "".join(c if c.isalnum() else "".join(f"%{b:02x}" for b in c.encode()) for c in secret)
            for form in {secret, secret.lower(), escaped.lower(), percent.lower(), secret.replace("^", " ").lower()}:
                for encoding in ENCODINGS:
                    try:
                        self.patterns[form.encode(encoding).lower()] = secret
                    except UnicodeEncodeError:
                        continue
        self._by_start: dict[bytes, list[bytes]] = defaultdict(list)
        self._first, self._second = np.zeros(1 << 16, bool), np.zeros(1 << 16, bool)
        for pattern in self.patterns:
            assert len(pattern) >= START, pattern
            self._by_start[pattern[:START]].append(pattern)
            self._first[int.from_bytes(pattern[:2], "big")] = self._second[int.from_bytes(pattern[2:4], "big")] = True
        self._searched: set[tuple[bytes, int]] = set()
        self.found: list[tuple[str, str]] = []
        self.looked_at = 0

    def folder(self, root: Path) -> None:
        """Every file below, and every name."""
        for path in sorted(Path(root).rglob("*")):
            self.text(path.name, place=f"name of {path.name}")
            if path.is_file():
                self.data(path.read_bytes(), path.name)

    def text(self, text: str, place: str = "text") -> None:
        """A log, a message, a repr."""
        self.data(text.encode("utf-8", "surrogateescape"), place)

    def data(self, data: bytes, place: str, depth: int = 0) -> None:
        """Bytes as they are, and unpacked if they are gzip, zip, PNG, zlib, or hold base64."""
        self.looked_at += 1
        content = (hashlib.sha256(data).digest(), depth)
        if content in self._searched:  # tracking keeps a second copy of most files
            return
        self._searched.add(content)
        lowered = data.lower()
        for position in self._starts(lowered):
            for pattern in self._by_start.get(lowered[position : position + START], ()):
                if lowered.startswith(pattern, position):
                    self.found.append((place, self.patterns[pattern]))
        if depth >= 3:
            return
        for name, inner in _inside(data):
            self.data(inner, f"{place}/{name}", depth + 1)

    def _starts(self, data: bytes) -> list[int]:
        """Where a pattern may begin: two tables of byte pairs leave few places of a file for the dictionary of the first four bytes."""
        values = np.frombuffer(data, np.uint8).astype(np.uint16)
        pairs = values[:-1] << 8 | values[1:]
        found: list[int] = np.flatnonzero(self._first[pairs[:-2]] & self._second[pairs[2:]]).tolist()
        return found


def _inside(data: bytes) -> Iterable[tuple[str, bytes]]:
    if data[:2] == b"\x1f\x8b":
        yield "gzip", gzip.decompress(data)
    elif data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield "zip listing", "\n".join(archive.namelist()).encode()
            for name in archive.namelist():
                yield name, archive.read(name)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from _png_chunks(data)
    else:
        for number, found in enumerate(re.finditer(rb"base64,([A-Za-z0-9+/=\s]{64,})", data)):
            yield f"base64 {number}", base64.b64decode(found[1])


def _png_chunks(data: bytes) -> Iterable[tuple[str, bytes]]:
    position, pixels = 8, b""
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        body = data[position + 8 : position + 8 + length]
        if kind == b"IDAT":
            pixels += body
        elif kind in (b"zTXt", b"iTXt", b"iCCP"):
            for start in range(len(body)):
                if body[start : start + 1] == b"\x78":
                    try:
                        yield "text chunk", zlib.decompress(body[start:])
                        break
                    except zlib.error:
                        continue
        position += 12 + length
    if pixels:
        yield "pixels", zlib.decompress(pixels)


def spellings_of_date(date: str) -> list[str]:
    """A date YYYYMMDD as it may be written; for `IdentitySearch`."""
    year, month, day = date[:4], date[4:6], date[6:]
    return [date, f"{year}-{month}-{day}", f"{day}.{month}.{year}", f"{month}/{day}/{year}", f"{day}/{month}/{year}"]
