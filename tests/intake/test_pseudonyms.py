"""Pseudonyms: stable with a key, others with another, and a key that nobody else can read."""

from __future__ import annotations

import csv
import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from pydicom.uid import UID

from medaug.errors import ConfigError, DataError
from medaug.intake.pseudonyms import KEY_VARIABLE, Pseudonyms, check_outside, key_path, write_mapping
from medaug.intake.records import IntakeOptions


def test_known_answer_of_hmac(pseudonym_key: Path) -> None:
    key = bytes.fromhex(pseudonym_key.read_text())
    expected = hmac.new(key, b'["patient", "4711"]', hashlib.sha256).hexdigest()[:16]
    assert Pseudonyms(pseudonym_key).patient("4711") == "p" + expected


def test_same_key_same_name_other_key_other_name(tmp_path: Path) -> None:
    first, again, other = Pseudonyms(tmp_path / "a" / "key"), Pseudonyms(tmp_path / "a" / "key"), Pseudonyms(tmp_path / "b")
    assert first.patient("4711") == again.patient("4711") != other.patient("4711")
    assert first.patient("x", "y") == first.patient("y", "x") != first.patient("xy")
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert Pseudonyms(None).patient("4711") != Pseudonyms(None).patient("4711")
    assert stat.S_IMODE((tmp_path / "a" / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_uids_are_valid_and_keyed(pseudonym_key: Path, tmp_path: Path) -> None:
    own, other = Pseudonyms(pseudonym_key), Pseudonyms(tmp_path / "key")
    made = {own.uid(f"1.2.{number}") for number in range(200)}
    assert len(made) == 200 and all(UID(uid).is_valid and uid.startswith("2.25.") for uid in made)
    assert own.uid("1.2.3") == Pseudonyms(pseudonym_key).uid("1.2.3") != other.uid("1.2.3")


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [
        ("ab" * 32, 0o644, "pseudonym-key-exposed"),
        ("ab" * 8, 0o600, "pseudonym-key-malformed"),
        ("secret", 0o600, "pseudonym-key-malformed"),
        ("", 0o600, "pseudonym-key-malformed"),
    ],
)
def test_weak_keys_are_refused(tmp_path: Path, content: str, mode: int, code: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=code):
        Pseudonyms(path).patient("1")


def test_where_the_key_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_path(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "env"))
    assert key_path(None) == tmp_path / "env"
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert key_path(None) == tmp_path / "xdg" / "medaug" / "pseudonym.key"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert key_path(None) == tmp_path / "home" / ".config" / "medaug" / "pseudonym.key"


def test_an_archive_is_handed_on_alone_and_a_list_with_its_folder(tmp_path: Path) -> None:
    """An archive that was downloaded into the home folder, where the key is too."""
    for name in ("archive.npz", "list.json"):
        (tmp_path / name).touch()
    key = tmp_path / ".config" / "key"
    assert IntakeOptions(tmp_path / "archive.npz", tmp_path / "out", pseudonym_key=key).checked().pseudonym_key == key.resolve()
    with pytest.raises(ConfigError, match="another path with --pseudonym-key"):
        IntakeOptions(tmp_path / "list.json", tmp_path / "out", pseudonym_key=key).checked()


@pytest.mark.parametrize("option", ["pseudonym_key", "mapping"])
@pytest.mark.parametrize("folder", ["in", "out", "copies", "link"])
def test_secrets_inside_a_source_or_output_are_refused(tmp_path: Path, option: str, folder: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    wanted = {option: tmp_path / folder / "deep" / "secret"}
    options = IntakeOptions(tmp_path / "in", tmp_path / "out", keep_dicom=tmp_path / "copies", **wanted)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="secret-inside"):
        options.checked()
    assert check_outside(tmp_path / "elsewhere", [tmp_path / "in"], "key", "--key") == (tmp_path / "elsewhere").resolve()


def test_mapping_is_private_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mapping.csv"
    write_mapping(path, [("patient", "p1", "Müller, A"), ("patient", "p1", "Müller, A")])
    write_mapping(path, [("file", "c1", "a\udce9.dcm")])
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.reader(stream))
    assert rows == [["kind", "pseudonym", "original"], ["file", "c1", "a\udce9.dcm"], ["patient", "p1", "Müller, A"]]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = tmp_path / "thesis.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="mapping-not-ours"):
        write_mapping(other, [])
    assert other.read_text() == "a,b\n1,2\n"
