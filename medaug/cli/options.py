"""What every command shares: the application, its common options and how a summary is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

CohortOption = Annotated[Path, typer.Option("--cohort", help="Cohort folder made by `medaug intake`.")]
OutOption = Annotated[Path, typer.Option("--out", help="Output folder; run again with the same arguments to go on.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="tiny, quickstart, cpu32, cpu64, or a YAML file; none: the paper's values.")
]
OverlayOption = Annotated[str | None, typer.Option("--overlay", help="Another stage of the bundle: a file in its configs/.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the bundle's config; repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")]
TrackingOption = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow; else MLFLOW_TRACKING_URI, else ./mlflow.db.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Decides every random draw.")]


def show(summary: dict[str, Any], as_json: bool, sentence: str) -> None:
    """Print the summary for machines, or the sentence for people."""
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else sentence)


def numbers(text: str, count: int, option: str) -> tuple[float, ...]:
    """`count` numbers separated by commas.

    Raises:
        ConfigError: anything else.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise ConfigError("option-malformed", f"{option} takes {count} numbers separated by commas, got {text!r}.")
    return values


def amounts(text: str, option: str) -> list[float]:
    """One number or several, separated by commas.

    Raises:
        ConfigError: anything else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("option-malformed", f"{option} takes a number, or several separated by commas, got {text!r}.") from None


def named(parts: Sequence[str], option: str) -> dict[str, str]:
    """NAME=TEXT as the command line writes it, each name once.

    Raises:
        ConfigError: anything else.
    """
    pairs = [part.partition("=") for part in parts]
    found = {name.strip(): text.strip() for name, _, text in pairs}
    if not all(name.strip() and text.strip() for name, _, text in pairs) or len(found) != len(parts):
        raise ConfigError("option-malformed", f"{option} takes NAME=TEXT, each name once, got {' '.join(parts)!r}.")
    return found


def whole_numbers(text: str) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        ConfigError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError("option-malformed", f"--counts takes whole numbers separated by commas, got {text!r}.")
    return [int(part) for part in parts]


def tracked_at(uri: str | None) -> dict[str, Any]:
    """Keyword arguments of `medaug.tracking.track`."""
    return {"enabled": True, "uri": uri, "experiment": "medaug"}
