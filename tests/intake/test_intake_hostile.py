"""Sources that stopped a whole batch, and labels that were refused though they name nobody."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_intake_attacks import dicom
from test_intake_build import codes, fill, picture, save, take

from medaug import storage
from medaug.errors import DataError
from medaug.intake import burned_in
from medaug.intake.assemble import refuse_names
from medaug.intake.classes import in_words, shown
from medaug.intake.identity import may_name_patient, names_patient
from medaug.intake.masks import find_mask
from medaug.intake.records import Item, Record, sha_of
from medaug.io import limits


def record(label: str, *secrets: str) -> Record:
    return Record(Item("a", Path("a"), "dicom"), "0", (label,), None, (), secrets)


@pytest.mark.parametrize(
    ("labels", "secrets"),
    [
        (("0", "1"), ("0001",)),
        (("1", "2.0"), ("0002",)),
        (("grade 3", "grade 4"), ("000003",)),
        (("1", "2"), ("001^0001",)),
        (("I", "II"), ("00002",)),
    ],
)
def test_a_grade_is_no_study_id(labels: tuple[str, ...], secrets: tuple[str, ...]) -> None:
    assert refuse_names([record(label, *secrets) for label in labels for _ in range(4)]) is not None


@pytest.mark.parametrize(
    ("label", "secret"),
    [
        ("0001", "0001"),
        ("4711", "0004711"),
        ("4711.0", "4711"),
        ("case 4711", "P-4711"),
        ("Quorra", "QUORRA^ZEPHYRINE"),
        ("001 0002", "001^0002"),
    ],
)
def test_names_and_identifiers_are_refused_all_the_same(label: str, secret: str) -> None:
    assert names_patient(label, secret) or may_name_patient(label, secret)
    with pytest.raises(DataError, match="label-identifies"):
        refuse_names([record(label, secret)])


def test_grades_of_patients_with_one_study_id_are_taken_in(tmp_path: Path) -> None:
    for index in range(16):
        dicom(
            tmp_path / "in" / str(index % 2) / f"P{index}" / f"IM{index:04d}",
            index,
            PatientID=f"Q{index:05d}",
            StudyID="0001",
            AccessionNumber="",
        )
    assert take(tmp_path / "in", tmp_path / "out").counts["used"] == 16


def test_loops_of_links_are_ignored_and_counted(tmp_path: Path) -> None:
    source = fill(tmp_path / "in")
    (source / "loop").symlink_to("loop")
    (source / "a.dcm").symlink_to("b.dcm")
    (source / "b.dcm").symlink_to("a.dcm")
    result = take(source, tmp_path / "out")
    assert result.counts["ignored"] == {"link-in-a-loop": 3} and not result.quarantine


def test_what_is_too_large_for_an_image_is_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, hashed = [], storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: read.append(path) or hashed(path))
    source = fill(tmp_path / "in")
    with open(source / "disk.dcm", "wb") as stream:
        stream.write(b"\0" * 128 + b"DICM")
        stream.truncate(1 << 33)
    result = take(source, tmp_path / "out", workers=1)
    assert list(codes(result).values()) == ["image-too-large"] and result.counts["used"] > 0
    assert read and source / "disk.dcm" not in read


def test_a_large_file_is_known_by_its_size_and_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 10)
    small, large, longer = (tmp_path / name for name in ("a", "b", "c"))
    small.write_bytes(b"0123456789")
    large.write_bytes(b"0123456789a")
    longer.write_bytes(b"0123456789aa")
    assert sha_of(small) == storage.sha256_file(small)
    assert len({sha_of(large), sha_of(longer), storage.sha256_file(large)}) == 3


def test_devices_and_pipes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: hashed(path) if path.is_file() else pytest.fail("would not end"))
    os.mkfifo(tmp_path / "pipe.png")
    images = [save(tmp_path / f"{index}.png", picture(index)) for index in range(12)]
    entries = [{"image": path.name, "label": index % 2} for index, path in enumerate(images)]
    entries += [{"image": name, "label": 0} for name in ("/dev/zero", "pipe.png")]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    result = take(tmp_path / "list.json", tmp_path / "out")
    assert result.counts["used"] == 12 and sorted(row["code"] for row in result.quarantine) == [
        "image-missing",
        "path-outside-source",
    ]


def test_datalist_entries_that_no_file_can_have_are_one_row_each(tmp_path: Path) -> None:
    images = [save(tmp_path / "in" / f"{index}.png", picture(index)) for index in range(12)]
    (tmp_path / "in" / "loop").symlink_to("loop")
    entries = [{"image": path.name, "label": str(number % 2)} for number, path in enumerate(images)]
    entries += [{"image": name, "label": "1"} for name in ("x" * 5000, "loop", "x/" * 5000, "\ud800.png")]
    (tmp_path / "in" / "d.json").write_text(json.dumps({"training": entries}))
    result = take(tmp_path / "in" / "d.json", tmp_path / "out")
    assert [row["code"] for row in result.quarantine] == ["image-missing"] * 4 and result.counts["used"] == 12
    assert "xxxx" not in repr(result.quarantine) and codes(result)


def test_a_mask_is_looked_for_under_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert find_mask(tmp_path, ["1." + "2" * 5000, "loop", "x" * 250]) == []


def test_a_label_of_a_whole_text_is_cut_in_messages() -> None:
    assert len(shown("Z" * 120_000)) < 60 and shown("normal") == "'normal'"
    assert len(in_words(["Z" * 120_000, "1"], 0, {"Z" * 120_000})) < 60


def test_the_search_for_text_leaves_the_picture_as_it_is() -> None:
    pixels = np.random.default_rng(0).normal(0, 1, (200, 300)).astype(np.float32)
    pixels[3, 3] = 1e6
    before = pixels.copy()
    burned_in.find_text(pixels)
    np.testing.assert_array_equal(pixels, before)
    assert burned_in.thumbnail(np.zeros((70, 9000), np.float32), [(2, 3, 9, 20)]).shape == (96, 96, 3)
