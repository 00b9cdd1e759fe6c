"""Prompts: templates, tables, files, the keyed choice, and every refusal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medaug.errors import ConfigError
from medaug.prompts import TEMPLATES, Prompts, make_prompts

CLASSES = ("large_cell", "normal")


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_published_templates() -> None:
    assert make_prompts(CLASSES).texts == (("large cell",), ("normal",))
    assert make_prompts(CLASSES, templates="syn2").texts[1] == ("a photo of a normal",)
    both = make_prompts(CLASSES, templates=["syn1", "syn2"])
    assert both.texts[0] == ("large cell", "a photo of a large cell")
    assert both.all() == ("a photo of a large cell", "a photo of a normal", "large cell", "normal")


def test_label_texts_styles_and_literal_templates() -> None:
    made = make_prompts(
        CLASSES,
        templates=["style", "{label}, axial"],
        labels={"large_cell": "large cell  carcinoma {label}", "normal": "healthy lung"},
        styles=["an old film", "a phone photo"],
    )
    assert made.texts[1] == (
        "healthy lung in the style of an old film",
        "healthy lung in the style of a phone photo",
        "healthy lung, axial",
    )
    assert made.texts[0][2] == "large cell carcinoma {label}, axial"  # a brace in a label's text means nothing


def test_every_named_template_names_its_label() -> None:
    for name, template in TEMPLATES.items():
        styles = ["x"] if "{style}" in template else []
        assert all("large cell" in text for text in make_prompts(CLASSES, templates=name, styles=styles).texts[0])


def test_a_file_takes_the_place_of_templates(tmp_path: Path) -> None:
    rows = [
        {"label": "normal", "prompt": "clear  lungs"},
        "",
        {"label": "large_cell", "prompt": "a {label} tumour"},
        {"label": "normal", "prompt": "clear lungs"},
        {"label": "normal", "prompt": "Lunge ohne Befund"},
    ]
    made = make_prompts(CLASSES, file=jsonl(tmp_path / "p.jsonl", *rows))
    assert made.texts == (("a large cell tumour",), ("clear lungs", "Lunge ohne Befund"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "normal.txt").write_text("clear lungs\r\n\r\nLunge ohne Befund\n", encoding="utf-8-sig")
    (tmp_path / "folder" / "large_cell.txt").write_text("a {label} tumour", encoding="utf-8")
    assert make_prompts(CLASSES, file=str(tmp_path / "folder")) == made


@given(st.integers(1, 6), st.integers(0, 2**40), st.text(max_size=8))
def test_the_choice_belongs_to_its_key(number: int, seed: int, name: str) -> None:
    prompts = Prompts((tuple(f"p{i}" for i in range(number)), ("q",)))
    assert prompts.prompt(0, seed, name) in prompts.texts[0]
    assert prompts.prompt(0, seed, name) == prompts.prompt(0, seed, name)
    assert prompts.prompt(1, seed, name) == "q"


def test_every_prompt_is_equally_likely() -> None:
    prompts = Prompts((("a", "b", "c"),))
    drawn = Counter(prompts.prompt(0, 7, f"image{i}") for i in range(3000))
    assert all(900 < count < 1100 for count in drawn.values()) and len(drawn) == 3  # 1000 +- 4 standard deviations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"templates": "syn3"}, "template-unknown.*syn1, syn2"),
        ({"templates": []}, "template-unknown"),
        ({"templates": "{label} of {colour}"}, r"template-unknown.*\{colour\}"),
        ({"templates": "style"}, "template-style"),
        ({"styles": ["ink"]}, "template-style"),
        ({"templates": "style", "styles": [" "]}, "prompt-empty"),
        ({"templates": "style", "styles": "ink"}, "prompt-empty.*list"),
        ({"labels": {"normal": "healthy"}}, "label-without-text.*large_cell"),
        ({"labels": {"normal": "healthy", "large_cell": "x", "other": "y"}}, "prompt-label-unknown.*other"),
        ({"labels": {"normal": " ", "large_cell": "x"}}, "prompt-empty.*normal"),
        ({"labels": {"normal": "lung", "large_cell": "Lung"}}, "prompt-ambiguous"),
    ],
)
def test_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_prompts(CLASSES, **settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{", {"label": "normal", "prompt": "x"}, "[1]"], "prompt-file-malformed.*lines 1, 3"),
        ([{"label": "normal", "prompt": "x", "more": 1}], "prompt-file-malformed.*line 1:"),
        ([{"label": "normal", "prompt": 3}], "prompt-file-malformed"),
        ([{"label": "normal", "prompt": "x"}, {"label": "Jane Doe", "prompt": "x"}], "prompt-label-unknown.*line 2"),
        ([{"label": "normal", "prompt": "x"}, "", {"label": "normal", "prompt": " "}], "prompt-empty.*line 3"),
        ([{"label": "normal", "prompt": "x" * 1001}], "prompt-file-malformed.*longer"),
        ([{"label": "normal", "prompt": "{name}"}], "prompt-file-malformed.*braces"),
        ([{"label": "normal", "prompt": "x"}], "label-without-text.*large_cell"),
        ([{"label": "normal", "prompt": "x"}, {"label": "large_cell", "prompt": "x"}], "prompt-ambiguous"),
        (["[" * 100_000], "prompt-file-malformed.*line 1"),
        ([], "label-without-text"),
    ],
)
def test_bad_lines_are_refused_by_their_numbers(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make_prompts(CLASSES, file=jsonl(tmp_path / "p.jsonl", *rows))
    assert "Jane" not in str(refused.value)  # what a file holds may name a person


def test_bad_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="prompt-file-missing.*none.jsonl"):
        make_prompts(CLASSES, file=tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"label": "normal", "prompt": "x"}\n\xe4\n')
    with pytest.raises(ConfigError, match="prompt-file-malformed.*line 2: no UTF-8"):
        make_prompts(CLASSES, file=tmp_path / "latin.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "strange.txt").write_text("x")
    with pytest.raises(ConfigError, match="prompt-label-unknown.*1 file"):
        make_prompts(CLASSES, file=tmp_path / "folder")
    monkeypatch.setattr("medaug.prompts.MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="prompt-file-malformed.*larger"):
        make_prompts(CLASSES, file=jsonl(tmp_path / "p.jsonl", {"label": "normal", "prompt": "x"}))


@pytest.mark.parametrize(
    "classes",
    [
        ("covid-19", "covid - 19"),  # an encoder splits words from other signs, whatever blanks there are
        ("grade²", "grade2"),
        ("ＡＢ", "ab"),
    ],
)
def test_prompts_that_an_encoder_reads_alike_are_refused(classes: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_prompts(classes)
    assert caught.value.code == "prompt-ambiguous"


@pytest.mark.parametrize("sign", ["\ud800", "\0", "\x1b"])
def test_halves_of_characters_and_control_characters_are_refused(tmp_path: Path, sign: str) -> None:
    path = jsonl(
        tmp_path / "p.jsonl", {"label": "large_cell", "prompt": "a mass"}, {"label": "normal", "prompt": f"clear {sign} lungs"}
    )
    with pytest.raises(ConfigError, match=r"p\.jsonl, line 2") as caught:
        make_prompts(CLASSES, file=path)
    assert caught.value.code == "prompt-file-malformed"
    for options in (
        {"labels": {"large_cell": "a mass", "normal": sign}},
        {"templates": "{label}" + sign},
        {"templates": "style", "styles": ["film", sign]},
    ):
        with pytest.raises(ConfigError) as caught:
            make_prompts(CLASSES, **options)
        assert caught.value.code == "prompt-unreadable"
        caught.value.message.encode()  # can be printed


def test_a_line_that_gives_a_key_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"label": "large_cell", "label": "normal", "prompt": "clear lungs"}'
    with pytest.raises(ConfigError, match="line 2"):
        make_prompts(CLASSES, file=jsonl(tmp_path / "p.jsonl", {"label": "large_cell", "prompt": "a mass"}, twice))


@pytest.mark.parametrize(
    "options",
    [
        {"labels": {0: "none", "other": "nodule"}},
        {"labels": list(CLASSES)},
        {"templates": 5},
        {"templates": [5]},
        {"templates": "style", "styles": 3},
        {"file": 5},
        {"file": "nope\0.jsonl"},
    ],
)
def test_settings_of_another_kind_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        make_prompts(CLASSES, **options)


def test_classes_that_are_numbers_may_be_written_as_numbers() -> None:
    assert make_prompts(("0", "1"), labels={0: "no nodule", 1: "a nodule"}).texts == (("no nodule",), ("a nodule",))
