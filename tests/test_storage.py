from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from medaug import storage
from medaug.errors import DataError, StorageError


def test_write_bytes_leaves_only_the_file(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "deep" / "a.bin", b"one")
    storage.write_bytes(tmp_path / "deep" / "a.bin", b"two")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.bin"]
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"two"


def test_written_file_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        storage.write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_failed_write_keeps_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(tmp_path / "a", b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_full_disk_is_named_and_leaves_nothing_half_written(small_disk: Path) -> None:
    storage.write_bytes(small_disk / "whole", b"x" * 1000)
    with pytest.raises(StorageError, match="No space left") as caught:
        storage.write_bytes(small_disk / "whole", b"y" * 3_000_000)
    assert caught.value.code == "disk-full"
    assert caught.value.exit_code == 5
    assert [path.name for path in small_disk.iterdir()] == ["whole"]
    assert (small_disk / "whole").read_bytes() == b"x" * 1000


def test_file_in_place_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="storage-failed"):
        storage.write_bytes(tmp_path / "file" / "a", b"")


def test_json_round_trip_and_canonical_hash(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": "ü"})
    assert storage.read_json(tmp_path / "a.json") == {"b": [1, 2.5, None], "a": "ü"}
    assert storage.sha256_json({"a": 1, "b": 2}) == storage.sha256_json({"b": 2, "a": 1})
    assert storage.sha256_json({"a": 1}) != storage.sha256_json({"a": "1"})


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        storage.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_unreadable_json_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="json-unreadable"):
        storage.read_json(tmp_path / "a.json")


def test_missing_json_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="file-missing"):
        storage.read_json(tmp_path / "a.json")


def test_csv_has_a_header_and_quotes_what_needs_it(tmp_path: Path) -> None:
    storage.write_csv(tmp_path / "a.csv", [{"file": 'a,"b"', "code": 1}], ["file", "code"])
    assert (tmp_path / "a.csv").read_text() == 'file,code\n"a,""b""",1\n'


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than one chunk
    (tmp_path / "a").write_bytes(data)
    assert storage.sha256_file(tmp_path / "a") == storage.sha256_bytes(data)
    assert storage.sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4


def test_second_process_finds_the_folder_in_use(tmp_path: Path) -> None:
    with storage.locked(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                with storage.locked(tmp_path):
                    os._exit(0)
            except StorageError as error:
                os._exit(error.exit_code if error.code == "folder-in-use" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    with storage.locked(tmp_path):
        pass  # free again


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with storage.locked(tmp_path):
            os.write(write, b"held")
            os.kill(os.getpid(), 9)
    assert os.read(read, 4) == b"held"
    os.waitpid(child, 0)
    with storage.locked(tmp_path):
        pass


def test_error_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(StorageError("disk-full", "No space.")))
    assert (type(error), error.code, error.message, str(error)) == (
        StorageError,
        "disk-full",
        "No space.",
        "[disk-full] No space.",
    )
    assert json.dumps(error.code)


def test_json_is_what_json_dumps_gives_at_a_fraction_of_its_memory(tmp_path: Path) -> None:
    value = {"cases": [{"id": f"s{number}", "lineage": {"seed": number, "sigma": 0.1, "text": "ä"}} for number in range(5000)]}
    expected = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    tracemalloc.start()
    storage.write_json(tmp_path / "a.json", value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == expected
    assert peak < 2 * len(expected)  # the text itself; a list of its tokens takes nine times as much


def test_rows_hash_like_their_list() -> None:
    for rows in ([], [["a", 1]], [{"b": 1, "a": [None, "\u00e4"]}, 2.5, "x"]):
        assert storage.sha256_rows(iter(rows)) == storage.sha256_json(rows)


def test_json_of_other_objects_is_made_one_at_a_time(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", {"rows": (1, 2 + 3j)}, default=lambda value: [value.real, value.imag])
    assert storage.read_json(tmp_path / "a.json") == {"rows": [1, [2.0, 3.0]]}
