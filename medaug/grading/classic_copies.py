"""Turned and mirrored copies of the real training images: the classic baselines of a mixing experiment.

The copies are a synthetic cohort like any other: each names the training case that it was made from and has its group, so
every leak check holds for them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.cohort import FILE_NAME, Case, Cohort, created_by, fit_sha256, read_cohort, write_cohort
from medaug.draws import key_seed
from medaug.errors import ConfigError, MedaugError
from medaug.grading.mixing import real_cases
from medaug.io.raster import encode_unit_png, read_unit_png

Change = Callable[[np.ndarray, Case], tuple[np.ndarray, dict[str, Any]]]

__all__ = ["COPIES", "make_copies"]


def _turned(image: np.ndarray, case: Case) -> tuple[np.ndarray, dict[str, Any]]:
    """By 90, 180 or 270 degrees, counter-clockwise: exact on a square grid; which of them belongs to the case alone."""
    turns = 1 + key_seed("rot", case.id) % 3
    return np.rot90(image, turns), {"rotation_degrees": 90 * turns}


def _mirrored(image: np.ndarray, case: Case) -> tuple[np.ndarray, dict[str, Any]]:
    """Upside down."""
    return image[::-1], {"flipped": "vertical"}


COPIES: dict[str, Change] = {"rot": _turned, "vflip": _mirrored}


def make_copies(real: Cohort, kind: str, folder: Path) -> Cohort:
    """One changed copy of every real training image, as a synthetic cohort; a finished folder is used again.

    Args:
        real: cohort read from a folder.
        kind: a name of `COPIES`.
        folder: where the copies go; those of another cohort are replaced.

    Raises:
        ConfigError: `copies-unknown`.  StorageError: the folder is in use or cannot be written.
    """
    if kind not in COPIES:
        raise ConfigError("copies-unknown", f"Classic copies are one of {', '.join(COPIES)}, got {kind!r}.")
    made = created_by(f"classic copies: {kind}", {"kind": kind, "cohort": real.content_sha256}, 0)
    with storage.locked(folder):
        found = _finished(folder)
        if found is not None and found.created_by == made:
            return found
        # Until the last copy is there the folder holds no cohort: images of two of them would be neither.
        (folder / FILE_NAME).unlink(missing_ok=True)
        groups = tuple(sorted(real.groups("training")))
        fit = fit_sha256(groups)
        cases = []
        for case in real_cases(real):
            changed, facts = COPIES[kind](read_unit_png(real.path(case)), case)
            name = f"{case.id}_{kind}"
            image = f"images/{name}.png"
            storage.write_bytes(folder / image, encode_unit_png(np.ascontiguousarray(changed)))
            lineage = {"bundle": "classic_copies", "reference": case.id, "intended_label": case.label, "fit_on": fit, **facts}
            cases.append(Case(name, image, case.label, case.group, case.source, name=name, lineage=lineage))
        copies = replace(real, name=f"{real.name} {kind}", created_by=made, fit_on={fit: groups}, validation=(), test=())
        return write_cohort(copies.with_cases(training=cases), folder)


def _finished(folder: Path) -> Cohort | None:
    """The cohort in the folder; None where there is none, or no whole one."""
    try:
        return read_cohort(folder, verify=True)
    except MedaugError:
        return None
