"""CLAIM 2024 and TRIPOD+AI: every item once, answers from the records, blanks where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from study import Study, make_study

from medaug.evidence.checklist_items import BLANK
from medaug.evidence.checklists import CHECKLISTS
from medaug.evidence.evidence import write_evidence

TRIPOD_PARTS = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef", 20: "abc", 23: "ab", 27: "abc"}
NUMBERS = {
    "CLAIM 2024": [str(number) for number in range(1, 45)],
    "TRIPOD+AI": [f"{number}{part}" for number in range(1, 28) for part in TRIPOD_PARTS.get(number, " ")],
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path / "study")


def sections(page: Path) -> dict[str, dict[str, str]]:
    """Checklist -> item -> answer, from checklists.md."""
    found: dict[str, dict[str, str]] = {}
    for section in page.read_text().split("\n## ")[1:]:
        rows = [re.split(r"(?<!\\)\|", line) for line in section.splitlines() if line.startswith("| ")][1:]
        assert all(len(row) == 6 for row in rows)
        found[section.splitlines()[0]] = {row[1].strip(): row[4].strip() for row in rows}
        assert len(rows) == len(found[section.splitlines()[0]])
    return found


def test_every_item_appears_once_in_both_files(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path, **study.options)
    found = sections(tmp_path / "checklists.md")
    page = (tmp_path / "checklists.html").read_text()
    for (name, answers), section in zip(found.items(), page.split("<section>")[1:], strict=True):
        expected = [number.strip() for number in NUMBERS[name]]
        assert list(answers) == expected
        assert re.findall(r"<tr><td>(\w+)</td>", section) == expected
    assert [len(checklist.items) for checklist in CHECKLISTS] == [44, 52]


def test_answers_hold_the_figures_of_the_benchmark(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path, **study.options)
    claim, tripod = sections(tmp_path / "checklists.md").values()
    assert "188" not in claim["20"] and "20 images by patient" in claim["20"] and "unnoticed" not in claim["20"]
    assert claim["12"] == "Nothing was imputed. Of 22 rows of labels 1 had no image, and 0 images had no row; both were left out."
    assert "kappa (quadratic weights) 0.250" in claim["18"]
    assert "training 60%, validation 20%, test 20%" in claim["19"] and "seed 3" in claim["19"]
    assert "They were drawn by chance, group by group." in claim["19"]
    assert "guided (18 training images, 6 of them synthetic; augmentation none)" in claim["25"]
    assert "num_steps=30, batch_size=16, learning_rate=0.003" in claim["25"] and BLANK not in claim["25"]
    assert "steps 10 to 30" in claim["26"]
    assert "200 bootstrap resamples of test groups, widened by the variance over seeds" in claim["29"]
    # truth 0 0 1 1: none answers 0 0 1 0, kappa (0.75 - 0.5) / (1 - 0.5); guided is right everywhere
    assert "none: test 0.500 ± 0.000" in claim["37"] and "guided: test 1.000 ± 0.000" in claim["37"]
    assert "guided: no evidence, +0.500 (95 % " in claim["38"] or "guided: helps, +0.500 (95 % " in claim["38"]
    assert claim["39"].startswith(
        "Test predictions over all runs: none 3 of 12 wrong, most often high taken for low (3); guided 0 of 12 wrong."
    )
    assert "There is no `oversample` arm" in claim["40"].replace("\\`", "`")
    assert tripod["13"].startswith("In 0 of 6 training runs the loss was weighted") and "guided low: 4, high: 2" in tripod["13"]
    assert claim["44"] == f"**{BLANK} funding**" and tripod["17"] == f"**{BLANK} ethics committee and consent**"


def test_arms_of_several_ratios_keep_the_names_of_the_verdict(study: Study, tmp_path: Path) -> None:
    for name, old, new in (("rows.csv", ",guided\n", ",guided@1\n"), ("verdict.json", '"guided"', '"guided@1"')):
        path = study.benchmark / name
        text = path.read_text().replace("\r\n", "\n")
        assert old in text
        path.write_text(text.replace(old, new))
    write_evidence(study.accepted, tmp_path, **study.options)
    claim = sections(tmp_path / "checklists.md")["CLAIM 2024"]
    assert "guided@1: test 1.000 ± 0.000" in claim["37"] and "guided@1: no evidence, " in claim["38"]
    assert "guided@1: no evidence, " in (tmp_path / "DATASET_CARD.md").read_text()


def test_without_a_benchmark_its_items_are_blank(study: Study, tmp_path: Path) -> None:
    with_all = write_evidence(study.accepted, tmp_path / "all", **study.options)
    without = write_evidence(study.accepted, tmp_path / "less", cohort=study.cohort, run=study.run)
    claim, tripod = sections(tmp_path / "less" / "checklists.md").values()
    for item in ("26", "27", "28", "29", "30", "37", "38"):
        assert claim[item] == f"**{BLANK}**"
    assert BLANK in claim["25"] and "640 iterations" in claim["25"]
    assert tripod["23a"] == f"**{BLANK} subgroups**"
    for name in NUMBERS:
        assert without["checklists"][name]["blank"] > with_all["checklists"][name]["blank"]
        assert sum(without["checklists"][name].values()) == len(NUMBERS[name])


@pytest.mark.parametrize("origin", ["automatic", "column"])
def test_a_split_without_patients_says_so(study: Study, tmp_path: Path, origin: str) -> None:
    path = study.cohort / "cohort.json"
    path.write_text(path.read_text().replace('"patient": 20', f'"{origin}": 20'))
    write_evidence(study.cohort, tmp_path)
    claim = sections(tmp_path / "checklists.md")["CLAIM 2024"]
    assert "For 20 images no patient is known, so splits could share patients unnoticed" in claim["20"]
    assert ("may be other than patients" in claim["20"]) == (origin == "column")


@pytest.mark.parametrize(
    "drawn, sentence",
    [
        ([], "They are the source's own; how it drew them is not recorded."),
        (["validation"], "They are the source's own, but for validation, drawn by chance from its training groups; how it"),
        (None, "Whether they are the source's own or were drawn by intake is not recorded."),
    ],
)
def test_splits_that_the_source_gave_are_not_called_drawn(
    study: Study, tmp_path: Path, drawn: list[str] | None, sentence: str
) -> None:
    path = study.cohort / "cohort.json"
    content = json.loads(path.read_text())
    content["notes"] |= {"drawn_splits": drawn}
    path.write_text(json.dumps(content))
    write_evidence(study.cohort, tmp_path)
    assert sentence in sections(tmp_path / "checklists.md")["CLAIM 2024"]["19"].replace("&#x27;", "'")


def test_a_gan_is_described_by_its_two_networks(study: Study, tmp_path: Path) -> None:
    path = study.run / "run.json"
    content = json.loads(path.read_text())
    described = content["settings"] | {"generator": {"channels": [8, 16]}, "critic": {"channels": [4, 8]}}
    del described["network"], described["diffusion"]
    path.write_text(json.dumps(content | {"settings": described}))
    write_evidence(study.accepted, tmp_path / "gan", **study.options)
    answer = sections(tmp_path / "gan" / "checklists.md")["CLAIM 2024"]["22"].replace("\\", "")
    assert "generator.channels=[8 16], critic.channels=[4 8]" in answer
    del described["generator"], described["critic"]
    path.write_text(json.dumps(content | {"settings": described}))
    write_evidence(study.accepted, tmp_path / "none", **study.options)
    assert BLANK in sections(tmp_path / "none" / "checklists.md")["CLAIM 2024"]["22"]


def test_names_cannot_break_the_pages(study: Study, tmp_path: Path) -> None:
    for folder in (study.cohort, study.accepted):
        path = folder / "cohort.json"
        path.write_text(
            path.read_text().replace("drawn chest", "<script>alert(1)</script>|x").replace('"accepted"', '"<b>|a\\nb"')
        )
    write_evidence(study.accepted, tmp_path, **study.options)
    pages = [(tmp_path / name).read_text() for name in ("checklists.md", "checklists.html", "DATASET_CARD.md", "MODEL_CARD.md")]
    assert all("<script>" not in page and "<b>" not in page for page in pages)
    assert len(sections(tmp_path / "checklists.md")["CLAIM 2024"]) == 44
