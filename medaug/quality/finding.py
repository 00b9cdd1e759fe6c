"""What one check says of one case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACCEPT, QUARANTINE, REJECT = "accept", "quarantine", "reject"
VERDICTS = (ACCEPT, QUARANTINE, REJECT)  # from the mildest to the strictest

__all__ = ["ACCEPT", "QUARANTINE", "REJECT", "VERDICTS", "Finding", "worst"]


@dataclass(frozen=True)
class Finding:
    """What one check says of one case.

    Attributes:
        verdict: "accept", "quarantine" (a person may look at it) or "reject".
        reasons: (code, sentence) pairs; empty when accepted.
        lineage: numbers to keep with the case.
        label: the class an accepted case is to carry; None keeps the one it was generated for.
        unlabelled: True if only the label is in doubt, not the image.
    """

    verdict: str = ACCEPT
    reasons: tuple[tuple[str, str], ...] = ()
    lineage: Mapping[str, Any] = field(default_factory=dict)
    label: int | None = None
    unlabelled: bool = False


def worst(verdicts: Sequence[str]) -> str:
    """The strictest verdict; "accept" of none."""
    return max(verdicts, key=VERDICTS.index, default=ACCEPT)
