from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug import storage
from medaug.cohort import Case, Cohort, check_against, fit_sha256, read_cohort, validate, write_cohort
from medaug.errors import DataError, LeakageError

MakeCohort = Callable[..., Cohort]


@pytest.fixture
def real(make_cohort: MakeCohort, tmp_path: Path) -> Cohort:
    return make_cohort(tmp_path / "real")


def synthetic_of(cohort: Cohort, groups: list[str], **changes: Any) -> Cohort:
    """A synthetic cohort of one case, whose generator was trained on `groups`."""
    reference = cohort.training[0]
    lineage = {"fit_on": fit_sha256(groups), "reference": reference.id}
    case = replace(reference, id="s1", lineage=lineage, **changes)
    return replace(cohort, training=(case,), validation=(), test=(), fit_on={fit_sha256(groups): groups})


def edit(cohort: Cohort, change: Callable[[dict[str, Any]], None]) -> Path:
    assert cohort.root is not None
    data = json.loads((cohort.root / "cohort.json").read_text())
    change(data)
    (cohort.root / "cohort.json").write_text(json.dumps(data))
    return cohort.root


def test_cohort_round_trip(real: Cohort) -> None:
    assert real.root is not None
    assert read_cohort(real.root, verify=True) == real
    assert read_cohort(real.root / "cohort.json") == real


def test_written_twice_gives_the_same_bytes(real: Cohort, tmp_path: Path) -> None:
    first = (tmp_path / "real" / "cohort.json").read_bytes()
    write_cohort(read_cohort(tmp_path / "real"), tmp_path / "real")
    assert (tmp_path / "real" / "cohort.json").read_bytes() == first


def test_monai_reads_the_file_as_it_is(real: Cohort) -> None:
    from monai.data import load_decathlon_datalist

    assert real.root is not None
    for split in ("training", "validation", "test"):
        rows = load_decathlon_datalist(str(real.root / "cohort.json"), True, split)
        assert [row["image"] for row in rows] == [str(real.path(case)) for case in real.split(split)]
        assert [row["label"] for row in rows] == [case.label for case in real.split(split)]


def test_counts_and_groups(real: Cohort) -> None:
    assert [sum(real.class_counts(split)[label] for split in ("training", "validation", "test")) for label in range(3)] == [
        12,
        12,
        12,
    ]
    assert not real.groups("training") & real.groups("test")


# --- leakage ----------------------------------------------------------------------------------------------------------


def test_group_in_two_splits_is_named(real: Cohort) -> None:
    moved = replace(real.training[0], id="moved")
    with pytest.raises(LeakageError, match=rf"group-in-two-splits.*{moved.group}"):
        validate(real.with_cases(test=(*real.test, moved)))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_synthetic_case_belongs_to_training(real: Cohort, split: str) -> None:
    fake = replace(real.split(split)[0], lineage={"fit_on": "x"})
    with pytest.raises(LeakageError, match=f"synthetic-outside-training.*{split}.*{fake.id}"):
        validate(real.with_cases(**{split: (fake,)}))


def test_fit_on_held_out_group_is_named(real: Cohort) -> None:
    held = real.test[0].group
    groups = [real.training[0].group, held]
    fake = replace(real.training[0], id="s1", lineage={"fit_on": fit_sha256(groups)})
    with pytest.raises(LeakageError, match=f"fit-on-held-out.*{held}"):
        validate(replace(real, training=(*real.training, fake), fit_on={fit_sha256(groups): groups}))


@pytest.mark.parametrize("lineage", [{}, {"fit_on": None}, {"fit_on": "0" * 64}])
def test_synthetic_case_without_a_known_fit_is_refused(real: Cohort, lineage: dict[str, Any]) -> None:
    with pytest.raises(LeakageError, match="fit-unknown.*s1"):
        validate(real.with_cases(training=(replace(real.training[0], id="s1", lineage=lineage),)))


def test_forged_group_list_is_refused(real: Cohort) -> None:
    groups = sorted(real.groups("training"))
    synthetic = synthetic_of(real, groups)
    with pytest.raises(LeakageError, match="fit-unknown"):
        validate(replace(synthetic, fit_on={fit_sha256(groups): groups[1:]}))


def test_fit_sha_does_not_depend_on_order_or_repeats() -> None:
    assert fit_sha256(["b", "a", "a"]) == fit_sha256(["a", "b"]) != fit_sha256(["ab"])


def test_synthetic_cohort_of_the_training_split_is_accepted(real: Cohort) -> None:
    check_against(validate(synthetic_of(real, sorted(real.groups("training")))), real)


def test_against_names_the_held_out_groups_of_the_fit(real: Cohort) -> None:
    held = real.validation[0].group
    synthetic = synthetic_of(real, [*real.groups("training"), held])
    with pytest.raises(LeakageError, match=f"fit-on-held-out.*{held}"):
        check_against(synthetic, real)


def test_against_names_an_inherited_held_out_group(real: Cohort) -> None:
    synthetic = synthetic_of(real, sorted(real.groups("training")), group=real.test[0].group)
    with pytest.raises(LeakageError, match=f"reference-held-out.*{real.test[0].group}"):
        check_against(synthetic, real)


def test_against_finds_a_held_out_reference_behind_another_group(real: Cohort) -> None:
    synthetic = synthetic_of(real, sorted(real.groups("training")))
    case = replace(synthetic.training[0], lineage={**(synthetic.training[0].lineage or {}), "reference": real.test[0].id})
    with pytest.raises(LeakageError, match="reference-held-out"):
        check_against(synthetic.with_cases(training=[case]), real)


def test_against_finds_real_held_out_images_among_the_synthetic(real: Cohort) -> None:
    synthetic = synthetic_of(real, sorted(real.groups("training")))
    with pytest.raises(LeakageError, match=real.test[0].group):
        check_against(synthetic.with_cases(training=[*synthetic.training, real.test[0]]), real)


def test_against_refuses_groups_the_real_cohort_does_not_know(real: Cohort) -> None:
    synthetic = synthetic_of(real, [*real.groups("training"), "elsewhere"])
    with pytest.raises(LeakageError, match="fit-unknown.*elsewhere"):
        check_against(synthetic, real)
    check_against(synthetic, real, allow_untrusted=True)


def test_against_refuses_other_classes(real: Cohort) -> None:
    synthetic = synthetic_of(real, sorted(real.groups("training")))
    with pytest.raises(DataError, match="cohorts-differ"):
        check_against(replace(synthetic, classes=("a", "b", "c")), real)


# --- content ----------------------------------------------------------------------------------------------------------


def test_content_sha_changes_with_pixels_labels_and_splits_only(real: Cohort, tmp_path: Path) -> None:
    root = tmp_path / "real"
    first, rest = real.training[0], real.training[1:]
    assert write_cohort(replace(real, name="other"), root).content_sha256 == real.content_sha256
    assert write_cohort(real.with_cases(training=(*rest, first)), root).content_sha256 == real.content_sha256  # order of cases
    shas = {
        real.content_sha256,
        write_cohort(real.with_cases(training=(replace(first, label=1), *rest)), root).content_sha256,
        write_cohort(real.with_cases(training=(replace(first, group="new"), *rest)), root).content_sha256,
        write_cohort(real.with_cases(training=rest), root).content_sha256,
        write_cohort(real.with_cases(training=real.training + real.validation, validation=()), root).content_sha256,
    }
    write_cohort(real, root)
    real.path(first).write_bytes(real.path(first).read_bytes() + b" ")
    with pytest.raises(DataError, match="cohort-changed"):
        read_cohort(root, verify=True)
    shas.add(write_cohort(real, root).content_sha256)
    assert len(shas) == 6


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["training", "validation", "test"]), st.integers(0, 4)), max_size=12))
def test_validate_accepts_exactly_the_splits_without_a_common_group(rows: list[tuple[str, int]]) -> None:
    splits: dict[str, list[Case]] = {"training": [], "validation": [], "test": []}
    for index, (split, group) in enumerate(rows):
        splits[split].append(Case(id=f"c{index}", image=f"images/c{index}.png", label=0, group=f"g{group}", source=""))
    cohort = Cohort(name="", modality="", classes=("a",), ordinal=False, image_size=8).with_cases(**splits)
    crossing = any(len({split for split, other in rows if other == group}) > 1 for group in range(5))
    if crossing:
        with pytest.raises(LeakageError, match="group-in-two-splits"):
            validate(cohort)
    else:
        assert validate(cohort) is cohort


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"id": ""}, "case-id-duplicate"),
        ({"id": "../x"}, "case-id-invalid"),
        ({"id": "/x"}, "case-id-invalid"),
        ({"id": "a\\x"}, "case-id-invalid"),
        ({"id": "a\0"}, "case-id-invalid"),
        ({"label": 3}, "label-out-of-range"),
        ({"label": -1}, "label-out-of-range"),
        ({"label": True}, "label-out-of-range"),
        ({"label": 1.0}, "label-out-of-range"),
        ({"image": "../x.png"}, "path-outside-cohort"),
        ({"image": "/x.png"}, "path-outside-cohort"),
        ({"image": "a\\..\\x.png"}, "path-outside-cohort"),
        ({"image": ""}, "path-outside-cohort"),
        ({"group": ""}, "group-missing"),
    ],
)
def test_bad_case_is_refused(real: Cohort, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError, match=code):
        validate(real.with_cases(training=(replace(real.training[0], **changes), *real.training[1:])))


def test_id_given_twice_is_refused(real: Cohort) -> None:
    with pytest.raises(DataError, match=f"case-id-duplicate.*{real.training[0].id}"):
        validate(real.with_cases(training=(real.training[0], real.training[0])))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: data.pop("classes"), "cohort-malformed"),
        (lambda data: data.update(format=2), "cohort-format"),
        (lambda data: data["training"][0].update(colour="red"), "cohort-malformed"),
        (lambda data: data["training"].append("case"), "cohort-malformed"),
        (lambda data: data["training"][0].update(image=5), "cohort-malformed"),
        (lambda data: data["training"][0].update(group=["g"]), "cohort-malformed"),
        (lambda data: data["training"][0].update(id=None), "cohort-malformed"),
        (lambda data: data["training"][0].update(lineage=[]), "cohort-malformed"),
        (lambda data: data.update(training=5), "cohort-malformed"),
        (lambda data: data.update(image_size="large"), "cohort-malformed"),
        (lambda data: data.update(classes=[]), "classes-invalid"),
        (lambda data: data.update(classes=["a", "a", "b"]), "classes-invalid"),
    ],
)
def test_malformed_file_is_refused(real: Cohort, change: Callable[[dict[str, Any]], None], code: str) -> None:
    with pytest.raises(DataError, match=code):
        read_cohort(edit(real, change))


def test_file_that_holds_a_list_is_refused(real: Cohort, tmp_path: Path) -> None:
    storage.write_json(tmp_path / "real" / "cohort.json", [])
    with pytest.raises(DataError, match="cohort-malformed"):
        read_cohort(tmp_path / "real")


def test_absent_images_and_folders_are_refused(real: Cohort, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cohort-missing"):
        read_cohort(tmp_path / "nowhere")
    real.path(real.test[0]).unlink()
    with pytest.raises(DataError, match=f"image-missing.*{real.test[0].id}"):
        read_cohort(tmp_path / "real")
    with pytest.raises(DataError, match="image-missing"):
        write_cohort(real, tmp_path / "real")


def test_unknown_split_and_missing_root_are_refused(real: Cohort) -> None:
    with pytest.raises(DataError, match="split-unknown"):
        real.split("train")
    with pytest.raises(DataError, match="cohort-unrooted"):
        replace(real, root=None).path(real.training[0])


@pytest.mark.parametrize("what", ["patient", "image"])
def test_a_patient_or_an_image_in_two_splits_is_leakage(make_cohort: Callable[..., Cohort], tmp_path: Path, what: str) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    same = replace(cohort.test[0], **{what: "one"})
    other = replace(cohort.training[0], **{what: "one"})
    with pytest.raises(LeakageError, match=f"{what}-in-two-splits"):
        validate(cohort.with_cases(training=(other, *cohort.training[1:]), test=(same, *cohort.test[1:])))
