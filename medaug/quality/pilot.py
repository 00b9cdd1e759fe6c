"""Go or no-go after a pilot: a few images of every class, measured, against limits that a file documents.

Pure functions of figures: `medaug.pilot` generates and measures. A figure that cannot be had leaves its check undefined, with the
reason; only a check that fails says no-go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from scipy.stats import binomtest

from medaug.errors import ConfigError
from medaug.quality.verdicts import ClassAcceptance

PASS, FAIL, UNDEFINED = "pass", "fail", "undefined"
NOTHING_READABLE = "No image of the pilot shows anything that could be measured."

__all__ = [
    "FAIL", "NOTHING_READABLE", "PASS", "UNDEFINED", "Check", "PilotLimits", "acceptance_check", "accuracy_check", "copy_check",
    "disk_check", "go", "kid_check", "outlier_check", "share_interval", "time_check",
]  # fmt: skip


@dataclass(frozen=True)
class PilotLimits:
    """What a pilot must show; ``configs/pilots/default.yaml`` gives the values and the reason for each.

    Attributes:
        least_acceptance: share of a class's images that the gate accepts, in the class with the smallest.
        most_outliers: share beyond the limit that 95 % of real validation images stay within.
        kid_noise: noise laid over held-out images, as a share of their own standard deviation; their KID is the limit.
        most_copies: share that the gate takes for copies of training images.
        least_accuracy: share of what equally many real images teach a classifier beyond chance.
        most_hours: of the full generation.
        most_disk: share of the free disk that the full generation takes.

    Raises:
        ConfigError: a value out of range (code `pilot-limits`).
    """

    least_acceptance: float
    most_outliers: float
    kid_noise: float
    most_copies: float
    least_accuracy: float
    most_hours: float
    most_disk: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value, top = getattr(self, field.name), math.inf if field.name in ("kid_noise", "most_hours") else 1.0
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= top:
                wanted = "a finite number of at least 0" if math.isinf(top) else "a share from 0 to 1"
                raise ConfigError("pilot-limits", f"The limit {field.name} must be {wanted}, got {value!r}.")

    @staticmethod
    def of(values: Mapping[str, Any]) -> PilotLimits:
        """Limits from the content of a file.

        Raises:
            ConfigError: a name that is no limit, or one that is missing (code `pilot-limits`).
        """
        known = {field.name for field in fields(PilotLimits)}
        if odd := sorted(known ^ set(values)):
            raise ConfigError("pilot-limits", f"The limits of a pilot are {', '.join(sorted(known))}; check {', '.join(odd)}.")
        return PilotLimits(**values)


@dataclass(frozen=True)
class Check:
    """One line of the decision.

    Attributes:
        name: of the check.
        outcome: "pass", "fail" or "undefined".
        value, limit: what was compared; None where there is none.
        sentence: what was seen, for people.
    """

    name: str
    outcome: str
    value: float | None
    limit: float | None
    sentence: str


def go(checks: Sequence[Check]) -> bool:
    """True unless a check fails."""
    return all(check.outcome != FAIL for check in checks)


def _check(name: str, value: float | None, limit: float | None, good: bool, sentence: str) -> Check:
    outcome = UNDEFINED if value is None or limit is None else PASS if good else FAIL
    return Check(name, outcome, value, limit, sentence)


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Clopper and Pearson 1934); n at least 1."""
    found = binomtest(hits, n).proportion_ci(method="exact")
    return float(found.low), float(found.high)


def _seen(hits: int, n: int) -> str:
    low, high = share_interval(hits, n)
    return f"{hits} of {n} ({_percent(hits / n)}, 95 % interval {100 * low:.0f} to {_percent(high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    units = ((7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
    size, name = next((size, name) for least, size, name in units if seconds >= least)
    return f"{seconds / size:.3g} {name}"


def acceptance_check(acceptance: Sequence[ClassAcceptance], limit: float) -> Check:
    """The gate's acceptance in the class with the smallest."""
    worst = min((entry for entry in acceptance if entry.generated), key=lambda entry: entry.passed / entry.generated)
    value = worst.passed / worst.generated
    text = f"Of class {worst.name}, the worst, the gate accepts {_seen(worst.passed, worst.generated)}; at least {_percent(limit)} are needed."
    return _check("acceptance", value, limit, value >= limit, text)


def outlier_check(found: Mapping[str, Any] | None, limit: float, reason: str = "") -> Check:
    """Share of outliers; `found` holds ``flagged``, ``n`` and ``n_validation``, or is None for a `reason`."""
    if found is None:
        return Check("outliers", UNDEFINED, None, limit, reason)
    value = found["flagged"] / found["n"]
    text = (
        f"Outliers are {_seen(found['flagged'], found['n'])}, beyond what 95 % of {found['n_validation']} real validation images stay within; "
        f"at most {_percent(limit)} may be."
    )
    return _check("outliers", value, limit, value <= limit, text)


def kid_check(row: Mapping[str, Any] | None, noise: float) -> Check:
    """KID to training against that of held-out images under noise; `row` is that of class "all", see `kid_rows`."""
    if row is None:
        return Check("kid", UNDEFINED, None, None, NOTHING_READABLE)
    if row["value"] is None or row["limit"] is None:
        return Check("kid", UNDEFINED, row["value"], row["limit"], row["note"])
    text = (
        f"KID to training is {row['value']:.4g} (95 % interval {row['low']:.4g} to {row['high']:.4g}); held-out real images have {row['floor']:.4g}, "
        f"and {row['limit']:.4g} under noise of {_percent(noise)} of their contrast, which is the most it may be."
    )
    return _check("kid", row["value"], row["limit"], row["value"] <= row["limit"], text)


def copy_check(found: Mapping[str, Any] | None, limit: float) -> Check:
    """Share of near-copies; `found` holds ``copies`` and ``n``."""
    if found is None or not found["n"]:
        return Check("copies", UNDEFINED, None, limit, NOTHING_READABLE)
    value = found["copies"] / found["n"]
    text = f"Copies of training images are {_seen(found['copies'], found['n'])}; at most {_percent(limit)} may be."
    return _check("copies", value, limit, value <= limit, text)


def accuracy_check(found: Mapping[str, Any] | None, limit: float, reason: str = "") -> Check:
    """What the pilot teaches beyond chance, as a share of what equally many real images teach.

    Undefined where the real images teach no more than luck would: within 1.96 standard errors of guessing.

    Args:
        found: mean balanced accuracies ``synthetic`` and ``real`` on validation, ``chance``, ``n`` images of either kind and
            ``n_validation``; None for a `reason`.
        limit: least share.
    """
    if found is None:
        return Check("accuracy", UNDEFINED, None, limit, reason)
    chance, real = found["chance"], found["real"]
    text = (
        f"A classifier trained on {found['n']} images of the pilot alone reaches a balanced accuracy of {found['synthetic']:.3f} on {found['n_validation']} "
        f"real validation images, one trained on as many real images {real:.3f}, chance {chance:.3f}"
    )
    luck = 1.96 * math.sqrt(chance * (1 - chance) / found["n_validation"])
    if real - chance <= luck:
        return Check("accuracy", UNDEFINED, None, limit, f"{text}; so few real images teach nothing either.")
    value = (found["synthetic"] - chance) / (real - chance)
    return _check(
        "accuracy", value, limit, value >= limit, f"{text}: {_percent(value)} of the gain, {_percent(limit)} are needed."
    )


def time_check(projected: Mapping[str, Any], limit: float) -> Check:
    """Hours of the full generation, see `project`."""
    if projected["seconds"] is None:
        return Check("time", UNDEFINED, None, limit, projected["reason"])
    hours = projected["seconds"] / 3600
    text = f"The full generation takes {_duration(projected['seconds'])} for {projected['generate']} images; at most {limit:g} hours are allowed."
    return _check("time", hours, limit, hours <= limit, text)


def disk_check(projected: Mapping[str, Any], free: int, limit: float) -> Check:
    """Disk of the full generation as a share of the `free` bytes."""
    if projected["bytes"] is None:
        return Check("disk", UNDEFINED, None, limit, projected["reason"])
    value = projected["bytes"] / max(free, 1)
    text = f"The full generation takes {projected['bytes'] / 1e6:.3g} MB, {100 * value:.2g} % of what is free; at most {_percent(limit)} may be."
    return _check("disk", value, limit, value <= limit, text)
