"""Pages of results: the same bytes from a page as from the rows, the verdict's own figures, nothing private, loud refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medaug import storage
from medaug.cohort import read_cohort, write_cohort
from medaug.errors import DataError, MedaugError, StorageError
from medaug.grading.figures import confusion_figure, png
from medaug.grading.tables import number, table_rows
from medaug.results.page import write_page
from medaug.results.samples import samples_png
from medaug.results.sources import is_page, read_study

CLASSES = ("one", "two", "three")
WARNED = "Leak indicator: High: patients probably cross the split."


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != storage.LOCK_NAME}


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    storage.write_json(path, content)


def test_a_page_writes_itself_again_byte_for_byte(page: Path, tmp_path: Path) -> None:
    shutil.copytree(page, tmp_path / "moved")
    for name in contents(page):
        if not name.endswith(".json"):
            (tmp_path / "moved" / name).unlink()  # all but the data: nothing is copied from the files of before
    write_page(tmp_path / "moved", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(page)
    write_page(page, page)
    assert contents(tmp_path / "again") == contents(page)


def test_rows_give_the_same_page_twice(world: Path, page: Path, tmp_path: Path) -> None:
    write_page(world / "bench", tmp_path / "other")
    assert contents(tmp_path / "other") == contents(page)
    expected = {"README.md", "rows.json", "experiment.json", "environment.json", "table.md", "table.csv", "table.tex"}
    assert expected | {"comparison.png", "forest.png", "report.html"} <= set(contents(page))


def test_figures_are_those_of_the_verdict(world: Path, page: Path) -> None:
    verdict = json.loads((world / "bench" / "verdict.json").read_text())
    text = (page / "README.md").read_text()
    assert set(verdict) == {"oversample", "drawn"}
    for arm, entry in verdict.items():
        assert f"- **{entry['verdict'].capitalize()}.** {entry['sentence']}" in text and arm in entry["sentence"]
        none = entry["against_none"]
        assert (
            f"gainst none: p {none['p_value']:.3f}, Holm-adjusted {none['p_holm']:.3f}, better in {entry['wilcoxon']['wins']} of 2"
            in text
        )
        area = entry["ranking"]["against_none"]
        assert (
            f"area under the ROC curve {area['score_a']:.3f} against {area['score_b']:.3f}, {area['difference']:+.3f} (" in text
        )
    area = verdict["drawn"]["ranking"]["against_control"]
    assert f"; against repeated real images {area['difference']:+.3f} ({area['low']:+.3f} to {area['high']:+.3f})." in text
    control = verdict["drawn"]["against_control"]
    assert f"against repeated real images (oversample): p {control['p_value']:.3f}, Holm-adjusted {control['p_holm']:.3f}" in text
    for name in (
        "table.md",
        "table.csv",
        "table.tex",
        "rows.csv",
        "comparison.png",
        "forest.png",
        "confusion.png",
        "report.html",
    ):
        assert (page / name).read_bytes() == (world / "bench" / name).read_bytes(), name


def test_the_table_by_network_is_of_the_rows(page: Path) -> None:
    study = read_study(page)
    lines = {(line["arm"], line["network"]): line for line in table_rows(study.rows, {})}
    cells = [
        number(lines[arm, "resnet18"][m := "balanced_accuracy"], lines[arm, "resnet18"][f"{m}_std"]) for arm in ("none", "drawn")
    ]
    (line,) = [line for line in (page / "README.md").read_text().splitlines() if line.startswith("| resnet18 |")]
    assert line.startswith(f"| resnet18 | {cells[0]} |") and f"| {cells[1]} (" in line


def test_a_page_shows_every_class_and_how_the_networks_were_trained(page: Path) -> None:
    text = (page / "README.md").read_text()
    section = text.split("## By class")[1].split("##")[0]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| drawn |")]
    assert len(lines) == 3 and lines[1][1] == r"\*star\* \_line\_"
    runs = [row for row in read_study(page).rows if row["arm"] == "drawn"]
    recall = np.mean([row["test"]["metrics"]["per_class"][1]["recall"] for row in runs])
    assert float(lines[1][3]) == pytest.approx(recall, abs=5e-4)
    assert "Trained with, in every arm alike: 3 optimiser steps; 8 images in a batch;" in text
    assert "Share of each true class and, below it, the number of test images" in text


def test_a_page_says_where_it_comes_from_and_what_it_does_not_show(page: Path, world: Path) -> None:
    text = (page / "README.md").read_text()
    assert WARNED in text and "For 36 images no patient is known" in text
    assert 'medaug grade --cohort "$COHORT" --out "$OUT" --arm none --arm oversample --arm "drawn=$DRAWN"' in text
    assert "One set of images for each synthetic arm" in text and "Images of 16 x 16 px" in text
    assert "it was set, not chosen on validation" in text and "| 9 | 4 | 44% |" in text
    found = json.loads((page / "environment.json").read_text())
    assert re.search(r"Time: grading [\d.]+ (seconds|minutes)\.", text) and found["stages"][0]["stage"] == "grading"
    widths = [
        entry["against_none"]["high"] - entry["against_none"]["low"]
        for entry in json.loads((world / "bench" / "verdict.json").read_text()).values()
    ]
    assert re.search(rf"are ({min(widths):.3f} to )?{max(widths):.3f} wide", text)


def test_names_cannot_pose_as_markup(page: Path) -> None:
    text, html = (page / "README.md").read_text(), (page / "report.html").read_text()
    assert "<b>" not in text and "<discs>" not in text and "&lt;discs&gt; &amp; co" in text
    assert r"| a\|b &lt;b&gt;bold&lt;/b&gt; |" in text and r"| \*star\* \_line\_ |" in text and r"| \`code\` \[x](y) |" in text
    assert "<b>bold" not in html and "<discs>" not in html
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} <= {5, 6, 8}


def test_names_cannot_pose_as_formulas() -> None:
    rows = [{"arm": "none", "test": {"metrics": {"confusion": [[1, 0], [0, 1]]}}}]
    assert png(confusion_figure(rows, ["none"], [r"$\fracx$", "5 $ a day"])).startswith(b"\x89PNG")


def test_nothing_names_a_case_a_group_or_a_folder(page: Path, world: Path) -> None:
    real = read_cohort(world / "cohort")
    private = {case.id for case in real.cases()} | {case.group for case in real.cases()} | {str(world)}
    for name, content in contents(page).items():
        assert not [word for word in private if word.encode() in content], name
    rows = json.loads((page / "rows.json").read_text())
    assert rows["test"]["target"] == [case.label for case in real.test]
    groups = [case.group for case in real.test]
    assert len(set(zip(groups, rows["test"]["groups"], strict=True))) == len(set(groups)) == len(set(rows["test"]["groups"]))


def test_notes_are_appended_word_for_word_and_kept(bench: Path, tmp_path: Path) -> None:
    storage.write_text(bench / "NOTES.md", "Looked at: *hazy* <i>lungs</i> | all.\n")
    write_page(bench, tmp_path / "page")
    assert "## Notes\n\nLooked at: *hazy* <i>lungs</i> | all.\n" in (tmp_path / "page" / "README.md").read_text()
    storage.write_text(tmp_path / "page" / "NOTES.md", "Another look.\n")
    write_page(bench, tmp_path / "page")
    assert (tmp_path / "page" / "NOTES.md").read_text() == "Another look.\n"
    assert "Another look." in (tmp_path / "page" / "README.md").read_text()


def test_an_unfinished_grading_needs_a_word_and_is_marked(bench: Path, tmp_path: Path) -> None:
    gone = [cell for cell in json.loads((bench / "grading.json").read_text())["cells"] if cell[0] == "drawn"][:2]
    for cell in gone:
        (bench / "rows" / f"{cell[3]}.json").unlink()
    with pytest.raises(DataError, match="page-unfinished.*2 of 18 training runs"):
        write_page(bench, tmp_path / "page")
    assert not (tmp_path / "page").exists()
    summary = write_page(bench, tmp_path / "page", unfinished=True)
    assert (summary["missing"], summary["finished"], list(summary["verdict"])) == (2, False, ["oversample"])
    text = (tmp_path / "page" / "README.md").read_text()
    assert "> **Unfinished.** 2 of 18 training runs are missing; the arms drawn are left out." in text
    assert len(json.loads((tmp_path / "page" / "rows.json").read_text())["rows"]) == 16
    with pytest.raises(DataError, match="page-unfinished"):
        write_page(tmp_path / "page", tmp_path / "again")
    write_page(tmp_path / "page", tmp_path / "again", unfinished=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "page")


def test_without_the_baseline_there_is_nothing_to_compare(bench: Path, tmp_path: Path) -> None:
    for arm, _, seed, name in json.loads((bench / "grading.json").read_text())["cells"]:
        if (arm, seed) == ("none", 0):
            (bench / "rows" / f"{name}.json").unlink()
    with pytest.raises(DataError, match="page-too-early.*`none`"):
        write_page(bench, tmp_path / "page", unfinished=True)


def test_a_network_that_is_not_through_yet_is_left_out_and_named(bench: Path, tmp_path: Path) -> None:
    cells = json.loads((bench / "grading.json").read_text())["cells"]
    late = cells[-1][1]
    for _, network, _, name in cells:
        if network == late:
            (bench / "rows" / f"{name}.json").unlink()
    summary = write_page(bench, tmp_path / "page", unfinished=True)
    assert list(summary["verdict"]) == ["oversample", "drawn"]
    text = (tmp_path / "page" / "README.md").read_text()
    assert f"9 of 18 training runs are missing; the networks {late} are left out." in text.replace("\\", "")
    assert f"| {late}" not in text.replace("\\", "")


def first_row(bench: Path) -> Path:
    return bench / "rows" / f"{json.loads((bench / 'grading.json').read_text())['cells'][0][3]}.json"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda row: row["test"]["metrics"].update(accuracy=0.99), "row-changed"),
        (lambda row: row["test"]["probs"].reverse(), "row-changed"),
        (lambda row: row.update(arm="drawn"), "row-malformed"),
        (lambda row: row.update(seed=7), "row-malformed"),
        (lambda row: row["key"].update(seed=7), "row-changed"),
        (lambda row: row["key"]["recipe"].update(num_steps=9), "row-changed"),
        (lambda row: row["key"].update(cohort="f" * 64), "rows-mixed"),
        (lambda row: row["test"]["ids"].reverse(), "test-cases-differ"),
        (lambda row: row.pop("key"), "row-malformed"),
    ],
)
def test_a_row_changed_by_hand_is_refused(bench: Path, tmp_path: Path, change: Callable[[Any], None], code: str) -> None:
    edit(first_row(bench), change)
    with pytest.raises(DataError) as caught:
        write_page(bench, tmp_path / "page")
    assert caught.value.code == code
    assert not (tmp_path / "page").exists()


def swap_arms(rows: Any) -> None:
    first, second = (
        row for row in rows["rows"] if (row["network"], row["seed"]) == ("simple_cnn", 0) and row["arm"] != "oversample"
    )
    first["arm"], second["arm"] = second["arm"], first["arm"]


@pytest.mark.parametrize(
    "change",
    [
        swap_arms,
        lambda rows: rows["rows"][0]["test"]["metrics"].update(accuracy=0.99),
        lambda rows: rows["test"]["target"].reverse(),
    ],
)
def test_a_page_whose_rows_were_changed_is_refused_even_with_a_new_hash(page: Path, tmp_path: Path, change: Any) -> None:
    shutil.copytree(page, tmp_path / "page")
    edit(tmp_path / "page" / "rows.json", change)
    with pytest.raises(DataError, match="page-changed"):
        write_page(tmp_path / "page", tmp_path / "again")
    digest = storage.sha256_file(tmp_path / "page" / "rows.json")
    edit(tmp_path / "page" / "experiment.json", lambda content: content.update(rows_sha256=digest))
    with pytest.raises(DataError, match="row-changed"):
        write_page(tmp_path / "page", tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("experiment.json", lambda content: content.update(format=0), "page-format"),
        ("experiment.json", lambda content: content["grading"].pop("arms"), "record-malformed"),
        ("experiment.json", lambda content: content.pop("asked"), "page-malformed"),
        ("experiment.json", lambda content: content.update(made=[{"arm": "drawn"}]), "page-malformed"),
        ("rows.json", lambda content: content["rows"][0].pop("test"), "page-malformed"),
        ("environment.json", lambda content: content["stages"][0].update(environment=5), "sessions-malformed"),
    ],
)
def test_a_page_that_lacks_something_is_refused(page: Path, tmp_path: Path, name: str, change: Any, code: str) -> None:
    shutil.copytree(page, tmp_path / "page")
    edit(tmp_path / "page" / name, change)
    digest = storage.sha256_file(tmp_path / "page" / "rows.json")
    edit(tmp_path / "page" / "experiment.json", lambda content: content.update(rows_sha256=digest))
    with pytest.raises(DataError) as caught:
        write_page(tmp_path / "page", tmp_path / "again")
    assert caught.value.code == code


PAGES = sorted(path for path in (Path(__file__).parents[2] / "docs" / "results").iterdir() if is_page(path))


@pytest.mark.slow
@pytest.mark.parametrize("committed", PAGES, ids=[path.name for path in PAGES])
def test_a_committed_page_is_what_its_rows_say(committed: Path, tmp_path: Path) -> None:
    """Pictures, and the report that holds them, have other bytes with another matplotlib; everything else is the same."""
    write_page(committed, tmp_path / "page", unfinished=True)
    pictures = {".png", ".html"}
    known, made = (
        {name: data for name, data in contents(folder).items() if Path(name).suffix not in pictures}
        for folder in (committed, tmp_path / "page")
    )
    assert made == known and "README.md" in known
    assert set(contents(tmp_path / "page")) == set(contents(committed))


def test_pages_of_earlier_times_are_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "old"
    storage.write_json(old / "rows.json", [{"arm": "none", "network": "simple_cnn", "seed": 0, "balanced_accuracy": 0.8}])
    with pytest.raises(DataError, match="page-format.*earlier format"):
        write_page(old, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_folders_without_rows_or_record_are_refused(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(DataError, match="rows-missing"):
            write_page(tmp_path / folder, tmp_path / "page")
    (bench / "grading.json").unlink()
    with pytest.raises(DataError, match="record-missing.*run the same command again"):
        write_page(bench, tmp_path / "page")


def test_other_peoples_files_are_left_alone(world: Path, bench: Path, tmp_path: Path) -> None:
    def refused(out: Path, code: str) -> None:
        before = contents(out)
        with pytest.raises(StorageError) as caught:
            write_page(world / "bench", out)
        assert caught.value.code == code and contents(out) == before

    storage.write_text(tmp_path / "written" / "README.md", "# By hand\n")
    refused(tmp_path / "written", "page-occupied")
    storage.write_json(tmp_path / "job" / "experiment.json", {"rows": []})
    refused(tmp_path / "job", "page-occupied")
    shutil.rmtree(bench / "rows")
    (bench / "rows.csv").unlink()
    with pytest.raises(StorageError, match="page-occupied"):
        write_page(world / "bench", bench)
    write_page(world / "bench", tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    storage.write_text(tmp_path / "page" / "README.md", text.replace("## Data", "It works.\n\n## Data"))
    refused(tmp_path / "page", "page-edited")


def look_for_copies(folder: Path) -> None:
    """Write down a distance for every image, as the gate's check does."""
    made = read_cohort(folder)
    cases = [replace(case, lineage={**(case.lineage or {}), "nearest_training_distance": 1.0}) for case in made.training]
    write_cohort(made.with_cases(training=cases), folder)


def test_samples_need_images(world: Path, page: Path, tmp_path: Path) -> None:
    for folder in (world / "bench", page):
        with pytest.raises(DataError, match="samples-missing"):
            write_page(folder, tmp_path / "page", samples=True)
    shutil.copytree(world / "accepted", tmp_path / "job" / "accepted")
    shutil.copytree(world / "bench", tmp_path / "job" / "benchmark")
    storage.write_json(tmp_path / "job" / "augment.json", {"bundle": "drawn"})
    with pytest.raises(DataError, match="samples-unchecked.*No gate looked for copies"):
        write_page(tmp_path / "job", tmp_path / "page", samples=True)
    look_for_copies(tmp_path / "job" / "accepted")
    write_page(tmp_path / "job", tmp_path / "page", samples=True)
    assert "![accepted synthetic images](samples.png)" in (tmp_path / "page" / "README.md").read_text()
    assert (tmp_path / "page" / "samples.png").read_bytes().startswith(b"\x89PNG")
    write_page(tmp_path / "page", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "page")
    write_page(tmp_path / "job", tmp_path / "page")
    assert not (tmp_path / "page" / "samples.png").exists()


def test_every_set_of_images_has_a_panel(world: Path, tmp_path: Path) -> None:
    from PIL import Image

    heights = []
    for place in ("accepted/plain", "feedback/rounds/accepted"):
        shutil.copytree(world / "accepted", tmp_path / place)
        look_for_copies(tmp_path / place)
        (tmp_path / "sheet.png").write_bytes(samples_png(tmp_path, CLASSES))
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[1] > 1.8 * heights[0]
    shutil.copytree(world / "accepted", tmp_path / "accepted" / "unchecked")
    (tmp_path / "sheet.png").write_bytes(samples_png(tmp_path, CLASSES))
    assert Image.open(tmp_path / "sheet.png").height == heights[1]


def test_an_experiment_brings_its_question_and_what_the_gate_let_through(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "bench", tmp_path / "job" / "benchmark")
    head = {
        "name": "noise",
        "title": "Where | noise goes",
        "asked": "Does <it> matter?",
        "command": 'medaug experiment noise --cohort "$COHORT"',
        "settings": [{"name": "drawn", "bundle": "/home/secret/mine", "training": {"weights": "/home/secret/file"}}],
    }
    storage.write_json(tmp_path / "job" / "experiment.json", head)
    with pytest.raises(DataError, match="page-unfinished"):
        write_page(tmp_path / "job", tmp_path / "page")
    none = {"arm": "none", "generated": None, "accepted": None, "label_agreement": None}
    table = [none, {**none, "arm": "drawn", "generated": 27, "accepted": 12, "label_agreement": 0.75}]
    table += [{**none, "arm": "lost", "generated": 9, "accepted": 0}]
    table += [{**none, "arm": "rounds", "generated": 9, "accepted": 0, "seeds_without": [0], "unkept": 8}]
    storage.write_json(tmp_path / "job" / "experiment.json", head | {"table": table})
    write_page(tmp_path / "job", tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    assert text.startswith("# Where \\| noise goes\n\n**Asked.** Does &lt;it&gt; matter? Arms: none, oversample, drawn;")
    assert "    medaug experiment noise --cohort" in text and "| drawn | 27 | 12 | 0.750 |" in text
    assert "- **Not graded.** lost: none of 9 generated images was accepted." in text
    unkept = "rounds: none of its images is used: 8 passed the gate, but no round of them helped a grader on validation."
    assert f"- **Not graded.** {unkept}" in text
    written = (tmp_path / "page" / "experiment.json").read_text()
    assert "secret" not in written and '"bundle": "mine"' in written


def test_a_calibration_is_shown_with_its_rule_and_how_far_its_judge_is_to_be_trusted(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "bench", tmp_path / "job" / "benchmark")
    rows = [{"scale": scale, "agreement": 1 - scale / 4, "distance": scale, "copy_rate": 0.5} for scale in (0.0, 0.25, 1.0)]
    pilot = {"scale": 0.25, "rows": rows, "weak_distance": 0.125, "least_agreement": 0.9, "seed_images": 12}
    lines = [{"row": "drawn", "judge": {"n": 8, "balanced_accuracy": 0.625}, **pilot}]
    lines += [{"row": "other", "seed": 3, "judge": {"n": None, "balanced_accuracy": None}, **pilot}]
    storage.write_json(tmp_path / "job" / "experiment.json", {"name": "noise", "table": [], "calibrations": lines})
    write_page(tmp_path / "job", tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    assert text.count("## How strong the noise may be") == 1
    rule = "In bold the largest scale that leaves 90% of the labels that a judge sees without noise"
    assert text.count(rule) == 2 and text.count("than a weak copy does (0.125), on 12 training images.") == 2
    assert (
        text.count("has learned from them (balanced accuracy 0.625 on 8 validation images).")
        == text.count("has learned from them.")
        == 1
    )
    for name in ("drawn", "other, seed 3"):
        assert (
            f"| {name} | 0 | 1.000 | 0.000 | 0.500 |\n| {name} | **0.25** | 0.938 | 0.250 | 0.500 |\n| {name} | 1 | 0.750 |"
            in text
        )
    write_page(tmp_path / "page", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "page")


def test_what_amst_made_of_the_labels_is_told_for_each_network(bench: Path, tmp_path: Path) -> None:
    networks = set()
    for path in (bench / "rows").iterdir():
        row = storage.read_json(path)
        if row["arm"] == "drawn":
            networks.add(row["network"])
            last = {
                "scored": 8,
                "accepted": 4 - 2 * (row["seed"] > 0),
                "relabelled": 1,
                "confusion_all": [[3, 1, 0], [0, 2, 0], [2, 0, 0]],
            }
            storage.write_json(path, row | {"amst": {"rounds": [{"scored": 1}, last], "notes": []}})
        else:
            storage.write_json(
                path, row | {"amst": {"rounds": [{"scored": 2, "accepted": 2, "relabelled": 0, "confusion_all": [[2]]}]}}
            )
    write_page(bench, tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    section = text[text.index("## What AMST did to the labels") : text.index("## By class")]
    assert networks and all(
        f"| drawn | {name} | 25% to 50% | 25% to 50% | 38% |" in section.replace("\\", "") for name in networks
    )
    assert "oversample" not in section and "| none" not in section  # which kept every label
    write_page(tmp_path / "page", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "page")


def test_the_command_shows_a_summary(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from medaug import cli

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["medaug", "report", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    shown = json.loads(run(str(page), "--out", str(tmp_path / "other"), "--json"))
    assert shown["finished"] and shown["rows"] == 18 and "README.md" in shown["written"]
    sentence = shown["verdict"]["drawn"]["sentence"]
    assert sentence in run(str(page), "--out", str(tmp_path / "other"))


def test_every_refusal_is_one_sentence_without_the_path(tmp_path: Path) -> None:
    with pytest.raises(MedaugError) as caught:
        write_page(tmp_path / "folder", tmp_path / "page")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["cohort.json", "gate.json", "report.html", "mine.txt"])
def test_a_folder_of_something_else_is_left_alone(page: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(StorageError, match="page-occupied"):
        write_page(page, out)
    assert contents(out) == {name: b"{}"}


def test_notes_may_come_first_and_must_be_text(page: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "NOTES.md").write_bytes("Prüfung".encode("cp1252"))
    with pytest.raises(DataError, match="NOTES.md of out is not UTF-8"):
        write_page(page, out)
    assert set(contents(out)) == {"NOTES.md"}
    (out / "NOTES.md").write_text("Prüfung", encoding="utf-8")
    write_page(page, out)
    assert "Prüfung" in (out / "README.md").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_leaves_nothing_half(page: Path, tmp_path: Path) -> None:
    shutil.copytree(page, tmp_path / "page")
    edit(tmp_path / "page" / "experiment.json", lambda content: content.update(made=[{}]))
    with pytest.raises(DataError, match="page-malformed"):
        write_page(tmp_path / "page", tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    (tmp_path / "page" / "rows.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"rows\.json of page is not UTF-8"):
        write_page(tmp_path / "page", tmp_path / "out")
    with pytest.raises(DataError, match="There is no folder nowhere"):
        write_page(tmp_path / "nowhere", tmp_path / "out")
