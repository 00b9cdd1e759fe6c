"""`medaug evidence`: cards, Croissant metadata and checklists, filled from what the stages recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import JsonOption, app, show


@app.command()
def evidence(
    folder: Annotated[Path, typer.Argument(help="Cohort to describe: of `medaug gate`, generate, import or intake.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder; the cohort's own makes it a Croissant data set.")],
    cohort: Annotated[Path | None, typer.Option("--cohort", help="Real cohort behind a synthetic one.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of `medaug train`, for the model card.")] = None,
    benchmark: Annotated[Path | None, typer.Option("--benchmark", help="Folder of `medaug grade`, for the checklists.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write what a paper or a repository asks: data set and model card, Croissant, CLAIM and TRIPOD+AI, with blanks left blank.

    Example: medaug evidence runs/accepted --cohort runs/cohort --run runs/run --benchmark runs/benchmark --out runs/evidence
    """
    from medaug.evidence.evidence import write_evidence

    summary = write_evidence(folder, out, cohort=cohort, run=run, benchmark=benchmark)
    show(summary, as_json, _text(summary, out))


def _text(summary: dict[str, Any], out: Path) -> str:
    lines = [f"{', '.join(summary['written'])} in {out}."]
    for name, counts in summary["checklists"].items():
        lines.append(f"{name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()) + ".")
    if summary["missing"]:
        lines.append(f"Not there, so left blank: {', '.join(summary['missing'])}.")
    return "\n".join([*lines, f"For the authors to add to croissant.json: {', '.join(summary['for_authors'])}."])
