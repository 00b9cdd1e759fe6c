"""Paths that untrusted lists, links and headers name: what the file system refuses is not there."""

from __future__ import annotations

from pathlib import Path

# Loops of links (RuntimeError before Python 3.13), names that are too long, no permission; letters that no file name can hold.
_REFUSALS = (OSError, RuntimeError, ValueError)


def resolved(path: Path) -> Path | None:
    """The real path, links followed; None for a loop of links and for a name that the file system cannot hold."""
    try:
        return path.resolve()
    except _REFUSALS:
        return None


def is_inside(path: Path, root: Path) -> bool:
    """True if the real path lies below `root`, which is a real path."""
    real = resolved(path)
    return real is not None and real.is_relative_to(root)


def is_file(path: Path) -> bool:
    """True for a regular file, or a link to one."""
    try:
        return path.is_file()
    except _REFUSALS:
        return False


def exists(path: Path) -> bool:
    """True if something is at this place."""
    try:
        return path.exists()
    except _REFUSALS:
        return False


def children(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing if it is none or must not be read."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except _REFUSALS:
        return []
