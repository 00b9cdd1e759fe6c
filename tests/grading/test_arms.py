"""Exact counts, nesting, the control, and refusals of arms."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug import cohort as cohorts
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading import arms


def counts(pairs, num_classes=3):
    return [Counter(case.label for _, case in pairs)[label] for label in range(num_classes)]


@given(st.integers(0, 200), st.lists(st.integers(0, 50), min_size=2, max_size=5).filter(any))
@settings(deadline=None, max_examples=25)
def test_allocations_are_exact_and_nest(total, weights):
    for split in (arms.in_proportion, arms.level):
        added = split(total, weights)
        assert sum(added) == total
        assert all(more >= less for more, less in zip(split(total + 1, weights), added, strict=True))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=5).filter(any), st.data())
@settings(deadline=None, max_examples=25)
def test_a_share_of_what_is_there_never_asks_for_more(weights, data):
    total = data.draw(st.integers(0, sum(weights)))
    assert all(need <= has for need, has in zip(arms.in_proportion(total, weights), weights, strict=True))
    assert arms.in_proportion(sum(weights), weights) == weights


def test_no_class_loses_an_image_where_largest_remainders_take_one():
    # The Alabama paradox: by largest remainders [4, 4, 2] becomes [5, 5, 1] when 10 images become 11.
    assert arms.in_proportion(10, [6, 6, 2]) == [5, 4, 1]
    assert arms.in_proportion(11, [6, 6, 2]) == [5, 5, 1]


def test_level_fills_the_smallest_class_first():
    assert arms.level(5, [10, 2, 4]) == [0, 4, 1]  # 2 + 4 = 6, 4 + 1 = 5: as even as five images allow


def test_parse_arm(tmp_path, make_cohort, make_synthetic):
    assert arms.parse_arm("none").policy == "none"
    assert arms.parse_arm("crop_rotate").policy == "crop_rotate"
    assert arms.parse_arm("oversample").oversample
    made = make_synthetic(make_cohort(tmp_path / "real"), tmp_path / "a=b", [2, 2, 2])
    arm = arms.parse_arm(f"guided_ddpm={tmp_path / 'a=b'}")
    assert arm.name == "guided_ddpm" and arm.synthetic.training == made.training


@pytest.mark.parametrize(
    "text", ["rotate", "guided_ddpm", "", "=folder", "none=folder", "oversample=x", "../x=folder", "a b=folder", "name="]
)
def test_unknown_or_badly_named_arm_is_refused(text):
    with pytest.raises(ConfigError, match="arm"):
        arms.parse_arm(text)
    with pytest.raises(DataError, match="cohort-missing"):
        arms.parse_arm("ddpm=does-not-exist")


def test_training_sets_have_exact_counts_and_nest(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real", per_class=10)
    synthetic = make_synthetic(real, tmp_path / "synthetic", [20, 8, 14])
    num_real = len(real.training)
    sets = {}
    for ratio in (0.4, 1.0, 1.5, None):
        wanted = arms.Arm("a", synthetic=synthetic, synthetic_per_real=ratio)
        (arm,) = arms.prepare_arms([wanted], real)
        pairs = arms.build_training_set(arm, real, seed=3)
        assert len(pairs) == num_real + (42 if ratio is None else round(ratio * num_real))
        assert [case for owner, case in pairs if owner is real] == list(real.training)
        sets[ratio] = {case.id for owner, case in pairs if owner is synthetic}
        assert len(sets[ratio]) == len(pairs) - num_real
    assert sets[0.4] < sets[1.0] < sets[1.5] < sets[None]
    (half,) = arms.prepare_arms([arms.Arm("a", synthetic=synthetic, synthetic_per_real=0.4)], real)
    assert arms.build_training_set(half, real, seed=3) == arms.build_training_set(half, real, seed=3)
    assert arms.build_training_set(half, real, seed=3) != arms.build_training_set(half, real, seed=4)


def test_allocations_of_an_arm(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real", per_class=10)  # 6 training cases per class
    synthetic = make_synthetic(real, tmp_path / "synthetic", [24, 12, 12])
    extra = {
        allocation: arms.extra_counts(arms.Arm("a", synthetic=synthetic, synthetic_per_real=12 / 18, allocation=allocation), real)
        for allocation in arms.ALLOCATIONS
    }
    assert extra == {"as_generated": (6, 3, 3), "proportional": (4, 4, 4), "balance": (4, 4, 4)}
    with pytest.raises(DataError, match="class1: 12 of 18"):
        arms.extra_counts(arms.Arm("a", synthetic=synthetic, synthetic_per_real=3, allocation="proportional"), real)


def test_the_control_repeats_real_images_to_the_count_and_classes_of_the_largest_arm(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real", per_class=10)
    small, large = (
        make_synthetic(real, tmp_path / name, per_class, name=name) for name, per_class in (("x", [2, 2, 2]), ("y", [13, 0, 7]))
    )
    prepared = arms.prepare_arms(
        [arms.parse_arm("oversample"), arms.Arm("small", synthetic=small), arms.Arm("large", synthetic=large)], real
    )
    control, _, most, _ = (arms.build_training_set(arm, real, seed=0) for arm in prepared)
    assert counts(control) == counts(most) == [6 + 13, 6, 6 + 7]
    assert all(owner is real for owner, _ in control)
    repeats = Counter(case.id for _, case in control if case.label == 0)
    assert max(repeats.values()) - min(repeats.values()) <= 1  # every image before any one again


def test_control_without_synthetic_images_levels_the_classes(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real", per_class=10)
    real = real.with_cases(training=[case for case in real.training if case.label != 1 or case.id.endswith(("0", "1"))])
    (arm,) = arms.prepare_arms([arms.parse_arm("oversample")], real)
    assert counts(arms.build_training_set(arm, real, seed=0)) == [6, 6, 6]


def test_control_without_synthetic_images_levels_the_classes_it_keeps(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real", per_class=40, cases_per_group=1)
    real = real.with_cases(training=[case for case in real.training if case.label != 1 or case.id.endswith(("0", "1"))])
    (arm,) = arms.prepare_arms([arms.Arm("oversample", oversample=True, real_fraction=0.25)], real)
    pairs = arms.build_training_set(arm, real, seed=0)
    assert len(set(counts(pairs))) == 1 and max(counts(pairs)) < 20


def test_control_refuses_a_class_that_no_kept_group_has(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real", per_class=20, cases_per_group=1)
    rare = [case for case in real.training if case.label == 2][:1]
    real = real.with_cases(training=[case for case in real.training if case.label != 2] + rare)
    arm = arms.Arm("oversample", oversample=True, real_fraction=0.1, extra=(0, 0, 5))
    kept = [{case.label for case in arms.kept_cases(arm, real, seed)} for seed in range(8)]
    lost = next((seed for seed, labels in enumerate(kept) if 2 not in labels), None)
    if lost is None:
        pytest.skip("every part keeps the rare class")
    with pytest.raises(DataError, match="class-empty"):
        arms.build_training_set(arm, real, lost)


def test_images_of_a_generator_that_saw_a_test_group_are_refused(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    groups = [*real.groups("training"), sorted(real.groups("test"))[0]]
    leaked = make_synthetic(real, tmp_path / "leaked", [1, 1, 1], fit_groups=groups)
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        arms.prepare_arms([arms.Arm("a", synthetic=leaked)], real)
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        arms.build_training_set(arms.Arm("a", synthetic=leaked, extra=(1, 1, 1)), real, 0)


def test_real_images_that_pose_as_synthetic_are_refused(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real")
    with pytest.raises(LeakageError, match="real-in-synthetic-arm"):
        arms.prepare_arms([arms.Arm("a", synthetic=make_cohort(tmp_path / "other", seed=1))], real)


def test_refusals(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    synthetic = make_synthetic(real, tmp_path / "synthetic", [1, 1, 1])
    with pytest.raises(ConfigError, match="arms-invalid"):
        arms.prepare_arms([arms.parse_arm("none"), arms.parse_arm("none")], real)
    with pytest.raises(ConfigError, match="arm-unprepared"):
        arms.build_training_set(arms.parse_arm("none"), real, 0)
    with pytest.raises(DataError, match="arm-empty"):
        arms.prepare_arms([arms.Arm("a", synthetic=synthetic.with_cases(training=()))], real)
    with pytest.raises(DataError, match="cohorts-differ"):
        arms.prepare_arms([arms.Arm("a", synthetic=replace(synthetic, image_size=8))], real)
    with pytest.raises(DataError, match="class-empty"):
        empty = real.with_cases(training=[case for case in real.training if case.label != 2])
        arms.prepare_arms([arms.parse_arm("oversample")], cohorts.validate(empty))
    with pytest.raises(ConfigError, match="ratio-invalid"):
        arms.parse_arm(f"a={tmp_path / 'synthetic'}", synthetic_per_real=0)
    with pytest.raises(ConfigError, match="as_generated"):
        arms.parse_arm(f"a={tmp_path / 'synthetic'}", allocation="equal")
