"""Arms that train by AMST: how they are written, what they train on, what they refuse, and a benchmark with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from medaug.cohort import fit_sha256, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading import arms, benchmark, controls
from medaug.grading.grade import grade
from medaug.grading.notes import arm_notes
from medaug.grading.options import GradingOptions
from medaug.grading.recipe import grading_recipe
from medaug.results.page import write_page
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.teacher import Teacher
from medaug.transforms.views import Views

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
    assert arms.parse_arm("weak_view", amst={"views": {"pad": 0.25}}).views == Views(pad=0.25)
    with pytest.raises(ConfigError, match="arm-name"):
        arms.parse_arm(f"weak_view={folder}:amst")
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
        replace(plain, amst=AmstRecipe(), teacher=Teacher(lambda images: images, fit_groups=(), sha256="x")),
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
            tmp_path / "real",
            tmp_path / "out",
            specs,
            GradingOptions("simple_cnn", 1, "tiny", QUICK, amst={"quantile": 0.5}),
            num_resamples=50,
            on_row=rows.append,
        )

    rows = []
    result = run(rows)
    by_arm = {row["arm"]: row for row in rows}
    amst, seeds = by_arm["dreamda+amst"], by_arm["dreamda"]
    assert amst["num_training"] == seeds["num_training"] == len(real.training) + 12
    assert amst["num_steps"] == seeds["num_steps"] == amst["history"][-1]["step"] == 16
    (report,) = amst["amst"]["rounds"]
    assert report["scored"] == 12 and amst["num_unlabelled"] == 12 and "amst" not in seeds
    assert report["labelled"] + report["unlabelled"] == len(real.training) + 12 + 12
    assert list(by_arm) == ["none", "dreamda", "dreamda+amst", "weak_view"]  # AMST brings its control
    assert by_arm["weak_view"]["num_training"] == len(real.training)
    assert seeds["image_passes"] == by_arm["weak_view"]["image_passes"] == 16 * 8 and seeds["forward_passes"] == 0
    stage1 = round(0.3 * 16)
    assert amst["image_passes"] == (2 * stage1 + 2 * (16 - stage1)) * 8
    assert amst["forward_passes"] == 12 + (16 - stage1) * 8
    verdict = result["verdict"]
    assert set(verdict) == {"dreamda", "dreamda+amst", "weak_view"}
    assert [verdict[arm]["against_views"] is None for arm in ("dreamda", "weak_view", "dreamda+amst")] == [True, True, False]
    assert "same weak view" in verdict["dreamda+amst"]["sentence"] and "same weak view" not in verdict["dreamda"]["sentence"]
    assert "same weak view" in (tmp_path / "out" / "report.html").read_text()
    table = (tmp_path / "out" / "table.csv").read_text()
    assert "image_passes" in table and str(amst["image_passes"]) in table
    (tmp_path / "out" / "rows" / f"{amst['sha256']}.json").unlink()
    again = []
    assert run(again) == result
    assert sorted(again, key=lambda row: row["arm"]) == sorted(rows, key=lambda row: row["arm"])  # finished rows are told first


def test_semi_supervised_arm_without_synthetic_images(tmp_path, make_cohort):
    make_cohort(tmp_path / "real")
    unlabelled_cohort(make_cohort, tmp_path / "rest")
    specs = ["none", f"semi=:amst:{tmp_path / 'rest'}"]
    options = GradingOptions("simple_cnn", 1, "tiny", QUICK)
    result = grade(tmp_path / "real", tmp_path / "out", specs, options, num_resamples=50)
    row = result["rows"][1]
    assert row["num_synthetic"] == 0 and row["amst"]["rounds"][0]["unlabelled"] == 12
    write_page(tmp_path / "out", tmp_path / "page")
    assert "What AMST did" not in (tmp_path / "page" / "README.md").read_text()  # there were no images to label


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


def test_the_control_of_amst_sees_its_weak_view_and_nothing_else(tmp_path, make_cohort, make_synthetic, monkeypatch):
    real = make_cohort(tmp_path / "real")
    synthetic = make_synthetic(real, tmp_path / "s", [2, 2, 2])
    views, other = Views(flip=True), Views(pad=0.3)
    wanted = [
        arms.Arm("none"),
        arms.Arm("a", synthetic=synthetic, amst=AmstRecipe(views=views)),
        arms.Arm("b", synthetic=synthetic, amst=AmstRecipe(views=views, quantile=0.5)),
        arms.Arm("c", synthetic=synthetic, amst=AmstRecipe(views=other)),
    ]
    made = controls.with_view_controls(wanted)
    assert [arm.name for arm in made] == ["none", "a", "b", "c", "weak_view", "weak_view-2"]
    assert controls.view_controls(made) == {"a": "weak_view", "b": "weak_view", "c": "weak_view-2"}
    assert controls.with_view_controls(made) == made
    assert [arm.name for arm in arms.prepare_arms(wanted, real)] == [arm.name for arm in made]
    assert controls.with_view_controls(wanted[:1]) == wanted[:1]

    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn", {"num_steps": 1, "batch_size": 4})}
    cells = benchmark.plan_cells(real, [made[4], made[5]], ["simple_cnn"], [0], recipes)
    assert len({cell.sha256 for cell in cells}) == 2
    seen = []
    original = benchmark.fit_classifier

    def spy(network, training, *args, **options):
        x, keys = training.batch(range(4))[0], [("k", place) for place in range(4)]
        seen.append((len(training), torch.equal(options["augment"](x, keys), views.weak(x, keys)), x))
        return original(network, training, *args, **options)

    monkeypatch.setattr(benchmark, "fit_classifier", spy)
    benchmark.run_benchmark(real, [made[4]], ["simple_cnn"], [0], recipes, tmp_path / "out")
    assert [entry[:2] for entry in seen] == [(len(real.training), True)]


def test_amst_takes_no_policy():
    for fields in (
        {"policy": "weak", "amst": AmstRecipe()},
        {"views": Views(), "amst": AmstRecipe()},
        {"policy": "crop_rotate", "views": Views()},
    ):
        with pytest.raises(ConfigError, match="arm-views"):
            arms.Arm("a", **fields)


def test_a_teacher_that_saw_held_out_groups_is_refused_and_a_known_one_is_in_the_row(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    synthetic = make_synthetic(real, tmp_path / "s", [2, 2, 2])
    training = tuple(sorted(real.groups("training")))

    def arm(groups, **options):
        teacher = Teacher(lambda images: torch.full((len(images), 3), 1 / 3), groups, "t", **options)
        return arms.Arm("taught", synthetic=synthetic, amst=AmstRecipe(labels="teacher"), teacher=teacher)

    for groups, code in (
        ((*training, sorted(real.groups("validation"))[0]), "fit-on-held-out"),
        ((sorted(real.groups("test"))[0],), "fit-on-held-out"),
        (None, "fit-unknown"),
        (("elsewhere",), "fit-unknown"),
    ):
        with pytest.raises(LeakageError, match=code):
            arms.check_arm(arm(groups), real)
    arms.check_arm(arm(None, trusted=True), real)
    arms.check_arm(arm(()), real)
    assert any("teacher of arm taught" in note for note in arm_notes(real, [arm(None, trusted=True)]))
    assert arm_notes(real, [arm(training)]) == []
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn", {"num_steps": 4, "batch_size": 4})}
    row = benchmark.run_benchmark(real, [arm(training)], ["simple_cnn"], [0], recipes, tmp_path / "out")[0]
    assert row["teacher"] == {
        "sha256": "t", "fit_groups": list(training), "fit_on": fit_sha256(training), "trusted": False
    }  # fmt: skip


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("role", ["unlabelled", "synthetic"])
def test_a_held_out_image_under_another_name_is_known_by_its_pixels(tmp_path, make_cohort, make_synthetic, split, role):
    """Source, patient and group say nothing, and the file is compressed in another way; the picture is the same."""
    real = make_cohort(tmp_path / "real")
    if role == "unlabelled":
        other = unlabelled_cohort(make_cohort, tmp_path / "rest")
        arm = arms.Arm("a", amst=AmstRecipe(), unlabelled=other)
    else:
        other = make_synthetic(real, tmp_path / "rest", [2, 2, 2])
        arm = arms.Arm("a", synthetic=other)
    arms.prepare_arms([arm], real)
    target = other.path(other.training[0])
    with Image.open(real.path(real.training[0])) as picture:
        picture.save(target, compress_level=1)
    arms.prepare_arms([arm], real)  # a training image is no leak
    with Image.open(real.path(real.split(split)[0])) as picture:
        picture.save(target, compress_level=0)
    assert target.read_bytes() != real.path(real.split(split)[0]).read_bytes()
    with pytest.raises(LeakageError, match="pixels-held-out") as caught:
        arms.prepare_arms([arm], real)
    assert caught.value.exit_code == 4


def test_unlabelled_images_that_are_the_synthetic_ones_count_once(tmp_path, make_cohort, make_synthetic):
    real = make_cohort(tmp_path / "real")
    synthetic = make_synthetic(real, tmp_path / "s", [2, 2, 2])
    arm = arms.Arm("a", synthetic=synthetic, amst=AmstRecipe(quantile=0.5), unlabelled=synthetic)
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn", {"num_steps": 6, "batch_size": 4})}
    row = benchmark.run_benchmark(real, [arm], ["simple_cnn"], [0], recipes, tmp_path / "out")[0]
    assert row["num_unlabelled"] == 0 and row["amst"]["unlabelled_repeated"] == 6
    (report,) = row["amst"]["rounds"]
    assert report["labelled"] + report["unlabelled"] == len(real.training) + 6
    assert any(note.startswith("amst-unlabelled-repeated") for note in row["amst"]["notes"])
