"""Bundles and profiles are found wherever medaug runs from, and a wheel would carry every one of their files."""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path

import pytest

from medaug import assets
from medaug.errors import ConfigError, StorageError

REPOSITORY = Path(__file__).resolve().parents[1]


def make_bundle(folder: Path) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text("{}", encoding="utf-8")
    (folder / "configs" / "train.yaml").write_text("seed: 0\n", encoding="utf-8")
    (folder / "LICENSE").write_text("terms", encoding="utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation without a checkout: the package in site-packages, the data files under the prefix."""
    package = tmp_path / "prefix" / "lib" / "site-packages" / "medaug"
    package.mkdir(parents=True)
    monkeypatch.setattr(assets, "_PACKAGE", package)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(assets.site, "getuserbase", lambda: str(tmp_path / "user"))
    return tmp_path


def test_the_checkout_comes_first() -> None:
    assert assets.bundles_root() == REPOSITORY / "bundles"
    assert "guided_ddpm" in assets.list_bundles()


def test_an_installation_uses_the_prefix_then_the_user_base(installed: Path) -> None:
    user = make_bundle(installed / "user" / "share" / "medaug" / "bundles" / "theirs").parent
    assert assets.bundles_root() == user
    make_bundle(installed / "prefix" / "share" / "medaug" / "bundles" / "ours")
    assert assets.list_bundles() == ["ours"]


def test_a_foreign_bundles_folder_in_site_packages_is_not_ours(installed: Path) -> None:
    make_bundle(installed / "prefix" / "lib" / "site-packages" / "bundles" / "foreign")
    with pytest.raises(ConfigError, match="assets-missing") as caught:
        assets.list_bundles()
    assert caught.value.exit_code == 2


def test_a_bundle_is_found_by_name_relative_and_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make_bundle(tmp_path / "with space" / "mine")
    monkeypatch.chdir(tmp_path)
    assert assets.bundle_root("guided_ddpm") == REPOSITORY / "bundles" / "guided_ddpm"
    assert assets.bundle_root("with space/mine") == mine
    assert assets.bundle_root(mine) == mine


def test_a_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make_bundle(tmp_path / "guided_ddpm")
    monkeypatch.chdir(tmp_path)
    assert assets.bundle_root("guided_ddpm") == REPOSITORY / "bundles" / "guided_ddpm"
    assert assets.bundle_root("./guided_ddpm") == mine


@pytest.mark.parametrize("name", ["guided_dpm", "", ".", "private folder/guided_dpm"])
def test_an_unknown_bundle_is_refused_with_the_list(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="bundle-unknown.*guided_ddpm") as caught:
        assets.bundle_root(name)
    assert "private folder" not in caught.value.message


def test_a_profile_is_found_by_name_and_path(installed: Path) -> None:
    shipped = installed / "prefix" / "share" / "medaug" / "configs" / "profiles" / "tiny.yaml"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("seed: 1\n", encoding="utf-8")
    own = installed / "own.yaml"
    own.write_text("seed: 2\n", encoding="utf-8")
    assert assets.list_profiles() == ["tiny"]
    assert assets.profile_path("tiny") == shipped
    assert assets.profile_path(own) == own
    for wrong in ("tinny", "", installed, installed / "missing.yaml"):
        with pytest.raises(ConfigError, match="profile-unknown.*tiny"):
            assets.profile_path(wrong)


@pytest.mark.parametrize("exists", [False, True])
def test_a_copy_holds_the_same_files(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "new" / "copy"
    if exists:
        target.mkdir(parents=True)
    assert assets.copy_bundle("guided_ddpm", target) == target
    assert files(target) == files(REPOSITORY / "bundles" / "guided_ddpm")
    assert [path.name for path in target.parent.iterdir()] == ["copy"]
    assert assets.bundle_root(target) == target


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="target-not-empty"):
        assets.copy_bundle("guided_ddpm", target)
    with pytest.raises(ConfigError, match="target-not-empty"):
        assets.copy_bundle("guided_ddpm", target / "notes.txt")
    assert files(target) == {"notes.txt": b"keep"}


def test_a_copy_inside_its_source_is_refused(tmp_path: Path) -> None:
    mine = make_bundle(tmp_path / "mine")
    with pytest.raises(ConfigError, match="target-inside-bundle"):
        assets.copy_bundle(mine, mine / "copy")


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(assets, "_sync", full)
    with pytest.raises(StorageError, match="disk-full"):
        assets.copy_bundle("guided_ddpm", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_setup_cfg_ships_every_bundle_and_config_file() -> None:
    shipped: set[str] = set()
    for target, patterns in setup_cfg()["options.data_files"].items():
        for pattern in patterns.split():
            found = [path for path in REPOSITORY.glob(pattern) if path.is_file()]
            assert all(path.parent == REPOSITORY / target.removeprefix("share/medaug/") for path in found), pattern
            shipped |= {path.relative_to(REPOSITORY).as_posix() for path in found}
    present = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("bundles", "configs")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert present - shipped == set(), "add these to [options.data_files] in setup.cfg"


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path in (REPOSITORY / "medaug").rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_setup_cfg_ships_every_template() -> None:
    patterns = setup_cfg()["options.package_data"]["medaug"].split()
    shipped = {path for pattern in patterns for path in (REPOSITORY / "medaug").glob(pattern)}
    present = {path for path in (REPOSITORY / "medaug").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert present - shipped == set(), "add these to [options.package_data] in setup.cfg"
