"""What every measurement writes down: settings, machine, versions, commit, command; and a folder to go on from after a kill.

No torch here: `memory.py` measures processes that must not inherit the size of the one that starts them.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medaug.storage import read_json, sha256_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "runs" / "benchmarks"


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every measurement of minutes takes."""
    parser = argparse.ArgumentParser(
        prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cohort", type=Path, required=True, help="cohort folder of `medaug intake`")
    parser.add_argument("--work", type=Path, default=WORK / name, help="where a killed measurement goes on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    return parser


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result; folders are left out: a row names a cohort by its content."""
    return {key: value for key, value in vars(options).items() if key != "no_record" and not isinstance(value, Path)}


def command_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that makes the row again, with names in place of this machine's folders."""
    words = [f"python benchmarks/{parser.prog}"]
    for key, value in vars(options).items():
        if key in ("work", "no_record") or value == parser.get_default(key):
            continue
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list) and parser.get_default(key) == []:  # an option given several times
            words += [f"{flag} {item}" for item in value]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, key.upper() if isinstance(value, Path) else str(value)]
    return " ".join(words)


def environment() -> dict[str, Any]:
    """Machine, versions and commit. The load says whether the machine had other work to do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "usable_cores": cores,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "load_average": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("medaug", "monai", "torch")},
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of this checkout, with a plus when files differ from it; None outside of git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout.strip()


def record(row: dict[str, Any], name: str) -> None:
    """Append a row to ``benchmarks/results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    write_json(path, {"rows": [*rows, row]})


class WorkFolder:
    """Finished parts of one measurement. Started again with the same settings, a measurement takes them up.

    Args:
        folder: its place.
        identity: what must be the same for the parts to belong together.

    Raises:
        SystemExit: the folder holds parts of another measurement.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = sha256_json(identity)
        path = folder / "identity.json"
        if path.is_file() and read_json(path) != {"sha256": self.identity}:
            raise SystemExit(
                f"{folder.name} holds parts of a measurement with other settings, cohort, commit or versions; "
                "delete the folder or give another --work."
            )
        write_json(path, {"sha256": self.identity})

    def read(self, name: str) -> Any | None:
        """The finished part `name`, or None."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def write(self, name: str, part: Any) -> None:
        """Keep the finished part `name`."""
        write_json(self.folder / f"{name}.json", part)

    def finish(self, row: dict[str, Any], name: str, keep: bool) -> None:
        """Record the row and forget the parts; `keep` False leaves the row out of the results."""
        if keep:
            record(row, name)
        for path in [*self.folder.glob("*.json"), *self.folder.glob("*.safetensors")]:
            path.unlink()


def open_work(options: argparse.Namespace, facts: dict[str, Any], around: dict[str, Any]) -> WorkFolder:
    """The work folder of a measurement that these options, facts (cohort, weights) and versions decide."""
    same = {"settings": settings_of(options), "versions": around["versions"], "commit": around["commit"]}
    return WorkFolder(options.work.resolve(), facts | same)
