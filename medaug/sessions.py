"""On what a job worked and for how long: one line for every session of a stage, with the environment it ran in.

A job that was killed and started again has several sessions, maybe of different versions. Times are kept beside the results,
never in them: what a stage makes stays the same bytes on a slow machine and on a quick one.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from medaug import __version__, storage
from medaug.errors import DataError

FILE_NAME = "sessions.json"
PACKAGES = ("monai", "torch", "torchvision", "timm", "pytorch-ignite", "numpy", "scipy", "scikit-learn")
_CHECKOUT = Path(__file__).resolve().parents[1]
_SAVE_EVERY = 10.0  # seconds; what a kill may lose of a session's time

__all__ = ["FILE_NAME", "Sessions", "environment", "joined", "read_sessions"]


def environment() -> dict[str, Any]:
    """Commit (None outside a checkout), versions and a machine without a name."""
    versions = {"medaug": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"commit": _commit(), "python": platform.python_version(), "machine": _machine(), "packages": versions}


def _machine() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{cores} core{'' if cores == 1 else 's'}, {', '.join(gpus) or 'no GPU'}"


def _commit() -> str | None:
    """The commit of the checkout that this package is in, with a word if its files differ from it."""
    if not (_CHECKOUT / ".git").exists() or not (_CHECKOUT / "setup.cfg").is_file():
        return None  # an installed package inside somebody else's repository
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else f"{head} with local changes" if changed else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Sessions:
    """Writes ``sessions.json`` of a folder that its caller has locked.

    Args:
        folder: of the job.
    """

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / FILE_NAME

    @contextmanager
    def stage(self, name: str, *, needed: bool = True) -> Iterator[Callable[[], None]]:
        """A session of a stage: gives a function to call now and then, which saves the time so far.

        Args:
            name: of the stage, for people; no path.
            needed: False for a stage that is finished already: its session is not worth a line.
        """
        if not needed:
            yield lambda: None
            return
        content = read_sessions(self._path.parent)
        found = environment()
        if found not in content["environments"]:
            content["environments"].append(found)
        entry = {"stage": name, "environment": content["environments"].index(found), "seconds": 0.0}
        content["stages"].append(entry)
        start = saved = time.monotonic()

        def save() -> None:
            entry["seconds"] = round(time.monotonic() - start, 1)
            storage.write_json(self._path, content)

        def save_sometimes() -> None:
            nonlocal saved
            if time.monotonic() - saved >= _SAVE_EVERY:
                save()
                saved = time.monotonic()

        save()
        try:
            yield save_sometimes
        finally:
            save()


def read_sessions(folder: Path) -> dict[str, list[Any]]:
    """``{"environments": [...], "stages": [{"stage", "environment": number of it, "seconds"}]}``; empty lists without a file.

    Raises:
        DataError: the file is not one that medaug wrote (code `sessions-malformed`).
    """
    path = Path(folder) / FILE_NAME
    return checked(storage.read_json(path)) if path.is_file() else {"environments": [], "stages": []}


def checked(content: Any) -> dict[str, list[Any]]:
    """The content of such a file, as `read_sessions` gives it.

    Raises:
        DataError: `sessions-malformed`.
    """
    try:
        environments, stages = list(content["environments"]), list(content["stages"])
        good = all(isinstance(entry["packages"], dict) for entry in environments) and all(
            isinstance(entry["stage"], str)
            and isinstance(entry["environment"], int)
            and 0 <= entry["environment"] < len(environments)
            and 0 <= entry["seconds"] < math.inf
            for entry in stages
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise DataError(
            "sessions-malformed", "The times and environments are not as medaug wrote them; restore the file or delete it."
        )
    return {"environments": environments, "stages": stages}


def joined(parts: Iterable[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Sessions of several folders as of one, each environment once."""
    environments: list[Any] = []
    stages: list[Any] = []
    for part in parts:
        environments += [entry for entry in part["environments"] if entry not in environments]
        stages += [
            {**entry, "environment": environments.index(part["environments"][entry["environment"]])} for entry in part["stages"]
        ]
    return {"environments": environments, "stages": stages}
