"""Arms at several ratios and fractions: names, controls, the choice on validation, and rows shared with single runs."""

from __future__ import annotations

import pytest

from medaug.errors import ConfigError
from medaug.grading.arms import Arm, Variant, parse_arm, prepare_arms
from medaug.grading.benchmark import plan_cells
from medaug.grading.recipe import grading_recipe
from medaug.grading.variants import amounts, at_verdict, check_choosable, choose, opponents_of, spread_arms
from medaug.grading.verdict import Opponents

RATIOS = [0.5, 1.0]


def test_scores_that_differ_in_the_last_bit_are_equal_and_the_smaller_ratio_is_taken():
    arms = [variant("a", 0.5), variant("a", 5)]
    scores = {"a@0.5": (0.5, 0.55, 0.6), "a@5": (0.5, 0.6, 0.55)}
    rows = [row(arm, score, seed=seed) for arm, values in scores.items() for seed, score in enumerate(values)]
    (choice,) = choose(arms, rows, "m")
    assert choice.per_real == 0.5


def test_a_choice_without_validation_does_not_say_that_it_was_made_there():
    (choice,) = choose([variant("a", 0.5), variant("a", 5)], [row("a@0.5", None), row("a@5", None)], "m")
    assert choice.per_real == 0.5 and "Nothing is known on validation" in choice.sentence()


def variant(base, ratio=None, fraction=None):
    name = base + (f"@{ratio:g}" if ratio else "") + (f"@real{fraction:g}" if fraction else "")
    return Arm(name, variant=Variant(base, ratio, fraction))


def row(arm, validation, test=0.0, network="n", seed=0):
    return {
        "arm": arm, "network": network, "seed": seed,
        "validation": {"metrics": {"m": validation}}, "test": {"metrics": {"m": test}},
    }  # fmt: skip


@pytest.fixture
def world(tmp_path, make_cohort, make_synthetic):
    """A real cohort of 24 training images and a reader of arms: none, the control, a classic one, and synthetic ones."""
    real = make_cohort(tmp_path / "real", cases_per_group=1)
    make_synthetic(real, tmp_path / "s", [12, 12, 12])
    texts = ["none", "crop_rotate", "oversample", f"a={tmp_path / 's'}", f"b={tmp_path / 's'}?per_real=0.25"]

    def read(ratio, fraction):
        return [parse_arm(text, synthetic_per_real=ratio, real_fraction=fraction) for text in texts]

    return real, read


def test_only_arms_that_depend_on_the_ratio_have_one_variant_each(world):
    real, read = world
    arms = spread_arms(read, RATIOS, [1.0], real)
    assert [arm.name for arm in arms] == [
        "none",
        "crop_rotate",
        "oversample@0.5",
        "oversample@1",
        "a@0.5",
        "a@1",
        "b",
        "oversample-b",
    ]
    counts = {arm.name: sum(arm.extra or ()) for arm in prepare_arms(arms, real)}
    assert counts["a@0.5"] == counts["oversample@0.5"] == len(real.training) / 2
    assert counts["a@1"] == counts["oversample@1"] == len(real.training)
    assert [arm.base for arm in arms[2:6]] == ["oversample", "oversample", "a", "a"]


def test_fractions_name_every_arm_and_the_control_keeps_the_count_of_its_point(world):
    real, read = world
    arms = spread_arms(read, RATIOS, [0.5, 1.0], real)
    names = [arm.name for arm in arms]
    assert names[:2] == ["none@real0.5", "none@real1"]
    assert names[4:8] == ["oversample@0.5@real0.5", "oversample@1@real0.5", "oversample@0.5@real1", "oversample@1@real1"]
    prepared = {arm.name: arm for arm in prepare_arms(arms, real)}
    for point in ("0.5@real0.5", "1@real0.5", "0.5@real1", "1@real1"):
        assert prepared[f"oversample@{point}"].extra == prepared[f"a@{point}"].extra
    opponents = opponents_of(arms)
    assert opponents["a@1@real0.5"] == Opponents("none@real0.5", "oversample@1@real0.5")
    assert opponents["oversample@1@real0.5"] == Opponents("none@real0.5")
    assert opponents["crop_rotate@real1"] == Opponents("none@real1", "oversample@1@real1")  # of no ratio: the largest control
    assert "none@real1" not in opponents


def test_one_value_gives_the_rows_of_before_and_several_values_find_them(world):
    real, read = world
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn")}

    def names(arms):
        return {cell.arm.name: cell.sha256 for cell in plan_cells(real, arms, ["simple_cnn"], [0], recipes)}

    one = spread_arms(read, [0.5], [1.0], real)
    assert one[:-1] == read(0.5, 1.0) and one[-1].name == "oversample-b"  # as they were read, without a variant
    assert one[0].content() == {"name": "none", "policy": "none", "oversample": False, "extra": [], "synthetic": None}
    alone, several = names(one), names(spread_arms(read, RATIOS, [0.5, 1.0], real))
    found = {"none": "none@real1", "oversample": "oversample@0.5@real1", "a": "a@0.5@real1", "crop_rotate": "crop_rotate@real1"}
    assert {name: alone[name] for name in found} == {name: several[where] for name, where in found.items()}
    assert len(set(several.values())) == len(several)
    assert prepare_arms(prepare_arms(one, real), real) == prepare_arms(one, real)


def test_the_choice_follows_validation_and_not_the_test(world):
    arms = [variant("a", 0.5), variant("a", 1), variant("a", 2.5), Arm("none")]
    rows = [row("a@0.5", 0.7, test=0.9), row("a@1", 0.8, test=0.1), row("a@2.5", 0.6, test=0.99), row("none", 0.9)]
    (choice,) = choose(arms, rows, "m")
    assert (choice.base, choice.arm, choice.per_real, dict(choice.scores)) == ("a", "a@1", 1, {0.5: 0.7, 1: 0.8, 2.5: 0.6})
    assert "ratio 1 was chosen on validation among 0.5, 1, 2.5" in choice.sentence()
    assert choice.facts()["scores"] == {"0.5": 0.7, "1": 0.8, "2.5": 0.6}
    for one in rows:
        del one["test"]  # the choice does not even look
    assert choose(arms, rows, "m") == [choice]


def test_the_choice_is_the_mean_over_networks_and_seeds_and_the_smaller_of_equals():
    arms = [variant("a", 1), variant("a", 2)]
    rows = [row("a@1", 0.4, network="n"), row("a@1", 0.6, network="k"), row("a@2", 0.1, seed=0), row("a@2", 0.95, seed=1)]
    assert choose(arms, rows, "m")[0].arm == "a@2"  # 0.525 against 0.5
    rows[-1] = row("a@2", 0.9, seed=1)
    assert choose(arms, rows, "m")[0].arm == "a@1"
    assert choose(arms, [row("a@1", None), row("a@2", 0.1)], "m")[0].arm == "a@2"
    assert choose(arms, [row("a@1", None), row("a@2", None)], "m")[0].arm == "a@1"


def test_each_fraction_has_a_choice_and_the_verdict_is_at_the_largest():
    arms = [variant(base, ratio, part) for base in ("a", "b") for part in (0.5, 1) for ratio in (1, 2)]
    arms = [variant("none", None, 0.5), variant("none", None, 1), *arms, Arm("orig50")]
    best = {"a@1@real0.5", "a@2@real1", "b@2@real0.5", "b@1@real1"}
    choices = choose(arms, [row(arm.name, 0.9 if arm.name in best else 0.5) for arm in arms], "m")
    assert {choice.arm for choice in choices} == best
    assert [arm.name for arm in at_verdict(arms, choices)] == ["none@real1", "a@2@real1", "b@1@real1", "orig50"]


def test_refusals(world):
    real, read = world
    assert amounts(None, "x") == [] and amounts([2, 0.5], "x") == [0.5, 2.0] and amounts(1, "x") == [1.0]
    for wrong in ([1, 1.0], []):
        with pytest.raises(ConfigError, match="amounts-invalid"):
            amounts(wrong, "--per-real")
    with pytest.raises(ConfigError, match="ratio-invalid"):
        spread_arms(read, [-1, 1], [1.0], real)
    with pytest.raises(ConfigError, match="fraction-invalid"):
        spread_arms(read, [], [0.5, 1.5], real)
    arms = spread_arms(read, RATIOS, [1.0], real)
    check_choosable(arms, real)
    with pytest.raises(ConfigError, match="ratio-choice"):
        check_choosable(arms, real.with_cases(validation=()))
    check_choosable(read(1.0, 1.0), real.with_cases(validation=()))
