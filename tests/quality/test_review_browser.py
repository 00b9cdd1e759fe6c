"""The pages in a real browser: headless Chromium, keyboard only, no request to anywhere."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from test_gate import write_synthetic

from medaug.cohort import Cohort, read_cohort
from medaug.quality.gate import run_gate
from medaug.quality.reader_score import score_readers
from medaug.quality.reader_test import make_reader_test

pytestmark = pytest.mark.integration


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def folders(tmp_path: Path, make_cohort: Callable[..., Cohort]) -> Path:
    real = make_cohort(tmp_path / "real", per_class=30, cases_per_group=2)
    write_synthetic(tmp_path / "synthetic", real, make_cohort(tmp_path / "others", per_class=10, seed=1))
    run_gate(tmp_path / "synthetic", tmp_path / "real", tmp_path / "out", checks=["copies"])
    return tmp_path


class Watched:
    """A page with what it asked for and what went wrong in it."""

    def __init__(self, context: Any, path: Path) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.goto(path.as_uri())

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").inner_text())

    def wait_for(self, name: str, text: str) -> None:
        """Until the element says so: on a busy machine a page that is loaded may not be drawn yet."""
        self.page.wait_for_function("([id, text]) => document.getElementById(id).innerText === text", arg=[name, text])

    def export(self, path: Path) -> list[dict[str, str]]:
        with self.page.expect_download() as download:
            self.page.locator("#export").press("Enter")
        download.value.save_as(path)
        with open(path, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    def name(self, reader: str) -> None:
        self.page.locator("#reader").fill(reader)
        self.press("Escape")

    def check_quiet(self) -> None:
        """Nothing but the file itself, data inside it and the table it made."""
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert self.errors == []


def test_a_review_by_keyboard_goes_through_the_gate(browser: Any, folders: Path) -> None:
    context = browser.new_context(accept_downloads=True)
    seen = Watched(context, folders / "out" / "review.html")
    assert seen.text("count").startswith("0 of 27 decided") and seen.text("place") == "Image 1 of 27"
    seen.page.locator("#filter-class").select_option("class1")
    assert seen.text("place") == "Image 1 of 9"
    seen.press("Escape", "r", "a", "r", "u", "ArrowRight", "ArrowLeft")
    assert seen.text("count") == "2 of 27 decided: 1 accepted, 1 rejected"
    small = seen.page.locator("#picture").bounding_box()["width"]
    seen.press("z")
    assert seen.page.locator("#picture").bounding_box()["width"] > 1.5 * small
    seen.press("z")
    seen.page.locator("#filter-reason").select_option("near-copy")
    seen.press("Escape", "a")
    assert "No reader can accept" in seen.text("message") and seen.page.locator("#accept").is_disabled()
    seen.page.locator("#export").press("Enter")
    assert "pseudonym" in seen.text("message")  # no name, no file; the keys go into the field now
    seen.name("ann")
    rows = seen.export(folders / "r.csv")
    assert rows == [
        {"id": "s1good0", "verdict": "reject", "reader": "ann"},
        {"id": "s1good1", "verdict": "accept", "reader": "ann"},
    ]
    seen.page.reload()
    seen.wait_for("count", "2 of 27 decided: 1 accepted, 1 rejected")
    assert seen.page.input_value("#reader") == "ann"
    seen.check_quiet()

    other = Watched(browser.new_context(accept_downloads=True), folders / "out" / "review.html")  # another person's browser
    assert other.text("count").startswith("0 of 27")
    other.page.locator("#import").set_input_files(folders / "r.csv")
    other.page.wait_for_function("document.getElementById('count').textContent.startsWith('2 of 27')")
    other.name("bob")
    other.press("a")
    assert {row["reader"] for row in other.export(folders / "more.csv")} == {"ann", "bob"}
    other.check_quiet()

    result = run_gate(folders / "synthetic", folders / "real", folders / "out", checks=["copies"], review=[folders / "r.csv"])
    assert result.summary["review"] | {"csv_sha256": []} == {
        "accepted": 1, "rejected": 1, "changed": 1, "readers": ["ann"], "csv_sha256": [],
    }  # fmt: skip
    assert "s1good0" not in {case.id for case in read_cohort(folders / "out").training}
    again = Watched(browser.new_context(), folders / "out" / "review.html")
    assert again.text("count") == "2 of 27 decided: 1 accepted, 1 rejected"  # the page starts from the applied review
    again.check_quiet()


def test_a_reader_test_by_keyboard_is_scored(browser: Any, folders: Path) -> None:
    make_reader_test(folders / "real", folders / "out", folders / "readers", n=3, seed=2)
    context = browser.new_context(accept_downloads=True)
    seen = Watched(context, folders / "readers" / "blinded.html")
    seen.press("s", "5", "r", "2", "3", "r")
    assert seen.text("count") == "3 of 6 answered"
    seen.press("u", "u", "3", "r", "s", "1", "s", "4", "r", "5")
    seen.page.reload()
    seen.wait_for("count", "6 of 6 answered")
    seen.name("ann")
    rows = seen.export(folders / "answers.csv")
    assert [(row["answer"], row["confidence"]) for row in rows] == [
        ("synthetic", "5"), ("real", "2"), ("real", "3"), ("synthetic", "1"), ("synthetic", "4"), ("real", "5"),
    ]  # fmt: skip
    scores = score_readers(folders / "readers", [folders / "answers.csv"])["readers"]["ann"]
    assert scores["answered"] == 6 and scores["missing"] == 0 and scores["auc"]["n"] == 6
    seen.check_quiet()
