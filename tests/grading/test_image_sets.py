"""Images of its own for every seed: the same rows as alone, controls seed by seed, refusals, and what the verdict says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from medaug.cohort import write_cohort
from medaug.errors import DataError, LeakageError
from medaug.grading import arms
from medaug.grading.benchmark import plan_cells
from medaug.grading.command import grade_command
from medaug.grading.grade import grade
from medaug.grading.image_sets import at_place, image_sets, join_sets, own_seeds
from medaug.grading.notes import arm_notes
from medaug.grading.options import GradingOptions
from medaug.grading.recipe import grading_recipe
from medaug.grading.record import acceptance_of, read_record
from medaug.grading.variants import spread_arms
from medaug.results.page import write_page

SEEDS = [0, 1, 2]


@pytest.fixture
def world(tmp_path, make_cohort, make_synthetic):
    """A real cohort, and 0/, 1/, 2/ with images of three generators each for two arms."""
    real = make_cohort(tmp_path / "real", per_class=20)
    for seed in SEEDS:
        for name, per_class in (("even", [9 + seed] * 3), ("other", [9, 9, 9 - 4 * seed])):
            made = make_synthetic(real, tmp_path / str(seed) / name, per_class, name=f"{name}{seed}")
            made = made.with_cases(training=[_made_with(case, f"{name}{seed}") for case in made.training])
            write_cohort(made, tmp_path / str(seed) / name)
    return real, tmp_path


def _made_with(case, weights):
    return replace(case, lineage={**case.lineage, "weights_sha256": weights})


def read(root, *specs, seeds=SEEDS, **options):
    """Arms as `grade` reads them."""
    texts = [spec if spec in ("none", "oversample") else f"{spec}={root}/{{seed}}/{spec}" for spec in specs]
    own = own_seeds(texts, seeds)
    return join_sets(lambda seed: [arms.parse_arm(at_place(text, seed), **options) for text in texts], own)


def names_of(cells, seed):
    return [(cell.arm.name, cell.sha256) for cell in cells if cell.seed == seed]


@pytest.mark.parametrize("options", [{}, {"synthetic_per_real": 0.4}, {"allocation": "balance", "synthetic_per_real": 0.4}])
def test_every_row_is_that_of_a_comparison_of_its_seed_alone(world, options):
    real, root = world
    recipes = {"simple_cnn": grading_recipe("tiny", "simple_cnn")}
    together = plan_cells(real, read(root, "none", "oversample", "even", **options), ["simple_cnn"], SEEDS, recipes)
    for seed in SEEDS:
        alone = [arms.parse_arm("none"), arms.parse_arm("oversample"), arms.parse_arm(f"even={root}/{seed}/even", **options)]
        assert names_of(together, seed) == names_of(plan_cells(real, alone, ["simple_cnn"], [seed], recipes), seed)
    assert len({cell.sha256 for cell in together}) == len(together)


def test_without_the_placeholder_nothing_is_read_twice(world):
    real, root = world
    asked = []

    def once(seed):
        asked.append(seed)
        return [arms.parse_arm("none"), arms.parse_arm(f"even={root}/0/even")]

    joined = join_sets(once, own_seeds([f"even={root}/0/even"], SEEDS))
    assert asked == [0] and image_sets(joined) == {} and own_seeds([], []) == [0]


def test_the_control_repeats_as_many_images_as_the_seed_has(world):
    real, root = world
    prepared = arms.prepare_arms(read(root, "none", "oversample", "even"), real)
    for seed in SEEDS:
        control, even = (arms.build_training_set(arm, real, seed) for arm in prepared[1:])
        assert len(even) - len(real.training) == 3 * (9 + seed) == len(control) - len(real.training)
        assert {case.id[:5] for _, case in even if case.is_synthetic} == {f"even{seed}"}


def test_an_arm_that_leaves_the_control_at_one_seed_has_a_control_of_its_own(world):
    real, root = world
    spread = spread_arms(lambda ratio, part: read(root, "none", "oversample", "even", "other"), [], [1.0], real)
    assert [arm.name for arm in spread[4:]] == ["oversample-other"]  # alike at the seed 0 alone
    own = arms.prepare_arms(spread, real)[4]
    assert [len(arms.build_training_set(own, real, seed)) - len(real.training) for seed in SEEDS] == [27, 23, 19]


def test_variants_by_ratio_keep_their_sets(world):
    real, root = world
    spread = spread_arms(lambda ratio, part: read(root, "none", "even", synthetic_per_real=ratio), [0.1, 0.4], [1.0], real)
    assert [arm.name for arm in spread] == ["none", "even@0.1", "even@0.4"] and image_sets(spread) == {"even": 3}
    few, many = (
        {case.id for _, case in arms.build_training_set(arm, real, 2) if case.is_synthetic}
        for arm in arms.prepare_arms(spread, real)[1:]
    )
    assert few < many and all(name.startswith("even2") for name in many)


def test_one_set_under_two_seeds_is_refused(world):
    real, root = world
    arm = read(root, "even")[0]
    same = replace(arm, by_seed={**arm.by_seed, 2: arm.by_seed[1]})
    with pytest.raises(DataError, match=r"seeds 1 and 2") as caught:
        arms.check_arm(same, real)
    assert caught.value.code == "sets-alike"


def test_every_set_is_checked_not_only_the_first(world, make_synthetic):
    real, root = world
    leaking = make_synthetic(real, root / "leak", [3, 3, 3], name="leak", fit_groups=sorted(real.groups("test")))
    arm = read(root, "even")[0]
    spoiled = replace(arm, by_seed={**arm.by_seed, 2: replace(arm.by_seed[2], synthetic=leaking)})
    with pytest.raises(LeakageError):
        arms.prepare_arms([arms.parse_arm("none"), spoiled], real)


def test_a_missing_set_is_named(world):
    real, root = world
    with pytest.raises(DataError, match="For seed 3: even is not a cohort"):
        read(root, "even", seeds=[0, 3])


def test_seeds_that_share_a_generator_are_said_to(world):
    real, root = world
    arm = read(root, "even")[0]
    assert not any("generator" in note for note in arm_notes(real, [arm]))
    cohorts = {seed: one.synthetic for seed, one in arm.by_seed.items()}
    drawn_again = cohorts[1].with_cases(training=[_made_with(case, "even0") for case in cohorts[1].training])
    shared = replace(arm, by_seed={**arm.by_seed, 1: replace(arm.by_seed[1], synthetic=drawn_again)})
    assert any(note.startswith("Seeds of arm even have images of one generator") for note in arm_notes(real, [shared]))


def test_acceptance_is_of_all_sets_together(world):
    real, root = world
    for seed in SEEDS:
        counts = [{"name": name, "generated": 10 + seed, "accepted": 5} for name in real.classes]
        content = {"cohort_sha256": real.content_sha256, "acceptance": counts}
        (root / str(seed) / "even" / "gate.json").write_text(json.dumps(content))
    rows = acceptance_of(read(root, "even"), real)["even"]["synthetic"]
    assert rows == [{"name": name, "generated": 33, "accepted": 15} for name in real.classes]


def test_verdict_record_and_page_say_which_luck_is_covered(world):
    real, root = world
    specs = ["none", "oversample", f"even={root}/{{seed}}/even", f"other={root}/0/other"]
    quick = {"num_steps": 3, "evaluate_every": 1, "batch_size": 8}
    result = grade(
        root / "real", root / "bench", specs, GradingOptions("simple_cnn", 3, "tiny", quick), num_resamples=50, workers=1
    )
    assert result["verdict"]["even"]["image_sets"] == 3 and "image_sets" not in result["verdict"]["other"]
    assert "Each of 3 seeds trained on images of its own" in result["verdict"]["even"]["sentence"]
    assert read_record(root / "bench").image_sets == {"even": 3}
    write_page(root / "bench", root / "page")
    text = (root / "page" / "README.md").read_text()
    assert "One set of images for the arm(s) other" in text and "One set of images for each synthetic arm" not in text
    write_page(root / "page", root / "again")
    assert (root / "again" / "README.md").read_bytes() == (root / "page" / "README.md").read_bytes()
    assert (root / "again" / "rows.json").read_bytes() == (root / "page" / "rows.json").read_bytes()


def test_sources_of_mixed_arms_have_sets_too(world):
    real, root = world
    specs = ["none", "mixed=real?fraction=0.5 + syn?per_real=0.5"]
    quick = {"num_steps": 2, "evaluate_every": 1, "batch_size": 8}
    options = GradingOptions("simple_cnn", 3, "tiny", quick, sources=[f"syn={root}/{{seed}}/even"])
    result = grade(root / "real", root / "bench", specs, options, num_resamples=20, workers=1)
    assert result["verdict"]["mixed"]["image_sets"] == 3


def test_no_claim_where_seeds_share_images_or_makers_are_unknown(world, make_synthetic):
    real, root = world
    unknown = {seed: make_synthetic(real, root / f"u{seed}", [3, 3, 3], name=f"u{seed}") for seed in (0, 1)}
    shared = arms.parse_arm(f"mix={root}/0/even + {root}/0/other")
    mixed = replace(shared, by_seed={0: shared, 1: arms.parse_arm(f"mix={root}/1/even + {root}/0/other")})
    made = read(root, "even")[0]
    imported = replace(made, by_seed={seed: replace(made, synthetic=cohort, by_seed={}) for seed, cohort in unknown.items()})
    assert [len(arms.build_training_set(arm, real, 1)) for arm in arms.prepare_arms([mixed], real)]  # it is graded all the same
    for arm, reason in ((mixed, "share some of their images"), (imported, "Nothing shows that the images for the seeds")):
        assert image_sets([arm]) == {} and any(reason in note for note in arm_notes(real, [arm]))
    assert image_sets([made]) == {"even": 3}
    assert len(acceptance_of([mixed], real).get("mix", {})) == 0 and len(mixed.all_added()) == 3


def test_folders_that_are_all_alike_are_refused(world):
    _, root = world
    with pytest.raises(DataError, match="sets-alike"):
        join_sets(lambda seed: [arms.parse_arm("none"), arms.parse_arm(f"even={root}/0/even")], SEEDS)


def test_the_shown_command_keeps_the_placeholder(world):
    _, root = world
    arms_of = ["none", f"even={root}/{{seed}}/even", f"taught={root}/{{seed}}/even:amst:{root}/{{seed}}/more"]
    text = grade_command(arms_of, GradingOptions("simple_cnn", 3, "tiny", sources=[f"syn={root}/{{seed}}/even"]))
    assert "even=$EVEN/{seed}" in text and "syn=$SYN/{seed}" in text and "$TAUGHT/{seed}:amst:$TAUGHT_UNLABELLED/{seed}" in text
    assert str(root) not in text
