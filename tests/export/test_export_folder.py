from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from export_cohorts import WEIGHTS, accepted_cohort, real_cohort
from pydicom import dcmread

from medaug import storage
from medaug.cohort import read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, StorageError
from medaug.export.export import export_cohort
from medaug.export.manifest import verify_export

MEDAUG = [sys.executable, "-c", "from medaug.cli import main; main()"]


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohorts")
    real = real_cohort(folder / "real")
    return real, accepted_cohort(real, folder / "accepted")


@pytest.fixture
def export(cohorts, tmp_path):
    """A finished DICOM export."""
    real, accepted = cohorts
    export_cohort(accepted.root, tmp_path / "out", reference_cohort=real.root)
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def images(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.dcm"))


def medaug(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*MEDAUG, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


# known answers


def test_manifest_names_every_file_and_what_made_it(cohorts, export):
    real, accepted = cohorts
    manifest = json.loads((export / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["weights_sha256"] == [WEIGHTS]
    assert manifest["cohort_sha256"] == accepted.content_sha256
    assert manifest["settings"]["reference_cohort_sha256"] == real.content_sha256
    listed = {row["path"]: row["sha256"] for row in manifest["files"]}
    assert listed == {
        name: storage.sha256_bytes(data)
        for name, data in contents(export).items()
        if name not in ("manifest.json", ".medaug.lock")
    }
    for row in manifest["files"]:
        if row["kind"] == "image":
            dataset = dcmread(export / row["path"])
            assert (row["sop"], row["series"], row["study"]) == (
                dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID
            )  # fmt: skip
            assert row["facts"]["lineage"]["verdict"] == "accept"


def test_label_table_joins_the_files(export):
    with open(export / "labels.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        dataset = dcmread(export / row["file"])
        assert (row["sop"], row["patient"]) == (dataset.SOPInstanceUID, dataset.PatientID) and row["label"] in ("low", "high")
    assert len(rows) == len(images(export)) == 12


def test_no_identity_of_the_cohort_leaves_but_content_names(cohorts, tmp_path):
    """Groups, patients, file names and remarks that somebody put into a cohort stay behind."""
    real, accepted = cohorts
    planted = replace(
        accepted,
        name="PLANTED^COHORT",
        source="PLANTED^SOURCE",
        training=tuple(replace(case, patient="PLANTED^PATIENT", name="PLANTED^NAME.dcm") for case in accepted.training),
        root=None,
    )
    for case in accepted.training:
        storage.write_bytes(tmp_path / "planted" / case.image, accepted.path(case).read_bytes())
    write_cohort(planted, tmp_path / "planted")
    for format in ("dicom", "nifti", "png"):
        export_cohort(tmp_path / "planted", tmp_path / format, format=format, reference_cohort=real.root)
        for name, data in contents(tmp_path / format).items():
            assert b"PLANTED" not in data and "PLANTED" not in name
            assert str(tmp_path).encode() not in data


# laws


@pytest.mark.parametrize("format", ["dicom", "nifti", "png"])
def test_same_inputs_give_the_same_bytes(cohorts, tmp_path, format):
    real, accepted = cohorts
    for name in ("one", "two"):
        export_cohort(accepted.root, tmp_path / name, format=format, reference_cohort=real.root)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify_export(tmp_path / "one") == verify_export(tmp_path / "two")


def test_a_second_run_writes_nothing_and_repairs_what_was_damaged(cohorts, export):
    real, accepted = cohorts
    before = contents(export)
    again = export_cohort(accepted.root, export, reference_cohort=real.root)
    assert again["written"] == 0 and contents(export) == before
    images(export)[0].write_bytes(b"damaged")
    images(export)[1].unlink()
    (export / "images" / ".x.dcm.abc.tmp").write_bytes(b"left behind")
    again = export_cohort(accepted.root, export, reference_cohort=real.root)
    assert again["written"] == 2 and contents(export) == before


def test_other_options_give_other_objects(cohorts, tmp_path):
    real, accepted = cohorts
    for name in ("ct", "sc"):
        export_cohort(accepted.root, tmp_path / name, storage_class=name, reference_cohort=real.root)
    uids = [{dcmread(path).SOPInstanceUID for path in images(tmp_path / name)} for name in ("ct", "sc")]
    assert not uids[0] & uids[1]


@pytest.mark.integration
@pytest.mark.parametrize("files_before_the_kill", [0, 1, 40])
def test_a_killed_export_leaves_whole_files_and_goes_on(tmp_path, files_before_the_kill):
    real = real_cohort(tmp_path / "real")
    accepted = accepted_cohort(real, tmp_path / "accepted", per_reference=40)
    expected = export_cohort(accepted.root, tmp_path / "whole", reference_cohort=real.root)
    out = tmp_path / "out"
    arguments = ["export", accepted.root, "--out", out, "--cohort", real.root, "--json"]
    process = subprocess.Popen(
        [*MEDAUG, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "manifest.json").is_file() and len(images(out)) >= files_before_the_kill:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    whole = contents(tmp_path / "whole")
    left = {name: data for name, data in contents(out).items() if name.endswith(".dcm")}
    assert files_before_the_kill <= len(left) < expected["images"]
    assert all(whole[name] == data for name, data in left.items())
    with pytest.raises(DataError, match="export-incomplete"):
        verify_export(out)
    done = medaug(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == expected["written"] - len(left)
    assert contents(out) == whole
    verify_export(out)


# refusals


def change_a_byte(folder):
    path = images(folder)[3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unmark(folder, rewrite=True):
    """A file whose mark is gone, with a manifest that was made to fit."""
    path = images(folder)[0]
    dataset = dcmread(path)
    dataset.SyntheticData = "NO"
    dataset.save_as(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for row in manifest["files"]:
        if row["path"] == path.relative_to(folder).as_posix():
            row |= {"sha256": storage.sha256_file(path), "bytes": path.stat().st_size}
    manifest["files_sha256"] = storage.sha256_json(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut_the_list(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["files"].pop(0)["path"]
    path.unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_by_link(folder):
    path = images(folder)[0]
    path.rename(folder.parent / "elsewhere.dcm")
    path.symlink_to(folder.parent / "elsewhere.dcm")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (change_a_byte, "export-file-changed"),
        (lambda folder: images(folder)[2].unlink(), "export-file-missing"),
        (lambda folder: (folder / "images" / "extra.dcm").write_bytes(b"x"), "export-file-extra"),
        (lambda folder: (folder / "link").symlink_to(folder.parent), "export-file-extra"),
        (replace_by_link, "export-file-changed"),
        (unmark, "export-not-synthetic"),
        (cut_the_list, "export-manifest-changed"),
        (lambda folder: (folder / "manifest.json").unlink(), "export-missing"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "export-manifest-malformed"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "export-manifest-malformed"),
    ],
)
def test_verify_finds(export, damage, code):
    verify_export(export)
    damage(export)
    with pytest.raises(DataError) as caught:
        verify_export(export)
    assert caught.value.code == code and caught.value.exit_code == 3


def test_verify_counts_all_problems_and_names_the_first(export):
    for path in images(export)[:3]:
        path.unlink()
    with pytest.raises(DataError, match=r"3 problem\(s\), the first: images/SYN\w+/s\w+\.dcm is missing"):
        verify_export(export)


def test_real_images_are_never_exported(cohorts, tmp_path):
    real, _ = cohorts
    with pytest.raises(DataError, match="not-synthetic.*8 real"):
        export_cohort(real.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ungated_images_need_a_word(cohorts, tmp_path):
    _, accepted = cohorts
    cases = tuple(
        replace(case, lineage={key: value for key, value in case.lineage.items() if key != "verdict"})
        for case in accepted.training[:2]
    )
    for case in accepted.training:
        storage.write_bytes(tmp_path / "ungated" / case.image, accepted.path(case).read_bytes())
    write_cohort(replace(accepted, training=cases + accepted.training[2:]), tmp_path / "ungated")
    with pytest.raises(DataError, match="not-gated.*2 of 12"):
        export_cohort(tmp_path / "ungated", tmp_path / "out")
    summary = export_cohort(tmp_path / "ungated", tmp_path / "out", allow_ungated=True)
    assert "2 image(s) were not accepted by a gate." in summary["notes"]


def test_changed_images_are_refused(cohorts, tmp_path):
    _, accepted = cohorts
    for name, data in contents(accepted.root).items():
        storage.write_bytes(tmp_path / "copy" / name, data)
    first, second = (tmp_path / "copy" / case.image for case in read_cohort(tmp_path / "copy").training[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match="cohort-changed"):
        export_cohort(tmp_path / "copy", tmp_path / "out")


@pytest.mark.parametrize("where", [".", "images", "new/deeper"])
def test_the_output_stays_out_of_the_cohorts(cohorts, where):
    real, accepted = cohorts
    for root in (real.root, accepted.root):
        with pytest.raises(ConfigError, match="out-inside-cohort"):
            export_cohort(accepted.root, root / where, reference_cohort=real.root)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"format": "jpeg"}, "option-unknown"),
        ({"storage_class": "mr"}, "storage-class-unknown"),
        ({"study": "old"}, "option-unknown"),
        ({"study": "linked"}, "study-uid-missing"),
        ({"study_uid": "1.2.3"}, "study-uid-missing"),
        ({"study": "linked", "study_uid": "PATIENT/1"}, "study-uid-invalid"),
        ({"bits": 12}, "bits-invalid"),
        ({"bits": 8, "storage_class": "ct"}, "bits-invalid"),
        ({"date": "2024-02-29"}, "date-invalid"),
        ({"format": "png", "storage_class": "sc"}, "option-unused"),
    ],
)
def test_options_that_do_not_fit(cohorts, tmp_path, options, code):
    real, accepted = cohorts
    with pytest.raises(ConfigError) as caught:
        export_cohort(accepted.root, tmp_path / "out", reference_cohort=real.root, **options)
    assert caught.value.code == code and not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage_class", ["ct", "dx"])
def test_geometry_is_not_invented(cohorts, tmp_path, storage_class):
    _, accepted = cohorts
    with pytest.raises(DataError, match="geometry-unknown.*--storage-class sc"):
        export_cohort(accepted.root, tmp_path / "out", storage_class=storage_class)


def test_colour_is_secondary_capture_only(tmp_path):
    accepted = accepted_cohort(real_cohort(tmp_path / "real", channels=3, modality="CR"), tmp_path / "accepted")
    assert export_cohort(accepted.root, tmp_path / "out")["storage_class"] == "sc"
    with pytest.raises(DataError, match="demands grey pixels"):
        export_cohort(accepted.root, tmp_path / "cr", storage_class="cr")
    with pytest.raises(ConfigError, match="bits-invalid"):
        export_cohort(accepted.root, tmp_path / "deep", bits=16)


def test_another_cohort_is_no_reference(cohorts, tmp_path):
    _, accepted = cohorts
    other = real_cohort(tmp_path / "other")
    renamed = tuple(replace(case, id=f"x{case.id}") for case in other.training)
    write_cohort(replace(other, training=renamed), tmp_path / "other")
    with pytest.raises(DataError, match="reference-unknown"):
        export_cohort(accepted.root, tmp_path / "out", reference_cohort=tmp_path / "other")


def test_a_folder_of_something_else_is_left_alone(cohorts, tmp_path, export):
    real, accepted = cohorts
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="folder-not-empty"):
        export_cohort(accepted.root, tmp_path / "full")
    with pytest.raises(ConfigError, match="export-other-settings"):
        export_cohort(accepted.root, export, reference_cohort=real.root, storage_class="sc")
    with storage.locked(tmp_path / "busy"), pytest.raises(StorageError, match="folder-in-use"):
        export_cohort(accepted.root, tmp_path / "busy")


def test_a_full_disk_is_one_sentence_and_the_rest_comes_later(cohorts, small_disk, tmp_path):
    real = real_cohort(tmp_path / "real", size=256)
    accepted = accepted_cohort(real, tmp_path / "accepted")
    with pytest.raises(StorageError, match="disk-full"):
        export_cohort(accepted.root, small_disk / "out", reference_cohort=real.root)
    assert all(dcmread(path).SyntheticData == "YES" for path in images(small_disk / "out"))
    assert not list((small_disk / "out").rglob("*.tmp"))


def test_commands(cohorts, tmp_path):
    real, accepted = cohorts
    out = tmp_path / "with space" / "out"
    done = medaug("export", accepted.root, "--out", out, "--format", "png")
    assert done.returncode == 0 and "12 synthetic images" in done.stdout, done.stderr
    done = medaug("export", "--verify", out, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["verified"] is True, done.stderr
    next(out.rglob("*.png")).unlink()
    done = medaug("export", "--verify", out)
    assert done.returncode == 3 and done.stderr.startswith("medaug: [export-file-missing]") and done.stderr.count("\n") == 1
    done = medaug("export", real.root, "--out", tmp_path / "real")
    assert done.returncode == 3 and done.stderr.startswith("medaug: [not-synthetic]") and "Traceback" not in done.stderr
    assert medaug("export", accepted.root).returncode == 2
