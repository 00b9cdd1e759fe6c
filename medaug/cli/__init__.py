"""The command line. Each command reads its options and calls one function; heavy imports happen inside it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from medaug import __version__
from medaug.cli import (  # noqa: F401 - registers their commands
    bundles,
    calibrate,
    evidence,
    experiment,
    export,
    feedback,
    imported,
    intake,
    labels,
    pacs,
    pilot,
    readers,
    replay,
    report,
    stages,
    sweep,
)
from medaug.cli.options import app
from medaug.errors import MedaugError

EXIT_INTERRUPTED = 130
INTERRUPTED = "Stopped; run the same command again to go on.\n"


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Labelled medical images: generate, check, and measure whether they help. Research use only, not for diagnosis.

    Example: medaug quickstart --out runs/quickstart
    """


def _on_terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(run: Callable[[], Any] = app) -> None:
    """Entry point: runs the command and turns errors into a sentence and an exit code."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        run()
    except MedaugError as error:
        _fail(error)
    except SystemExit as stop:  # typer has turned Ctrl-C into an exit of its own
        if stop.code == EXIT_INTERRUPTED:
            sys.stderr.write(INTERRUPTED)
        raise
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os._exit(0)


def _fail(error: MedaugError) -> None:
    sys.stderr.write(f"medaug: {error}\n")
    sys.exit(error.exit_code)
