"""Options of grading: networks that fail, ordinal heads, checkpoints, classic arms."""

from __future__ import annotations

import pytest

from medaug.cli.options import amounts, named
from medaug.errors import ConfigError
from medaug.grading.arms import Arm, parse_arm
from medaug.grading.benchmark import plan_cells
from medaug.grading.grade import grade
from medaug.grading.options import GradingOptions
from medaug.grading.recipe import GRADING_PROFILES, grading_recipe
from medaug.networks.grading import build_network
from medaug.networks.weights import save_weights
from medaug.training.amst_recipe import amst_recipe

QUICK = {"num_steps": 3, "evaluate_every": 3}


def run(folder, networks, arms=("none",), recipe=None, pretrained=None):
    return grade(
        folder / "real",
        folder / "out",
        arms,
        GradingOptions(networks, 1, "tiny", overrides=QUICK | (recipe or {}), pretrained=pretrained),
        num_resamples=20,
    )


def test_a_network_that_cannot_take_the_size_is_named_and_the_rest_goes_on(tmp_path, make_cohort):
    make_cohort(tmp_path / "real")
    result = run(tmp_path, ["simple_cnn", "inception_v4"], ["none", "cutmix"])
    assert {row["network"] for row in result["rows"]} == {"simple_cnn"}
    assert [(row["arm"], row["network"], row["code"]) for row in result["failed"]] == [
        ("none", "inception_v4", "network-image-size"),
        ("cutmix", "inception_v4", "network-image-size"),
    ]
    assert any("inception_v4 is left out" in warning for warning in result["verdict"]["cutmix"]["warnings"])
    with pytest.raises(ConfigError, match="cannot take images of 16 px"):
        run(tmp_path, ["inception_v4"])


def test_a_training_that_fails_everywhere_is_an_error_with_its_reason(tmp_path, make_cohort):
    make_cohort(tmp_path / "real")
    with pytest.raises(ConfigError, match=r"nothing-graded.*lower learning_rate"):
        run(tmp_path, ["simple_cnn"], recipe={"learning_rate": 1e36})
    assert not list(tmp_path.glob("out/rows/*"))


def test_head_and_checkpoint_reach_the_network_and_the_name_of_the_row(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "real", ordinal=True)
    save_weights(tmp_path / "w.safetensors", build_network("simple_cnn", 3, 1, 16))
    result = run(
        tmp_path,
        ["simple_cnn"],
        ["none", "randaugment"],
        recipe={"head": "coral"},
        pretrained={"simple_cnn": tmp_path / "w.safetensors"},
    )
    assert len(result["rows"]) == 2 and not result["failed"]
    assert any("come from a file" in warning for warning in result["verdict"]["randaugment"]["warnings"])
    recipes = {head: {"simple_cnn": grading_recipe("tiny", "simple_cnn", QUICK | {"head": head})} for head in ("linear", "coral")}
    weights = {"simple_cnn": tmp_path / "w.safetensors"}
    names = {
        plan_cells(cohort, [Arm("none")], ["simple_cnn"], [0], recipe, given)[0].sha256
        for recipe in recipes.values()
        for given in (None, weights)
    }
    assert len(names) == 4


def test_every_arm_of_a_network_has_the_same_steps(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "real")
    arms = [parse_arm(name) for name in ("none", "crop_rotate", "randaugment", "cutmix", "random_erasing", "oversample")]
    recipe = {"simple_cnn": grading_recipe("tiny", "simple_cnn")}
    cells = plan_cells(cohort, arms, ["simple_cnn"], [0], recipe)
    assert {cell.recipe.num_steps for cell in cells} == {recipe["simple_cnn"].num_steps}
    assert [cell.recipe.policy for cell in cells] == ["none", "crop_rotate", "randaugment", "cutmix", "random_erasing", "none"]


@pytest.mark.parametrize("profile", sorted(set(GRADING_PROFILES) - {"tiny", "quickstart"}))
def test_transformers_have_a_recipe_of_their_own(profile):
    for network in ("vit_small_patch16_224", "swin_tiny_patch4_window7_224"):
        assert grading_recipe(profile, network).learning_rate == 3e-4
        assert grading_recipe(profile, network).weight_decay == 0.05
        assert grading_recipe(profile, network).num_steps >= grading_recipe(profile, "resnet50").num_steps


def test_refusals(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    with pytest.raises(ConfigError, match="pretrained-unused"):
        run(tmp_path, ["simple_cnn"], pretrained={"resnet18": tmp_path / "w.safetensors"})
    with pytest.raises(ConfigError, match="weights-missing"):
        run(tmp_path, ["simple_cnn"], pretrained={"simple_cnn": tmp_path / "w.safetensors"})
    for wrong in (["resnet18"], ["resnet18=a", "resnet18=b"], ["=a"], ["resnet18="]):
        with pytest.raises(ConfigError, match="option-malformed"):
            named(wrong, "--pretrained")
    assert named(["resnet18=a=b/c.safetensors"], "--pretrained") == {"resnet18": "a=b/c.safetensors"}
    for wrong in ("", "half", "0.5,", "0.5 1"):
        with pytest.raises(ConfigError, match="option-malformed"):
            amounts(wrong, "--per-real")
    assert amounts("2.5", "--per-real") == [2.5] and amounts("0.5, 1,2.5", "--per-real") == [0.5, 1, 2.5]
    made = make_synthetic(real, tmp_path / "made", [2, 2, 2])
    recipe = {"simple_cnn": grading_recipe("tiny", "simple_cnn", {"head": "coral"})}
    with pytest.raises(ConfigError, match="head-amst"):
        plan_cells(real, [Arm("x", synthetic=made, amst=amst_recipe("amst"))], ["simple_cnn"], [0], recipe)
    with pytest.raises(ConfigError, match="head must be one of linear, coral"):
        grading_recipe("tiny", "simple_cnn", {"head": "corn"})


def test_results_never_go_into_a_cohort(tmp_path, make_cohort):
    make_cohort(tmp_path / "real")
    before = {path.name for path in (tmp_path / "real").iterdir()}
    with pytest.raises(ConfigError, match="out-is-input"):
        grade(tmp_path / "real", tmp_path / "real", ["none"], GradingOptions("simple_cnn", 1, "tiny"))
    assert {path.name for path in (tmp_path / "real").iterdir()} == before
