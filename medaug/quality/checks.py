"""The gate's checks: each is a function of the cases that gives a verdict, reasons and numbers per case.

A new check is one function and one entry of `CHECKS`; its settings are its keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import DataError
from medaug.io.raster import read_unit_png
from medaug.quality.context import LABEL_SOURCES, GateContext
from medaug.quality.copy_check import copies
from medaug.quality.copy_ruler import CopyRuler
from medaug.quality.fidelity_check import fidelity
from medaug.quality.finding import ACCEPT, QUARANTINE, REJECT, VERDICTS, Finding, worst
from medaug.quality.judge_check import judge
from medaug.quality.outlier_checks import outliers, real_fake

CONSTANT_STD = 1 / 255  # a picture with less contrast than one 8-bit level shows nothing

__all__ = [
    "ACCEPT", "CHECKS", "LABEL_SOURCES", "QUARANTINE", "REJECT", "VERDICTS", "Check", "CopyRuler", "Finding", "GateContext", "worst",
]  # fmt: skip

Check = Callable[..., list[Finding]]


def usable(context: GateContext, cases: Sequence[Case]) -> list[Finding]:
    """Reject images that cannot be read, have another size, or show nothing."""
    return [_usable(context.synthetic, case) for case in cases]


def _usable(cohort: Cohort, case: Case) -> Finding:
    try:
        image = read_unit_png(cohort.path(case))
    except DataError as error:
        return Finding(REJECT, ((error.code, "The image cannot be read."),))
    made = (case.lineage or {}).get("image_sha256")
    if made is not None and storage.sha256_file(cohort.path(case)) != made:
        return Finding(REJECT, (("image-changed", "The image is not the one that was generated."),))
    wanted = (cohort.image_size, cohort.image_size) + ((3,) if cohort.channels == 3 else ())
    if image.shape != wanted:
        return Finding(REJECT, (("image-size", f"The image has shape {image.shape}, {wanted} is needed."),))
    spread = float(image.std())
    if not np.isfinite(image).all() or spread < CONSTANT_STD:
        text = f"The image shows nothing: its standard deviation is {spread:.2g} of the range."
        return Finding(REJECT, (("image-constant", text),))
    return Finding()


def pseudo_label(context: GateContext, cases: Sequence[Case]) -> list[Finding]:
    """Reject images whose label the source does not confirm, or not surely enough."""
    findings = []
    for case, seen in zip(cases, context.label_filter.verdicts(context.synthetic, cases, context.threshold), strict=True):
        label = seen.label if seen.relabel and not seen.reasons else None
        if label is not None:
            context.carried[case.id] = label
        findings.append(Finding(REJECT if seen.reasons else ACCEPT, seen.reasons, seen.lineage, label, seen.relabel))
    return findings


# `usable` always runs, and the others see only what it lets through.
CHECKS: dict[str, Check] = {
    "usable": usable,
    "pseudo_label": pseudo_label,
    "copies": copies,
    "judge": judge,  # after pseudo_label, which may give an image another class
    "outliers": outliers,
    "real_fake": real_fake,
    "fidelity": fidelity,
}
