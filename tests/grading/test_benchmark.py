"""The benchmark end to end on drawn discs: planted effects, resuming, refusals, the report."""

import csv
import json
from dataclasses import replace

import pytest

from medaug.cohort import read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading import benchmark
from medaug.grading.arms import Arm, check_arm
from medaug.grading.grade import grade
from medaug.grading.notes import arm_notes
from medaug.grading.options import GradingOptions
from medaug.grading.recipe import GRADING_PROFILES, grading_recipe

QUICK = {"num_steps": 40, "batch_size": 16, "evaluate_every": 20, "learning_rate": 5e-3}


@pytest.fixture
def planted(tmp_path, make_cohort, make_synthetic):
    """Few real images per class, right and wrong synthetic ones."""
    real = make_cohort(tmp_path / "real", per_class=40, cases_per_group=1)
    few = real.with_cases(training=[case for case in real.training if int(case.id[-4:]) < 10])
    real = write_cohort(few, tmp_path / "real")
    make_synthetic(real, tmp_path / "right", [30, 30, 30], name="r")
    make_synthetic(real, tmp_path / "wrong", [30, 30, 30], shift=1, name="w")
    return tmp_path


def test_planted_effects_resume_and_report(planted):
    arms = ["none", "oversample", f"right={planted / 'right'}", f"wrong={planted / 'wrong'}"]
    seen = []

    def run():
        seen.clear()
        return grade(
            planted / "real",
            planted / "out",
            arms,
            GradingOptions("simple_cnn", 3, "tiny", QUICK),
            num_resamples=500,
            on_row=seen.append,
            command="medaug grade",
        )

    result = run()
    assert [(row["arm"], row["seed"]) for row in result["rows"]] == [
        (arm.split("=")[0], seed) for arm in arms for seed in range(3)
    ]
    assert result["verdict"]["wrong"]["verdict"] == "harms"
    assert result["verdict"]["right"]["verdict"] != "harms"
    assert result["verdict"]["right"]["against_none"]["difference"] > -0.05
    assert result["verdict"]["wrong"]["against_none"]["high"] < 0
    assert {row["num_training"] for row in result["rows"]} == {30, 120}
    assert [row["ratio"] for row in result["rows"]] == [0] * 6 + [3] * 6
    _check_rows(planted, seen)
    _check_report(planted / "out", result)
    _check_resume(planted / "out", run, result)


def _check_rows(folder, rows):
    """The same test cases everywhere, and metrics that follow from the stored probabilities."""
    cohort = read_cohort(folder / "real")
    for row in rows:
        assert row["test"]["ids"] == [case.id for case in cohort.test]
        preds = [probs.index(max(probs)) for probs in row["test"]["probs"]]
        hits = [preds[index] == case.label for index, case in enumerate(cohort.test)]
        assert row["test"]["metrics"]["accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert row["key"]["recipe"]["num_steps"] == QUICK["num_steps"]


def _check_report(out, result):
    assert json.loads((out / "verdict.json").read_text()) == result["verdict"]
    assert len(list(csv.DictReader((out / "rows.csv").open()))) == 12
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [line["arm"] for line in table] == ["none", "oversample", "right", "wrong"]
    assert "| wrong | simple_cnn |" in (out / "table.md").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert (
        "harms" in page
        and "medaug grade" in page
        and "data:image/png;base64" in page
        and "24 real test images of 24 groups" in page
    )
    area = json.loads((out / "verdict.json").read_text())["wrong"]["ranking"]
    none, network = area["against_none"], area["per_network"]["simple_cnn"]
    assert f"Area under the ROC curve {none['score_a']:.3f} against {none['score_b']:.3f}: {none['difference']:+.3f} (" in page
    assert f"by network simple_cnn {network['difference']:+.3f}" in page
    assert "<script" not in page and "http" not in page


def _check_resume(out, run, result):
    """Nothing is trained again but the row that is gone, and it comes back as it was."""
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "rows").iterdir()}
    gone = sorted(files)[3]
    gone.unlink()
    assert run() == result
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "rows").iterdir()}
    assert after.keys() == files.keys()
    assert [path for path in files if after[path][1] != files[path][1]] == [gone]
    assert after[gone][0] == files[gone][0]


def test_an_arm_that_saw_a_test_group_stops_before_training(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    make_synthetic(real, tmp_path / "leaked", [1, 1, 1], fit_groups=sorted(real.groups("training") | real.groups("test")))
    with pytest.raises(LeakageError, match="fit-on-held-out") as caught:
        grade(tmp_path / "real", tmp_path / "out", ["none", f"x={tmp_path / 'leaked'}"], GradingOptions("simple_cnn", 1, "tiny"))
    assert caught.value.exit_code == 4
    assert not list(tmp_path.glob("out/rows/*"))


def test_a_changed_image_recipe_or_seed_is_another_row(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "real")
    other = make_cohort(tmp_path / "other", seed=1)
    arm = benchmark.Arm("none")

    def name(cohort=cohort, seed=0, network="simple_cnn", **overrides):
        recipe = grading_recipe("tiny", network, overrides)
        return benchmark.plan_cells(cohort, [arm], [network], [seed], {network: recipe})[0].sha256

    assert name() == name()
    assert len({name(), name(other), name(seed=1), name(network="resnet18"), name(num_steps=31)}) == 5


def test_ordinal_cohort_is_judged_by_kappa_and_the_leak_is_repeated(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "real", ordinal=True)
    leak = {"accuracy": 0.9, "balanced_accuracy": 0.9, "chance": 0.33, "n": 9, "warning": "Patients <cross> the split."}
    write_cohort(replace(cohort, notes={"leak": leak}), tmp_path / "real")
    result = grade(
        tmp_path / "real",
        tmp_path / "out",
        ["none", "crop_rotate"],
        GradingOptions(["simple_cnn"], [5], "tiny", {"num_steps": 4}),
        num_resamples=50,
    )
    assert result["verdict"]["crop_rotate"]["metric"] == "quadratic_kappa"
    assert result["verdict"]["crop_rotate"]["warnings"][0] == leak["warning"]
    assert "Patients &lt;cross&gt; the split." in (tmp_path / "out" / "report.html").read_text()
    assert result["rows"][0]["validation"]["quadratic_kappa"] is not None


def test_refusals(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "real")
    common = (tmp_path / "real", tmp_path / "out")
    with pytest.raises(ConfigError, match="--arm none"):
        grade(*common, ["oversample"], GradingOptions("simple_cnn", 1, "tiny"))
    with pytest.raises(ConfigError, match="network-unknown"):
        grade(*common, ["none"], GradingOptions("simple_cmm", 1, "tiny"))
    with pytest.raises(ConfigError, match="tiny, quickstart"):
        grade(*common, ["none"], GradingOptions("simple_cnn", 1, "huge"))
    with pytest.raises(ConfigError, match="recipe-unknown-key"):
        grade(*common, ["none"], GradingOptions("simple_cnn", 1, "tiny", {"epochs": 3}))
    with pytest.raises(ConfigError, match="cells-invalid"):
        grade(*common, ["none"], GradingOptions("simple_cnn", 0, "tiny"))
    with pytest.raises(DataError, match="split-empty"):
        benchmark.plan_cells(cohort.with_cases(test=()), [benchmark.Arm("none")], ["a"], [0], {"a": grading_recipe("tiny", "a")})


@pytest.mark.parametrize("profile", GRADING_PROFILES)
def test_every_profile_gives_a_recipe(profile):
    for network in ("simple_cnn", "resnet18", "vit_small_patch16_224"):
        recipe = grading_recipe(profile, network)
        assert recipe.num_steps >= recipe.evaluate_every >= 1


def test_precision_reaches_every_network_that_gains_from_it():
    for profile in GRADING_PROFILES:
        assert grading_recipe(profile, "resnet18").precision == "float32"
        assert grading_recipe(profile, "resnet18", {"precision": "bfloat16"}).precision == "bfloat16"
        assert grading_recipe(profile, "mobilenetv2_100", {"precision": "bfloat16"}).precision == "float32"


def test_images_of_unknown_origin_need_a_word_and_carry_a_warning(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    made = make_synthetic(real, tmp_path / "made", [2, 2, 2])
    strangers = [replace(case, lineage={"intended_label": case.label}, group=f"foreign-{case.id}") for case in made.training]
    foreign = replace(made.with_cases(training=strangers), fit_on={})
    with pytest.raises(LeakageError, match="fit-unknown"):
        check_arm(Arm("x", synthetic=foreign), real)
    trusting = Arm("x", synthetic=foreign, allow_untrusted=True)
    check_arm(trusting, real)
    assert "6 image(s) of arm x" in arm_notes(real, [trusting])[0]
    assert arm_notes(real, [Arm("x", synthetic=made)]) == []


def test_processes_are_started_for_long_comparisons_alone():
    cores = len(benchmark.usable_cores())
    assert [benchmark.chosen_workers(steps) for steps in (0, benchmark.WORTH_PROCESSES - 1, benchmark.WORTH_PROCESSES)] == [
        1,
        1,
        cores,
    ]
    assert benchmark.chosen_workers(10**6, "cuda") == 1
