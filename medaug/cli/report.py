"""`medaug report`: the page of a result, written from rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import JsonOption, app, show


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of `medaug experiment`, augment or grade, or a page of this command.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the page.")],
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Write a page though training runs are missing; it says so.")
    ] = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="Add a sheet of accepted images, of the sets whose gate looked for copies.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write README, tables and figures of a result; a page writes the same page again. NOTES.md is appended to it.

    Example: medaug report runs/locations --out docs/results/locations
    """
    from medaug.results.page import write_page

    summary = write_page(folder, out, unfinished=unfinished, samples=samples)
    show(summary, as_json, _text(summary, out))


def _text(summary: dict[str, Any], out: Path) -> str:
    missing = [] if summary["finished"] else [f"Unfinished: {summary['missing']} training runs are missing."]
    return "\n".join([*missing, *(entry["sentence"] for entry in summary["verdict"].values()), f"Page: {out / 'README.md'}"])
