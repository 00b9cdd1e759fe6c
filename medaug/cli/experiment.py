"""`medaug experiment`: a whole table of arms from one file."""

from __future__ import annotations

from typing import Annotated

import typer

from medaug.cli.options import (
    CohortOption,
    JsonOption,
    OutOption,
    ProfileOption,
    SeedOption,
    TrackingOption,
    app,
    show,
    tracked_at,
)


@app.command()
def experiment(
    file: Annotated[str, typer.Argument(help="Name of an experiment that came with medaug, or a YAML file.")],
    cohort: CohortOption,
    out: OutOption,
    profile: ProfileOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, generate, gate and grade every row of an experiment; resumable.

    Example: medaug experiment dreamda_locations --cohort runs/cohort --out runs/locations --profile cpu32
    """
    from medaug.experiment import markdown, run_experiment

    result = run_experiment(file, cohort, out, profile=profile, seed=seed, tracking=tracked_at(tracking_uri))
    show(result, as_json, markdown(result["title"], result["table"]) + f"Report: {out / 'benchmark' / 'report.html'}")
