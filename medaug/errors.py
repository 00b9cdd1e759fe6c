"""Errors a user can act on: one coded sentence each, and the exit code the command line answers with.

A message names the thing, what was expected, what came, and the way out. It never holds a patient's name,
identifier, birth date, accession number or a path that could hold one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MedaugError(Exception):
    """Base of every expected failure.

    Args:
        code: short kebab-case name of the fault, stable across releases, for example ``image-unreadable``.
        message: one sentence for the user.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[MedaugError], tuple[str, str]]:
        return type(self), (self.code, self.message)


class ConfigError(MedaugError):
    """Wrong usage, option, configuration or weights file."""

    exit_code = 2


class DataError(MedaugError):
    """The input holds nothing usable, or one file of it cannot be used."""

    exit_code = 3


class LeakageError(MedaugError):
    """A group of the validation or test split reached training, a generator, a guide or a filter."""

    exit_code = 4


class StorageError(MedaugError):
    """Disk, lock or network trouble."""

    exit_code = 5


class MissingDependencyError(ConfigError):
    """An optional package is not installed; the message names the extra."""


@contextmanager
def well_formed(code: str, what: str, way_out: str, *also: type[Exception]) -> Iterator[None]:
    """Turn what happens when a record that was read lacks a field, or has one of another type, into one refusal.

    Args:
        code: of the refusal.
        what: the thing, without any patient's data: "A file of the page".
        way_out: what to do about it.
        also: further errors that mean the same.

    Raises:
        DataError: with the name of a missing field, or the kind of the error alone, since its text may hold what was read.
    """
    others: tuple[type[Exception], ...] = (AttributeError, IndexError, TypeError, ValueError, *also)
    try:
        yield
    except KeyError as error:
        key = error.args[0] if error.args else None
        named = f"the field {key!r}" if isinstance(key, str) and len(key) <= 40 else "a field"
        raise DataError(code, f"{what} lacks {named}; {way_out}.") from error
    except others as error:
        raise DataError(code, f"{what} lacks or mistypes a field ({type(error).__name__}); {way_out}.") from error
