"""`medaug sweep`: the same noise at several scales of a bundle's guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import (
    CohortOption,
    JsonOption,
    OverlayOption,
    ProfileOption,
    SeedOption,
    SetOption,
    TrackingOption,
    app,
    show,
    tracked_at,
)


@app.command()
def sweep(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder that guides by a gradient, such as uncertainty_guidance.")],
    cohort: CohortOption,
    run: Annotated[Path, typer.Option("--run", help="Folder of `medaug train`.")],
    out: Annotated[Path | None, typer.Option("--out", help="Output folder; default: a folder in --run.")] = None,
    scales: Annotated[str | None, typer.Option(help="Scales separated by commas, e.g. 0,2,5,10.")] = None,
    profile: ProfileOption = None,
    overlay: OverlayOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the same noise at several guidance scales: strips, mean entropy and label agreement for each.

    Example: medaug sweep uncertainty_guidance --overlay disturbance --cohort runs/cohort --run runs/run --scales 0,2,5,10,20 --profile cpu32
    """
    from medaug.cli.options import numbers
    from medaug.errors import ConfigError
    from medaug.workflow import load_config, parse_overrides, run_stage

    if "sweeping" not in load_config(bundle, "generating", profile, overlay):
        raise ConfigError("sweep-unknown", f"Bundle {Path(bundle).name} has no guidance to sweep over.")
    overrides: dict[str, Any] = {
        "dataset_dir": str(cohort),
        "run_dir": str(run),
        "seed": seed,
        "tracking": tracked_at(tracking_uri),
    }
    if out is not None:
        overrides["sweep_dir"] = str(out)
    if scales is not None:
        overrides["sweep_settings#scales"] = list(numbers(scales, scales.count(",") + 1, "--scales"))
    overrides |= parse_overrides(settings or [])
    # The parts are those of generation; only what is run differs.
    result = run_stage(
        bundle, "generating", profile, overrides | {"session": "@sweep", "generating": ["$@sweep.run()"]}, overlay=overlay
    )
    lines = [
        f"scale {row['scale']:g}: entropy {row['entropy']:.3f}, agreement {row['agreement']:.2f}, change {row['change']:.3f}"
        for row in result["rows"]
    ]
    show(result, as_json, "\n".join(lines))
