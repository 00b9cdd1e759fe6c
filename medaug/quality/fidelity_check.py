"""The gate's table of fidelity and diversity: it judges the set, so every image passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError
from medaug.quality.context import RANDOM_CONV, GateContext
from medaug.quality.copy_ruler import real_cases
from medaug.quality.fidelity_table import HALVES, FeatureSet, fidelity_table
from medaug.quality.finding import Finding

__all__ = ["fidelity"]


def fidelity(
    context: GateContext,
    cases: Sequence[Case],
    *,
    spaces: Sequence[str | Mapping[str, Any]] = (RANDOM_CONV,),
    halves: int = HALVES,
) -> list[Finding]:
    """Measure the readable images against training and validation, overall and per class, in each space.

    Args:
        context, cases: of the gate.
        spaces: names of extractors, or the arguments of `local_features`.
        halves: behind the intervals; 0 leaves them out.
    """
    if not spaces or isinstance(spaces, str | Mapping) or isinstance(halves, bool) or not isinstance(halves, int) or halves < 0:
        raise ConfigError(
            "spaces-empty", f"Fidelity needs a list of spaces and halves of 0 or more, got {spaces!r} and {halves!r}."
        )
    rows: list[dict[str, Any]] = []
    for space in spaces:
        if not cases:
            continue
        real = {"training": _set(context, space, "training", context.cohort, real_cases(context.cohort))}
        if context.cohort.validation:
            real["held-out"] = _set(context, space, "held-out", context.cohort, context.cohort.validation)
        synthetic = _set(context, space, "synthetic", context.synthetic, cases)
        rows += fidelity_table(synthetic, real, context.cohort.classes, context.extractor(space).name, halves=halves)
    context.reports["fidelity_table"] = rows
    return [Finding() for _ in cases]


def _set(context: GateContext, space: str | Mapping[str, Any], name: str, cohort: Cohort, cases: Sequence[Case]) -> FeatureSet:
    labels = np.array([case.label for case in cases])
    return FeatureSet(name, context.features(space, cohort, cases), labels, [case.group for case in cases])
