"""The numbers that docs/guidance.md shows are those that its script makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_figure_of_the_page_is_there_and_names_its_command() -> None:
    page = (DOCS / "guidance.md").read_text(encoding="utf-8")
    for path in sorted((DOCS / "guidance").glob("*.png")):
        assert f"](guidance/{path.name})\n\n`python docs/guidance_figures.py`" in page


def test_the_page_shows_the_numbers_of_the_file() -> None:
    page = (DOCS / "guidance.md").read_text(encoding="utf-8")
    numbers = json.loads((DOCS / "guidance" / "numbers.json").read_text(encoding="utf-8"))
    exact = numbers["tilting"]["diffused energy, 1000 steps"]
    assert f"| diffused energy | 1000 | {exact['mean']} | {exact['std']} |" in page
    rows = {(row["measure"], row["scale"]): row for row in numbers["two_clusters"] if row["network"] == "with classes"}
    for measure, scale in (("entropy", 0.5), ("entropy", 1.0), ("entropy", 2.0), ("margin", 1.0), ("classifier", 1.0)):
        row = rows[measure, scale]
        assert f"| {measure} | {scale:g} | {row['entropy']:.3f} | {row['distance']:.3f} | {row['label_kept']:.3f} |" in page
    assert rows["margin", -1.0]["entropy"] > rows["margin", 0.0]["entropy"] > rows["entropy", -1.0]["entropy"]


@pytest.mark.slow
@pytest.mark.integration
def test_the_script_makes_them_again(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "guidance_figures.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    found, committed = (json.loads((folder / "numbers.json").read_text()) for folder in (tmp_path, DOCS / "guidance"))
    for name, row in committed["tilting"].items():
        assert found["tilting"][name] == pytest.approx(row, abs=2e-4)
    for row, other in zip(committed["two_clusters"], found["two_clusters"], strict=True):
        assert other["entropy"] == pytest.approx(row["entropy"], abs=2e-4)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "guidance").iterdir()}
