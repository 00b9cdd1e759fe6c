"""One progress bar for every long stage: on stderr, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; yields ``advance(steps)``.

    Args:
        description: what is being done, without names of patients or files.
        total: number of steps.
        completed: steps an earlier run has done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(description, total=total, completed=completed)
        yield lambda steps: bar.advance(task, steps)
