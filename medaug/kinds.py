"""What values of a settings file may be, in words and as a test, so that a wrong one is named before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from medaug.errors import ConfigError

Kind = tuple[str, Callable[[Any], bool]]  # what a value must be, in words and as a test

__all__ = ["MAPPING", "NUMBER", "SWITCH", "TEXT", "TEXTS", "WHOLE", "Kind", "check_kinds", "numbers", "one_or_several"]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


TEXT: Kind = ("a text", _is_text)
WHOLE: Kind = ("a whole number", _is_whole)
NUMBER: Kind = ("a number", _is_number)
SWITCH: Kind = ("true or false", lambda value: isinstance(value, bool))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value))
MAPPING: Kind = (
    "a mapping of names to values",
    lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
)


def numbers(count: int) -> Kind:
    """A list of so many numbers."""
    return (
        f"a list of {count} numbers",
        lambda value: isinstance(value, list) and len(value) == count and all(map(_is_number, value)),
    )


def one_or_several(kind: Kind) -> Kind:
    """One such value or a list of at least one."""
    words, fits = kind
    return (
        f"{words}, or a list of such",
        lambda value: all(map(fits, value)) and bool(value) if isinstance(value, list) else fits(value),
    )


def check_kinds(what: str, content: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuse a value of the wrong kind; null stands for a key that is left out, and keys without a kind are not looked at.

    Raises:
        ConfigError: `config-value`.
    """
    for key, value in content.items():
        words, fits = kinds.get(key, ("", lambda _: True))
        if value is not None and not fits(value):
            raise ConfigError("config-value", f"{key} of {what} must be {words}, got {str(value)[:40]!r}.")
