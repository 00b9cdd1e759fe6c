"""Intake options from a file: the same as from the command line, wherever the images are on this machine."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from medaug.errors import ConfigError
from medaug.intake.records import IntakeOptions
from medaug.intake.section import _KINDS, check_section, publishable, section_options

# Where things go, what only a rehearsal is for, and what belongs to a machine or a person.
OUTSIDE = {"out", "dry_run", "pseudonym_key", "mapping", "keep_dicom", "workers"}
SECTION: dict[str, Any] = {
    "source": "$DATA/ct",
    "labels": "${DATA}/ct/manifest.csv",
    "label_column": "class",
    "group_column": "patient",
    "split": [0.7, 0.1, 0.2],
    "class_names": {0: "normal", 1: "pneumonia"},
    "classes": ["normal", "pneumonia"],
    "ordinal": False,
    "image_size": 32,
    "training_images": 200,
    "burned_in": "keep",
}


def test_a_section_says_what_the_command_line_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    wanted = IntakeOptions(
        source=Path("/data/ct"),
        out=Path("cohort"),
        labels=Path("/data/ct/manifest.csv"),
        label_column="class",
        group_column="patient",
        split=(0.7, 0.1, 0.2),
        class_names=(("0", "normal"), ("1", "pneumonia")),
        classes=("normal", "pneumonia"),
        ordinal=False,
        image_size=32,
        training_images=200,
        burned_in="keep",
    )
    found = section_options(SECTION, Path("cohort"))
    assert replace(found, workers=0) == wanted and found.workers >= 1


def test_every_option_is_either_known_or_left_out_on_purpose() -> None:
    assert {option.name for option in fields(IntakeOptions)} - set(_KINDS) == OUTSIDE
    assert set(_KINDS) <= {option.name for option in fields(IntakeOptions)}


def test_a_section_is_checked_without_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    check_section(SECTION)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "intake-section"),
        ({"labels": "x.csv"}, "intake-section"),
        ({"source": "x", "label-column": "class"}, "config-key-unknown"),
        ({"source": "x", "out": "y"}, "config-key-unknown"),
        ({"source": "x", 3: "y"}, "config-key-unknown"),
        ({"source": "x", "image_size": "32"}, "config-value"),
        ({"source": "x", "image_size": True}, "config-value"),
        ({"source": "x", "ordinal": "no"}, "config-value"),
        ({"source": "x", "split": [0.7, 0.3]}, "config-value"),
        ({"source": "x", "class_names": ["0=normal"]}, "config-value"),
        ({"source": ""}, "config-value"),
        ({"source": "$"}, "config-value"),
        ({"source": "x", "key": "name"}, "key-unknown"),
        ({"source": "x", "image_size": 4}, "image-size-invalid"),
        ({"source": "x", "burned_in": "show"}, "option-unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused(content: Any, code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        check_section(content)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("$DATA/ct/slices", "the folder that holds ct/slices"),
        ("${DATA}/ct", "the folder that holds ct"),
        ("$DATA", "the path of the images"),
    ],
)
@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named_with_what_it_should_hold(
    monkeypatch: pytest.MonkeyPatch, source: str, what: str, value: str | None
) -> None:
    monkeypatch.delenv("DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("DATA", value)
    with pytest.raises(ConfigError, match="variable-unset") as caught:
        section_options({"source": source}, Path("cohort"))
    assert f"set the environment variable DATA to {what}." in caught.value.message


def test_two_dollar_signs_are_one() -> None:
    assert section_options({"source": "a$$b"}, Path("cohort")).source == Path("a$b")


def test_results_repeat_no_place_and_no_person() -> None:
    content = {"source": "/home/somebody/ct", "labels": "$DATA/ct.csv", "reader_column": "reader", "senior": "Dr Quixote"}
    assert publishable(content) == {"source": "ct", "labels": "$DATA/ct.csv", "reader_column": "reader"}
