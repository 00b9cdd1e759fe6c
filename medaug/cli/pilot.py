"""`medaug pilot`: a few images of every class first, and go or no-go to the full generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import (
    CohortOption,
    JsonOption,
    OutOption,
    ProfileOption,
    SeedOption,
    SetOption,
    TrackingOption,
    app,
    show,
    tracked_at,
)

EXIT_NO_GO = 3


@app.command()
def pilot(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder.")],
    cohort: CohortOption,
    run: Annotated[Path, typer.Option("--run", help="Folder of `medaug train`.")],
    out: OutOption,
    per_class: Annotated[int, typer.Option(help="Images generated of each class that is wanted.")] = 32,
    wanted: Annotated[int | None, typer.Option(help="Accepted images that the full generation is to give, in all.")] = None,
    per_real: Annotated[
        float | None, typer.Option(help="The same per real training image; without either the bundle's own numbers.")
    ] = None,
    limits: Annotated[str, typer.Option(help="What must be shown: default, or a YAML file with other limits.")] = "default",
    profile: ProfileOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a few images of every class, measure them on real validation images, and say go or no-go to the full generation.

    Looks at the gate's acceptance, outliers, KID, copies, and what a classifier learns from the pilot alone; projects images, time, disk and
    memory of the full generation. `medaug generate --out OUT/synthetic` with the same settings goes on from the pilot's images.

    Exit code 0 is go, 3 is no-go (or no usable input, which says so on stderr and writes no report).

    Example: medaug pilot guided_ddpm --cohort runs/cohort --run runs/run --out runs/pilot --per-real 2.5 --profile cpu32
    """
    from medaug.pilot import PilotOptions, run_pilot
    from medaug.workflow import parse_overrides

    result = run_pilot(
        bundle,
        cohort,
        run,
        out,
        PilotOptions(per_class, wanted, per_real, limits),
        profile=profile,
        overrides=parse_overrides(settings or []),
        seed=seed,
        tracking=tracked_at(tracking_uri),
    )
    show(result, as_json, _text(result, out))
    if not result["go"]:
        raise typer.Exit(EXIT_NO_GO)


def _text(result: dict[str, Any], out: Path) -> str:
    lines = [f"{check['outcome']:9} {check['name']}: {check['sentence']}" for check in result["checks"]]
    failed = ", ".join(check["name"] for check in result["checks"] if check["outcome"] == "fail")
    return "\n".join([*lines, f"No-go: {failed}." if failed else "Go: no check fails.", f"Report: {out / 'report.html'}"])
