"""The gate's check for copies: training images, and seeds, that a synthetic image lies too near to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medaug.cohort import Case
from medaug.errors import ConfigError
from medaug.quality.context import PIXELS, RANDOM_CONV, GateContext
from medaug.quality.copies import CopyReport, copy_report
from medaug.quality.copy_ruler import Near, Ruler
from medaug.quality.copy_statistics import closeness
from medaug.quality.finding import ACCEPT, QUARANTINE, Finding
from medaug.quality.images import image_batches
from medaug.quality.seeds import seed_of

NEAR_COPY, SEED_COPY = "near-copy", "seed-copy"
SPACES = (RANDOM_CONV, PIXELS)
QUANTILES = (0.0, 0.01, 0.05, 0.5)
DIGITS = 6

__all__ = ["NEAR_COPY", "SEED_COPY", "SPACES", "copies"]


def copies(context: GateContext, cases: Sequence[Case], *, spaces: Sequence[str] = SPACES) -> list[Finding]:
    """Quarantine images nearer to a training image, in any space, than 99 % of new ones are.

    An image that started from a seed image is compared by this rule with other patients only. To its seed, and the seed's
    patient, it may be near, but not nearer than a weakly augmented copy of a training image usually is.
    """
    if not spaces or isinstance(spaces, str):
        raise ConfigError("spaces-empty", f"Copies need a list of spaces to look in, got {spaces!r}.")
    if not cases:
        return []
    found: list[list[Finding]] = []
    for space in spaces:
        found.append(_in_space(context, cases, space))
    merged = [_merge(space_findings, spaces) for space_findings in zip(*found, strict=True)]
    flagged = sum(finding.verdict != ACCEPT for finding in merged)
    context.reports["near_copies"] = _rate(flagged, len(cases))
    if context.cohort.validation and RANDOM_CONV in spaces:
        ruler = context.ruler
        assert ruler.held_out is not None
        whole = closeness(ruler.features(context.synthetic, cases), ruler.training, ruler.held_out)
        context.reports["closeness"] = asdict(whole) | {"extractor": ruler.name}
    return merged


def _rate(flagged: int, n: int) -> dict[str, Any]:
    """Count and rate with interval, as `CopyReport` says them."""
    return asdict(copy_report(np.r_[np.zeros(flagged), np.ones(n - flagged)], 0.5))


def _in_space(context: GateContext, cases: Sequence[Case], space: str) -> list[Finding]:
    ruler = context.ruler_of(space)
    seeds = [seed_of(case) for case in cases]
    free = [index for index, seed in enumerate(seeds) if seed is None]
    seeded = [index for index, seed in enumerate(seeds) if seed is not None]
    findings: dict[int, Finding] = {}
    rows: list[Near] = []
    if free:
        near = ruler.near(context.synthetic, [cases[index] for index in free])
        findings |= dict(zip(free, _ordinary(ruler, near), strict=True))
        rows.append(near)
    if seeded:
        near, own = _seeded(context, ruler, [cases[index] for index in seeded], [str(seeds[index]) for index in seeded])
        findings |= dict(zip(seeded, own, strict=True))
        rows.append(near)
    distances = np.concatenate([near.distance for near in rows])
    report = copy_report(distances, ruler.threshold)
    if space == RANDOM_CONV:
        context.copies = report
    context.reports.setdefault("copy_spaces", {})[space] = _report(ruler, report, np.concatenate([n.ratio for n in rows]))
    return [findings[index] for index in range(len(cases))]


def _report(ruler: Ruler, report: CopyReport, ratio: np.ndarray) -> dict[str, Any]:
    known = ratio[np.isfinite(ratio)]
    quantiles = {f"{q:g}": round(float(np.quantile(known, q)), DIGITS) for q in QUANTILES} if len(known) else None
    facts = {"space": ruler.name, "threshold": ruler.threshold, "basis": ruler.basis, "basis_n": ruler.n}
    return asdict(report) | facts | {"ratio_quantiles": quantiles}


def _ordinary(ruler: Ruler, near: Near) -> list[Finding]:
    """One finding per image by the distance to the nearest training image."""
    findings = []
    for row in range(len(near.distance)):
        lineage = _numbers(ruler, near, row)
        if near.distance[row] > ruler.threshold:
            findings.append(Finding(ACCEPT, (), lineage))
            continue
        other, distance = lineage["case"], float(near.distance[row])
        text = (
            f"The distance to training case {other} is {distance:.4f}; new patients' images stay above {ruler.threshold:.4f} "
            f"({ruler.name})."
        )
        findings.append(Finding(QUARANTINE, ((NEAR_COPY, text),), lineage))
    return findings


def _numbers(ruler: Ruler, near: Near, row: int) -> dict[str, Any]:
    distance, ratio = float(near.distance[row]), float(near.ratio[row])
    if near.index[row] < 0:
        return {"case": None, "distance": None, "ratio": None}
    numbers: dict[str, Any] = {"case": ruler.ids[near.index[row]], "distance": round(distance, DIGITS)}
    numbers["ratio"] = round(ratio, DIGITS) if np.isfinite(ratio) else None
    return numbers | ({} if near.similarity is None else {"ssim": round(float(near.similarity[row]), 4)})


def _seeded(context: GateContext, ruler: Ruler, cases: Sequence[Case], seeds: Sequence[str]) -> tuple[Near, list[Finding]]:
    """Other patients by the ordinary rule; the seed and its patient's other images by the distance of weak copies."""
    places = {case_id: index for index, case_id in enumerate(ruler.ids)}
    unknown = sorted(set(seeds) - set(places))
    if unknown:
        raise ConfigError(
            "seed-unknown",
            f"{len(unknown)} seed image(s) of the synthetic cases are not in the training split of --cohort; give the cohort they "
            "were generated from.",
        )
    own = np.array([places[seed] for seed in seeds])
    groups = [ruler.groups[index] for index in own]
    near = ruler.near(context.synthetic, cases, groups)
    to_seed = ruler.apart(image_batches(context.synthetic, cases), own)
    limit = context.weak_distance(ruler)
    findings = []
    for row, finding in enumerate(_ordinary(ruler, near)):
        distance = float(to_seed[row])
        numbers = {**finding.lineage, "seed_case": seeds[row], "seed_distance": round(distance, DIGITS)}
        reasons = finding.reasons
        if distance <= limit:
            text = (
                f"The distance to its own seed image {seeds[row]} is {distance:.4f}, and {limit:.4f} is what a weakly augmented copy of a "
                f"training image usually has ({ruler.name})."
            )
            reasons = (*reasons, (SEED_COPY, text))
        findings.append(Finding(QUARANTINE if reasons else ACCEPT, reasons, numbers))
    return near, findings


def _merge(findings: Sequence[Finding], spaces: Sequence[str]) -> Finding:
    """One finding of the findings in each space; the first space names the nearest training image."""
    lineage: dict[str, Any] = {}
    first: Mapping[str, Any] = findings[0].lineage
    if first["case"] is not None:
        lineage = {"nearest_training_distance": first["distance"], "nearest_training_case": first["case"]}
    if "seed_distance" in first:
        lineage |= {"seed_distance": first["seed_distance"]}
    lineage["nearest_by_space"] = {space: dict(finding.lineage) for space, finding in zip(spaces, findings, strict=True)}
    reasons = tuple(reason for finding in findings for reason in finding.reasons)
    return Finding(QUARANTINE if reasons else ACCEPT, reasons, lineage)
