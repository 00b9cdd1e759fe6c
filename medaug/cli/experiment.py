"""`medaug experiment`: a whole table of arms from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medaug.cli.options import (
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
    out: OutOption,
    cohort: Annotated[Path | None, typer.Option(help="Cohort folder, in the place of the one that the file describes.")] = None,
    profile: ProfileOption = None,
    seed: SeedOption = 0,
    executor: Annotated[str, typer.Option(help="Of the grading: local or ray; both give the same rows.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of the grading: training runs side by side, see `medaug grade`.")
    ] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the cohort, then train, generate, gate and grade every row of an experiment; resumable.

    The files that came with medaug take their images from $MEDAUG_DATA, as each says at its top; --cohort takes another cohort.

    Example: medaug experiment dreamda_locations --cohort runs/cohort --out runs/locations --profile cpu32

    Example: MEDAUG_DATA=data medaug experiment guided_ddpm_ct --out runs/guided_ddpm_ct
    """
    from medaug.experiment import markdown, run_experiment

    result = run_experiment(
        file, cohort, out, profile=profile, seed=seed, executor=executor, workers=workers, tracking=tracked_at(tracking_uri)
    )
    show(result, as_json, markdown(result["title"], result["table"]) + f"Report: {out / 'benchmark' / 'report.html'}")
