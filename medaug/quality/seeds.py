"""Which synthetic images start from a real one: their seed is nearest by construction and needs a rule of its own."""

from __future__ import annotations

from medaug.cohort import Case

__all__ = ["seed_of"]


def seed_of(case: Case) -> str | None:
    """The id of the training case that the sampling of a synthetic case started from; None if it started from noise.

    A variation, inverted or noised, starts from its reference; a disturbance of a real image from its source. A reference that
    only conditions the network is no seed.
    """
    lineage = case.lineage or {}
    source = lineage.get("source")
    if isinstance(source, dict) and source.get("kind") == "real":
        return str(source.get("case") or lineage.get("reference") or "") or None
    return str(lineage["reference"]) if "inversion" in lineage and lineage.get("reference") else None
