"""Facts and thumbnails on the disk, and the memory of an intake with many files."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medaug.cohort import read_cohort
from medaug.errors import StorageError
from medaug.intake import duplicates, leak
from medaug.intake.build import IntakeOptions, run_intake
from medaug.intake.spool import Spool, Thumbnails

BYTES_PER_IMAGE = 2400  # 1,550 measured


def test_facts_come_back_as_json_holds_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.put({"spacing_mm": (0.7, np.float32(0.5)), "bits": np.int16(12), "bad": float("nan"), "text": "\u00e4\n"})
    second = spool.put({})
    assert first == {"spacing_mm": [0.7, 0.5], "bits": 12, "bad": None, "text": "\u00e4\n"} and second == {} and not second
    longer = first.extended(more={"0": 1})
    assert list(longer) == [*first, "more"] and longer["more"] == {"0": 1} and "more" not in first
    assert not list(tmp_path.iterdir())  # no name that a killed intake could leave behind


def test_facts_are_copied_and_pickled_as_a_dict(tmp_path: Path) -> None:
    facts = Spool(tmp_path).put({"a": [1]})
    for other in (copy.deepcopy(facts), pickle.loads(pickle.dumps(facts))):
        assert type(other) is dict and other == facts


def test_thumbnails_are_an_array_whose_parts_are_read(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(size=(9, 32, 32)).astype(np.float16)
    spool = Spool(None)
    stack = Thumbnails(spool, [spool.add(image) for image in images])
    order = np.array([3, 1, 8])
    assert len(stack) == 9 and np.array_equal(stack[2:5], images[2:5]) and np.array_equal(stack[4], images[4])
    assert len(stack[order]) == 3 and np.array_equal(stack[order][:], images[order])
    assert stack[:0].shape == (0, 32, 32)


def test_groups_and_leak_are_those_of_the_array(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    bodies = np.repeat(generator.uniform(size=(20, 8, 8)), 3, axis=0).repeat(4, axis=1).repeat(4, axis=2)
    images = np.clip(bodies + generator.normal(0, 0.02, bodies.shape), 0, 1).astype(np.float16)
    spool, labels = Spool(tmp_path), [index // 3 % 2 for index in range(60)]
    stack = Thumbnails(spool, [spool.add(image) for image in images])
    assert duplicates.find_groups(stack).labels == duplicates.find_groups(images).labels
    spooled = leak.leak_indicator(stack[np.arange(40)], labels[:40], stack[np.arange(40, 60)], labels[40:])
    assert spooled == leak.leak_indicator(images[:40], labels[:40], images[40:], labels[40:])


def test_a_folder_that_cannot_hold_the_spool_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Spool(tmp_path / "nowhere")


def source_of(folder: Path, count: int) -> tuple[Path, Path]:
    """Noise of 16 x 16 pixels, 20 images a patient, and the label table."""
    lines = ["file,label,patient"]
    for index in range(count):
        path = folder / "in" / f"IM{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
        lines.append(f"{path.name},{'ab'[index // 20 % 2]},patient {index // 20}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder / "in", folder / "labels.csv"


def peak_of(folder: Path, count: int) -> int:
    source, labels = source_of(folder, count)
    options = IntakeOptions(source, folder / "out", labels=labels, patient_column="patient", image_size=16)
    tracemalloc.start()
    result = run_intake(options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.counts["used"] == count and result.cohort == read_cohort(folder / "out")
    return peak


def test_an_image_takes_little_memory_until_the_cohort_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", 64)  # blocks of the usual size would grow up to 1024 images
    peak_of(tmp_path / "warm", 80)  # imports
    small, large = peak_of(tmp_path / "small", 200), peak_of(tmp_path / "large", 500)
    # Its thumbnail alone takes 2 kB, its facts as a dict 1.5 kB and once more in the cohort.
    assert (large - small) / 300 < BYTES_PER_IMAGE, f"{(large - small) / 300:.0f} bytes per image"
