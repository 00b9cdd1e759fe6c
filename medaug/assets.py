"""Where the bundles and configuration overlays are: beside the package in a checkout, under share/ when installed.

Bundles and configs are trusted code: MONAI evaluates their ``$`` expressions and imports what ``_target_`` names.
"""

from __future__ import annotations

import os
import shutil
import site
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from medaug.errors import ConfigError
from medaug.storage import storage_errors

_PACKAGE = Path(__file__).resolve().parent
_MARK = Path("configs", "metadata.json")
_PROFILE_SUFFIXES = (".yaml", ".yml", ".json")


def bundles_root() -> Path:
    """Folder that holds the shipped bundles, absolute.

    Raises:
        ConfigError: neither a checkout nor an installation with its data files (code `assets-missing`).
    """
    return _root("bundles")


def configs_root() -> Path:
    """Folder that holds the shipped overlays (``profiles/`` and so on), absolute.

    Raises:
        ConfigError: see `bundles_root`.
    """
    return _root("configs")


def _root(kind: str) -> Path:
    for candidate in _candidates(kind):
        if candidate.is_dir():
            return candidate
    raise ConfigError(
        "assets-missing",
        f"The {kind}/ folder of medaug is neither beside the package nor under share/medaug; install medaug again with pip.",
    )


def _candidates(kind: str) -> Iterable[Path]:
    checkout = _PACKAGE.parent
    if (checkout / "setup.cfg").is_file():  # site-packages/bundles would be somebody else's
        yield checkout / kind
    yield Path(sys.prefix, "share", "medaug", kind)
    yield Path(site.getuserbase(), "share", "medaug", kind)  # pip install --user


def list_bundles() -> list[str]:
    """Names of the shipped bundles, sorted."""
    return sorted(folder.name for folder in bundles_root().iterdir() if _is_bundle(folder))


def _is_bundle(folder: Path) -> bool:
    return (folder / _MARK).is_file()


def bundle_root(name_or_path: str | os.PathLike[str]) -> Path:
    """Absolute folder of a bundle.

    Args:
        name_or_path: the name of a shipped bundle, or a relative or absolute path of a bundle folder. A name wins over
            a folder of the same name in the working directory; write ``./NAME`` for that one.

    Raises:
        ConfigError: no such bundle (code `bundle-unknown`); the message lists the known names.
    """
    names = list_bundles()
    if os.fspath(name_or_path) in names:
        return bundles_root() / name_or_path
    folder = Path(name_or_path).expanduser()
    if os.fspath(name_or_path) and _is_bundle(folder):
        return folder.resolve()
    raise ConfigError(
        "bundle-unknown",
        f"A bundle must be one of {_listed(names)} or a folder with {_MARK.as_posix()}, got {_shown(name_or_path)!r}; "
        "`medaug bundles` lists them.",
    )


def list_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return _list_configs("profiles")


def profile_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Absolute path of a profile, an overlay on a bundle's configs.

    Args:
        name_or_path: the name of a shipped profile, or the path of a YAML or JSON file.

    Raises:
        ConfigError: no such profile (code `profile-unknown`); the message lists the known names.
    """
    return _config_path("profile", name_or_path)


def list_experiments() -> list[str]:
    """Names of the shipped experiments, sorted."""
    return _list_configs("experiments")


def experiment_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Absolute path of an experiment's file; arguments and errors as `profile_path` (code `experiment-unknown`)."""
    return _config_path("experiment", name_or_path)


def list_gates() -> list[str]:
    """Names of the shipped gates, sorted."""
    return _list_configs("gates")


def gate_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Absolute path of a gate's file; arguments and errors as `profile_path` (code `gate-unknown`)."""
    return _config_path("gate", name_or_path)


def list_pilots() -> list[str]:
    """Names of the shipped limits of a pilot, sorted."""
    return _list_configs("pilots")


def pilot_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Absolute path of a file of limits; arguments and errors as `profile_path` (code `pilot-unknown`)."""
    return _config_path("pilot", name_or_path)


def _list_configs(folder: str) -> list[str]:
    return sorted(path.stem for path in (configs_root() / folder).glob("*.yaml"))


def _config_path(kind: str, name_or_path: str | os.PathLike[str]) -> Path:
    names = _list_configs(f"{kind}s")
    if os.fspath(name_or_path) in names:
        return configs_root() / f"{kind}s" / f"{os.fspath(name_or_path)}.yaml"
    path = Path(name_or_path).expanduser()
    if path.suffix in _PROFILE_SUFFIXES and path.is_file():
        return path.resolve()
    raise ConfigError(
        f"{kind}-unknown",
        f"The {kind} must be one of {_listed(names)} or the path of a YAML or JSON file, got {_shown(name_or_path)!r}.",
    )


def copy_bundle(name_or_path: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Copy a bundle to `target` for editing; the folder appears whole or not at all.

    Args:
        name_or_path: see `bundle_root`.
        target: the new bundle folder; it must not exist, or be empty.

    Returns:
        The absolute path of the copy.

    Raises:
        ConfigError: unknown bundle, or `target` holds something (code `target-not-empty`).
        StorageError: the disk is full or the folder cannot be written.
    """
    source = bundle_root(name_or_path)
    folder = Path(target).expanduser().resolve()
    if folder == source or source in folder.parents:
        raise ConfigError("target-inside-bundle", f"The copy must lie outside the bundle {source.name}; choose another folder.")
    _refuse_occupied(folder)
    with storage_errors(folder.name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            copy = staging / "bundle"
            _copy_tree(source, copy)
            os.rename(copy, folder)  # POSIX replaces an empty folder and refuses one that was filled meanwhile
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _refuse_occupied(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise ConfigError("target-not-empty", f"{folder.name} exists and is not an empty folder; name a new one for the copy.")


def _copy_tree(source: Path, target: Path) -> None:
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    except shutil.Error as error:  # a list of (source, target, reason): raise the fault of the disk itself
        raise OSError(f"{len(error.args[0])} file(s) of the bundle could not be copied") from error
    for path in [*target.rglob("*"), target]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none installed)"


def _shown(name_or_path: str | os.PathLike[str]) -> str:
    return Path(name_or_path).name  # a path may name a person; its last part is enough to recognise it
