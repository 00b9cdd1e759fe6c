from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_run import World, new_run

from medaug import cohort as cohorts
from medaug import storage
from medaug.cohort import Case, Cohort, check_against, read_cohort
from medaug.errors import ConfigError, DataError, LeakageError, StorageError
from medaug.generation.generate import check_run, geometry_facts, read_synthetic, save_batch, sheet
from medaug.generation.plan import make_plan
from medaug.networks.reference_encoder import ReferenceEncoder
from medaug.quality.checks import CHECKS, GateContext
from medaug.workflow import run_stage

SAMPLER = {
    "step": "dpm_solver_pp_2m",
    "num_inference_steps": 3,
    "spacing": "karras",
    "sigma_min": 0.01,
    "sigma_max": 80.0,
    "bottleneck_scale": 0.1,
}


def generate(world: World, out: Path, counts: list[int] | None, **overrides: Any) -> Cohort:
    """`medaug generate` in this process."""
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(out)}
    plain = {
        "counts": counts,
        "generation_batch_size": 4,
        "sampler_settings": SAMPLER,
        "device_name": "cpu",
        "tracking": {"enabled": False},
    }
    made: Cohort = run_stage("guided_ddpm", "generating", None, paths | plain | overrides)
    return made


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def test_synthetic_cohort_has_its_lineage(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", [3, 5, 0], seed=2)
    assert read_synthetic(tmp_path / "s") == made
    assert made.class_counts("training") == [3, 5, 0]
    assert not made.validation and not made.test
    assert made.fit_on == {world.record.fit_on: world.record.fit_groups}
    training = {case.id: case for case in world.cohort.training}
    for case in made.training:
        lineage = case.lineage or {}
        reference = training[lineage["reference"]]  # a KeyError would be a validation or test case
        assert (case.group, case.label) == (reference.group, reference.label)
        assert lineage["fit_on"] == world.record.fit_on
        assert lineage["weights_sha256"] == world.record.weights_sha256
        assert (lineage["bundle"], lineage["seed"], lineage["intended_label"]) == ("guided_ddpm", 2, case.label)
        assert lineage["noise"] == {"bottleneck_scale": 0.1, "bottleneck_mode": "relative"}
        assert lineage["sampler"]["sigma_max"] == 80.0
        assert case.acquisition == {}  # a new image lies nowhere
    check_against(made, world.cohort)


def test_only_facts_of_place_and_storage_pass_to_a_variation() -> None:
    known = {"spacing_mm": [0.7, 0.7], "position_mm": [0.0, 0.0, -47.5], "window": [-1350, 150], "burned_in_text": "not found"}
    reference = Case(id="a", image="images/a.png", label=0, group="g", source="s", acquisition=known)
    assert geometry_facts(reference) == {"spacing_mm": [0.7, 0.7], "position_mm": [0.0, 0.0, -47.5]}


def test_generation_goes_on_with_the_same_bytes(world: World, tmp_path: Path) -> None:
    generate(world, tmp_path / "whole", [7, 6, 5])
    generate(world, tmp_path / "resumed", [7, 6, 5])
    whole = images(tmp_path / "whole")
    for index, name in enumerate(whole):
        if index % 3 == 0:
            (tmp_path / "resumed" / "images" / name).unlink()
    (tmp_path / "resumed" / "cohort.json").unlink()
    generate(world, tmp_path / "resumed", [7, 6, 5])
    assert images(tmp_path / "resumed") == whole
    assert (tmp_path / "resumed" / "cohort.json").read_bytes() == (tmp_path / "whole" / "cohort.json").read_bytes()


def test_interrupted_generation_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medaug.generation import generate as module

    calls = 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        save_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(world, tmp_path / "killed", [7, 6, 5])
    assert len(images(tmp_path / "killed")) == 7
    assert not (tmp_path / "killed" / "cohort.json").exists()
    generate(world, tmp_path / "killed", [7, 6, 5])
    generate(world, tmp_path / "whole", [7, 6, 5])
    assert images(tmp_path / "killed") == images(tmp_path / "whole")


def test_larger_plan_keeps_what_is_there_and_a_smaller_one_drops_the_rest(world: World, tmp_path: Path) -> None:
    generate(world, tmp_path / "s", [3, 3, 0])
    small = images(tmp_path / "s")
    generate(world, tmp_path / "s", [5, 3, 1])
    large = images(tmp_path / "s")
    assert len(large) == 9 and small.items() <= large.items()
    made = generate(world, tmp_path / "s", [3, 3, 0])
    assert images(tmp_path / "s") == small
    assert len(made.training) == 6


def test_batch_size_changes_an_image_by_rounding_only(world: World, tmp_path: Path) -> None:
    from medaug.io.raster import read_unit_png

    one, eight = (generate(world, tmp_path / str(size), [8, 0, 0], generation_batch_size=size) for size in (1, 8))
    for a, b in zip(one.training, eight.training, strict=True):
        assert a.id == b.id
        assert abs(read_unit_png(one.path(a)) - read_unit_png(eight.path(b))).max() <= 1e-4


def test_seed_and_weights_change_the_images(world: World, tmp_path: Path) -> None:
    first = generate(world, tmp_path / "a", [2, 0, 0])
    again = generate(world, tmp_path / "b", [2, 0, 0])
    other = generate(world, tmp_path / "c", [2, 0, 0], seed=1)
    assert images(tmp_path / "a") == images(tmp_path / "b")
    assert first.content_sha256 == again.content_sha256 != other.content_sha256
    assert not {case.id for case in first.training} & {case.id for case in other.training}


def test_encoder_runs_once_per_reference_in_a_whole_generation(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    features = ReferenceEncoder.features

    def counting(self: ReferenceEncoder, batch: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(batch)
        return features(self, batch)

    monkeypatch.setattr(ReferenceEncoder, "features", counting)
    made = generate(world, tmp_path / "s", [15, 15, 15])
    references = {(case.lineage or {})["reference"] for case in made.training}
    assert seen == len(references) == len(world.cohort.training)


def test_plan_by_ratio_and_by_class(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", None, synthetic_per_real=0.5)
    assert sum(made.class_counts("training")) == round(0.5 * len(world.cohort.training))
    fixed = generate(world, tmp_path / "f", None, allocation="fixed", fixed={"class1": 2})
    assert fixed.class_counts("training") == [0, 2, 0]


def test_sheet_shows_references_above_their_images(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", [2, 2, 1])
    picture = sheet(made, world.cohort, per_class=2)
    assert picture.shape == (4 * 16, 2 * 16)  # class 2 has too few


# --- refusals ---------------------------------------------------------------------------------------------------------


def moved_to_test(world: World, group: str, root: Path) -> Cohort:
    """The same cohort with one training group held out."""
    for case in world.cohort.cases():
        storage.write_bytes(root / case.image, world.cohort.path(case).read_bytes())
    held = tuple(case for case in world.cohort.training if case.group == group)
    kept = tuple(case for case in world.cohort.training if case.group != group)
    return cohorts.write_cohort(world.cohort.with_cases(training=kept, test=world.cohort.test + held), root)


def test_run_that_saw_a_held_out_group_is_refused(world: World, tmp_path: Path) -> None:
    group = world.cohort.training[0].group
    other = replace(world, cohort=moved_to_test(world, group, tmp_path / "cohort"))
    with pytest.raises(LeakageError, match=f"fit-on-held-out.*{group}") as caught:
        generate(other, tmp_path / "s", [1, 1, 1])
    assert caught.value.exit_code == 4
    assert not (tmp_path / "s").exists()


def test_run_of_other_classes_is_refused(world: World, make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class-mismatch"):
        generate(replace(world, cohort=make_cohort(tmp_path / "c", num_classes=2)), tmp_path / "s", [1, 1])
    with pytest.raises(ConfigError, match="class-mismatch"):
        check_run(world.record, replace(world.cohort, image_size=32))


def test_folder_of_another_run_or_sampler_is_refused(world: World, tmp_path: Path) -> None:
    generate(world, tmp_path / "s", [1, 0, 0])
    for changes in (
        {"seed": 1},
        {"sampler_settings": SAMPLER | {"sigma_max": 40.0}},
        {"sampler_settings": SAMPLER | {"bottleneck_scale": 0.0}},
    ):
        with pytest.raises(ConfigError, match="generation-other-config"):
            generate(world, tmp_path / "s", [1, 0, 0], **changes)
    with pytest.raises(ConfigError, match="generation-other-config"):
        generate(new_run(world.cohort, tmp_path / "run", seed=1), tmp_path / "s", [1, 0, 0])
    fewer = cohorts.write_cohort(world.cohort.with_cases(training=world.cohort.training[:-1]), world.cohort.root or tmp_path)
    try:
        with pytest.raises(ConfigError, match="generation-other-config"):  # its references would be others
            generate(replace(world, cohort=fewer), tmp_path / "s", [1, 0, 0])
    finally:
        cohorts.write_cohort(world.cohort, world.cohort.root or tmp_path)


def test_folder_of_another_cohort_is_refused(world: World, make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    kept = make_cohort(tmp_path / "c")
    with pytest.raises(ConfigError, match="folder-not-empty"):
        generate(world, tmp_path / "c", [1, 0, 0])
    assert read_cohort(tmp_path / "c", verify=True) == kept


def test_folder_in_use_by_another_process_is_refused(world: World, tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with storage.locked(tmp_path / "s"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(StorageError, match="folder-in-use") as caught:
            generate(world, tmp_path / "s", [1, 0, 0])
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
    assert caught.value.exit_code == 5


def test_image_that_is_not_finite_is_refused(world: World, tmp_path: Path) -> None:
    planned = make_plan(world.cohort, [1, 0, 0], 0, "w")[0]
    with pytest.raises(DataError, match="sample-not-finite"):
        save_batch(torch.full((1, 1, 16, 16), float("nan")), planned, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_run_and_real_cohort_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run-missing"):
        generate(replace(world, run=tmp_path), tmp_path / "s", [1, 0, 0])
    with pytest.raises(DataError, match="not-synthetic"):
        read_synthetic(world.cohort.root or tmp_path)


def test_run_of_unknown_groups_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(LeakageError, match="fit-unknown"):
        check_run(replace(world.record, fit_groups=(*world.record.fit_groups, "g-elsewhere")), world.cohort)


def test_an_exchanged_image_is_rejected(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", [2, 2, 0])
    first, second = made.training[:2]
    (tmp_path / "s" / first.image).write_bytes((tmp_path / "s" / second.image).read_bytes())
    context = GateContext(world.cohort, made, tmp_path / "filter", 0.8, None, "simple_cnn", 0, False)
    verdicts = [finding.reasons[0][0] if finding.reasons else "" for finding in CHECKS["usable"](context, made.training)]
    assert verdicts[0] == "image-changed" and verdicts[1] != "image-changed"
