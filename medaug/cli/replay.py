"""`medaug replay`: does a synthetic image come out of its lineage again, byte for byte?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medaug.cli.options import CohortOption, JsonOption, SeedOption, SetOption, app, show

if TYPE_CHECKING:
    from medaug.generation.generate import GenerationSession
    from medaug.replay_record import Generation

DIFFERENT = 3


@app.command()
def replay(
    cohort: CohortOption,
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Synthetic cohort, of `medaug generate` or `medaug gate`.")],
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of `medaug train` that it was generated from, unless it was made without one."),
    ] = None,
    case: Annotated[list[str] | None, typer.Argument(help="Ids of synthetic cases.")] = None,
    random: Annotated[
        int | None, typer.Option("--random", min=1, help="In place of ids: so many cases, drawn by --seed.")
    ] = None,
    source: Annotated[Path | None, typer.Option(help="For disturbed images of a finished stage 1: its folder.")] = None,
    settings: SetOption = None,
    bundle: Annotated[str | None, typer.Option(help="Folder of an edited bundle that generated them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Keep the images made now in this folder.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make synthetic images again from their lineage and compare the bytes; exit code 3 if any differs.

    Folders that generation was given by --set, such as model_dir or classifier_dirs, are no part of a lineage: give them again.

    Example: medaug replay --random 20 --synthetic runs/accepted --cohort runs/cohort --run runs/run
    """
    from medaug import storage
    from medaug.errors import ConfigError
    from medaug.generation.generate import read_synthetic
    from medaug.generation.replay import choose_cases, replay_cases, replay_settings, shipped_bundle
    from medaug.progress import progress
    from medaug.workflow import parse_overrides, run_setting, run_stage

    made = read_synthetic(synthetic)
    cases = choose_cases(made, case or [], random, seed)
    if out is not None and made.root is not None and made.root.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError("out-is-input", "--out must be another folder than the synthetic cohort.")
    folders = {"dataset_dir": str(cohort)} | ({} if source is None else {"source": str(source)})
    given = folders | parse_overrides(settings or [])

    def open_session(generation: Generation, device: str) -> GenerationSession:
        overlay = {} if generation.overlay is None else {"overlay": generation.overlay}
        name = bundle or shipped_bundle(generation)
        values = replay_settings(generation, device) | run_setting(run, name, generation.overlay) | given
        session: GenerationSession = run_stage(name, "generating", None, values, **overlay)
        return session

    rows: list[dict[str, Any]] = []
    with progress("replaying", len(cases)) as advance:
        for found in replay_cases(cases, made, open_session):
            rows.append(found.to_json())
            if out is not None:
                storage.write_bytes(out / f"{found.id}.png", found.png)
            advance(1)
    _answer(rows, as_json)


def _answer(rows: list[dict[str, Any]], as_json: bool) -> None:
    from medaug.replay_record import machine

    same = sum(row["identical"] for row in rows)
    here = {device: machine(device) | {"threads": None} for device in sorted({row["made_on"]["device"] for row in rows})}
    summary = {"cases": len(rows), "identical": same, "rows": rows}
    elsewhere = sum(row["made_on"] | {"threads": None} != here[row["made_on"]["device"]] for row in rows)
    lines = [_line(row) for row in rows] + [f"{same} of {len(rows)} image(s) identical, byte for byte."]
    if same < len(rows) and elsewhere:
        lines.append(
            f"{elsewhere} image(s) were made on another machine or with other versions, which may round otherwise: see --json."
        )
    show(summary | {"here": here}, as_json, "\n".join(lines))
    if same < len(rows):
        raise typer.Exit(DIFFERENT)


def _line(row: dict[str, Any]) -> str:
    if row["identical"]:
        return f"{row['id']}: identical, sha256 {row['sha256_on_disk']}"
    changed = "; the file is not the one that was made" if row["sha256_on_disk"] != row["sha256_in_lineage"] else ""
    difference = "no image of this size" if row["largest_difference"] is None else f"{row['largest_difference']:.3g}"
    return (
        f"{row['id']}: NOT identical, on disk {row['sha256_on_disk']}, replayed {row['sha256_replayed']}, "
        f"largest pixel difference {difference}{changed}"
    )
