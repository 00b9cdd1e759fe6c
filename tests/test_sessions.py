"""Sessions of a job: one line each, the environment once, times that a kill cannot take away."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from medaug import __version__, sessions
from medaug.errors import DataError


def test_a_session_is_written_before_its_work_and_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    with sessions.Sessions(tmp_path).stage("training") as save:
        assert sessions.read_sessions(tmp_path)["stages"] == [{"stage": "training", "environment": 0, "seconds": 0.0}]
        now[0] += 5
        save()
        assert sessions.read_sessions(tmp_path)["stages"][0]["seconds"] == 0.0  # too early to write again
        now[0] += 20
        save()
        assert sessions.read_sessions(tmp_path)["stages"][0]["seconds"] == 25.0
        now[0] += 2
    with pytest.raises(KeyboardInterrupt), sessions.Sessions(tmp_path).stage("training"):
        now[0] += 3
        raise KeyboardInterrupt
    with sessions.Sessions(tmp_path).stage("gate", needed=False):
        now[0] += 9
    found = sessions.read_sessions(tmp_path)
    assert [entry["seconds"] for entry in found["stages"]] == [27.0, 3.0]
    assert len(found["environments"]) == 1


def test_an_environment_names_versions_and_no_machine() -> None:
    found = sessions.environment()
    assert found["packages"]["medaug"] == __version__ and "torch" in found["packages"]
    assert re.fullmatch(r"\d+ cores?, .+", found["machine"])
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}( with local changes)?", found["commit"])


def test_folders_are_joined_with_each_environment_once() -> None:
    one, two = {"packages": {"medaug": "1"}}, {"packages": {"medaug": "2"}}
    first = {"environments": [one], "stages": [{"stage": "a", "environment": 0, "seconds": 1}]}
    second = {"environments": [two, one], "stages": [{"stage": "b", "environment": i, "seconds": 2} for i in (0, 1)]}
    found = sessions.joined([first, second])
    assert found["environments"] == [one, two]
    assert [entry["environment"] for entry in found["stages"]] == [0, 1, 0]
    assert sessions.joined([]) == {"environments": [], "stages": []}


ENDLESS = {"environments": [{"packages": {}}], "stages": [{"stage": "a", "environment": 0, "seconds": float("inf")}]}
BROKEN = {"environments": [{"packages": {}}], "stages": [{"stage": "a", "environment": 0.0, "seconds": 1}]}


@pytest.mark.parametrize(
    "content", [[], {"environments": [], "stages": [{"stage": "a", "environment": 0, "seconds": 1}]}, ENDLESS, BROKEN]
)
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / sessions.FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match="sessions-malformed"):
        sessions.read_sessions(tmp_path)
