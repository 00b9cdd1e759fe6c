"""Verdicts of the gate: one per synthetic case, and what they add up to per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medaug.cohort import Case
from medaug.quality.finding import ACCEPT, QUARANTINE, REJECT, Finding, worst

QUOTA_FILLED = "quota-filled"

__all__ = ["ClassAcceptance", "Verdict", "acceptance_per_class", "agreement", "combine", "cut_to_quota"]


@dataclass(frozen=True)
class Verdict:
    """The gate's word on one synthetic case.

    Attributes:
        case: as generated.
        verdict: "accept", "quarantine" or "reject".
        reasons: (code, sentence) pairs.
        lineage: numbers the checks add to the case's lineage.
        relabelled: the class it is to carry; None keeps the one it was generated for.
        unlabelled: True for a rejected image that lacks a trusted label and nothing else.
        by_check: what each check that saw it said.
    """

    case: Case
    verdict: str
    reasons: tuple[tuple[str, str], ...]
    lineage: Mapping[str, Any]
    relabelled: int | None = None
    unlabelled: bool = False
    by_check: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> int:
        """The class an accepted case carries, an index."""
        return self.case.label if self.relabelled is None else self.relabelled

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The row of ``gate.json``."""
        row: dict[str, Any] = {"id": self.case.id, "name": self.case.name or self.case.id, "verdict": self.verdict}
        row["reasons"] = [f"{code}: {text}" for code, text in self.reasons]
        named = {"intended": classes[self.case.label]} | ({} if self.relabelled is None else {"label": classes[self.label]})
        checks = {"checks": dict(self.by_check)} if self.by_check else {}
        return row | named | checks | dict(self.lineage)


@dataclass(frozen=True)
class ClassAcceptance:
    """Counts of one class: accepted are the images that carry it, the others those generated for it.

    `rate` is the share that passed every check, before a quota cut it; `quota` None asks for none.
    """

    name: str
    generated: int
    passed: int
    accepted: int
    quarantined: int
    rejected: int
    rate: float | None
    quota: int | None

    @property
    def short(self) -> bool:
        """True if the quota is missed."""
        return self.quota is not None and self.accepted < self.quota


def combine(case: Case, findings: Sequence[Finding], names: Sequence[str] = ()) -> Verdict:
    """The strictest verdict of a case's findings, with all their reasons and numbers; `names` of the checks behind the first of them."""
    reasons = tuple(reason for finding in findings for reason in finding.reasons)
    lineage = {key: value for finding in findings for key, value in finding.lineage.items()}
    labels = [finding.label for finding in findings if finding.label is not None]
    others = [finding.verdict for finding in findings if not finding.unlabelled]
    verdict = worst([finding.verdict for finding in findings])
    unlabelled = verdict == REJECT and len(others) < len(findings) and worst(others) == ACCEPT
    by_check = {name: finding.verdict for name, finding in zip(names, findings, strict=False)}
    return Verdict(case, verdict, reasons, lineage, labels[-1] if labels else None, unlabelled, by_check)


def cut_to_quota(verdicts: Sequence[Verdict], quotas: Sequence[int | None]) -> list[Verdict]:
    """Reject what passed beyond a quota, in the cohort's order: choosing by confidence would favour the easy images."""
    taken: Counter[int] = Counter()
    cut = []
    for verdict in verdicts:
        quota = quotas[verdict.label]
        if verdict.verdict == ACCEPT:
            taken[verdict.label] += 1
            if quota is not None and taken[verdict.label] > quota:
                verdict = replace(verdict, verdict=REJECT, reasons=((QUOTA_FILLED, f"The class has its {quota} images."),))
        cut.append(verdict)
    return cut


def acceptance_per_class(
    verdicts: Sequence[Verdict], classes: Sequence[str], quotas: Sequence[int | None]
) -> list[ClassAcceptance]:
    """Count verdicts by class, in class order."""
    rows = []
    for label, name in enumerate(classes):
        own = [verdict for verdict in verdicts if verdict.case.label == label]
        counts = Counter(verdict.verdict for verdict in own)
        passed = counts[ACCEPT] + sum(code == QUOTA_FILLED for verdict in own for code, _ in verdict.reasons)
        rows.append(
            ClassAcceptance(
                name=name,
                generated=len(own),
                passed=passed,
                accepted=sum(verdict.verdict == ACCEPT and verdict.label == label for verdict in verdicts),
                quarantined=counts[QUARANTINE],
                rejected=counts[REJECT],
                rate=passed / len(own) if own else None,
                quota=quotas[label],
            )
        )
    return rows


def agreement(verdicts: Sequence[Verdict], num_classes: int) -> list[list[int]]:
    """Counts (K, K): rows the intended class, columns the filter's."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    for verdict in verdicts:
        if "pseudo_label" in verdict.lineage:
            counts[verdict.case.label][verdict.lineage["pseudo_label"]] += 1
    return counts
