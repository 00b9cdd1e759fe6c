"""`medaug calibrate`: a pilot that chooses how strongly a bundle may perturb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import (
    CohortOption,
    JsonOption,
    ProfileOption,
    SeedOption,
    SetOption,
    TrackingOption,
    app,
    show,
    tracked_at,
)


@app.command()
def calibrate(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder that perturbs, such as bottleneck_perturbation.")],
    cohort: CohortOption,
    run: Annotated[Path, typer.Option("--run", help="Folder of `medaug train`; the result goes into its calibration/.")],
    profile: ProfileOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try several scales of the perturbation on training images; stops if none keeps the labels.

    Example: medaug calibrate bottleneck_perturbation --cohort runs/cohort --run runs/run --profile cpu32
    """
    from medaug.errors import ConfigError
    from medaug.workflow import load_config, parse_overrides, run_stage

    if "calibrating" not in load_config(bundle, "generating", profile):
        raise ConfigError("calibration-unknown", f"Bundle {Path(bundle).name} has no scale to calibrate.")
    overrides: dict[str, Any] = {
        "dataset_dir": str(cohort),
        "run_dir": str(run),
        "seed": seed,
        "tracking": tracked_at(tracking_uri),
    }
    overrides |= parse_overrides(settings or [])
    # The parts are those of generation; only what is run differs.
    result = run_stage(bundle, "generating", profile, overrides | {"generating": ["$@calibration.run()"]})
    lines = [
        f"scale {row['scale']:g}: agreement {row['agreement']:.2f}, distance {row['distance']:.3f}, near-copies {row['copy_rate']:.2f}"
        for row in result["rows"]
    ]
    lines += [f"Chosen: {result['scale']:g} (weak augmentation moves an image by {result['weak_distance']:.3f})."]
    show(result, as_json, "\n".join([*lines, f"Curve and strips: {run / 'calibration'}"]))
