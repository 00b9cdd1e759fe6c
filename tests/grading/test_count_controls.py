"""The control of the same count: one for all arms alike, one of its own for an arm of another count or mix of classes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading import arms
from medaug.grading.benchmark import plan_cells
from medaug.grading.controls import alike
from medaug.grading.recipe import grading_recipe
from medaug.grading.variants import opponents_of, spread_arms
from medaug.grading.verdict import Opponents


def counts(pairs, num_classes=3):
    return [Counter(case.label for _, case in pairs)[label] for label in range(num_classes)]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=5))
def test_counts_are_alike_both_ways_and_to_themselves(pairs):
    ours, theirs = [list(column) for column in zip(*pairs, strict=True)]
    assert alike(ours, ours) and alike(ours, theirs) == alike(theirs, ours)


def test_how_much_counts_may_differ():
    assert alike([500, 500], [475, 500]) and not alike([500, 500], [449, 500])
    assert not alike([500, 500], [530, 470])  # the same number, another mix
    assert not alike([3, 0], [0, 3])


@pytest.fixture
def world(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real", per_class=20)
    for name, per_class in (
        ("skewed", [30, 0, 0]),
        ("even", [10, 10, 10]),
        ("nearly", [10, 10, 9]),
        ("few", [2, 2, 2]),
        ("scarce", [2, 2, 1]),
    ):
        make_synthetic(real, tmp_path / name, per_class, name=name)

    def read(*names, **options):
        texts = [name if name in ("none", "oversample") else f"{name}={tmp_path / name}" for name in names]
        return [arms.parse_arm(text, **options) for text in texts]

    return real, read


def test_every_arm_meets_real_images_repeated_to_its_own_count_and_classes(world):
    real, read = world
    spread = spread_arms(
        lambda ratio, part: read("none", "oversample", "even", "nearly", "skewed", "few", "scarce"), [], [1.0], real
    )
    assert [arm.name for arm in spread[7:]] == ["oversample-skewed", "oversample-few"]  # one image fewer is no other count
    opponents = opponents_of(spread)
    assert opponents["even"] == opponents["nearly"] == Opponents(control="oversample")
    assert opponents["skewed"] == Opponents(control="oversample-skewed")
    assert opponents["few"].control == opponents["scarce"].control == "oversample-few"
    assert opponents["oversample"] == opponents["oversample-few"] == Opponents()
    sets = {arm.name: arms.build_training_set(arm, real, 1) for arm in arms.prepare_arms(spread, real)}
    assert counts(sets["oversample"]) == counts(sets["even"])
    assert counts(sets["oversample-skewed"]) == counts(sets["skewed"]) and counts(sets["oversample-few"]) == counts(sets["few"])
    assert all(owner is real for owner, _ in sets["oversample-skewed"])


def test_without_the_common_control_none_is_added(world):
    real, read = world
    assert [arm.name for arm in arms.prepare_arms(read("none", "even", "skewed"), real)] == ["none", "even", "skewed"]


def test_an_own_control_is_there_at_every_ratio(world):
    real, read = world
    spread = spread_arms(
        lambda ratio, part: read("none", "oversample", "even", "skewed", synthetic_per_real=ratio), [0.1, 0.5], [1.0], real
    )
    names = [arm.name for arm in spread]
    assert names[-2:] == ["oversample-skewed@0.1", "oversample-skewed@0.5"]
    assert opponents_of(spread)["skewed@0.5"].control == "oversample-skewed@0.5"
    assert opponents_of(spread)["even@0.1"].control == "oversample@0.1"
    prepared = {arm.name: arm for arm in arms.prepare_arms(spread, real)}
    assert prepared["oversample-skewed@0.1"].extra == prepared["skewed@0.1"].extra


def test_the_control_follows_its_arm_seed_by_seed(tmp_path, make_cohort, make_synthetic):
    """Groups of unequal size are kept whole, so a fraction of the real images, and with it what a ratio adds, differs by seed."""
    real = make_cohort(tmp_path / "real", per_class=40, cases_per_group=1)
    real = real.with_cases(
        training=[case for case in real.training if case.label or int(case.id[-2:]) % 2]
        + [case for case in make_cohort(tmp_path / "more", per_class=40, cases_per_group=8, seed=1).training if not case.label]
    )
    synthetic = make_synthetic(real, tmp_path / "s", [60, 60, 60])
    wanted = [
        arms.parse_arm("oversample", real_fraction=0.25),
        arms.Arm("s", synthetic=synthetic, synthetic_per_real=2, real_fraction=0.25),
    ]
    prepared = arms.prepare_arms(wanted, real)
    added = set()
    for seed in range(8):
        control, arm = (arms.build_training_set(one, real, seed) for one in prepared)
        assert counts(control) == counts(arm)
        added.add(len(arm))
    assert len(added) > 1


def test_a_training_image_with_the_pixels_of_a_test_image_is_a_leak(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real")
    copied, original = real.training[0], real.test[0]
    real.path(copied).write_bytes(real.path(original).read_bytes())
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn")}
    with pytest.raises(LeakageError, match=f"pixels-held-out.*{copied.id}"):
        plan_cells(real, [arms.parse_arm("none")], ["simple_cnn"], [0], recipes)


def test_ordered_heads_need_ordered_classes(tmp_path, make_cohort):
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn", {"head": "coral"})}
    with pytest.raises(ConfigError, match="head-nominal.*--head linear"):
        plan_cells(make_cohort(tmp_path / "real"), [arms.parse_arm("none")], ["simple_cnn"], [0], recipes)


def test_images_stored_with_another_window_are_another_thing(tmp_path, make_cohort, make_synthetic):
    from dataclasses import replace

    window = {"kind": "window_hu", "0": -1350, "1": 150}
    real = replace(make_cohort(tmp_path / "real"), intensity=window)
    synthetic = make_synthetic(real, tmp_path / "s", [2, 2, 2])
    arms.check_arm(arms.Arm("s", synthetic=replace(synthetic, intensity=window)), real)
    arms.check_arm(arms.Arm("s", synthetic=replace(synthetic, intensity={"kind": "percentile"})), real)
    with pytest.raises(DataError, match=r"cohorts-differ.*-1350.*-160"):
        arms.check_arm(arms.Arm("s", synthetic=replace(synthetic, intensity=window | {"0": -160, "1": 240})), real)
