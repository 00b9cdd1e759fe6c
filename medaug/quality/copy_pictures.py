"""Pictures for whoever judges a near-copy: the synthetic image and, to its right, the real one it lies too near to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.io.raster import write_unit_png
from medaug.quality.copy_check import NEAR_COPY, SEED_COPY
from medaug.quality.report import contact_sheet
from medaug.quality.thumbnails import read_image
from medaug.quality.verdicts import Verdict

FOLDER = "copies"

__all__ = ["FOLDER", "write_copy_pictures"]


def write_copy_pictures(out: Path, real: Cohort, synthetic: Cohort, verdicts: Sequence[Verdict]) -> None:
    """Make ``out/copies`` hold one picture per near-copy, ``<id>.png``, and nothing of an earlier gate."""
    known = {case.id: case for case in real.training}
    kept = set()
    for verdict in verdicts:
        other = known.get(_resembled(verdict) or "")
        if other is None:
            continue
        path = out / FOLDER / f"{verdict.case.id}.png"
        kept.add(path.name)
        write_unit_png(path, _pair(synthetic, verdict.case, real, other))
    with storage.storage_errors(FOLDER):
        for path in (out / FOLDER).glob("*.png"):
            if path.name not in kept:
                path.unlink()


def _resembled(verdict: Verdict) -> str | None:
    """The id of the real image that a near-copy resembles: in the space where it stands out most; None for others."""
    codes = {code for code, _ in verdict.reasons}
    spaces = [row for row in verdict.lineage.get("nearest_by_space", {}).values() if row["case"] is not None]
    if NEAR_COPY in codes and spaces:
        return str(min(spaces, key=lambda row: 1.0 if row["ratio"] is None else row["ratio"])["case"])
    seeds = [row["seed_case"] for row in verdict.lineage.get("nearest_by_space", {}).values() if "seed_case" in row]
    return str(seeds[0]) if SEED_COPY in codes and seeds else None


def _pair(synthetic: Cohort, made: Case, real: Cohort, other: Case) -> np.ndarray:
    images = [read_image(synthetic, made), read_image(real, other)]
    return contact_sheet([images], 2, real.image_size, real.channels)
