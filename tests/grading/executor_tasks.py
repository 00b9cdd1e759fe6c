"""Tasks for worker processes, which load this module alone: no torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from medaug.errors import ConfigError, StorageError
from medaug.grading.executors import usable_cores


def square(number, advance):
    """A task that tells its steps and its cores, and refuses 3."""
    advance(number)
    if number == 3:
        raise ConfigError("three", "Three does not suit.")
    return number**2, len(usable_cores())


def dies_once(folder, number, advance):
    """Task 1 kills its process half-way, the first time."""
    advance(5)
    marker = Path(folder) / f"{number}"
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    advance(5)
    return number


def one_always_dies(number, advance):
    """Task 1 kills every process that takes it."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fails(number, advance):
    raise StorageError("disk-full", "No space left.")


def sleeps(folder, number, advance):
    """Says that it runs, and never ends."""
    (Path(folder) / f"{os.getpid()}").touch()
    time.sleep(600)
