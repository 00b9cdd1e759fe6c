"""Images told apart by what they show: a held-out image is found again under any name, source or file format."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from medaug.cohort import Case, Cohort
from medaug.io.raster import read_unit_png

_LEVELS = 65535  # cohort images have 8 or 16 bits; both fall on these levels exactly

__all__ = ["held_out_images", "held_out_pixels", "pixel_sha256", "shared_pixels"]


def pixel_sha256(cohort: Cohort, case: Case) -> str:
    """sha256 of the decoded pixels of a case and their shape, the same for 8 and 16 bits and any compression."""
    path = cohort.path(case)
    facts = path.stat()
    return _digest(str(path), facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=1 << 18)
def _digest(path: str, changed: int, size: int) -> str:
    """One image is decoded once for all arms and seeds; a changed file is another entry."""
    pixels = np.rint(read_unit_png(Path(path)).astype(np.float64) * _LEVELS).astype("<u2")
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def held_out_pixels(cohort: Cohort) -> set[str]:
    """`pixel_sha256` of every validation and test image."""
    return {pixel_sha256(cohort, case) for case in cohort.validation + cohort.test}


def shared_pixels(cohort: Cohort, cases: Sequence[Case], known: set[str]) -> list[str]:
    """Sorted ids of the cases whose pixels are among the known ones."""
    return sorted(case.id for case in cases if pixel_sha256(cohort, case) in known)


def held_out_images(cohort: Cohort, real: Cohort) -> list[str]:
    """Sorted ids of the training cases of `cohort` that are validation or test images of `real`, by source file or by pixels."""
    sources = {case.source for case in real.validation + real.test} - {""}
    by_source = {case.id for case in cohort.training if case.source in sources}
    return sorted(by_source.union(shared_pixels(cohort, cohort.training, held_out_pixels(real))))
