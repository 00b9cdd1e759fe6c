"""Reading single DICOM elements of untrusted files: values as written, numbers only where they are numbers."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag, Tag

from medaug.errors import DataError

DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # VR DS, PS3.5 6.2: no comma, no NaN
LOGGERS = ("pydicom", "openjpeg")
CODE = re.compile(r"[A-Z0-9 _]{1,16}")  # VR CS


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom and its decoders, whose warnings and log lines quote element values."""
    # Where they are silent already, as in reading processes, nothing is set: every change empties the caches of all loggers.
    loggers = [logger for logger in map(logging.getLogger, LOGGERS) if logger.level <= logging.CRITICAL]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)  # child loggers take their level from it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def stay_quiet() -> None:
    """Silence the loggers of `quiet` for as long as this process lives."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@cache
def tag_of(keyword: str) -> tuple[BaseTag, str]:
    """Tag and VR of a keyword; making them anew for each element takes longer than reading it."""
    tag = Tag(keyword)
    return tag, dictionary_VR(tag)


def has(dataset: Dataset, keyword: str) -> bool:
    """True if the element is there, empty or not."""
    return tag_of(keyword)[0] in dataset.keys()  # noqa: SIM118 - `in dataset` makes a tag first


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """The values of a text element as written, stripped; [] if absent or empty. Never converts, so never fails."""
    if not has(dataset, keyword):
        return []
    item = dataset.get_item(tag_of(keyword)[0])
    value = item.value if item is not None else None
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    elif isinstance(value, str) or not hasattr(value, "__iter__"):
        value = [] if value is None else [value]
    found = [_original(part).strip(" \0") for part in value]
    return found if any(found) else []


def _original(part: Any) -> str:
    return str(getattr(part, "original_string", part))


def text(dataset: Dataset, keyword: str) -> str:
    """The first value of a text element, "" if absent."""
    return (texts(dataset, keyword) or [""])[0]


def decimal(value: str) -> float | None:
    """A decimal string (VR DS) as a finite number, None for anything else."""
    number = float(value) if DECIMAL.fullmatch(value) else None
    return number if number is not None and math.isfinite(number) else None


def decimals(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite decimal numbers, or None."""
    values = [decimal(value) for value in texts(dataset, keyword)]
    return tuple(values) if len(values) == count and None not in values else None  # type: ignore[arg-type]


def double(dataset: Dataset, keyword: str) -> float | None:
    """One finite number of any numeric VR (DS, IS, FD, US ...), or None."""
    if not has(dataset, keyword):
        return None
    try:
        value = dataset.get(keyword)
        number = float(value) if isinstance(value, (int, float)) else decimal(text(dataset, keyword))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def code(dataset: Dataset, keyword: str) -> str:
    """First value of a code string (VR CS), "" if absent or malformed."""
    value = text(dataset, keyword)
    return value if CODE.fullmatch(value) else ""


def codes(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """All values of a code string; () if one of them is malformed."""
    values = texts(dataset, keyword)
    return tuple(values) if values and all(CODE.fullmatch(value) for value in values) else ()


def integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """One whole number of VR US, SS or IS.

    Raises:
        DataError: `pixel-format-invalid` for an absent element without default, or one that is no whole number.
    """
    tag, vr = tag_of(keyword)
    if tag in dataset.keys():  # noqa: SIM118
        raw = dataset.get_item(tag)
        if isinstance(raw, RawDataElement) and vr == "US" and raw.VR in ("US", None) and raw.value and len(raw.value) == 2:
            return int.from_bytes(raw.value, "little" if raw.is_little_endian else "big")
    value = dataset.get(keyword)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise DataError("pixel-format-invalid", f"{keyword} must be one whole number; export the file again.")
    return int(value)


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence, [] if it is absent or not a sequence."""
    if not has(dataset, keyword):
        return []
    try:
        value = dataset.get(keyword)
    except (ValueError, TypeError, LookupError, AttributeError):
        return []
    return [item for item in value if isinstance(item, Dataset)] if value is not None and hasattr(value, "__iter__") else []
