"""The main job on drawn discs: every stage runs, a repeated job changes nothing, a missed quota is loud."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug import augment
from medaug.cohort import Cohort, read_cohort
from medaug.errors import DataError

TINY: dict[str, Any] = {
    "network_settings": {
        "backbone": "lean",
        "class_conditional": True,
        "backbone_options": {"channels": [8, 8], "patch": 2},
        "reference": {"feature": "blocks"},
    },
    "batch_size": 4,
    "max_epochs": 1,
    "epoch_length": 2,
    "preview_every": 0,
    "sampler_settings": {"step": "dpm_solver_pp_2m", "num_inference_steps": 3, "spacing": "karras", "sigma_min": 0.02},
    "synthetic_per_real": 0.5,
    "device_name": "cpu",
    "augment#gate_threshold": 0.0,
    "augment#seeds": 1,
    "augment#filter": {"num_steps": 4, "evaluate_every": 2, "batch_size": 8},
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name[0] != "."
    }


@pytest.mark.slow
@pytest.mark.integration
def test_augment_goes_all_the_way_and_again_to_the_same_bytes(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    real = make_cohort(tmp_path / "cohort", size=16, per_class=15)
    result = augment.run_augment(
        "guided_ddpm", tmp_path / "cohort", tmp_path / "job", profile="tiny", overrides=TINY, allow_short=True
    )
    assert {row["arm"] for row in result["rows"]} == {"none", "crop_rotate", "oversample", "guided_ddpm"}
    assert set(result["verdict"]) == {"crop_rotate", "oversample", "guided_ddpm"}
    accepted = read_cohort(tmp_path / "job" / "accepted")
    references = {case.lineage["reference"] for case in accepted.training if case.lineage}
    assert references <= {case.id for case in real.training}
    assert json.loads((tmp_path / "job" / "augment.json").read_text())["accepted"] == len(accepted.training)
    before = files_of(tmp_path / "job")
    augment.run_augment("guided_ddpm", tmp_path / "cohort", tmp_path / "job", profile="tiny", overrides=TINY, allow_short=True)
    after = files_of(tmp_path / "job")
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


class Entry:
    """A class's line in the gate's acceptance."""

    def __init__(self, accepted: int) -> None:
        self.accepted = accepted


class Gated:
    """What the job reads of a gate's result."""

    def __init__(self, accepted: list[int], quota: list[int]) -> None:
        self.acceptance = [Entry(min(a, q)) for a, q in zip(accepted, quota, strict=True)]
        self.short = [str(i) for i, (a, q) in enumerate(zip(accepted, quota, strict=True)) if a < q]


@pytest.mark.parametrize("allow_short", [True, False])
def test_a_class_that_never_passes_stops_at_the_limit(tmp_path: Path, allow_short: bool) -> None:
    plans: list[list[int]] = []
    quota = [10, 10]
    options = {"max_attempts": 5.0, "first_attempts": 1.5, "allow_short": allow_short}

    def judge(allow: bool) -> Any:
        if not allow:
            raise DataError("quota-missed", "too few")
        return Gated([plans[-1][0] // 2, 0], quota)

    def job() -> Any:
        return augment._generate_until_enough(plans.append, judge, quota, options, tmp_path / "counts.json")

    if allow_short:
        assert job().short == ["1"]
    else:
        with pytest.raises(DataError, match="quota-missed"):
            job()
    assert plans[0] == [15, 15]
    assert plans[-1][1] == 50
    assert plans[-1][0] < 50  # the class that passes is not driven to the limit
    plans.clear()
    if allow_short:
        job()
        assert len(plans) == 1  # a repeated job starts where the first ended


@given(st.integers(0, 100), st.integers(1, 100), st.integers(0, 100), st.integers(0, 400))
@settings(deadline=None, max_examples=50)
def test_next_count_never_shrinks_a_plan_nor_passes_the_limit(accepted: int, made: int, wanted: int, more: int) -> None:
    limit = made + more
    count = augment.next_count(min(accepted, made), made, wanted, limit)
    assert made <= count <= limit
    assert (count == made) == (min(accepted, made) >= wanted or more == 0)


def test_a_cohort_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cohort-missing"):
        augment.run_augment("guided_ddpm", tmp_path / "nowhere", tmp_path / "out", profile="tiny")
    assert not (tmp_path / "out").exists()
