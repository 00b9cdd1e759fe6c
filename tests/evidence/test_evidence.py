"""The evidence pack: what the records say, in every paper; what they do not say, blank; nothing that names a patient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from identity_search import IdentitySearch
from study import Study, make_study

from medaug import cohort as cohorts
from medaug import storage
from medaug.errors import DataError, LeakageError, StorageError
from medaug.evidence.evidence import FILES, write_evidence

PLANTED = "Zwetschgenbaum"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path / "study")


def bullets(card: Path) -> dict[str, str]:
    """Label -> text of a card."""
    lines = [line for line in card.read_text().splitlines() if line.startswith("- **")]
    return dict(line.removeprefix("- **").split(":** ", 1) for line in lines)  # type: ignore[misc]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    storage.write_json(path, content)


def test_the_dataset_card_says_the_numbers_of_the_records(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path / "out", **study.options)
    text = (tmp_path / "out" / "DATASET_CARD.md").read_text()
    assert "6 of 6 images are synthetic" in text and "not for clinical use" in text
    assert "| low | 0 | 4 | 0 | 0 | 4 |\n| high | 0 | 2 | 0 | 0 | 2 |\n| all | 0 | 6 | 0 | 0 | 6 |\n" in text
    card, real = bullets(tmp_path / "out" / "DATASET_CARD.md"), cohorts.read_cohort(study.cohort)
    assert real.content_sha256 in card["real data"] and "drawn chest" in card["real data"]
    assert (
        card["sizes"] == "Real data: training 12 images of 6 groups, validation 4 images of 2 groups, test 4 images of 2 groups."
    )
    assert card["taken in"] == "20 images taken in from 23 files, 3 left out (conflicting-label 1, image-unreadable 2)."
    assert "pixel spacing 0.5 to 1.4 mm; slice thickness 2.5 mm; format DICOM (20)" in card["acquisition"]
    assert "-1350 and 150 Hounsfield units" in card["format"] and "1 suspect stayed in" in card["identity"]
    assert "0123456789abcdef" * 4 in card["origin"] and "c" * 64 in card["origin"] and "seed 7" in card["origin"]
    assert card["what it saw"].startswith("Generator and filter were fitted on 6 groups. None of them")
    assert "usable, pseudo_label, copies; threshold=0.8" in card["checks"]
    assert card["acceptance"].startswith(
        "6 of 10 images accepted (60.0%). Reasons against images: confidence-low 3, near-copy 1."
    )
    assert card["acceptance"].endswith("Classes short of their quota: high.")
    assert card["copies found"].startswith("1 of 10 generated") and "0.003 to 0.445" in card["copies found"]
    assert "SOP Instance UID" in card["real images"] and "agreement of pairs 0.600" in card["agreement of readers"]
    assert card["graded as"] == "The described images were graded as: guided."
    assert card["memory of training images"] == "not recorded"


def test_a_cohort_of_other_groups_or_of_synthetic_images_is_refused(study: Study, tmp_path: Path) -> None:
    other = cohorts.read_cohort(study.cohort)
    renamed = {split: [replace(case, group=f"x{case.group}") for case in other.split(split)] for split in cohorts.SPLITS}
    shutil.copytree(study.cohort, tmp_path / "other")
    cohorts.write_cohort(replace(other.with_cases(**renamed), root=None), tmp_path / "other")
    for folder in (tmp_path / "other", study.accepted):
        with pytest.raises((DataError, LeakageError)):
            write_evidence(study.accepted, tmp_path / "out", cohort=folder)
    assert not list(tmp_path.glob("out/*.md"))


def test_weights_of_unknown_origin_are_not_certified(study: Study, tmp_path: Path) -> None:
    made = cohorts.read_cohort(study.accepted)
    cases = [replace(case, lineage={**(case.lineage or {}), "generator_trusted": True}) for case in made.training]
    cohorts.write_cohort(replace(made.with_cases(training=cases), root=None), study.accepted)
    write_evidence(study.accepted, tmp_path / "out", cohort=study.cohort)
    text = bullets(tmp_path / "out" / "DATASET_CARD.md")["what it saw"]
    assert "None of them" not in text and text.endswith(
        "Of 6 images nothing shows what weights behind them were first trained on."
    )


def test_the_model_card_has_only_arms_that_trained_on_the_described_images(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path / "out", **study.options)
    assert "guided: " in bullets(tmp_path / "out" / "MODEL_CARD.md")["use in training"]
    for path in (study.options["benchmark"] / "rows").iterdir():
        edit(path, lambda row: row["key"]["arm"].update(synthetic=None, sources=[]))
    write_evidence(study.accepted, tmp_path / "again", **study.options)
    assert bullets(tmp_path / "again" / "MODEL_CARD.md")["use in training"] == "not recorded"


def test_the_card_of_a_real_cohort_has_no_generator(study: Study, tmp_path: Path) -> None:
    summary = write_evidence(study.cohort, tmp_path / "out")
    text = (tmp_path / "out" / "DATASET_CARD.md").read_text()
    assert "None of the 20 images is recorded as synthetic" in text and "## Generator" not in text
    assert "| low | 6 | 0 | 2 | 2 | 10 |" in text
    assert "MODEL_CARD.md" not in summary["written"]


def test_the_model_card_says_what_the_run_recorded(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path / "out", **study.options)
    card = bullets(tmp_path / "out" / "MODEL_CARD.md")
    assert "network.backbone=lean" in card["network and process"] and "parameterisation=edm" in card["network and process"]
    assert card["settings"].startswith("The generator was trained for 640 iterations with seed 0 on 6 groups; batch_size=32")
    assert card["samples"] == (
        "16 samples against 4 real test images: kid undefined (insufficient), kid_floor 0.013, label_agreement 0.875."
    )
    assert card["final loss"] == "not recorded"


def test_papers_repeat_to_the_byte_and_never_overwrite_what_was_filled_in(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = write_evidence(study.accepted, out, **study.options)
    before = {name: (out / name).read_bytes() for name in FILES}
    assert write_evidence(study.accepted, out, **study.options) == first
    write_evidence(study.accepted, tmp_path / "again", **study.options)
    assert before == {name: (tmp_path / "again" / name).read_bytes() for name in FILES}
    (out / "checklists.md").write_text("filled in by hand")
    with pytest.raises(StorageError, match="evidence-edited.*checklists.md"):
        write_evidence(study.accepted, out, **study.options)
    assert (out / "checklists.md").read_text() == "filled in by hand"
    for name in set(FILES) - {"MODEL_CARD.md"}:
        (tmp_path / "again" / name).unlink()
    with pytest.raises(StorageError, match="evidence-edited.*MODEL_CARD.md"):  # of a run that this call does not name
        write_evidence(study.accepted, tmp_path / "again", cohort=study.cohort, benchmark=study.benchmark)
    assert [path.name for path in (tmp_path / "again").glob("[!.]*")] == ["MODEL_CARD.md"]


def test_missing_records_are_named_and_read_not_recorded(study: Study, tmp_path: Path) -> None:
    (study.accepted / "gate.json").unlink()
    summary = write_evidence(study.accepted, tmp_path / "out")
    names = " ".join(summary["missing"])
    assert all(word in names for word in ("--cohort", "--run", "--benchmark", "gate.json", "metrics.json", "intake"))
    card = bullets(tmp_path / "out" / "DATASET_CARD.md")
    assert {card[name] for name in ("real data", "sizes", "checks", "acceptance", "copies found", "result")} == {"not recorded"}


def test_nothing_of_a_patient_leaves_the_records(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strings planted wherever a record may hold more than its public fields, in values, keys and names of folders and files."""

    def plant(content: dict[str, Any]) -> None:
        content["remark"] = content[f"{PLANTED}_key"] = f"{PLANTED}^Kunigunde"
        content["source"] = f"/data/{PLANTED}/export"
        for split in cohorts.SPLITS:
            for case in content[split] if isinstance(content.get(split), list) else ():
                case["name"] = f"{PLANTED}.dcm"
                case["acquisition"] |= {"format": f"DICOM of {PLANTED}, K", "series": PLANTED, "remark": PLANTED}
                if "lineage" in case:
                    case["lineage"] |= {"remark": PLANTED, "prompt": f"a photo of {PLANTED}"}
                    case["lineage"]["sampler"]["negative_prompt"] = f"not {PLANTED} again"
        content.setdefault("notes", {})["intake"] = [f"Column {PLANTED} was read."]

    for name in ("cohort/cohort.json", "accepted/cohort.json", "cohort/report.json", "accepted/gate.json", "run/run.json"):
        edit(study.cohort.parent / name, plant)
    edit(study.run / "run.json", lambda run: run["settings"]["network"]["reference"].update(pretrained_path=f"/home/{PLANTED}/w"))
    edit(
        study.run / "run.json", lambda run: run["settings"]["training"].update(note=f"{PLANTED}, Kirschbaum", encoder_dir=PLANTED)
    )
    edit(study.run / "evaluation" / "metrics.json", plant)
    for row in (study.benchmark / "rows").iterdir():
        edit(row, plant)
    (study.cohort / "quarantine.csv").write_text(f"file,code,reason\n{PLANTED}.dcm,image-unreadable,\n")
    storage.write_text(study.cohort / "mapping.csv", f"pseudonym0,{PLANTED}\n")
    moved = study.cohort.parent.rename(tmp_path / f"{PLANTED}_Kirschbaum")
    folders = Study(moved / "cohort", moved / "accepted", moved / "run", moved / "benchmark")
    summary = write_evidence(folders.accepted, tmp_path / "out", **folders.options)
    write_evidence(folders.cohort, tmp_path / "real")
    real = cohorts.read_cohort(folders.cohort)
    private = {case.source for case in real.cases()} | {case.group for case in real.cases()} | {"f00dfeedbeefcafe"}
    search = IdentitySearch([PLANTED, "Kunigunde", "Kirschbaum", *private])
    search.folder(tmp_path / "out")
    search.folder(tmp_path / "real")
    search.text(json.dumps(summary) + capsys.readouterr().out)
    assert search.found == [] and search.looked_at > 20


def test_the_command_says_what_it_wrote_and_what_is_missing(study: Study, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from medaug.cli.options import app

    arguments = ["evidence", str(study.accepted), "--cohort", str(study.cohort), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, arguments).stdout
    assert "DATASET_CARD.md" in said and "Not there, so left blank: training run (--run)" in said and "license" in said
    summary = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert set(summary["written"]) == {path.name for path in (tmp_path / "out").glob("[!.]*")}


def test_a_folder_that_is_no_cohort_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cohort-missing"):
        write_evidence(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("accepted/gate.json", "cohort_sha256", "gate.json is of other data"),
        ("run/run.json", "cohort_sha256", "run.json is of other data"),
        ("run/evaluation/metrics.json", "weights_sha256", "metrics.json is of other data"),
        ("cohort/report.json", "content_sha256", "report.json is of other data"),
    ],
)
def test_records_of_another_study_are_refused(study: Study, tmp_path: Path, name: str, key: str, message: str) -> None:
    edit(study.cohort.parent / name, lambda record: record.update({key: "9" * 64}))
    with pytest.raises(DataError, match=f"records-differ.*{message}"):
        write_evidence(study.accepted, tmp_path / "out", **study.options)


def test_a_run_or_gate_of_other_images_is_refused(study: Study, tmp_path: Path) -> None:
    edit(study.accepted / "gate.json", lambda gate: gate["verdicts"].pop(0))
    with pytest.raises(DataError, match="gate.json accepts other images"):
        write_evidence(study.accepted, tmp_path / "out", **study.options)
    (study.accepted / "gate.json").unlink()
    (study.run / "evaluation" / "metrics.json").unlink()
    edit(study.run / "run.json", lambda run: run.update(weights_sha256="9" * 64))
    with pytest.raises(DataError, match="not made with the weights of --run"):
        write_evidence(study.accepted, tmp_path / "out", **study.options)


def test_a_generator_that_saw_test_patients_is_refused(study: Study, tmp_path: Path) -> None:
    groups = sorted(cohorts.read_cohort(study.cohort).groups("training") | {"pseudonym9"})
    fit = cohorts.fit_sha256(groups)

    def leak(content: dict[str, Any]) -> None:
        content["fit_on"] = {fit: groups}
        for case in content["training"]:
            case["lineage"]["fit_on"] = fit

    edit(study.accepted / "cohort.json", leak)
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        write_evidence(study.accepted, tmp_path / "out", **study.options)


@pytest.mark.parametrize("name", ["accepted/gate.json", "run/run.json", "cohort/report.json", "benchmark/verdict.json"])
def test_a_record_without_a_field_is_one_sentence(study: Study, tmp_path: Path, name: str) -> None:
    inner = {"accepted/gate.json": "acceptance", "run/run.json": "settings", "cohort/report.json": "counts"}
    edit(study.cohort.parent / name, lambda record: record.update({inner.get(name, "guided"): ["?"]}))
    with pytest.raises(DataError, match="record-malformed"):
        write_evidence(study.accepted, tmp_path / "out", **study.options)


def test_missing_run_and_benchmark_are_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run-missing"):
        write_evidence(study.accepted, tmp_path / "out", run=study.cohort)
    with pytest.raises(DataError, match="benchmark-missing"):
        write_evidence(study.accepted, tmp_path / "out", benchmark=study.cohort)
