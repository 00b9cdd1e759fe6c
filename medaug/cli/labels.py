"""`medaug labels`: which labels of a cohort look wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import JsonOption, OutOption, SeedOption, app, show


@app.command()
def labels(
    cohort: Annotated[Path, typer.Argument(help="Cohort folder made by `medaug intake`; it is not changed.")],
    out: OutOption,
    network: Annotated[str, typer.Option(help="Network of every fold.")] = "simple_cnn",
    folds: Annotated[int, typer.Option(help="Parts of the training images, by group; at least 2.")] = 5,
    synthetic: Annotated[
        Path | None, typer.Option("--synthetic", help="Synthetic cohort of this cohort whose labels are judged, too.")
    ] = None,
    profile: Annotated[str, typer.Option("--profile", help="Training recipe, as of `medaug grade`.")] = "cpu32",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find labels that look wrong by confident learning: labels.csv, labels.json and report.html with the worst cases.

    Needs `pip install -e '.[labels]'`. A person decides what to do with the list.

    Example: medaug labels runs/cohort --out runs/labels --profile cpu32
    """
    from medaug.stages import check_labels

    result = check_labels(cohort, out, network=network, folds=folds, synthetic=synthetic, profile=profile, seed=seed)
    lines = [_line(name, part) for name, part in result["parts"].items()]
    show(result, as_json, "\n".join([*lines, f"Report: {out / 'report.html'}"]))


def _line(name: str, part: dict[str, Any]) -> str:
    return f"{name}: {part['issues']} of {part['n']} labels look wrong; networks agree with {part['agreement']:.0%} of them all"
