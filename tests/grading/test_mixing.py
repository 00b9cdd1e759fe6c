"""Exact counts per class and source for every cell, nesting, who shares the half, no held-out image, and every refusal."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.cohort import Case, read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading import arms, benchmark, mixing
from medaug.grading.arm_terms import term_names
from medaug.grading.classic_copies import make_copies
from medaug.grading.presets import PRESETS, check_presets, named_sources
from medaug.grading.recipe import grading_recipe
from medaug.io.raster import read_unit_png


def world(folder, make_cohort, make_synthetic, num_classes, cases_per_group=1):
    """A real cohort with unequal classes (4, 5, 6, 7 training images), two synthetic sets and the copies."""
    real = make_cohort(folder / "real", num_classes=num_classes, per_class=15, cases_per_group=cases_per_group)
    taken = Counter()
    kept = []
    for case in real.training:
        taken[case.label] += 1
        if taken[case.label] <= 4 + case.label:
            kept.append(case)
    real = real.with_cases(training=kept)
    real = write_cohort(real, folder / "real")
    for name in ("syn1", "syn2"):
        make_synthetic(real, folder / name, [9] * num_classes, name=name)
    given = [f"syn1={folder / 'syn1'}", f"syn2={folder / 'syn2'}"]
    return real, named_sources(given, list(PRESETS), real, folder / "copies")


@pytest.mark.parametrize("num_classes", [2, 4])
def test_every_cell_has_exact_counts_per_class_and_source(tmp_path, make_cohort, make_synthetic, num_classes):
    real, named = world(tmp_path, make_cohort, make_synthetic, num_classes)
    full = [4, 5, 6, 7][:num_classes]
    half, rest = [2, 2, 3, 3][:num_classes], [2, 3, 3, 4][:num_classes]  # halves down
    wanted = {
        "orig100": {"real": full},
        "orig+syn1": {"real": full, "syn1": full},
        "orig+syn2": {"real": full, "syn2": full},
        "orig+syn1+syn2": {"real": full, "syn1": full, "syn2": full},
        "orig50": {"real": half},
        "orig50+syn1_50": {"real": half, "syn1": rest},
        "orig50+syn2_50": {"real": half, "syn2": rest},
        "syn1": {"syn1": full},
        "syn2": {"syn2": full},
        "orig50+rot": {"real": half, "rot": half},
        "orig50+vflip": {"real": half, "vflip": half},
    }
    recipe = grading_recipe("tiny", "simple_cnn")
    cells = [arms.parse_arm(name, named=named) for name in PRESETS]
    planned = benchmark.plan_cells(real, cells, ["simple_cnn"], [0, 1], {"simple_cnn": recipe})
    held_out = {case.id for case in real.validation + real.test}
    halves = {}
    for cell in planned:
        facts = arms.training_facts(cell.arm, cell.pairs, num_classes)
        if cell.arm.name != "orig100":
            assert facts["per_source"] == wanted[cell.arm.name]
        assert facts["num_training"] == sum(map(sum, wanted[cell.arm.name].values()))
        assert len({(owner.content_sha256, case.id) for owner, case in cell.pairs}) == facts["num_training"]
        assert not held_out & {case.id for _, case in cell.pairs}
        assert cell.recipe.num_steps == recipe.num_steps
        if cell.arm.real_fraction == 0.5:
            halves.setdefault(cell.seed, set()).add(frozenset(case.id for owner, case in cell.pairs if owner is real))
    assert set(PRESETS) == set(wanted) and len(planned) == 2 * len(PRESETS)
    assert all(len(found) == 1 for found in halves.values())  # shared between cells
    assert halves[0] != halves[1]  # and the seed's own


def test_copies_are_of_the_kept_half_and_show_it_turned(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    for name, kind in (("orig50+rot", "rot"), ("orig50+vflip", "vflip")):
        (arm,) = arms.prepare_arms([arms.parse_arm(name, named=named)], real)
        pairs = arms.build_training_set(arm, real, 0)
        originals = {case.id for owner, case in pairs if owner is real}
        copies = [case for owner, case in pairs if owner is not real]
        assert {case.lineage["reference"] for case in copies} == originals and len(copies) == len(originals)
        for case in copies:
            origin = next(other for other in real.training if other.id == case.lineage["reference"])
            before, after = read_unit_png(real.path(origin)), read_unit_png(named[kind].path(case))
            turns = case.lineage.get("rotation_degrees", 0) // 90
            assert (turns in (1, 2, 3)) == (kind == "rot")
            undone = after[::-1] if kind == "vflip" else np.rot90(after, -turns)
            assert (undone == before).all() and not (after == before).all()
            assert case.group == origin.group
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").rglob("*.png")}
    assert make_copies(real, "rot", tmp_path / "copies" / "rot") == named["rot"]
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").rglob("*.png")}
    with pytest.raises(ConfigError, match="rot, vflip"):
        make_copies(real, "hflip", tmp_path / "x")


groups = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=25)


@given(groups, st.floats(0.05, 1), st.floats(0.05, 1), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_larger_fractions_contain_smaller_ones_and_groups_stay_whole(found, one, other, seed):
    cases = [
        Case(f"c{number}_{place}", "x", label, f"g{number}", "s")
        for number, (label, size) in enumerate(found)
        for place in range(size)
    ]
    small, large = (mixing.keep_fraction(cases, fraction, seed) for fraction in sorted((one, other)))
    assert {case.id for case in small} <= {case.id for case in large}
    assert {case.label for case in small} == {case.label for case in cases}  # no class is lost
    kept = {case.group for case in small}
    assert [case for case in cases if case.group in kept] == small


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.integers(1, 20), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_single_images_are_counted_exactly(sizes, twentieths, seed):
    cases = [Case(f"{label}_{n}", "x", label, f"{label}_{n}", "s") for label, size in enumerate(sizes) for n in range(size)]
    kept = mixing.keep_fraction(cases, twentieths / 20, seed)
    # n * fraction, halves down, at least one: in whole numbers, -(-(2nk - 20) // 40).
    wanted = [max(1, -(-(2 * size * twentieths - 20) // 40)) for size in sizes]
    assert mixing.class_counts(kept, len(sizes)) == wanted


@pytest.mark.parametrize("allocation", ["as_generated", "proportional"])
def test_ratios_and_fractions_nest_together(tmp_path, make_cohort, make_synthetic, allocation):
    real, named = world(tmp_path, make_cohort, make_synthetic, 3, cases_per_group=2)
    before: set[str] = set()
    for fraction, per_real in ((0.3, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0), (1.0, 1.4)):
        source = mixing.Source("syn1", named["syn1"], per_real=per_real, allocation=allocation)
        index = mixing.build_training_set(real, [source], real_fraction=fraction, seed=2)
        names = {case.id for _, case in index.pairs}
        assert len(names) == len(index.pairs) and before <= names
        num_real = index.provenance.count("real")
        assert index.provenance.count("syn1") == round(per_real * num_real)
        before = names


def test_absolute_counts_balance_and_provenance(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 3)
    one = mixing.Source("syn1", named["syn1"], allocation="fixed", counts=(0, 3, 1))
    two = mixing.Source("syn2", named["syn2"], per_real=0.2, allocation="balance")
    index = mixing.build_training_set(real, [one, two], seed=0)
    assert index.counts(3) == {"real": [4, 5, 6], "syn1": [0, 3, 1], "syn2": [2, 1, 0]}
    owners = {"real": real, "syn1": named["syn1"], "syn2": named["syn2"]}
    assert all(owner is owners[name] for name, (owner, _) in zip(index.provenance, index.pairs, strict=True))


def test_text_of_a_mixed_arm(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    text = f"half=real?fraction=0.5&share=0.5 + {tmp_path / 'syn1'}?per_real=1&weight=0.5 + syn2?counts=1/2"
    arm = arms.parse_arm(text, named=named)
    assert (arm.real_fraction, arm.real_share) == (0.5, 0.5)
    assert [(source.name, source.per_real, source.counts, source.weight) for source in arm.sources] == [
        ("syn1", 1.0, None, 0.5),
        ("syn2", None, (1, 2), 1.0),
    ]
    assert arms.parse_arm(f"only=no-real + {tmp_path / 'syn1'}").real_fraction is None
    both = arms.parse_arm(f"both={tmp_path / 'syn1'} + {tmp_path / 'syn2'}", synthetic_per_real=0.5)
    assert both.real_fraction == 1 and [source.per_real for source in both.sources] == [0.5, 0.5]
    plain = arms.parse_arm(f"a={tmp_path / 'syn1'}")
    assert plain.synthetic is not None and not plain.sources and "sources" not in plain.content()
    (turned,) = arms.prepare_arms([arms.parse_arm("x=real?fraction=0.5 + rot", named=named)], real)
    (cell,) = arms.prepare_arms([arms.parse_arm("orig50+rot", named=named)], real)
    assert arms.build_training_set(turned, real, 0) == arms.build_training_set(cell, real, 0)
    strange = tmp_path / "a + b?c=d"  # a folder of that very name is a folder
    (tmp_path / "syn1").rename(strange)
    assert arms.parse_arm(f"a={strange}").synthetic.content_sha256 == plain.synthetic.content_sha256
    assert term_names("real?fraction=0.5 + rot") == ["real", "rot"]


def test_shares_and_weights_reach_the_batches(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    (arm,) = arms.prepare_arms([arms.parse_arm("x=real?share=0.5 + syn1?weight=0.5 + syn2", named=named)], real)
    pairs = arms.build_training_set(arm, real, 0)
    mixture = arms.arm_mixture(arm, pairs)
    assert mixture.shares == {"real": 0.5} and mixture.weights == {"syn1": 0.5}
    assert mixture.batch_counts(16) == {"real": 8, "": 8}
    assert Counter(mixture.source) == {"real": 9, "syn1": 18, "syn2": 18}
    assert arms.arm_mixture(arms.parse_arm("none"), pairs[:9]) is None
    small = grading_recipe("tiny", "simple_cnn", {"batch_size": 2})
    arm = arms.parse_arm("x=real?share=0.01 + syn1", named=named)
    with pytest.raises(ConfigError, match="share-too-small"):
        benchmark.plan_cells(real, [arm], ["simple_cnn"], [0], {"simple_cnn": small})


def test_what_is_used_decides_the_name_of_a_row_and_nothing_else_does(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    texts = [
        "x=syn1",
        "x=syn1?weight=0.5",
        "x=syn1?share=0.5",
        "x=real?share=0.5 + syn1",
        "x=real?fraction=0.5 + syn1",
        "x=no-real + syn1",
    ]
    contents = [str(arms.parse_arm(text, named=named).content()) for text in texts]
    assert len(set(contents)) == len(texts)
    assert arms.parse_arm("none").content() == {
        "name": "none",
        "policy": "none",
        "oversample": False,
        "extra": [],
        "synthetic": None,
    }


def test_a_fraction_for_all_arms_and_its_control(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    texts = ["none", "oversample", f"a={tmp_path / 'syn1'}"]
    prepared = arms.prepare_arms([arms.parse_arm(text, real_fraction=0.5, synthetic_per_real=1) for text in texts], real)
    none, control, a = (arms.build_training_set(arm, real, 0) for arm in prepared)
    assert [len(none), len(control), len(a)] == [4, 8, 8]
    assert {case.id for _, case in none} == {case.id for _, case in control}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("orig75", "arm-unknown"),
        ("x=real?fraction=0 + syn1", "fraction-invalid"),
        ("x=real?fraction=1.5 + syn1", "fraction-invalid"),
        ("x=real?share=1 + real + syn1", "term-invalid"),
        ("x=real?weight=2 + syn1", "term-option"),
        ("x=no-real?share=1 + syn1", "term-option"),
        ("x=syn1?per_real=many + syn2", "term-option"),
        ("x=syn1?per_real=0 + syn2", "ratio-invalid"),
        ("x=syn1?counts=1 + syn2", "ratio-invalid"),
        ("x=syn1?allocation=even + syn2", "allocation-unknown"),
        ("x=syn1?share=0 + syn2", "share-invalid"),
        ("x=syn1?weight=-1 + syn2", "weight-invalid"),
        ("x=syn1?weight=0&share=0.5 + syn2", "weight-invalid"),
        ("x=syn1 + syn1", "source-twice"),
        ("x=syn1?weight=0 + no-real", "arm-mix"),
        ("x=real?share=0.5", "share-without-source"),
    ],
)
def test_mixtures_that_cannot_be_meant_are_refused(tmp_path, make_cohort, make_synthetic, text, code):
    _, named = world(tmp_path, make_cohort, make_synthetic, 2)
    with pytest.raises(ConfigError, match=code):
        arms.parse_arm(text, named=named)


def test_refusals_of_cells_and_sources(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    with pytest.raises(ConfigError, match="orig50\\+vflip"):
        check_presets(["orig75"], ["syn1"])
    with pytest.raises(ConfigError, match="syn2"):
        check_presets(["orig+syn1", "orig+syn2"], ["syn1"])
    for reserved in ("real", "rot"):  # before anything is trained, not when the arms are graded
        with pytest.raises(ConfigError, match="source-name"):
            check_presets(["orig100"], ["syn1", reserved])
    with pytest.raises(ConfigError, match="--source syn1=FOLDER"):
        arms.parse_arm("orig+syn1")
    for texts in (["syn1"], ["rot=x"], ["real=x"], [f"a={tmp_path / 'syn1'}"] * 2):
        with pytest.raises(ConfigError, match="source-name"):
            named_sources(texts, [], real, tmp_path / "c")
    empty = named["syn1"].with_cases(training=())
    with pytest.raises(DataError, match="arm-empty"):
        arms.parse_arm("orig+syn1", named={"syn1": empty})
    few = make_synthetic(real, tmp_path / "few", [9, 3], name="f")
    with pytest.raises(DataError, match="class1: 3 of 5"):
        arms.prepare_arms([arms.parse_arm("orig+syn1", named={"syn1": few})], real)
    with pytest.raises(ConfigError, match="fraction-invalid"):
        arms.parse_arm("none", real_fraction=0)


@pytest.mark.parametrize("place", [0, 1])
def test_every_source_is_checked_for_leaks(tmp_path, make_cohort, make_synthetic, place):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    leaked = make_synthetic(
        real, tmp_path / "leaked", [1, 1], fit_groups=sorted(real.groups("training") | real.groups("test")), name="l"
    )
    arm = arms.parse_arm(["x=leaked + syn1", "x=syn1 + leaked"][place], named=named | {"leaked": leaked})
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        arms.prepare_arms([arm], real)


def test_a_held_out_picture_under_another_name_is_found_in_any_source(tmp_path, make_cohort, make_synthetic):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    case = named["syn2"].training[0]
    named["syn2"].path(case).write_bytes(real.path(real.test[0]).read_bytes())
    again = write_cohort(read_cohort(tmp_path / "syn2"), tmp_path / "syn2")
    arm = arms.parse_arm("x=syn1 + syn2", named=named | {"syn2": again})
    with pytest.raises(LeakageError, match="pixels-held-out"):
        arms.prepare_arms([arm], real)


@pytest.mark.parametrize("ratio", ["1e9", "1e308"])
@pytest.mark.parametrize("allocation", ["as_generated", "proportional", "balance"])
def test_a_ratio_far_beyond_what_exists_is_refused_at_once(tmp_path, make_cohort, make_synthetic, ratio, allocation):
    real, named = world(tmp_path, make_cohort, make_synthetic, 2)
    arm = arms.parse_arm(f"x=syn1?per_real={ratio}&allocation={allocation}", named=named)
    with pytest.raises(DataError, match=r"synthetic-too-few.*18"):
        arms.prepare_arms([arm], real)


def test_copies_begun_for_another_cohort_and_killed_are_made_anew(tmp_path, make_cohort, monkeypatch):
    one = make_cohort(tmp_path / "one")
    other = make_cohort(tmp_path / "other", num_classes=2, per_class=9)
    make_copies(one, "rot", tmp_path / "rot")
    written = []

    def killed(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("medaug.storage.write_bytes", killed)
        make_copies(other, "rot", tmp_path / "rot")
    for path in written:
        path.write_bytes(b"half")  # what it wrote is not what the first cohort's header was written for
    found = make_copies(one, "rot", tmp_path / "rot")
    assert found.content_sha256 == make_copies(one, "rot", tmp_path / "again").content_sha256
