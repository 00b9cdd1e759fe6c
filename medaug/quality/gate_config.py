"""Which checks a gate runs, with which settings: from names, or from the list of a YAML file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medaug.errors import ConfigError
from medaug.quality.checks import CHECKS

GATE_KEYS = ("checks",)
CheckSpec = str | Mapping[str, Any]

__all__ = ["CheckSpec", "PlannedCheck", "checks_of", "plan_checks", "take_threshold", "without_folders"]


@dataclass(frozen=True)
class PlannedCheck:
    """A check by its name in `CHECKS` and the settings that differ from its function's own."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def checks_of(content: Mapping[str, Any]) -> list[CheckSpec]:
    """The list ``checks`` of a gate's file.

    Raises:
        ConfigError: another key, or no list (code `gate-malformed`).
    """
    unknown = sorted(set(map(str, content)) - set(GATE_KEYS))
    found = content.get("checks")
    if unknown or not isinstance(found, list) or not found:
        got = ", ".join(unknown) or type(found).__name__
        raise ConfigError(
            "gate-malformed", f"A gate's file holds one key, `checks`, with a list of at least one check; got {got}."
        )
    return found


def plan_checks(checks: Sequence[CheckSpec]) -> list[PlannedCheck]:
    """Checks in the order of `CHECKS`, "usable" always among them.

    Args:
        checks: names, or mappings of one name to its settings.

    Raises:
        ConfigError: an unknown check (code `check-unknown`), one given twice, or a setting that its function does not take.
    """
    named = [_named(entry) for entry in checks]
    unknown = [name for name, _ in named if name not in CHECKS]
    if unknown:
        raise ConfigError("check-unknown", f"A check must be one of {', '.join(CHECKS)}, got {', '.join(unknown)}.")
    settings = dict(named)
    if len(settings) < len(named):
        raise ConfigError("check-twice", f"Each check is given once, got {', '.join(name for name, _ in named)}.")
    for name, values in settings.items():
        known = [
            key
            for key, value in inspect.signature(CHECKS[name]).parameters.items()
            if value.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        odd = sorted(set(values) - set(known))
        if odd:
            takes = ", ".join(known) or "no settings"
            raise ConfigError("check-setting-unknown", f"The check {name} takes {takes}; got {', '.join(map(str, odd))}.")
    return [PlannedCheck(name, settings.get(name, {})) for name in CHECKS if name in settings or name == "usable"]


def _named(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, settings),) = entry.items()
        if settings is None or isinstance(settings, Mapping):
            return str(name), dict(settings or {})
    raise ConfigError("gate-malformed", f"A check is a name, or one name with its settings, got {type(entry).__name__}.")


def take_threshold(checks: Sequence[CheckSpec], threshold: float | None) -> tuple[list[CheckSpec], Any]:
    """The checks without the confidence threshold that their pseudo_label may name, and the threshold: the given one wins, None for neither."""
    left: list[CheckSpec] = []
    for entry in checks:
        name, settings = _named(entry)
        if name == "pseudo_label" and "threshold" in settings:
            threshold = settings["threshold"] if threshold is None else threshold
            settings = {key: value for key, value in settings.items() if key != "threshold"}
        left.append({name: settings} if settings else name)
    return left, threshold


def without_folders(settings: Any) -> Any:
    """Settings for a report: of a file that is named under ``path`` only the name, as a folder may name a person."""
    if isinstance(settings, Mapping):
        return {key: Path(str(value)).name if key == "path" else without_folders(value) for key, value in settings.items()}
    return [without_folders(value) for value in settings] if isinstance(settings, list | tuple) else settings
