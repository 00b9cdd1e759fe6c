"""Images made elsewhere: what becomes of them, of bad ones, and how far an unknown origin gets."""

from __future__ import annotations

import csv
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medaug import cli
from medaug import cohort as cohorts
from medaug.cohort import Cohort, read_cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError, LeakageError, StorageError
from medaug.grading import arms
from medaug.intake.imported import ImportOptions, label_of, run_import
from medaug.io.raster import read_unit_png
from medaug.quality.gate import run_gate
from medaug.storage import LOCK_NAME


def picture(key: object, side: int = 16, dtype: type = np.uint8) -> np.ndarray:
    noise = numpy_generator("imported", key).uniform(0, 1, (side, side))
    return (noise * np.iinfo(dtype).max).astype(dtype)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=["file", "grade", "made_from"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def real(tmp_path: Path, make_cohort: Callable[..., Cohort]) -> Cohort:
    return make_cohort(tmp_path / "real")


@pytest.fixture
def made(tmp_path: Path) -> ImportOptions:
    """Two images of each of three classes, 16 and 24 px, as PNG of 8 and 16 bits and JPEG."""
    rows = []
    for index, name in enumerate(("a.png", "b.png", "c.jpg", "d.png", "e.png", "sub/f.png")):
        save(tmp_path / "made" / name, picture(index, 16 if index % 2 else 24, np.uint16 if name == "d.png" else np.uint8))
        rows.append({"file": name, "grade": f"Class{index % 3}"})
    table = write_table(tmp_path / "made.csv", rows)
    return ImportOptions(
        tmp_path / "made", table, tmp_path / "real", tmp_path / "out", fit_on=tmp_path / "real", label_column="grade"
    )


def changed(options: ImportOptions, **fields: object) -> ImportOptions:
    return ImportOptions(**{**options.__dict__, **fields})


def stamps(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def append(options: ImportOptions, **row: str) -> None:
    with options.labels.open("a", newline="") as stream:
        csv.DictWriter(stream, fieldnames=["file", "grade", "made_from"], restval="").writerow(row)


def test_imported_images_are_a_synthetic_cohort_like_the_real_one(real: Cohort, made: ImportOptions) -> None:
    result = run_import(made)
    cohort = read_cohort(made.out, verify=True)
    assert cohort == result.cohort and len(cohort.training) == 6
    assert (cohort.classes, cohort.image_size, cohort.channels, cohort.intensity) == (
        real.classes, real.image_size, real.channels, real.intensity
    )  # fmt: skip
    assert {case.name: case.label for case in cohort.training} == {
        "a.png": 0, "b.png": 1, "c.jpg": 2, "d.png": 0, "e.png": 1, "f.png": 2
    }  # fmt: skip
    fit = cohorts.fit_sha256(real.groups("training"))
    assert {case.lineage["fit_on"] for case in cohort.training} == {fit} and set(cohort.fit_on) == {fit}
    assert all(case.group == f"imported-{case.id}" and not case.patient for case in cohort.training)
    by_name = {case.name: case for case in cohort.training}
    np.testing.assert_allclose(read_unit_png(cohort.path(by_name["b.png"])), picture(1) / 255, atol=1 / 65535)
    exact = read_unit_png(cohort.path(by_name["d.png"]))  # 16 bits: the full range, not the image's own percentiles
    np.testing.assert_allclose(exact, picture(3, 16, np.uint16) / 65535, atol=1 / 65535)
    arm = arms.parse_arm(f"x={made.out}")
    arms.check_arm(arm, real)
    assert result.report["per_class"] == {"class0": 2, "class1": 2, "class2": 2} and not result.report["quarantine"]


def test_the_same_import_again_does_nothing_and_another_is_refused(real: Cohort, made: ImportOptions) -> None:
    first = run_import(made)
    files = stamps(made.out)
    again = run_import(made)
    assert again.reused and not first.reused and again.report == first.report and again.cohort == first.cohort
    assert files == stamps(made.out)
    save(made.source / "new.png", picture("new"))
    with pytest.raises(StorageError, match="folder-not-empty"):
        run_import(made)
    assert not list(made.out.parent.glob(".*partial"))


def test_bad_images_rows_and_orphans_are_rows_of_the_quarantine(real: Cohort, made: ImportOptions) -> None:
    (made.source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (made.source / "notes.bin").write_bytes(b"no image")
    save(made.source / "unlabelled.png", picture("u"))
    save(made.source / "strange.png", picture("s"))
    save(made.source / "twice.png", picture("t"))
    save(made.source / "same.png", picture(1))  # the pixels of b.png
    save(made.source / "other.png", picture(5))  # the pixels of f.png, with another label
    for name, grade in (
        ("broken.png", "class0"), ("strange.png", "class9"), ("twice.png", "class0"), ("twice.png", "class1"),
        ("same.png", "class1"), ("other.png", "class0"), ("absent.png", "class0"), ("", "class1"),
    ):  # fmt: skip
        append(made, file=name, grade=grade)
    result = run_import(made)
    rows = list(csv.DictReader((made.out / "quarantine.csv").open()))
    found = sorted((row["file"], row["code"]) for row in rows)
    assert ("broken.png", "image-unreadable") in found or ("broken.png", "image-truncated") in found
    codes = [code for _, code in found]
    assert {"image-without-label", "label-unknown", "conflicting-label", "duplicate-image", "not-an-image"} <= set(codes)
    assert codes.count("conflicting-label") == 3 and codes.count("duplicate-image") == 1
    assert codes.count("label-without-image") == 2 == result.report["rows_without_image"]
    assert result.report["row_numbers_without_image"] == [13, 14]
    assert ("strange.png", "label-unknown") in found and ("unlabelled.png", "image-without-label") in found
    assert result.report["images_without_row"] == 1
    assert "class9" not in (made.out / "quarantine.csv").read_text()
    assert {"a.png", "c.jpg", "d.png", "e.png"} <= {case.name for case in result.cohort.training}


def test_an_image_inherits_the_group_of_its_reference(real: Cohort, made: ImportOptions) -> None:
    reference = real.training[3]
    for name, origin in (("by_id.png", reference.id), ("unknown.png", "nobody")):
        save(made.source / name, picture(name))
        append(made, file=name, grade="class1", made_from=origin)
    result = run_import(changed(made, reference_column="made_from"))
    case = next(case for case in result.cohort.training if case.name == "by_id.png")
    assert (case.group, case.lineage["reference"]) == (reference.group, reference.id)
    assert result.report["left_out"] == {"reference-unknown": 1} and result.report["with_reference"] == 1


def test_an_image_made_from_a_held_out_one_is_refused(real: Cohort, made: ImportOptions) -> None:
    save(made.source / "x.png", picture("x"))
    append(made, file="x.png", grade="class1", made_from=real.test[0].id)
    with pytest.raises(LeakageError, match="reference-held-out"):
        run_import(changed(made, reference_column="made_from"))
    assert not made.out.exists() and not list(made.out.parent.glob(".*partial"))


def test_a_held_out_picture_is_refused_in_any_format(real: Cohort, made: ImportOptions) -> None:
    pixels = np.rint(read_unit_png(real.path(real.validation[0])) * 65535).astype(np.uint16)
    save(made.source / "stolen.tif", pixels)
    append(made, file="stolen.tif", grade="class1")
    with pytest.raises(LeakageError, match="pixels-held-out"):
        run_import(made)
    assert not made.out.exists()


def test_exactly_one_origin_is_declared(real: Cohort, made: ImportOptions) -> None:
    for fields in ({"fit_on": None}, {"allow_untrusted": True}):
        with pytest.raises(ConfigError, match="origin-undeclared") as caught:
            run_import(changed(made, **fields))
        assert caught.value.exit_code == 2


def test_a_generator_that_saw_held_out_or_foreign_groups_is_refused(
    real: Cohort, made: ImportOptions, tmp_path: Path, make_cohort: Callable[..., Cohort]
) -> None:
    make_cohort(tmp_path / "turned", seed=0)
    turned = read_cohort(tmp_path / "turned")
    cohorts.write_cohort(turned.with_cases(training=turned.test, test=turned.training), tmp_path / "turned")
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        run_import(changed(made, fit_on=tmp_path / "turned"))
    make_cohort(tmp_path / "more", num_classes=4)
    with pytest.raises(LeakageError, match="fit-unknown"):
        run_import(changed(made, fit_on=tmp_path / "more"))


def test_untrusted_images_pass_the_gate_marked_and_need_a_word_to_be_graded(
    real: Cohort, made: ImportOptions, tmp_path: Path
) -> None:
    run_import(changed(made, fit_on=None, allow_untrusted=True))
    imported = read_cohort(made.out)
    assert all(case.lineage["untrusted"] and "fit_on" not in case.lineage for case in imported.training)
    result = run_gate(made.out, real.root, tmp_path / "accepted", checks=["usable"])
    assert result.summary["untrusted"] == 6 == json.loads((tmp_path / "accepted" / "gate.json").read_text())["untrusted"]
    assert all(case.lineage["untrusted"] and "fit_on" not in case.lineage for case in result.accepted.training)
    spec = f"x={tmp_path / 'accepted'}"
    with pytest.raises(LeakageError, match="fit-unknown.*--allow-untrusted"):
        arms.prepare_arms([arms.parse_arm(spec)], real)
    arms.prepare_arms([arms.parse_arm(spec, allow_untrusted=True)], real)
    with pytest.raises(LeakageError, match="fit-unknown"):  # where something is held out, no mark helps
        cohorts.validate(real.with_cases(training=[*real.training, *imported.training]))


def test_trusted_images_pass_the_gate_unmarked(real: Cohort, made: ImportOptions, tmp_path: Path) -> None:
    run_import(made)
    result = run_gate(made.out, real.root, tmp_path / "accepted", checks=["usable"])
    assert "untrusted" not in result.summary and len(result.accepted.training) == 6
    arms.prepare_arms([arms.parse_arm(f"x={tmp_path / 'accepted'}")], real)


def test_nothing_usable_and_wrong_columns_are_errors(real: Cohort, made: ImportOptions, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="column-missing"):
        run_import(changed(made, label_column="class"))
    table = write_table(tmp_path / "none.csv", [{"file": "a.png", "grade": "class7"}])
    with pytest.raises(DataError, match="no-usable-image"):
        run_import(changed(made, labels=table))
    assert not made.out.exists()


def test_colour_becomes_grey_and_grey_colour(made: ImportOptions, tmp_path: Path, make_cohort: Callable[..., Cohort]) -> None:
    make_cohort(tmp_path / "real", channels=3)
    colour = np.stack([picture("r"), picture("g"), picture("b")], -1)
    save(made.source / "rgb.png", colour)
    append(made, file="rgb.png", grade="class0")
    cohort = run_import(made).cohort
    shapes = {read_unit_png(cohort.path(case)).shape for case in cohort.training}
    assert cohort.channels == 3 and shapes == {(16, 16, 3)}


def test_the_command_answers_machines_and_refuses_an_undeclared_origin(
    real: Cohort, made: ImportOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["import", str(made.source), "--labels", str(made.labels), "--label-column", "grade", "--like", str(made.like)]
    given += ["--out", str(made.out), "--json"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        for more, code in ([], 2), (["--fit-on", str(made.like), "--allow-untrusted"], 2), (["--allow-untrusted"], 0):
            monkeypatch.setattr(sys, "argv", ["medaug", *given, *more])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert (stop.value.code or 0) == code
            out, err = capsys.readouterr()
            assert ("[origin-undeclared]" in err) == bool(code) and "Traceback" not in err
        summary = json.loads(out)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (summary["out"], summary["cases"], summary["trusted"]) == ("out", 6, False)


@pytest.mark.parametrize(
    ("text", "classes", "wanted"),
    [
        ("Normal", ("normal", "tumour"), 0),
        ("2.0", ("1", "2", "3"), 1),
        ("II", ("grade1", "grade2"), 1),
        ("b", ("B", "b"), 1),
        ("4", ("1", "2"), None),
        ("", ("1", "2"), None),
    ],
)
def test_labels_are_read_as_intake_reads_them(text: str, classes: tuple[str, ...], wanted: int | None) -> None:
    assert label_of(text, classes) == wanted


@pytest.mark.parametrize("by", ["pixels", "source"])
def test_a_generator_that_saw_a_held_out_image_under_a_training_group_is_refused(
    real: Cohort, made: ImportOptions, tmp_path: Path, make_cohort: Callable[..., Cohort], by: str
) -> None:
    """The other cohort numbers its groups as this one does, and they are other patients."""
    make_cohort(tmp_path / "other")
    other = read_cohort(tmp_path / "other")
    first, held_out = other.training[0], real.test[0]
    if by == "pixels":
        other.path(first).write_bytes(real.path(held_out).read_bytes())
        kept = replace(first, source="f" * 64)
    else:
        kept = replace(first, source=held_out.source)
    cohorts.write_cohort(other.with_cases(training=(kept, *other.training[1:]), validation=(), test=()), tmp_path / "other")
    with pytest.raises(LeakageError, match=f"fit-on-held-out.*{first.id}"):
        run_import(changed(made, fit_on=tmp_path / "other"))
