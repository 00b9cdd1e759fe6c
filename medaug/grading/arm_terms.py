"""Mixed arms as the command line writes them: ``NAME=TERM + TERM``, where blanks around the plus sign separate the terms.

A term is a folder of synthetic images, a named source, copies of the real images that are kept (``rot``, ``vflip``), ``real``
or ``no-real``; options follow a question mark:
``real?fraction=0.5&share=0.5 + runs/syn1?per_real=1&weight=0.5``. Without ``real`` all real images are there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaug.cohort import Cohort, read_cohort
from medaug.errors import ConfigError
from medaug.grading.classic_copies import COPIES
from medaug.grading.mixing import REAL, Source

NO_REAL = "no-real"
_SEPARATOR = " + "
_OPTIONS = re.compile(r"(?P<place>.+?)\?(?P<options>\w+=[^&?=]*(&\w+=[^&?=]*)*)")

__all__ = ["NO_REAL", "Terms", "is_mixed", "read_terms", "split_term", "term_names"]


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("/"))


_REAL_OPTIONS = {"fraction": float, "share": float}
_SOURCE_OPTIONS: dict[str, Any] = {"per_real": float, "allocation": str, "counts": _counts, "share": float, "weight": float}


@dataclass(frozen=True)
class Terms:
    """What the terms of an arm say; `real_fraction` is None for ``no-real`` and absent from `fields` if they do not say."""

    sources: tuple[Source, ...]
    fields: Mapping[str, Any]


def is_mixed(text: str) -> bool:
    """True if the text after ``NAME=`` is of terms; a folder of that very name comes first."""
    return (_SEPARATOR in text or _OPTIONS.fullmatch(text) is not None) and not Path(text).is_dir()


def term_names(text: str) -> list[str]:
    """The places that a text of terms names."""
    return [split_term(term)[0] for term in text.split(_SEPARATOR)]


def read_terms(
    arm: str, text: str, named: Mapping[str, Cohort], *, per_real: float | None = None, allocation: str = "as_generated"
) -> Terms:
    """Read the terms of an arm.

    Args:
        arm: its name, for messages.
        text: after ``NAME=``.
        named: cohorts that a term may call by a name in the place of a folder.
        per_real, allocation: of sources that do not say it themselves.

    Raises:
        ConfigError: `term-invalid`, `term-option`, and those of `Source`.  DataError: a folder is no cohort.
    """
    sources: list[Source] = []
    fields: dict[str, Any] = {}
    for term in text.split(_SEPARATOR):
        place, options = split_term(term)
        if not place:
            raise ConfigError("term-invalid", f"Arm {arm} has an empty term; write NAME=FOLDER + FOLDER.")
        if place in (REAL, NO_REAL):
            given = _read(arm, place, options, _REAL_OPTIONS if place == REAL else {})
            if "real_fraction" in fields:
                raise ConfigError("term-invalid", f"Arm {arm} speaks of its real images twice; give one term real or no-real.")
            fields["real_fraction"] = given.get("fraction", 1.0) if place == REAL else None
            fields["real_share"] = given.get("share")
            continue
        chosen = _read(arm, place, options, _SOURCE_OPTIONS)
        if "counts" in chosen:
            chosen = {"allocation": "fixed"} | chosen
        else:
            chosen = {"per_real": per_real, "allocation": allocation} | chosen
        sources.append(_source(place, named, chosen))
    return Terms(tuple(sources), fields)


def _source(place: str, named: Mapping[str, Cohort], chosen: Mapping[str, Any]) -> Source:
    if place in named:
        return Source(place, named[place], of_kept=place in COPIES, **chosen)
    cohort = read_cohort(Path(place), verify=True)
    return Source(Path(place).resolve().name, cohort, **chosen)


def split_term(term: str) -> tuple[str, str]:
    """The place that a term names, and its options."""
    found = _OPTIONS.fullmatch(term.strip())
    return (found["place"], found["options"]) if found else (term.strip(), "")


def _read(arm: str, place: str, text: str, known: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in text.split("&") if text else ():
        name, _, value = part.partition("=")
        if name not in known:
            options = f"takes the options {', '.join(known)}" if known else "takes no option"
            raise ConfigError("term-option", f"In arm {arm}, a term like {Path(place).name} {options}, got {name!r}.")
        try:
            values[name] = known[name](value)
        except ValueError:
            raise ConfigError("term-option", f"In arm {arm}, the option {name} cannot be {value!r}.") from None
    return values
