"""Intake from end to end on tiny sources: layouts, faults, privacy, one writer, same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medaug import storage
from medaug.cohort import read_cohort
from medaug.errors import ConfigError, DataError, MedaugError, StorageError
from medaug.intake.build import IntakeOptions, run_intake
from medaug.io import raster

SIZE = 16
FIRST_PATIENT = 4711083650  # ten digits: shorter ones occur by chance in hashes and encoded thumbnails


def picture(*key: int) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 255, (20, 18)).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def fill(root: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 8) -> Path:
    for label, name in enumerate(classes):
        for index in range(count):
            save(root / name / f"{name}_{index}.png", picture(label, index))
    return root


def take(source: Path, out: Path, **changes):
    return run_intake(IntakeOptions(source=source, out=out, image_size=SIZE, **changes))


def codes(result) -> dict[str, str]:
    return {row["file"]: row["code"] for row in result.quarantine}


def write_dicom(path: Path, pixels: np.ndarray, patient: str, name: str = "Quixote^Alonso", accession: str = "ACC7731") -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = generate_uid(entropy_srcs=["study", patient, name])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=["series", patient, name])
    data.PatientID, data.PatientName, data.PatientBirthDate = patient, name, "19530917"
    data.AccessionNumber, data.Modality, data.PhotometricInterpretation = accession, "CT", "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 1, 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept, data.PixelSpacing = 1, -1024, [0.7, 0.7]
    data.PixelData = (pixels.astype(np.int16) * 8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def test_class_folders_become_a_cohort(tmp_path):
    result = take(fill(tmp_path / "in"), tmp_path / "out")
    cohort = read_cohort(tmp_path / "out", verify=True)
    assert cohort.classes == ("a", "b") and not cohort.ordinal and cohort.image_size == SIZE and cohort.channels == 1
    assert result.counts["used"] == 16 and sum(map(sum, map(cohort.class_counts, ("training", "validation", "test")))) == 16
    assert cohort.intensity == {"kind": "uint8", "0": 0.0, "1": 255.0}
    assert cohort.notes["leak"]["n"] == len(cohort.test)
    case = cohort.training[0]
    assert case.image == f"images/{case.id}.png" and case.source.startswith(case.id) and case.name.startswith("ab"[case.label])
    assert raster.read_unit_png(cohort.path(case)).shape == (SIZE, SIZE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cohort.json",
        "images",
        "quarantine.csv",
        "report.html",
        "report.json",
    ]
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.integration
def test_cohort_is_a_monai_datalist(tmp_path):
    from monai.data import load_decathlon_datalist

    take(fill(tmp_path / "in"), tmp_path / "out")
    entries = load_decathlon_datalist(str(tmp_path / "out" / "cohort.json"), False, "training")
    assert all(Path(entry["image"]).is_file() for entry in entries)


def test_same_source_gives_the_same_cohort_whatever_its_place(tmp_path):
    first = take(fill(tmp_path / "in"), tmp_path / "one", name="x").cohort
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(tmp_path / "in", moved)
    second = take(moved, tmp_path / "two", name="x").cohort
    assert first.content_sha256 == second.content_sha256
    assert (tmp_path / "one" / "cohort.json").read_bytes() == (tmp_path / "two" / "cohort.json").read_bytes()


def test_only_the_classes_that_were_asked_for_are_taken_in(tmp_path):
    result = take(fill(tmp_path / "in", ("a", "b", "c")), tmp_path / "out", classes=("a", "c"))
    assert result.cohort.classes == ("a", "c") and result.counts["used"] == 16
    assert list(codes(result).values()) == ["class-not-chosen"] * 8
    with pytest.raises(ConfigError, match="class-unknown"):
        take(tmp_path / "in", tmp_path / "other", classes=("a", "d"))
    with pytest.raises(ConfigError, match="class-too-small"):
        take(tmp_path / "in", tmp_path / "other", classes=("a",))


def test_splits_of_the_source_are_kept_unless_others_are_asked_for(tmp_path):
    for number, split in enumerate(("train", "valid", "TEST")):
        for label, name in enumerate("ab"):
            for index in range(3):
                save(tmp_path / "in" / split / name / f"{index}.png", picture(number, label, index))
    kept = take(tmp_path / "in", tmp_path / "kept").cohort
    assert [len(kept.split(split)) for split in ("training", "validation", "test")] == [6, 6, 6]
    assert kept.notes["drawn_splits"] == []
    fresh = take(tmp_path / "in", tmp_path / "fresh", split=(0.5, 0.25, 0.25)).cohort
    assert fresh.notes["drawn_splits"] == ["training", "validation", "test"]
    assert len(fresh.training) != 6 or {case.id for case in fresh.training} != {case.id for case in kept.training}


def test_missing_validation_is_taken_from_training(tmp_path):
    for number, split in enumerate(("train", "test")):
        for label, name in enumerate("ab"):
            for index in range(12):
                save(tmp_path / "in" / split / name / f"{index}.png", picture(number, label, index))
    result = take(tmp_path / "in", tmp_path / "out")
    assert len(result.cohort.test) == 24 and result.cohort.validation
    assert any("no validation split" in note for note in result.notes)
    assert result.cohort.notes["drawn_splits"] == ["validation"]


def test_group_across_fixed_splits_stays_in_test_only(tmp_path):
    rows = ["file,label,subject,part"]
    for index in range(12):
        label = "ab"[index % 2]
        save(tmp_path / "in" / f"{index}.png", picture(index))
        part = ("train", "train", "train", "train", "val", "val", "test", "test", "test", "test", "train", "val")[index]
        rows.append(f"{index}.png,{label},{'S' if index in (3, 9) else f'T{index}'},{part}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(rows))
    result = take(tmp_path / "in", tmp_path / "out", labels=table, patient_column="subject", split_column="part")
    assert codes(result)["3.png"] == "group-crosses-splits"
    assert "9.png" in {case.name for case in result.cohort.test}


def test_table_faults_are_all_reported(tmp_path):
    source = tmp_path / "in"
    for index in range(10):
        save(source / f"{index}.png", picture(index))
    (source / "9.png").write_bytes((source / "9.png").read_bytes()[:60])
    rows = [f"{index}.png;{'2.0' if index % 2 else 'I'}" for index in range(8)]
    rows += ["7.png;1", "gone.png;1", "9.png;1"]  # 7 is in conflict, 8 has no row
    table = source / "labels.csv"
    table.write_bytes(("\ufefffile;label\r\n" + "\r\n".join(rows)).encode())
    result = take(source, tmp_path / "out", labels=table)
    assert result.cohort.classes == ("1", "2") and result.cohort.ordinal
    found = codes(result)
    assert found["7.png"] == "conflicting-label" and found["8.png"] == "image-without-label"
    assert found["table row 10"] == "label-without-image" and found["9.png"].startswith("image-")
    assert result.counts["used"] == 7
    assert (tmp_path / "out" / "quarantine.csv").read_text().startswith("file,code,reason\n")


def test_duplicates_and_contradictions(tmp_path):
    source = fill(tmp_path / "in")
    shutil.copy(source / "a" / "a_0.png", source / "a" / "copy.png")
    Image.open(source / "a" / "a_1.png").save(source / "a" / "same_pixels.png", compress_level=0)
    shutil.copy(source / "a" / "a_2.png", source / "b" / "other_class.png")
    result = take(source, tmp_path / "out", keep_names=True)
    by_code = result.counts["quarantine"]
    assert by_code == {"conflicting-label": 2, "duplicate-image": 2}
    assert {"a_2.png", "other_class.png"} <= set(codes(result))
    assert len(list((tmp_path / "out" / "images").iterdir())) == result.counts["used"] == 15


def test_identical_images_join_two_patients(tmp_path):
    source, rows = tmp_path / "in", ["file,label,patient"]
    for index in range(24):
        save(source / f"{index}.png", picture(index if index != 5 else 2))
        rows.append(f"{index}.png,{'ab'[index // 12]},P{index // 2}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    result = take(source, tmp_path / "out", labels=tmp_path / "t.csv")
    group = {case.name: case.group for case in result.cohort.cases()}
    assert group["3.png"] == group["4.png"]  # P1 and P2 both had picture 2
    assert any("joined to one group" in note for note in result.notes)


def test_patients_are_never_divided_and_stay_pseudonymous(tmp_path):
    source, rows = tmp_path / "in", ["file,label,patient"]
    for index in range(24):
        save(source / f"{index}.png", picture(index))
        rows.append(
            f"{index}.png,{'ab'[index // 12]},{' ann-77 ' if index == 1 else 'ANN-77' if index == 0 else f'p{index // 2}'}"
        )
    (tmp_path / "t.csv").write_text("\n".join(rows))
    cohort = take(source, tmp_path / "out", labels=tmp_path / "t.csv").cohort
    case = {case.name: case for case in cohort.cases()}
    assert case["0.png"].patient == case["1.png"].patient == case["0.png"].group
    assert re.fullmatch("p[0-9a-f]{16}", case["0.png"].patient)
    assert len({own.patient for own in cohort.cases()}) == 12


def test_dicom_in_any_layout_without_a_trace_of_the_patient(tmp_path):
    source, rows = tmp_path / "in", ["PatientID,Grade"]
    for index in range(12):
        patient = f"00{FIRST_PATIENT + index // 2}"
        write_dicom(source / f"Quixote_{patient}" / f"{patient}_IM{index}", picture(index), patient)
        if index % 2 == 0:
            rows.append(f"{FIRST_PATIENT + index // 2},{(index // 2) % 2}")
    write_dicom(source / "Quixote_x" / "IM0099", picture(99), "009988776655")  # no label
    broken = source / "Quixote^Alonso_ACC7731.dcm"
    broken.write_bytes((source / f"Quixote_00{FIRST_PATIENT}" / f"00{FIRST_PATIENT}_IM0").read_bytes()[:700])
    (tmp_path / "t.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    result = take(source, out, labels=tmp_path / "t.csv", key="patient", label_column="Grade")
    assert result.counts["used"] == 12 and result.counts["restored_zeros"] == 6 and result.cohort.modality == "CT"
    assert result.cohort.intensity["kind"] == "window_hu"
    assert len({case.patient for case in result.cohort.cases()}) == 6
    assert all(case.name == case.id for case in result.cohort.cases())
    assert codes(result)["IM0099"] == "image-without-label" and len(result.quarantine) == 2
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file()) + repr(result).encode()
    written += "".join(path.name for path in out.rglob("*")).encode()
    for secret in (
        b"Quixote",
        b"Alonso",
        str(FIRST_PATIENT)[:9].encode(),
        b"ACC7731",
        b"19530917",
        b"9988776655",
        str(tmp_path / "in").encode(),
    ):
        assert secret not in written


def test_dicom_without_patient_is_grouped_from_its_pixels(tmp_path):
    for index in range(12):
        name = "ab"[index % 2]
        write_dicom(tmp_path / "in" / name / f"IM{index}.dcm", picture(index), "", name="anonymous")
    result = take(tmp_path / "in", tmp_path / "out")
    assert result.report["groups"]["automatic"] == 12
    assert all(case.group.startswith("g") and not case.patient for case in result.cohort.cases())
    assert {case.name for case in result.cohort.cases()} == {f"IM{index}.dcm" for index in range(12)}


def test_names_that_hold_an_identifier_are_not_kept(tmp_path):
    source, rows = tmp_path / "in", ["file,label,patient"]
    for index in range(8):
        save(source / f"scan_mueller{index}_x.png", picture(index))
        rows.append(f"scan_mueller{index}_x.png,{'ab'[index % 2]},Mueller{index}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    cohort = take(source, tmp_path / "out", labels=tmp_path / "t.csv").cohort
    assert all(case.name == case.id for case in cohort.cases())
    assert b"mueller" not in b"".join(path.read_bytes().lower() for path in (tmp_path / "out").rglob("*.*"))


def test_medmnist_archive(tmp_path):
    arrays = {}
    for number, (split, count) in enumerate((("train", 12), ("val", 4), ("test", 6))):
        arrays[f"{split}_images"] = np.stack([picture(number, index)[:18] for index in range(count)])
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
    np.savez(tmp_path / "set.npz", **arrays)
    result = take(tmp_path / "set.npz", tmp_path / "out", keep_names=True)
    assert [len(result.cohort.split(split)) for split in ("training", "validation", "test")] == [12, 4, 6]
    assert result.cohort.classes == ("0", "1") and result.cohort.training[0].name.startswith("set.npz#")


def test_datalist_with_names_and_a_path_outside(tmp_path):
    root = tmp_path / "in"
    save(tmp_path / "secret.png", picture(1000))
    entries = [
        {"image": str(save(root / f"{index}.png", picture(index)).name), "label": index % 2, "patient": f"p{index}"}
        for index in range(12)
    ]
    entries.append({"image": "../secret.png", "label": 0})
    entries += [{"image": "absent.png", "label": 0}, {"label": 1}]
    (root / "list.json").write_text(json.dumps({"labels": {"0": "healthy", "1": "ill"}, "training": entries}))
    result = take(root / "list.json", tmp_path / "out", keep_names=True)
    assert result.cohort.classes == ("healthy", "ill") and result.counts["used"] == 12
    assert codes(result) == {
        "secret.png": "path-outside-source",
        "absent.png": "image-missing",
        "datalist entry": "datalist-malformed",
    }


def test_nifti_slices_stay_together(tmp_path):
    for index in range(8):
        volume = np.stack([picture(index, depth) for depth in range(3)], axis=-1).astype(np.float32)
        path = tmp_path / "in" / "ab"[index % 2] / f"scan{index}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    cohort = take(tmp_path / "in", tmp_path / "out").cohort
    assert len(cohort.cases()) == 24
    of_source: dict[str, set[str]] = {}
    for case in cohort.cases():
        of_source.setdefault(case.source, set()).add(case.group)
        assert case.id[12:14] == "_z" and case.acquisition["intensity"]["kind"] == "percentile"
    assert all(len(groups) == 1 for groups in of_source.values())


def test_content_decides_and_clutter_is_ignored(tmp_path):
    source = fill(tmp_path / "in")
    (source / "a" / "a_0.png").rename(source / "a" / "a_0.dat")
    save(source / "__MACOSX" / "c" / "x.png", picture(7))
    save(source / ".cache" / "x.png", picture(8))
    (source / "a" / "Thumbs.db").write_bytes(b"x")
    (source / "a" / "Maria_Huber").write_bytes(b"no image")
    save(tmp_path / "outside.png", picture(9))
    (source / "c" / "d").mkdir(parents=True)
    (source / "b" / "link.png").symlink_to(tmp_path / "outside.png")
    (source / "b" / "loop").symlink_to(source)
    result = take(source, tmp_path / "out")
    assert result.counts["used"] == 16
    assert result.counts["ignored"] == {"empty-folder": 1, "hidden-or-system": 3, "link-outside-source": 1, "linked-folder": 1}
    assert any(note.startswith("1 folder(s) of the source are empty") for note in result.notes)
    assert result.counts["quarantine"] == {"not-an-image": 1} and result.quarantine[0]["file"].startswith("sha256:")


def test_colour_and_grey_are_made_alike(tmp_path):
    source = fill(tmp_path / "in", count=4)
    for index in range(12):
        save(
            source / "ab"[index % 2] / f"colour{index}.png", np.stack([picture(index, channel) for channel in range(3)], axis=-1)
        )
    result = take(source, tmp_path / "out")
    assert result.cohort.channels == 3
    assert all(raster.read_unit_png(result.cohort.path(case)).shape == (SIZE, SIZE, 3) for case in result.cohort.cases())
    assert any("8 grey images became colour" in note for note in result.notes)


def test_dry_run_counts_and_writes_nothing(tmp_path):
    source = fill(tmp_path / "in")
    dry = take(source, tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    wet = take(source, tmp_path / "out")
    assert dry.counts == wet.counts and dry.leak == wet.leak and dry.quarantine == wet.quarantine


def test_run_again_returns_what_is_there_and_refuses_other_content(tmp_path):
    source, out = fill(tmp_path / "in"), tmp_path / "out"
    first = take(source, out)
    before = (out / "cohort.json").stat().st_mtime_ns
    again = take(source, out)
    assert again.reused and again.counts == first.counts and (out / "cohort.json").stat().st_mtime_ns == before
    with pytest.raises(StorageError, match="folder-not-empty"):
        take(source, out, seed=1)
    save(source / "a" / "new.png", picture(77))
    with pytest.raises(StorageError, match="folder-not-empty"):
        take(source, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="folder-not-empty"):
        take(source, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").is_file()


def test_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    source = fill(tmp_path / "in")
    original = raster.encode_unit_png
    monkeypatch.setattr(raster, "encode_unit_png", lambda image: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        take(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    monkeypatch.setattr(raster, "encode_unit_png", original)
    stale = tmp_path / ".out.partial" / "images"  # as a killed process leaves it
    stale.mkdir(parents=True)
    (stale / "stale.png").write_bytes(b"x")
    assert take(source, tmp_path / "out").counts["used"] == 16
    assert not (tmp_path / "out" / "images" / "stale.png").exists()


@pytest.mark.parametrize("held", ["out", ".out.partial"])
def test_one_writer_at_a_time(tmp_path, held):
    source = fill(tmp_path / "in")
    with storage.locked(tmp_path / held), pytest.raises(StorageError, match="folder-in-use"):
        take(source, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists() or held == ".out.partial"
    assert take(source, tmp_path / "out").counts["used"] == 16


def test_small_class_is_named(tmp_path):
    source = fill(tmp_path / "in")
    save(source / "rare" / "one.png", picture(5, 5))
    with pytest.raises(DataError, match="class-too-small.*number 3 of 3"):
        take(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_usable_says_what_was_there(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no-usable-image"):
        take(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 image-empty") as caught:
        take(tmp_path / "in", tmp_path / "out")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"key": "uid"}, "key-unknown"),
        ({"image_size": 2}, "image-size-invalid"),
        ({"labels": Path("absent.csv")}, "labels-missing"),
    ],
)
def test_wrong_options_are_refused(tmp_path, changes, code):
    with pytest.raises(ConfigError, match=code):
        run_intake(IntakeOptions(source=tmp_path, out=tmp_path / "out", **changes))
    with pytest.raises(ConfigError, match="source-missing"):
        take(tmp_path / "absent", tmp_path / "out")


def test_report_is_one_file_and_warns_of_a_leak(tmp_path):
    # Three pictures of each "patient", each said to be a group of its own.
    source, rows = tmp_path / "in", ["file,label,group"]
    generator = np.random.default_rng(0)
    for patient in range(80):
        base, label = generator.integers(20, 230, (20, 18)), generator.integers(0, 3)
        for index in range(3):
            name = f"{patient}_{index}.png"
            save(source / name, (base + generator.integers(-9, 9, base.shape)).astype(np.uint8))
            rows.append(f"{name},{label},{name}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    leaky = take(source, tmp_path / "leaky", labels=tmp_path / "t.csv", group_column="group")
    assert leaky.leak["level"] == "high" and leaky.cohort.notes["leak"]["warning"]
    found = take(source, tmp_path / "found", labels=tmp_path / "t.csv")
    assert found.report["groups"]["number"] == 80
    assert found.leak["balanced_accuracy"] < 0.75 < leaky.leak["balanced_accuracy"]
    page = (tmp_path / "leaky" / "report.html").read_text()
    assert "Patients probably cross the split" in page and "http" not in page and page.count("data:image/png;base64,") >= 4
    assert json.loads((tmp_path / "leaky" / "report.json").read_text())["leak"] == leaky.leak


def test_a_broken_file_named_after_its_patient_stays_unnamed(tmp_path):
    source = fill(tmp_path / "in")
    (source / "a" / "QUAGGA77.png").write_bytes(b"no picture")
    rows = ["file,label,patient", "a/QUAGGA77.png,a,QUAGGA77"]
    rows += [
        f"{name}/{path.name},{name},p{path.stem}{name}"
        for name in ("a", "b")
        for path in (source / name).glob("*.png")
        if "QUAGGA" not in path.name
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    result = take(source, tmp_path / "out", labels=tmp_path / "t.csv")
    assert "image-unreadable" in codes(result).values()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"QUAGGA" not in path.read_bytes()


def test_names_that_are_no_text_do_not_stop_the_batch(tmp_path):
    source = fill(tmp_path / "in")
    save(tmp_path / "x.png", picture(9, 9)).rename(os.fsdecode(os.fsencode(source / "a") + b"/caf\xe9.png"))
    (Path(os.fsdecode(os.fsencode(source / "b") + b"/bad\nname.png"))).write_bytes(b"")
    result = take(source, tmp_path / "out")
    assert len(result.cohort.cases()) == 17 and len(result.quarantine) == 1
    assert (tmp_path / "out" / "quarantine.csv").read_text().count("\n") == 2


def test_another_grouping_has_other_group_names(tmp_path):
    source, rows = tmp_path / "in", ["file,label,fine,coarse"]
    for index in range(24):
        save(source / f"{index}.png", picture(5, index))
        rows.append(f"{index}.png,{'ab'[index % 2]},{index},{index // 4}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    fine = take(source, tmp_path / "fine", labels=tmp_path / "t.csv", group_column="fine").cohort
    coarse = take(source, tmp_path / "coarse", labels=tmp_path / "t.csv", group_column="coarse").cohort
    assert not {case.group for case in fine.cases()} & {case.group for case in coarse.cases()}


def test_a_wrong_column_shows_before_the_source_is_read(tmp_path, monkeypatch):
    source = fill(tmp_path / "in")
    (tmp_path / "t.csv").write_text("file,label\n")
    monkeypatch.setattr("medaug.intake.build.scan", lambda options: pytest.fail("the source was scanned"))
    with pytest.raises(MedaugError, match="column-missing"):
        take(source, tmp_path / "out", labels=tmp_path / "t.csv", label_column="nowhere")


POOL = """
import os, sys, time
from pathlib import Path
from medaug.intake.processes import _pool
from medaug.intake.read import Reader
from medaug.intake.records import IntakeOptions

if __name__ == "__main__":
    options = IntakeOptions(source=Path("."), out=Path("out"))
    pool = _pool(2, Reader(options, False, None))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_processes_that_read_end_when_intake_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    with subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it is there
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a process that read for intake is still there ten seconds after intake was killed")
