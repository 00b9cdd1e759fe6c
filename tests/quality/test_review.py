"""A reader's decisions on the gate's images: what they change, what they cannot, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gate import write_synthetic

from medaug import storage
from medaug.cohort import Case, Cohort, read_cohort
from medaug.errors import DataError
from medaug.io.raster import write_unit_png
from medaug.quality import review_page
from medaug.quality.finding import ACCEPT, QUARANTINE, REJECT
from medaug.quality.gate import run_gate
from medaug.quality.review import Decision, apply_review, read_reviews
from medaug.quality.verdicts import Verdict

IDS = {"a", "b", "c"}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def judged(verdict: str, **by_check: str) -> Verdict:
    case = Case("a", "images/a.png", 0, "g", "0" * 64, lineage={})
    return Verdict(
        case, verdict, (("some-code", "A reason."),) if verdict != ACCEPT else (), {"confidence": 0.7}, None, False, by_check
    )


WORD = {wish: {"a": Decision(wish, "ann", "ab" * 32)} for wish in (ACCEPT, REJECT)}


@pytest.mark.parametrize("before", [ACCEPT, QUARANTINE, REJECT])
@pytest.mark.parametrize("wish", [ACCEPT, REJECT])
def test_a_reader_wins_over_label_and_outlier_checks(before: str, wish: str) -> None:
    (after,) = apply_review([judged(before, usable=ACCEPT, pseudo_label=before, outliers=before, copies=ACCEPT)], WORD[wish])
    assert after.verdict == wish
    assert after.lineage["reviewed_by"] == {
        "reader": "ann", "verdict": wish, "csv_sha256": "ab" * 32, "gate_verdict": before,
        "gate_reasons": [] if before == ACCEPT else ["some-code"],
    }  # fmt: skip
    assert after.lineage["confidence"] == 0.7
    assert [code for code, _ in after.reasons][:1] == ([] if wish == ACCEPT else ["reader-rejected"])


@pytest.mark.parametrize("checks", [{"usable": REJECT}, {"usable": ACCEPT, "copies": QUARANTINE}, {"copies": REJECT}])
def test_nobody_accepts_an_unusable_image_or_a_near_copy(checks: dict[str, str]) -> None:
    with pytest.raises(DataError, match="take the rows out") as caught:
        apply_review([judged(QUARANTINE, **checks)], WORD[ACCEPT])
    assert caught.value.code == "review-locked"
    assert apply_review([judged(QUARANTINE, **checks)], WORD[REJECT])[0].verdict == REJECT


def test_without_a_decision_nothing_changes() -> None:
    before = [judged(QUARANTINE, copies=QUARANTINE)]
    assert apply_review(before, {}) == before


GOOD = "id,verdict,reader\na,accept,ann\n"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("reader-csv-empty", ""),
        ("reader-csv-empty", "id,verdict,reader\n\n"),
        ("reader-csv-not-utf8", b"id,verdict,reader\na,accept,J\xf6rg\n"),
        ("reader-csv-columns", "id,verdict\na,accept\n"),
        ("reader-csv-columns", "id;verdict;reader\na;accept;ann\n"),
        ("reader-csv-columns", "id,verdict,reader\na,accept\n"),
        ("reader-csv-columns", 'id,verdict,reader\n"a,accept,ann\n'),
        ("reader-csv-value", "id,verdict,reader\na,quarantine,ann\n"),
        ("reader-csv-name", "id,verdict,reader\na,accept,\n"),
        ("reader-csv-name", "id,verdict,reader\na,accept,Ann Example\n"),
        ("reader-csv-id-unknown", "id,verdict,reader\na,accept,ann\nSmith^John,reject,ann\n"),
        ("reader-csv-id-twice", "id,verdict,reader\na,accept,ann\na,reject,ann\n"),
    ],
)
def test_a_file_that_cannot_be_applied_is_refused(tmp_path: Path, code: str, text: Any) -> None:
    with pytest.raises(DataError) as caught:
        read_reviews([write(tmp_path / "r.csv", text) if isinstance(text, str) else _raw(tmp_path / "r.csv", text)], IDS)
    assert caught.value.code == code
    assert "Smith" not in caught.value.message and "Example" not in caught.value.message


def _raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_missing_file_and_two_files_on_one_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_reviews([tmp_path / "none.csv"], IDS)
    assert caught.value.code == "reader-csv-unreadable"
    with pytest.raises(DataError) as caught:
        read_reviews([write(tmp_path / "1.csv", GOOD), write(tmp_path / "2.csv", GOOD)], IDS)
    assert caught.value.code == "reader-csv-id-twice"


NAMES = st.text("abcXYZ019_.-", min_size=1, max_size=40)


@given(st.dictionaries(st.sampled_from(sorted(IDS)), st.tuples(st.sampled_from([ACCEPT, REJECT]), NAMES)))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, words: dict[str, tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "r.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as stream:  # as spreadsheets write it, CRLF and all
        csv.writer(stream).writerows([("reader", "id", "verdict"), *((by, key, verdict) for key, (verdict, by) in words.items())])
    if not words:
        with pytest.raises(DataError, match="no rows"):
            read_reviews([path], IDS)
        return
    found = read_reviews([path], IDS)
    assert {key: (word.verdict, word.reader) for key, word in found.items()} == words
    assert {word.csv_sha256 for word in found.values()} == {storage.sha256_file(path)}


@pytest.fixture
def folders(tmp_path: Path, make_cohort: Callable[..., Cohort]) -> Path:
    real = make_cohort(tmp_path / "real", per_class=30, cases_per_group=2)
    write_synthetic(tmp_path / "synthetic", real, make_cohort(tmp_path / "others", per_class=10, seed=1))
    return tmp_path


def gate(folder: Path, out: str = "out", **options: Any) -> Any:
    return run_gate(folder / "synthetic", folder / "real", folder / out, checks=["copies"], **options)


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_gate_applies_a_review_and_again_with_the_same_bytes(folders: Path) -> None:
    before = gate(folders)
    verdicts = {row["id"]: row["verdict"] for row in before.verdicts}
    assert verdicts["s0good0"] == ACCEPT and verdicts["s0copy"] == QUARANTINE
    review = write(folders / "r.csv", "id,verdict,reader\ns0good0,reject,ann\ns0good1,accept,ann\ns1copy,reject,ann\n")
    page = data_of(folders / "out" / "review.html")
    after = gate(folders, review=[review])
    rows = {row["id"]: row for row in after.verdicts}
    assert rows["s0good0"]["verdict"] == REJECT and rows["s1copy"]["verdict"] == REJECT
    assert after.summary["review"]["changed"] == 2 and after.summary["reasons"]["reader-rejected"] == 2
    accepted = {case.id: case.lineage for case in read_cohort(folders / "out", verify=True).training}
    assert "s0good0" not in accepted and "reviewed_by" not in accepted["s0good2"]
    assert accepted["s0good1"]["reviewed_by"]["csv_sha256"] == storage.sha256_file(review)
    assert "A review was applied: ann" in (folders / "out" / "report.html").read_text()
    first = tree(folders / "out")
    gate(folders, review=[review])
    assert tree(folders / "out") == first
    reviewed = data_of(folders / "out" / "review.html")
    assert reviewed["key"] == page["key"] and reviewed["items"] == page["items"]  # a browser's decisions stay valid
    assert page["decisions"] == {} and reviewed["decisions"]["s0good0"] == [REJECT, "ann"]


def test_a_refused_review_leaves_the_gate_as_it_was(folders: Path) -> None:
    gate(folders)
    first = tree(folders / "out")
    for text in ("id,verdict,reader\ns0copy,accept,ann\n", "id,verdict,reader\nother,accept,ann\n"):
        with pytest.raises(DataError):
            gate(folders, review=[write(folders / "r.csv", text)])
    assert tree(folders / "out") == first


def test_the_page_shows_each_image_once_with_its_neighbours(folders: Path) -> None:
    result = gate(folders)
    page = data_of(folders / "out" / "review.html")
    items = {item["id"]: item for item in page["items"]}
    assert list(items) == [row["id"] for row in result.verdicts]
    assert (
        items["s0copy"]["locked"] == ["copies"] and items["s0blank"]["locked"] == ["usable"] and items["s0good0"]["locked"] == []
    )
    known = {f"s:{key}" for key in items} | {
        f"r:{item[role]['id']}" for item in items.values() for role in ("reference", "nearest") if role in item
    }
    assert set(page["pictures"]) == known and all(uri.startswith("data:image/png;base64,") for uri in page["pictures"].values())
    text = (folders / "out" / "review.html").read_text()
    assert str(folders) not in text and not re.search(r"https?://|<script src|<link|@import", text)


def test_many_images_go_into_parts_and_old_parts_go(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_page, "PART_IMAGES", 10)
    gate(folders)
    parts = sorted(path.name for path in (folders / "out").glob("review*.html"))
    assert parts == ["review-2.html", "review-3.html", "review.html"]
    pages = [data_of(folders / "out" / review_page.part_name(number)) for number in (1, 2, 3)]
    assert [len(page["items"]) for page in pages] == [10, 10, 7] and len({page["key"] for page in pages}) == 3
    assert 'href="review-2.html"' in (folders / "out" / "review.html").read_text()
    monkeypatch.setattr(review_page, "PART_IMAGES", 2000)
    gate(folders)
    assert [path.name for path in (folders / "out").glob("review*.html")] == ["review.html"]


def test_a_part_ends_when_its_pictures_are_many(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_page, "PART_BYTES", 1)
    gate(folders)
    assert len(list((folders / "out").glob("review*.html"))) == 27


def test_a_large_image_is_shown_smaller(tmp_path: Path) -> None:
    from medaug.quality.thumbnails import thumbnail_uri

    write_unit_png(tmp_path / "x.png", np.linspace(0, 1, 512 * 512, dtype=np.float32).reshape(512, 512))
    import base64
    import io

    from PIL import Image

    from medaug.io.raster import read_unit_png

    with Image.open(io.BytesIO(base64.b64decode(thumbnail_uri(read_unit_png(tmp_path / "x.png")).split(",")[1]))) as image:
        assert (image.size, image.mode, image.format) == ((256, 256), "L", "PNG")
