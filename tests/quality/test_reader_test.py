"""The blinded page: both kinds look alike to whoever reads its source, and the key stays private."""

from __future__ import annotations

import base64
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gate import write_synthetic
from test_review import data_of

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError, DataError
from medaug.quality.reader_test import make_reader_test, pick, share_out


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 100))
def test_places_are_shared_in_proportion(available: list[int], n: int) -> None:
    if sum(available) < n:
        with pytest.raises(DataError, match="Lower --n"):
            share_out(available, n)
        return
    counts = share_out(available, n)
    assert sum(counts) == n
    for count, there in zip(counts, available, strict=True):
        assert count <= there and abs(count - n * there / sum(available)) < 1


def test_a_group_comes_again_when_all_have_come() -> None:
    cases = [Case(f"c{index}", "x.png", 0, f"g{index % 4}", "0" * 64) for index in range(12)]
    assert len({case.group for case in pick(cases, 4, "k")}) == 4
    assert Counter(case.group for case in pick(cases, 8, "k")) == {f"g{index}": 2 for index in range(4)}
    assert pick(cases, 5, "k") == pick(cases[::-1], 5, "k") != pick(cases, 5, "other")


@pytest.fixture
def folders(tmp_path: Path, make_cohort: Callable[..., Cohort]) -> Path:
    real = make_cohort(tmp_path / "real", per_class=20, cases_per_group=2)
    synthetic = write_synthetic(tmp_path / "synthetic", real, make_cohort(tmp_path / "others", per_class=10, seed=1))
    assert len(synthetic.training) == 27
    return tmp_path


def make(folder: Path, out: str = "readers", **options: int) -> dict[str, object]:
    return make_reader_test(folder / "real", folder / "synthetic", folder / out, **options)


def test_nothing_gives_an_image_away(folders: Path) -> None:
    made = make(folders, n=12, seed=3)
    assert made["images"] == 24 and made["per_class"] == {"class0": 4, "class1": 4, "class2": 4}
    key = storage.read_json(folders / "readers" / "key.json")
    text = (folders / "readers" / "blinded.html").read_text()
    page = data_of(folders / "readers" / "blinded.html")
    assert [item["id"] for item in page["items"]] == [row["id"] for row in key["cases"]]
    assert set(page) == {"items", "key", "file"} and all(set(item) == {"id", "picture"} for item in page["items"])
    for row in key["cases"]:
        assert row["case"] not in text and len(row["id"]) == 16
    assert key["test_sha256"] not in text and str(folders) not in text
    headers = {base64.b64decode(item["picture"].split(",")[1])[:33] for item in page["items"]}
    assert len(headers) == 1  # signature and IHDR: size, bits, colour, filter and interlace are the same
    # Runs of one kind: a list sorted by kind has 2, a shuffled one about 13.
    kinds = [row["source"] for row in key["cases"]]
    assert sum(one != other for one, other in zip(kinds, kinds[1:], strict=False)) + 1 > 5


def test_only_real_training_and_validation_images_and_as_many_of_each_class(
    folders: Path, make_cohort: Callable[..., Cohort]
) -> None:
    make(folders, n=27)
    cases = storage.read_json(folders / "readers" / "key.json")["cases"]
    per_kind = {kind: Counter(row["class"] for row in cases if row["source"] == kind) for kind in ("real", "synthetic")}
    assert per_kind["real"] == per_kind["synthetic"] and sum(per_kind["real"].values()) == 27
    known = make_cohort(folders / "again", per_class=20, cases_per_group=2)
    allowed = {case.id for case in known.training + known.validation}
    assert {row["case"] for row in cases if row["source"] == "real"} <= allowed


def test_the_key_is_private_and_the_same_seed_gives_the_same_bytes(folders: Path) -> None:
    make(folders, n=6, seed=1)
    make(folders, "again", n=6, seed=1)
    make(folders, "other", n=6, seed=2)
    assert stat.S_IMODE((folders / "readers" / "key.json").stat().st_mode) == 0o600
    for name in ("key.json", "blinded.html"):
        assert (folders / "readers" / name).read_bytes() == (folders / "again" / name).read_bytes()
    tokens = [{row["id"] for row in storage.read_json(folders / out / "key.json")["cases"]} for out in ("readers", "other")]
    assert not tokens[0] & tokens[1]


def test_what_cannot_be_made_is_refused(folders: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make(folders, n=0)
    assert caught.value.code == "reader-test-size"
    with pytest.raises(DataError) as few:
        make(folders, n=28)
    assert few.value.code == "reader-test-too-few"
    (folders / "synthetic" / "images" / "s0good0.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as broken:
        make(folders, n=27)
    assert broken.value.code == "image-unreadable"
    assert not (folders / "readers" / "blinded.html").exists()
