"""Errors a user can act on: one coded sentence each, and the exit code the command line answers with.

A message names the thing, what was expected, what came, and the way out. It never holds a patient's name,
identifier, birth date, accession number or a path that could hold one.
"""

from __future__ import annotations


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
