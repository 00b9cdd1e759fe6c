"""Stages as the commands call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from medaug.quality import gate
from medaug.stages import gate_synthetic


def test_a_gate_without_checks_is_not_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "run_gate", lambda *_, checks, **__: checks)
    folders = Path("synthetic"), Path("cohort"), Path("out")
    assert gate_synthetic(*folders, checks=[]) == []  # run_gate adds "usable" to whatever it is given
    assert gate_synthetic(*folders) == list(gate.DEFAULT_CHECKS)
