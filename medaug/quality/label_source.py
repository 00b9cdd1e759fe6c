"""Where the gate takes an image's label from: what every source offers, and what it says of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from medaug.cohort import Case, Cohort

__all__ = ["LabelSource", "SourceVerdict"]


@dataclass(frozen=True)
class SourceVerdict:
    """A source's word on one image.

    Attributes:
        label: the class it sees, an index.
        reasons: (code, sentence) pairs; empty means that the label is believed.
        lineage: numbers to keep with the case.
        relabel: True if an accepted image is to carry `label`, not the one it was generated for.
    """

    label: int
    reasons: tuple[tuple[str, str], ...]
    lineage: Mapping[str, Any]
    relabel: bool = False


class LabelSource(Protocol):
    """A label filter, or another judge of labels, fitted on real training images."""

    @property
    def fit_groups(self) -> tuple[str, ...]:
        """Sorted groups it was fitted on."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the report says of it, with `weights_sha256`."""

    def verdicts(self, cohort: Cohort, cases: Sequence[Case], threshold: float) -> list[SourceVerdict]:
        """One per case, in order."""
