"""The gate's checks for images unlike the real ones, and for images that a classifier knows to be synthetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medaug.cohort import Case
from medaug.errors import ConfigError
from medaug.quality.context import LOGITS, RANDOM_CONV, GateContext
from medaug.quality.copy_ruler import real_cases
from medaug.quality.finding import ACCEPT, QUARANTINE, VERDICTS, Finding
from medaug.quality.outliers import METHODS, PASS_SHARE, energy, limit_of
from medaug.quality.real_fake import fit_real_fake

OUTLIER, TOLD_APART = "outlier", "told-apart"
METHOD_NAMES = ("energy", *METHODS)

__all__ = ["OUTLIER", "TOLD_APART", "outliers", "real_fake"]


def outliers(
    context: GateContext,
    cases: Sequence[Case],
    *,
    methods: Sequence[str] = ("mahalanobis",),
    space: str = RANDOM_CONV,
    pass_share: float = PASS_SHARE,
    verdict: str = QUARANTINE,
) -> list[Finding]:
    """Hold images back that are stranger, by any method, than `pass_share` of the real validation images.

    Args:
        context, cases: of the gate.
        methods: of "energy" (of the filter's logits), "mahalanobis", "knn", "vos".
        space: features of the last three.
        pass_share: of real validation images that each method lets pass.
        verdict: of a stranger.
    """
    unknown = [name for name in methods if name not in METHOD_NAMES]
    if unknown or not methods or isinstance(methods, str):
        raise ConfigError("outlier-method", f"Methods for outliers are a list of {', '.join(METHOD_NAMES)}, got {methods!r}.")
    _check(verdict, pass_share)
    if not cases:
        return []
    scores: dict[str, np.ndarray] = {}
    limits: dict[str, float] = {}
    for name in methods:
        scores[name], limits[name] = _scores(context, cases, name, space, pass_share)
    context.reports["outliers"] = {
        name: {
            "limit": limits[name],
            "flagged": int((scores[name] > limits[name]).sum()),
            "n": len(cases),
            "space": LOGITS if name == "energy" else context.extractor(space).name,
            "n_validation": len(context.cohort.validation),
        }
        for name in methods
    }
    return [_finding({name: float(scores[name][row]) for name in methods}, limits, verdict) for row in range(len(cases))]


def _check(verdict: str, pass_share: float) -> None:
    if verdict not in VERDICTS:
        raise ConfigError("verdict-unknown", f"A verdict must be one of {', '.join(VERDICTS)}, got {verdict!r}.")
    if isinstance(pass_share, bool) or not isinstance(pass_share, int | float) or not 0 < pass_share < 1:
        raise ConfigError("pass-share", f"The share of real images to pass must be between 0 and 1, got {pass_share!r}.")


def _scores(context: GateContext, cases: Sequence[Case], method: str, space: str, pass_share: float) -> tuple[np.ndarray, float]:
    """Scores (N,) of the cases and the limit from validation."""
    validation = list(context.cohort.validation)
    if method == "energy":
        held = energy(context.features(LOGITS, context.cohort, validation)) if validation else np.array([])
        return energy(context.features(LOGITS, context.synthetic, cases)), limit_of(held, pass_share)
    real = real_cases(context.cohort)
    score = METHODS[method](context.features(space, context.cohort, real), np.array([case.label for case in real]))
    held = score(context.features(space, context.cohort, validation)) if validation else np.array([])
    return score(context.features(space, context.synthetic, cases)), limit_of(held, pass_share)


def _finding(scores: dict[str, float], limits: dict[str, float], verdict: str) -> Finding:
    reasons = [
        (OUTLIER, f"Its {name} score is {value:.4g}; all but a few real validation images stay within {limits[name]:.4g}.")
        for name, value in scores.items()
        if value > limits[name]
    ]
    lineage = {"outlier_scores": {name: float(f"{value:.6g}") for name, value in scores.items()}}
    return Finding(verdict if reasons else ACCEPT, tuple(reasons), lineage)


def real_fake(
    context: GateContext,
    cases: Sequence[Case],
    *,
    space: str = RANDOM_CONV,
    pass_share: float = PASS_SHARE,
    verdict: str = QUARANTINE,
) -> list[Finding]:
    """Hold images back that a cross-fitted classifier calls synthetic more surely than `pass_share` of real validation images."""
    _check(verdict, pass_share)
    if not cases:
        return []
    real = real_cases(context.cohort)
    fitted = fit_real_fake(
        context.features(space, context.cohort, real),
        context.features(space, context.synthetic, cases),
        [case.group for case in real],
        [case.group for case in cases],
    )
    validation = list(context.cohort.validation)
    held = context.features(space, context.cohort, validation) if validation else np.empty((0, 0))
    limits = fitted.limits(held, pass_share)
    context.reports["real_fake"] = _facts(fitted.auc, fitted.low, fitted.high) | {
        "accuracy": fitted.accuracy,
        "p": fitted.p,
        "limits": sorted(set(limits.tolist())),
        "n": len(cases),
        "n_real": len(real),
        "space": context.extractor(space).name,
    }
    findings = []
    for value, limit in zip(fitted.synthetic, limits, strict=True):
        text = f"Its log-odds of being synthetic are {value:.3g}; all but a few real validation images stay within {limit:.3g}."
        reasons = ((TOLD_APART, text),) if value > limit else ()
        findings.append(Finding(verdict if reasons else ACCEPT, reasons, {"real_fake": float(f"{value:.6g}")}))
    return findings


def _facts(auc: float, low: float, high: float) -> dict[str, Any]:
    return {"auc": auc, "low": low, "high": high}
