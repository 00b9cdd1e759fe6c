"""Arms that train by AMST: how they are written, what they train on, what they refuse, and a benchmark with one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medaug.cohort import write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading import arms, benchmark
from medaug.grading.grade import grade
from medaug.grading.recipe import grading_recipe
from medaug.training.amst import Teacher
from medaug.training.amst_recipe import AmstRecipe

QUICK = {"num_steps": 16, "batch_size": 8, "evaluate_every": 8}


def unlabelled_cohort(make_cohort, root, seed=7, **changes):
    """Real images of other patients, all of one class that means nothing."""
    made = make_cohort(root, seed=seed, per_class=6)
    cases = [replace(case, label=0, group=f"other-{case.group}") for case in made.training]
    return write_cohort(
        replace(made.with_cases(training=cases, validation=(), test=()), classes=("unlabelled",), **changes), root
    )


def test_written_forms(tmp_path, make_cohort, make_synthetic):
    synthetic = make_synthetic(make_cohort(tmp_path / "real"), tmp_path / "s:x", [2, 2, 2])
    rest = unlabelled_cohort(make_cohort, tmp_path / "rest")
    folder = tmp_path / "s:x"
    plain = arms.parse_arm(f"dreamda={folder}")
    assert plain.amst is None and plain.synthetic.training == synthetic.training
    amst = arms.parse_arm(f"dreamda+amst={folder}:amst", amst={"quantile": 0.5})
    assert (amst.name, amst.amst, amst.unlabelled) == ("dreamda+amst", AmstRecipe(quantile=0.5), None)
    assert amst.synthetic.training == synthetic.training
    both = arms.parse_arm(f"a={folder}:amst-no_cr:{tmp_path / 'rest'}")
    assert not both.amst.consistency and both.unlabelled.training == rest.training
    semi = arms.parse_arm(f"semi=:amst:{tmp_path / 'rest'}")
    assert semi.synthetic is None and semi.unlabelled.training == rest.training
    with pytest.raises(ConfigError, match="on nothing"):
        arms.parse_arm("a=:amst")
    with pytest.raises(DataError, match="cohort-missing"):
        arms.parse_arm(f"a={folder}:amts")


def test_a_way_of_training_is_part_of_the_row_and_absent_for_other_arms(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    synthetic = make_synthetic(real, tmp_path / "s", [2, 2, 2])
    plain = arms.Arm("a", synthetic=synthetic)
    assert set(plain.content()) == {"name", "policy", "oversample", "extra", "synthetic"}  # rows of earlier benchmarks stay valid
    different = [
        plain,
        replace(plain, amst=AmstRecipe()),
        replace(plain, amst=AmstRecipe(quantile=0.5)),
        replace(plain, amst=AmstRecipe(), unlabelled=unlabelled_cohort(make_cohort, tmp_path / "rest")),
        replace(plain, amst=AmstRecipe(), teacher=Teacher(lambda images: images, sha256="x")),
    ]
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn")}
    names = {benchmark.plan_cells(real, [arm], ["simple_cnn"], [0], recipes)[0].sha256 for arm in different}
    assert len(names) == 5


def test_benchmark_trains_amst_arms_in_as_many_steps_and_resumes(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    make_synthetic(real, tmp_path / "s", [4, 4, 4])
    unlabelled_cohort(make_cohort, tmp_path / "rest")
    folder = tmp_path / "s"
    specs = ["none", f"dreamda={folder}", f"dreamda+amst={folder}:amst:{tmp_path / 'rest'}"]

    def run(rows):
        return grade(
            tmp_path / "real", tmp_path / "out", specs, "simple_cnn", 1, "tiny", overrides=QUICK, amst={"quantile": 0.5},
            num_resamples=50, on_row=rows.append,
        )  # fmt: skip

    rows = []
    result = run(rows)
    by_arm = {row["arm"]: row for row in rows}
    amst, seeds = by_arm["dreamda+amst"], by_arm["dreamda"]
    assert amst["num_training"] == seeds["num_training"] == len(real.training) + 12
    assert amst["num_steps"] == seeds["num_steps"] == amst["history"][-1]["step"] == 16
    (report,) = amst["amst"]["rounds"]
    assert report["scored"] == 12 and amst["num_unlabelled"] == 12 and "amst" not in seeds
    assert report["labelled"] + report["unlabelled"] == len(real.training) + 12 + 12
    assert set(result["verdict"]) == {"dreamda", "dreamda+amst"}
    (tmp_path / "out" / "rows" / f"{amst['sha256']}.json").unlink()
    again = []
    assert run(again) == result and again == rows


def test_semi_supervised_arm_without_synthetic_images(tmp_path, make_cohort):
    make_cohort(tmp_path / "real")
    unlabelled_cohort(make_cohort, tmp_path / "rest")
    specs = ["none", f"semi=:amst:{tmp_path / 'rest'}"]
    result = grade(tmp_path / "real", tmp_path / "out", specs, "simple_cnn", 1, "tiny", overrides=QUICK, num_resamples=50)
    row = result["rows"][1]
    assert row["num_synthetic"] == 0 and row["amst"]["rounds"][0]["unlabelled"] == 12


def test_held_out_images_among_the_unlabelled_are_refused(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    other = unlabelled_cohort(make_cohort, tmp_path / "rest")
    held_out = real.test[0]
    first, *others = other.training
    for stolen in (
        replace(first, group=held_out.group),
        replace(first, source=held_out.source),
    ):
        arm = arms.Arm("a", amst=AmstRecipe(), unlabelled=other.with_cases(training=[stolen, *others]))
        with pytest.raises(LeakageError, match="held-out") as caught:
            arms.prepare_arms([arm], real)
        assert caught.value.exit_code == 4
    leaked = make_synthetic(
        real, tmp_path / "leaked", [1, 1, 1], fit_groups=sorted(real.groups("training") | real.groups("test"))
    )
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        arms.prepare_arms([arms.Arm("a", amst=AmstRecipe(), unlabelled=leaked)], real)
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        arms.prepare_arms([arms.Arm("a", amst=AmstRecipe(), synthetic=leaked)], real)


def test_refusals(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real")
    other = unlabelled_cohort(make_cohort, tmp_path / "rest")
    with pytest.raises(ConfigError, match="only AMST"):
        arms.prepare_arms([arms.Arm("a", unlabelled=other)], real)
    with pytest.raises(DataError, match="no unlabelled image"):
        arms.prepare_arms([arms.Arm("a", amst=AmstRecipe(), unlabelled=other.with_cases(training=()))], real)
    with pytest.raises(DataError, match="cohorts-differ"):
        arms.prepare_arms([arms.Arm("a", amst=AmstRecipe(), unlabelled=replace(other, image_size=8))], real)
