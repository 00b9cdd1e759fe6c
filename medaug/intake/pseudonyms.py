"""Pseudonyms by keyed hash: the same patient has the same name in every intake with the same key, and no other has it.

A plain hash of a patient's identifier is no pseudonym, for there are few identifiers and a list of all of them is hashed
in minutes. HMAC-SHA256 (RFC 2104) with a secret key of 256 bits cannot be tried out. The key lies in a file that only its
owner may read, outside every source and output.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import hmac
import io
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from medaug import storage
from medaug.errors import ConfigError, DataError

KEY_VARIABLE = "MEDAUG_PSEUDONYM_KEY"
KEY_BYTES = 32
DIGITS = 16
MAPPING_COLUMNS = ("kind", "pseudonym", "original")


class Pseudonyms:
    """Makes pseudonyms with the key of a file, which is read, or made, when the first one is needed.

    Args:
        path: of the key file; None makes a key for this process alone, as a dry run does.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @cached_property
    def _key(self) -> bytes:
        if self._path is None:
            return secrets.token_bytes(KEY_BYTES)
        if not self._path.exists():
            _create(self._path)
        return _read(self._path)

    def hexadecimal(self, kind: str, *values: str, digits: int = DIGITS) -> str:
        """The first hex digits of the HMAC-SHA256 of a kind of identifier and its value."""
        message = json.dumps([kind, *values], ensure_ascii=True).encode()
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:digits]

    def patient(self, *known: str) -> str:
        """Name of a patient, or of several that were joined, by their normalised identifiers."""
        return "p" + self.hexadecimal("patient", *sorted(known))

    def uid(self, original: str) -> str:
        """A UID in place of another one: 2.25. and 122 keyed bits as a version 4 UUID would have (PS3.5 B.2)."""
        digits = bytearray.fromhex(self.hexadecimal("uid", original, digits=32))
        digits[6], digits[8] = digits[6] & 0x0F | 0x40, digits[8] & 0x3F | 0x80
        return f"2.25.{int.from_bytes(digits, 'big')}"

    @property
    def fingerprint(self) -> str:
        """Tells keys apart and gives nothing away, because the key itself is random."""
        return self.hexadecimal("key fingerprint")


def key_path(chosen: Path | None) -> Path:
    """Where the key lies: as chosen, else $MEDAUG_PSEUDONYM_KEY, else medaug/pseudonym.key in the user's configuration."""
    if chosen is not None:
        return Path(chosen).expanduser()
    named = os.environ.get(KEY_VARIABLE)
    if named:
        return Path(named).expanduser()
    configuration = os.environ.get("XDG_CONFIG_HOME")
    # The XDG specification ignores a relative path here.
    root = Path(configuration) if configuration and os.path.isabs(configuration) else Path.home() / ".config"
    return root / "medaug" / "pseudonym.key"


def check_outside(path: Path, folders: Iterable[Path], what: str, option: str) -> Path:
    """The path with its links resolved.

    Raises:
        ConfigError: `secret-inside` if it lies in one of the folders, which are handed on.
    """
    real = Path(path).expanduser().resolve()
    if any(real.is_relative_to(folder.resolve()) for folder in folders):
        raise ConfigError(
            "secret-inside",
            f"The {what} must lie outside the source and every output, which may be handed on; name another path with {option}.",
        )
    return real


def _create(path: Path) -> None:
    """Write a new key that only its owner may read; if another process was faster, its key stays."""
    with storage.storage_errors("the pseudonym key"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".pseudonym.")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(KEY_BYTES) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        mode, text = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError("pseudonym-key-unreadable", f"The pseudonym key cannot be read ({error.strerror}).") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            "pseudonym-key-exposed", "Others may read the pseudonym key; run `chmod 600` on it, or make a new one if they did."
        )
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) < KEY_BYTES:
        raise ConfigError(
            "pseudonym-key-malformed",
            f"A pseudonym key is a line of at least {2 * KEY_BYTES} hexadecimal digits; name an absent file to have one made.",
        )
    return key


def write_mapping(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write which pseudonym means whom, readable for the owner alone; rows of an earlier mapping stay.

    Args:
        path: of the CSV with columns kind, pseudonym, original.
        rows: of these three.

    Raises:
        DataError: `mapping-not-ours` if the file holds something else.  StorageError: it cannot be written.
    """
    known = {tuple(row) for row in rows} | (_earlier(path) if path.exists() else set())
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(MAPPING_COLUMNS)
    writer.writerows(sorted(known))
    with storage.storage_errors("the mapping table"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".mapping.")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="", errors="surrogateescape") as stream:
                stream.write(buffer.getvalue())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _earlier(path: Path) -> set[tuple[str, ...]]:
    other = DataError("mapping-not-ours", "The mapping table to write exists and is something else; choose another --mapping.")
    try:
        with open(path, encoding="utf-8", newline="", errors="surrogateescape") as stream:
            rows = [tuple(row) for row in csv.reader(stream)]
    except (OSError, csv.Error) as error:
        raise other from error
    if not rows or rows[0] != MAPPING_COLUMNS or any(len(row) != len(MAPPING_COLUMNS) for row in rows):
        raise other
    return set(rows[1:])
