"""`medaug bundles`: what methods came with medaug, and copies to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medaug.cli.options import JsonOption, app, show

bundles_app = typer.Typer(no_args_is_help=False, invoke_without_command=True)
app.add_typer(bundles_app, name="bundles")


@bundles_app.callback()
def bundles(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the bundles that came with medaug.

    Example: medaug bundles copy guided_ddpm my_bundle
    """
    if context.invoked_subcommand is None:
        from medaug.assets import list_bundles

        names = list_bundles()
        show({"bundles": names}, as_json, "\n".join(names))


@bundles_app.command("copy")
def bundles_copy(
    name: Annotated[str, typer.Argument(help="Bundle to copy.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a bundle to edit it.

    Example: medaug bundles copy guided_ddpm my_bundle
    """
    from medaug.assets import copy_bundle

    copied = copy_bundle(name, folder)
    show({"copied": name, "to": copied.name}, as_json, f"Copied {name} to {copied}.")
