"""A gate's file: what it may say, and that the default one is the gate as it is without a file."""

from __future__ import annotations

import pytest

from medaug import assets
from medaug.errors import ConfigError
from medaug.quality.checks import CHECKS
from medaug.quality.copy_check import SPACES
from medaug.quality.gate import DEFAULT_CHECKS
from medaug.quality.gate_config import checks_of, plan_checks, take_threshold
from medaug.quality.pseudo_label import PAPER_THRESHOLD
from medaug.workflow import read_yaml


def read(name: str) -> list:
    return checks_of(read_yaml(assets.gate_path(name)))


def test_the_default_file_says_the_defaults():
    specs, threshold = take_threshold(read("default"), None)
    assert [check.name for check in plan_checks(specs)] == list(DEFAULT_CHECKS)
    assert threshold == PAPER_THRESHOLD
    settings = {check.name: check.settings for check in plan_checks(specs) if check.settings}
    assert settings == {"copies": {"spaces": list(SPACES)}}


@pytest.mark.parametrize("name", assets.list_gates())
def test_shipped_gates_plan(name):
    assert plan_checks(take_threshold(read(name), None)[0])


def test_order_is_that_of_the_checks_and_usable_always_runs():
    assert [check.name for check in plan_checks(["copies", {"pseudo_label": None}])] == ["usable", "pseudo_label", "copies"]
    assert [check.name for check in plan_checks(CHECKS)] == list(CHECKS)


def test_the_given_threshold_wins():
    specs = ["copies", {"pseudo_label": {"threshold": 0.5}}]
    assert take_threshold(specs, None) == (["copies", "pseudo_label"], 0.5)
    assert take_threshold(specs, 0.9)[1] == 0.9
    assert take_threshold(["copies"], None)[1] is None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"checks": []}, "at least one check"),
        ({"checks": ["copies"], "limit": 1}, "got limit"),
        ({}, "NoneType"),
    ],
)
def test_wrong_files_are_refused(content, match):
    with pytest.raises(ConfigError, match=f"gate-malformed.*{match}"):
        checks_of(content)


@pytest.mark.parametrize(
    ("checks", "match"),
    [
        (["odd"], "check-unknown.*pseudo_label, copies.*got odd"),
        (["copies", {"copies": {}}], "check-twice"),
        ([{"copies": {"limit": 3}}], "copies takes spaces; got limit"),
        ([{"usable": {"limit": 3}}], "usable takes no settings"),
        ([{"copies": 3}], "gate-malformed"),
        ([{"copies": {}, "usable": {}}], "gate-malformed"),
        ([3], "gate-malformed.*int"),
    ],
)
def test_wrong_checks_are_refused(checks, match):
    with pytest.raises(ConfigError, match=match):
        plan_checks(checks)
