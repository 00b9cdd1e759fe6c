"""The bundle `uncertainty_guidance` through its own configs: two trainings, two stages, their overlays, sweeps, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from guided_world import QUIET, new_classifier_run, new_guided_run
from monai_run import run_from
from random_run import DIFFUSION, World
from tiny_run import BACKBONE

from medaug import assets
from medaug.cohort import Cohort, fit_sha256, read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.generation import generate as generation
from medaug.generation.disturbance import disturbance_plan
from medaug.generation.guides import make_terms
from medaug.generation.plan import quotas
from medaug.io.raster import read_unit_png
from medaug.training.run_folder import RUN_FILE, read_run
from medaug.workflow import (
    STAGES,
    list_overlays,
    load_config,
    own_error,
    parse_overrides,
    read_yaml,
    run_stage,
    run_training,
)

BUNDLE = assets.bundle_root("uncertainty_guidance")
SMALL_CLASSIFIER = {"channels": [8, 16], "patch": None, "norm_num_groups": 4, "dropout": 0.2}
TINY = QUIET | {
    "network_settings#backbone_options": BACKBONE,
    "batch_size": 4,
    "epoch_length": 2,
    "max_epochs": 1,
    "preview_every": 0,
}
JUDGE = {"num_steps": 4, "evaluate_every": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def world(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("guided")
    return new_guided_run(make_cohort(root / "cohort", per_class=10), root / "run")


def generate(world: World, out: Path, overlay: str | None = None, **overrides: Any) -> Any:
    """`medaug generate` in this process."""
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(out)}
    settings = paths | QUIET | {"generation_batch_size": 4} | overrides
    return run_stage("uncertainty_guidance", "generating", None, settings, overlay=overlay)


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def lineage(made: Cohort, index: int = 0) -> dict[str, Any]:
    return dict(made.training[index].lineage or {})


# --- configs ----------------------------------------------------------------------------------------------------------


def test_the_papers_values() -> None:
    train, classifier, generating = (
        load_config(str(BUNDLE), *stage) for stage in (("training",), ("training", None, "classifier"), ("generating",))
    )
    assert (train["learning_rate"], train["weight_decay"], train["ema_decay"]) == (1e-4, 1e-5, 0.9999)
    assert train["weighting_settings"] == {"weighting": "p2", "weighting_options": {"k": 1.0, "gamma": 0.5}}
    assert train["network_settings"]["backbone_options"]["channels"] == [256, 256, 512, 768, 1024]
    assert (train["sampler_settings"]["num_inference_steps"], train["sampler_settings"]["step_options"]) == (250, {"eta": 0.0})
    assert (classifier["learning_rate"], classifier["batch_size"], classifier["max_epochs"] * classifier["epoch_length"]) == (
        3e-4,
        64,
        200_000,
    )
    assert generating["guidance_settings"]["guidance"] == [{"measure": "classifier", "scale": 10.0}]
    disturbing = load_config(str(BUNDLE), "generating", None, "disturbance")
    assert disturbing["disturbance_settings"]["guidance"] == [{"measure": "entropy", "scale": 5.0}]


def test_overlays_know_their_stage() -> None:
    assert list_overlays("uncertainty_guidance") == {"classifier": "training", "disturbance": "generating"}
    assert list_overlays("sdedit") == {}
    for stage, overlay in (
        ("training", "disturbance"),
        ("generating", "classifier"),
        ("generating", "train"),
        ("generating", "nothing"),
    ):
        with pytest.raises(ConfigError, match="overlay-unknown"):
            load_config("uncertainty_guidance", stage, None, overlay)


@pytest.mark.parametrize("profile", assets.list_profiles())
def test_every_profile_fits_both_trainings(profile: str) -> None:
    train, classifier = (load_config("uncertainty_guidance", "training", profile, overlay) for overlay in (None, "classifier"))
    assert train["network_settings"]["backbone"] == "lean" and train["weighting_settings"] is None
    own = read_yaml(assets.profile_path(profile))
    assert classifier["classifier_settings"] == own["classifier_settings"] and classifier["max_epochs"] == own["max_epochs"]
    from medaug.networks.time_classifier import build_time_classifier

    for size, patch in ((32, 2), (64, 4), (128, 4)):
        assert build_time_classifier(classifier["classifier_settings"], 1, 2, size).patch == patch
    generating = load_config("uncertainty_guidance", "generating", profile, "disturbance")
    assert generating["sampler_settings"]["num_inference_steps"] > 1


@pytest.mark.parametrize("name", sorted(path.name for path in (BUNDLE / "configs").glob("*.yaml")))
def test_configs_hold_no_path_and_no_program(name: str) -> None:
    assert "lambda " not in (BUNDLE / "configs" / name).read_text()
    if name in STAGES.values():
        assert read_yaml(BUNDLE / "configs" / name)["bundle_root"] == "$str(assets.bundle_root('uncertainty_guidance'))"


@pytest.mark.parametrize(
    ("stage", "kind", "overlay"),
    [
        ("training", "train", None),
        ("training", "train", "classifier"),
        ("generating", "infer", None),
        ("generating", "infer", "disturbance"),
    ],
)
def test_monai_finds_the_properties_it_asks_for(world: World, tmp_path: Path, stage: str, kind: str, overlay: str | None) -> None:
    from monai.bundle import ConfigWorkflow

    files = [STAGES[stage], *([f"{overlay}.yaml"] if overlay else [])]
    workflow = ConfigWorkflow(
        config_file=[*(str(BUNDLE / "configs" / name) for name in files), str(assets.profile_path("tiny"))],
        workflow_type=kind,
        run_id=stage,
        init_id=None,
        final_id=None,
        logging_file=str(BUNDLE / "configs" / "logging.conf"),
        dataset_dir=str(world.cohort.root),
        output_dir=str(tmp_path / "out"),
        **({"run_dir": str(world.run)} if stage == "generating" else {}),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert not (tmp_path / "out").exists()


# --- training ---------------------------------------------------------------------------------------------------------


def test_one_training_makes_generator_and_classifier(world: World, tmp_path: Path) -> None:
    own = {"dataset_dir": str(world.cohort.root), "output_dir": str(tmp_path / "run")}
    record = run_training("uncertainty_guidance", "tiny", TINY | own)
    classifier = read_run(tmp_path / "run" / "classifier")
    assert record.settings["network"]["class_conditional"] and "classifier" not in record.settings
    assert classifier.settings["classifier"]["patch"] is None and classifier.settings["diffusion"] == record.settings["diffusion"]
    assert classifier.fit_on == record.fit_on and classifier.iterations == record.iterations == 2
    assert run_training("uncertainty_guidance", "tiny", TINY | own) == record  # finished: nothing is done again
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(tmp_path / "run")}
    for overlay in (None, "disturbance"):
        options = paths | QUIET | {"output_dir": str(tmp_path / f"s{overlay}"), "counts": [1, 1, 0]}
        made = run_stage("uncertainty_guidance", "generating", "tiny", options, overlay=overlay)
        assert made.class_counts("training") == [1, 1, 0]
        assert lineage(made)["sampler"]["num_inference_steps"] == 8  # of the profile
    judged = paths | QUIET | {"output_dir": str(tmp_path / "e"), "samples_per_class": 2}
    assert run_stage("uncertainty_guidance", "evaluating", "tiny", judged)["samples"] == 6


def test_only_the_generator_is_trained_when_asked(world: World, tmp_path: Path) -> None:
    own = {"dataset_dir": str(world.cohort.root), "output_dir": str(tmp_path / "run"), "also_trains": []}
    run_training("uncertainty_guidance", "tiny", TINY | own)
    assert not (tmp_path / "run" / "classifier").exists()
    with pytest.raises(DataError, match="run-missing.*classifier"):
        generate(replace(world, run=tmp_path / "run"), tmp_path / "s", counts=[1, 0, 0])
    made = generate(replace(world, run=tmp_path / "run"), tmp_path / "s", counts=[1, 0, 0], **{"guidance_settings#guidance": []})
    assert lineage(made)["guidance"]["classifiers"] == []


def test_a_network_with_a_blind_level_is_not_trained(world: World, tmp_path: Path) -> None:
    own = {"dataset_dir": str(world.cohort.root), "output_dir": str(tmp_path / "run")}
    blind = {"channels": [8, 16], "norm_num_groups": 8, "num_head_channels": 8}
    change = {"network_settings": {"backbone": "monai", "class_conditional": True, "backbone_options": blind, "reference": None}}
    with pytest.raises(ConfigError, match="network-blind.*8 channels in 8 norm groups"):
        run_stage("uncertainty_guidance", "training", None, own | QUIET | change)


# --- generation -------------------------------------------------------------------------------------------------------

CFG = {"guidance_settings#guidance": [], "guidance_settings#cfg_scale": 2.0}
WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "classifier": (None, {}),
    "cfg": (None, CFG),
    "disturbance": ("disturbance", {}),
    "bald_on_cfg": ("disturbance", CFG | {"disturbance_settings#guidance": [{"measure": "bald", "scale": 3.0, "votes": 3}]}),
    "everything": (
        None,
        {
            "guidance_settings#guidance": [
                {"measure": "classifier", "scale": 5.0, "schedule": "sqrt_abar"},
                {
                    "measure": "entropy",
                    "scale": -1.0,
                    "on": "x0hat",
                    "schedule": "interval",
                    "schedule_options": {"t_high": 900, "t_low": 100, "inside": "sqrt_abar"},
                },
            ],
            "guidance_settings#annealing": {"tau_low": 0.1},
            "guidance_settings#spread": 0.5,
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_images_do_not_depend_on_their_batch(world: World, tmp_path: Path, way: str) -> None:
    overlay, options = WAYS[way]
    for size in (1, 4):
        generate(world, tmp_path / str(size), overlay, counts=[3, 2, 0], generation_batch_size=size, **options)
    one, four = (tmp_path / name / "images" for name in ("1", "4"))
    for path in one.iterdir():
        np.testing.assert_allclose(read_unit_png(path), read_unit_png(four / path.name), atol=2e-4)


@pytest.mark.parametrize("overlay", [None, "disturbance"])
def test_a_killed_generation_ends_with_the_same_bytes(
    world: World, tmp_path: Path, overlay: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(world, tmp_path / "whole", overlay, counts=[5, 6, 2])
    calls, original = [], generation.save_batch

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "save_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(world, tmp_path / "killed", overlay, counts=[5, 6, 2])
    resumed = generate(world, tmp_path / "killed", overlay, counts=[5, 6, 2])
    assert pixels(tmp_path / "killed") == pixels(tmp_path / "whole")
    assert resumed.content_sha256 == whole.content_sha256


def test_the_lineage_names_measure_scale_schedule_and_classifier(world: World, tmp_path: Path) -> None:
    term = {"measure": "margin", "scale": 3.0, "schedule": "interval", "schedule_options": {"t_high": 900, "t_low": 50}}
    made = generate(world, tmp_path / "s", "disturbance", counts=[1, 0, 0], **{"disturbance_settings#guidance": [term]})
    sha = read_run(world.run / "classifier").weights_sha256
    found = lineage(made)
    assert found["guidance"]["terms"] == [term | {"on": "x_t"}] and found["guidance"]["classifiers"] == [sha]
    assert found["sampler"]["first"]["guidance"][0]["measure"] == "classifier" and found["source"]["kind"] == "generated"
    for change in ({"disturbance_settings#guidance": [term | {"scale": 4.0}]}, {"disturbance_settings#strength": 0.5}):
        with pytest.raises(ConfigError, match="generation-other-config"):
            generate(
                world, tmp_path / "s", "disturbance", counts=[1, 0, 0], **{"disturbance_settings#guidance": [term], **change}
            )


def test_fit_on_is_the_union_of_generator_and_classifier(world: World, tmp_path: Path) -> None:
    half = world.cohort.with_cases(training=world.cohort.training[::2])
    run = tmp_path / "half"
    new_classifier_run(half, run)
    few = tuple(sorted(world.cohort.groups("training")))[:4]
    content = json.loads((world.run / RUN_FILE).read_text()) | {"fit_groups": list(few), "fit_on": fit_sha256(few)}
    other = tmp_path / "run"
    other.mkdir()
    (other / RUN_FILE).write_text(json.dumps(content))
    (other / "model.safetensors").write_bytes((world.run / "model.safetensors").read_bytes())
    made = generate(replace(world, run=other), tmp_path / "s", counts=[1, 0, 0], classifier_dirs=[str(run)])
    union = sorted({*few, *half.groups("training")})
    assert lineage(made)["fit_on"] == fit_sha256(union) and list(made.fit_on[fit_sha256(union)]) == union


def test_a_classifier_that_saw_a_held_out_group_is_refused(world: World, tmp_path: Path) -> None:
    saw = world.cohort.with_cases(training=world.cohort.training + world.cohort.test[:2], test=world.cohort.test[2:])
    new_classifier_run(saw, tmp_path / "classifier")
    for overlay in (None, "disturbance"):
        with pytest.raises(LeakageError, match="fit-on-held-out") as caught:
            generate(world, tmp_path / "s", overlay, counts=[1, 0, 0], classifier_dirs=[str(tmp_path / "classifier")])
        assert caught.value.exit_code == 4 and not (tmp_path / "s").exists()


def test_a_classifier_of_other_classes_size_or_levels_is_refused(
    world: World, make_cohort: Callable[..., Cohort], tmp_path: Path
) -> None:
    two = make_cohort(tmp_path / "two", num_classes=2)
    new_classifier_run(two, tmp_path / "a")
    new_classifier_run(world.cohort, tmp_path / "b", diffusion=DIFFUSION | {"num_train_timesteps": 500})
    for name, code in (("a", "class-mismatch"), ("b", "classifier-schedule")):
        with pytest.raises(ConfigError, match=code):
            generate(world, tmp_path / "s", counts=[1, 0, 0], classifier_dirs=[str(tmp_path / name)])


@pytest.mark.parametrize(("steps", "asked", "found"), [(4, None, 1), (100, None, 0), (4, 0, 0), (100, 3, 3)])
def test_coarse_grids_are_inverted_with_a_refinement(
    world: World, tmp_path: Path, steps: int, asked: int | None, found: int
) -> None:
    change = {"disturbance_settings#num_inference_steps": steps, "disturbance_settings#refinements": asked}
    settings = generate(world, tmp_path / "s", "disturbance", counts=[1, 0, 0], generating=["$@inferer.settings()"], **change)
    assert settings["refinements"] == found


# --- sources ----------------------------------------------------------------------------------------------------------


def test_stage_2_of_a_finished_stage_1_is_stage_2_made_on_the_way(world: World, tmp_path: Path) -> None:
    first = generate(world, tmp_path / "first", counts=[2, 1, 0])
    apart = generate(world, tmp_path / "apart", "disturbance", source=str(tmp_path / "first"))
    whole = generate(world, tmp_path / "whole", "disturbance", counts=[2, 1, 0])
    assert apart.class_counts("training") == [2, 1, 0]
    by_source = {lineage(apart, i)["source"]["case"]: case for i, case in enumerate(apart.training)}
    assert set(by_source) == {case.id for case in first.training} == {case.id for case in whole.training}
    for case in whole.training:  # but for the rounding of the file in between
        twin = by_source[case.id]
        assert twin.group == case.group and twin.id != case.id
        np.testing.assert_allclose(read_unit_png(apart.path(twin)), read_unit_png(whole.path(case)), atol=2e-3)
    with pytest.raises(DataError, match="source-too-few"):
        generate(world, tmp_path / "more", "disturbance", source=str(tmp_path / "first"), counts=[3, 0, 0])


def test_real_images_are_disturbed_once_each(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", "disturbance", source="real")
    assert sorted(lineage(made, i)["reference"] for i in range(18)) == sorted(case.id for case in world.cohort.training)
    with pytest.raises(ConfigError, match="disturb-repeats"):
        generate(world, tmp_path / "t", "disturbance", source="real", synthetic_per_real=2)
    spread = {"disturbance_settings#spread": 0.5, "synthetic_per_real": 2}
    assert len(generate(world, tmp_path / "t", "disturbance", source="real", **spread).training) == 36
    assert len(set(pixels(tmp_path / "t").values())) == 36


def test_a_held_out_image_is_never_disturbed(world: World, tmp_path: Path) -> None:
    for split in ("validation", "test"):
        held = world.cohort.split(split)[0]
        with pytest.raises(LeakageError, match=f"reference-held-out.*{held.id}") as caught:
            generate(world, tmp_path / "s", "disturbance", source="real", seeds=[held.id], counts=[1, 0, 0])
        assert caught.value.exit_code == 4
    first = generate(world, tmp_path / "first", counts=[1, 1, 1])
    moved = [case for case in world.cohort.training if case.group == first.training[0].group]
    kept = [case for case in world.cohort.training if case.group != first.training[0].group]
    held_out = replace(world.cohort.with_cases(training=kept, test=world.cohort.test + tuple(moved)), root=world.cohort.root)
    with pytest.raises(LeakageError):
        disturbance_plan(held_out, world.record, 0, source=str(tmp_path / "first"))


@pytest.mark.parametrize("source", ["generated", "real", "cohort"])
def test_images_of_other_classes_become_the_target(world: World, tmp_path: Path, source: str) -> None:
    options: dict[str, Any] = {"source": source, "target_label": "class1"}
    if source == "cohort":
        generate(world, tmp_path / "first", counts=[2, 1, 0])
        options["source"] = str(tmp_path / "first")
    elif source == "generated":
        options["counts"] = [2, 1, 0]
    made = generate(world, tmp_path / "s", "disturbance", **options)
    assert made.class_counts("training") == [0, 12 if source == "real" else 2, 0]
    labels = {case.id: case.label for case in world.cohort.training}
    assert all(labels[lineage(made, i)["reference"]] != 1 for i in range(len(made.training)))
    assert all(case.label == 1 and lineage(made)["intended_label"] == 1 for case in made.training)


def test_nothing_to_disturb_is_refused(world: World, tmp_path: Path) -> None:
    empty = replace(world.cohort, training=(), validation=(), test=(), name="none")
    write_cohort(empty, tmp_path / "empty")
    with pytest.raises(DataError, match="disturb-empty"):
        disturbance_plan(world.cohort, world.record, 0, source=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="disturb-empty"):
        disturbance_plan(world.cohort, world.record, 0, counts=[0, 2, 0], target_label=1)
    with pytest.raises(ConfigError, match="class-unknown.*class0, class1, class2"):
        disturbance_plan(world.cohort, world.record, 0, counts=[0, 2, 0], target_label="classs1")


def test_ordinal_cohorts_are_balanced_by_default(world: World, tmp_path: Path) -> None:
    few = [case for case in world.cohort.training if case.label != 1] + [c for c in world.cohort.training if c.label == 1][:2]
    plain, ordinal = (replace(world.cohort.with_cases(training=few), ordinal=flag) for flag in (False, True))
    assert quotas(plain, 1.0, None) == [6, 2, 6] and quotas(ordinal, 0.5, None) == [1, 5, 1]
    for overlay in (None, "disturbance"):
        assert load_config("uncertainty_guidance", "generating", None, overlay)["allocation"] is None


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"source": "real"}])
def test_a_sweep_shows_one_noise_at_several_scales(world: World, tmp_path: Path, options: dict[str, Any]) -> None:
    overlay = "disturbance" if options else None
    few = {
        "sweep_settings#recipe": JUDGE,
        "sweep_settings#scales": [5.0, 400.0],
        "sweep_settings#num_images": 6,
        "sweep_settings#columns": 4,
    }
    run = few | options | {"generating": ["$@sweep.run()"], "sweep_dir": str(tmp_path / "sweep")}
    result = generate(world, tmp_path / "s", overlay, **run)
    assert [row["scale"] for row in result["rows"]] == [0.0, 5.0, 400.0]
    changes = [row["change"] for row in result["rows"]]
    assert changes[0] == 0 and changes[2] > changes[1] > 0
    assert all(0 <= row[name] <= np.log(3) + 1e-9 for row in result["rows"] for name in ("entropy", "guide_entropy"))
    assert read_unit_png(tmp_path / "sweep" / "strips.png").shape == (3 * 16, 4 * 16)
    assert (
        json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == result == generate(world, tmp_path / "s", overlay, **run)
    )
    assert not (tmp_path / "s").exists()
    name = "disturbance_settings" if options else "guidance_settings"
    with pytest.raises(ConfigError, match="sweep-unguided"):
        generate(world, tmp_path / "s", overlay, **run, **{f"{name}#guidance": []})


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"guidance_settings#guidance": [{"measure": "doubt"}]}, "measure-unknown"),
        ({"guidance_settings#guidance": [{"measur": "entropy"}]}, "setting-unknown.*measur"),
        ({"guidance_settings#guidance": {"measure": "entropy"}}, "setting-unknown"),
        ({"guidance_settings#guidance": [{"measure": "entropy", "scale": "five"}]}, "guidance-scale"),
        ({"guidance_settings#guidance": [{"measure": "entropy", "schedule": "linear"}]}, "scale-schedule-unknown"),
        ({"guidance_settings#guidance": [{"measure": "entropy", "on": "x_T"}]}, "guidance-place.*x0hat"),
        ({"guidance_settings#annealing": {"tau": 1}}, "setting-unknown"),
        ({"guidance_settings#autoguidance": {"scale": 2}}, "setting-unknown.*run_dir"),
        ({"guidance_settings#spread": 1.0}, "guidance-scale"),
        ({"guidance_settings": {"guidance": [], "autoguidance": None, "cfg": 2}}, "setting-unknown.*cfg"),
        ({"guidance_settings#guidance": [{"measure": "entropy", "scale": 1e38}]}, "guidance-diverged|sample-not-finite"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(world: World, tmp_path: Path, change: dict[str, Any], code: str) -> None:
    with pytest.raises((ConfigError, DataError), match=code):
        generate(world, tmp_path / "s", counts=[1, 0, 0], **change)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"guidance_settings#cfg_scale": math.nan}, "guidance-scale.*cfg_scale"),
        ({"guidance_settings#autoguidance": {"run_dir": "RUN", "scale": math.nan}}, "guidance-scale.*autoguidance"),
        ({"guidance_settings#autoguidance": {"run_dir": "RUN", "scale": "a"}}, "guidance-scale.*autoguidance"),
        ({"guidance_settings#guidance": [{"measure": "entropy", "scale": 10**400}]}, "guidance-scale"),
        (
            {"guidance_settings#guidance": [{"measure": "entropy_class", "measure_options": {"class_weight": math.nan}}]},
            "class_weight",
        ),
        (
            {"guidance_settings#guidance": [{"measure": "entropy_class", "measure_options": {"class_weight": "a"}}]},
            "class_weight",
        ),
        ({"sweep_settings#scales": ["a"], "session": "@sweep", "generating": ["$@sweep.run()"]}, "sweep-scales"),
        ({"sweep_settings#scales": ["a"], "generating": ["$@sweep.run()"]}, "sweep-scales"),
        ({"classifier_dirs": ["RUN/classifier", "RUN/classifier"]}, "classifier-twice"),
    ],
)
def test_values_that_are_no_numbers_are_refused_before_a_file_is_written(
    world: World, tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    given = json.loads(json.dumps(change).replace("RUN", str(world.run)))
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        generate(world, tmp_path / "s", counts=[1, 0, 0], sweep_dir=str(tmp_path / "sweep"), **given)
    assert re.search(code, str(own_error(caught.value))) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["real", "cohort"])
def test_a_strength_that_leaves_no_step_is_refused(world: World, tmp_path: Path, source: str) -> None:
    if source == "cohort":
        generate(world, tmp_path / "first", counts=[1, 0, 0])
    start = str(tmp_path / "first") if source == "cohort" else source
    for strength in (0, 0.2):  # of 4 steps
        with pytest.raises(ConfigError, match="strength-empty.*0.25"):
            generate(world, tmp_path / "s", "disturbance", source=start, **{"disturbance_settings#strength": strength})
    with pytest.raises(ConfigError, match="strength-range"):
        generate(world, tmp_path / "s", "disturbance", source=start, **{"disturbance_settings#strength": math.nan})
    assert not (tmp_path / "s").exists()


def test_seeds_are_what_is_disturbed(world: World, tmp_path: Path) -> None:
    training = world.cohort.training
    half = [case.id for case in training[::2]]
    plan = disturbance_plan(world.cohort, world.record, 0, source="real", synthetic_per_real=1.0, seeds=half)
    assert sorted(case.reference.id for cases in plan.plan for case in cases) == sorted(half)
    for ids in ([training[0].id], training[0].id):
        one = disturbance_plan(world.cohort, world.record, 0, source="real", synthetic_per_real=1.0, seeds=ids)
        assert [case.reference.id for cases in one.plan for case in cases] == [training[0].id]
    with pytest.raises(DataError, match="class-empty.*among the seeds"):
        disturbance_plan(world.cohort, world.record, 0, source="real", counts=[1, 1, 1], seeds=half[:1])
    with pytest.raises(DataError, match="disturb-empty"):
        disturbance_plan(world.cohort, world.record, 0, source="real", synthetic_per_real=1.0, seeds=[])
    with pytest.raises(ConfigError, match="seeds-invalid"):
        disturbance_plan(world.cohort, world.record, 0, source="real", synthetic_per_real=1.0, seeds=[1])  # type: ignore[list-item]


def test_a_sweep_keeps_to_the_seeds_and_needs_no_quota(world: World, tmp_path: Path) -> None:
    ids = [case.id for case in world.cohort.training if case.label == 1][:3]
    settings = {"source": "real", "seeds": ids, "synthetic_per_real": 5.0, "sweep_dir": str(tmp_path)}
    asked = {"session": "@sweep", "generating": ["$[case.reference.id for cases in @sweep_plan for case in cases]"]}
    found = run_stage(
        "uncertainty_guidance",
        "generating",
        None,
        {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run)} | QUIET | settings | asked,
        overlay="disturbance",
    )
    assert sorted(found) == sorted(ids)


def test_a_refused_scale_does_not_lock_its_folder(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def at(scale: float) -> Any:
        term = {"measure": "classifier", "scale": scale}
        counts = {"counts": [3, 0, 0], "generation_batch_size": 1}
        return generate(world, tmp_path / "s", **counts, **{"guidance_settings#guidance": [term]})

    with pytest.raises(ConfigError, match="guidance-diverged"):
        at(1e300)
    assert len(at(1.0).training) == 3 and "guidance-saturated" not in caplog.text
    with pytest.raises(ConfigError, match="generation-other-config"):
        at(2.0)


def test_saturated_images_are_told_once(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    term = {"measure": "classifier", "scale": 1e8}
    options = {"counts": [3, 0, 0], "generation_batch_size": 1, "guidance_settings#guidance": [term]}
    generate(world, tmp_path / "s", **options)
    assert caplog.text.count("guidance-saturated") == 1


def test_sources_of_the_wrong_kind_are_named(world: World, make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not-synthetic"):
        generate(world, tmp_path / "s", "disturbance", source=str(world.cohort.root))
    two = make_cohort(tmp_path / "two", num_classes=2)
    new_classifier_run(two, tmp_path / "a")
    with pytest.raises(ConfigError, match="class-mismatch.*train one on this cohort"):
        generate(world, tmp_path / "s", counts=[1, 0, 0], classifier_dirs=[str(tmp_path / "a")])


TERM_TEXT = "[{measure: entropy, scale: 2, on: x0hat}]"


def test_the_documented_key_on_works_in_files_and_on_the_command_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"guidance_settings:\n  guidance: {TERM_TEXT}\n")
    from_file = load_config("uncertainty_guidance", "generating", str(tmp_path / "own.yaml"))["guidance_settings"]["guidance"]
    given = parse_overrides([f"guidance_settings#guidance={TERM_TEXT}"])
    assert from_file == given["guidance_settings#guidance"] == [{"measure": "entropy", "scale": 2, "on": "x0hat"}]
    made = generate(world, tmp_path / "s", counts=[1, 0, 0], **given)
    assert lineage(made)["guidance"]["terms"][0]["on"] == "x0hat"
    plain = yaml.safe_load(TERM_TEXT)  # as MONAI's own command line reads it
    assert True in plain[0] and make_terms(plain) == make_terms(from_file)


# --- the whole way ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.integration
def test_augment_makes_both_stages(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.augment import run_augment

    make_cohort(tmp_path / "cohort", per_class=15, ordinal=True)
    job = {"augment#gate_threshold": 0.0, "augment#seeds": 1, "augment#filter": JUDGE, "synthetic_per_real": 0.5}
    result = run_augment(
        "uncertainty_guidance", tmp_path / "cohort", tmp_path / "job", profile="tiny", overrides=TINY | job, allow_short=True
    )
    assert {row["arm"] for row in result["rows"]} >= {"none", "oversample"}
    made = read_cohort(tmp_path / "job" / "synthetic")
    assert {term["measure"] for term in lineage(made)["guidance"]["terms"]} == {"entropy"}
    assert (tmp_path / "job" / "run" / "classifier" / RUN_FILE).is_file()


@pytest.mark.slow
@pytest.mark.integration
def test_the_experiment_makes_every_arm_on_shared_weights(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.experiment import run_experiment

    make_cohort(tmp_path / "cohort", per_class=15)
    file = read_yaml(assets.experiment_path("uncertainty_guidance"))
    file |= {"profile": "tiny", "grading": {"networks": ["simple_cnn"], "seeds": 1, "profile": "tiny"}}
    file["shared"]["training"] |= {name: value for name, value in TINY.items() if name != "tracking"}
    file["shared"]["generating"] |= {"device_name": "cpu"}
    file["rows"][-1]["feedback"] |= {"rounds": 1, "seeds": 1, "grading_profile": "tiny"}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(file))
    result = run_experiment(str(tmp_path / "table.yaml"), tmp_path / "cohort", tmp_path / "out")
    arms = [line["arm"] for line in result["table"]]
    assert sorted(arms) == sorted(
        ["none", "oversample", "cfg", "classifier_guidance", "mgdm_entropy", "mgdm_margin", "mgdm_leastconf", "disturbed_real"]
        + ["feedback"]
    )
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    measures = {
        name: [term["measure"] for term in lineage(read_cohort(tmp_path / "out" / "synthetic" / name))["guidance"]["terms"]]
        for name in arms[2:]
        if name != "feedback"
    }
    assert measures["cfg"] == [] and measures["mgdm_margin"] == ["margin"] and measures["disturbed_real"] == ["entropy"]


# --- from another folder ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.integration
def test_monai_runs_every_overlay_from_another_folder(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    make_cohort(tmp_path / "cohort")
    common = {"dataset_dir": "cohort", "tracking#enabled": False, "device_name": "cpu"}
    small = {"max_epochs": 1, "epoch_length": 2, "batch_size": 4, "network_settings#backbone_options": BACKBONE}
    classifier = small | {"output_dir": "run/classifier", "classifier_settings": SMALL_CLASSIFIER}
    generated = {
        "run_dir": "run",
        "output_dir": "first",
        "counts": [1, 1, 1],
        "guidance_settings#guidance": yaml.safe_load(TERM_TEXT),
    }
    (tmp_path / "own.yaml").write_text(f"+disturbance_settings:\n  guidance: {TERM_TEXT}\n")
    train, classify, infer, disturb = (
        BUNDLE / "configs" / f"{name}.yaml" for name in ("train", "classifier", "inference", "disturbance")
    )
    tiny = assets.profile_path("tiny")
    run_from(tmp_path, "training", [train, tiny], **common | small | {"output_dir": "run"})
    run_from(tmp_path, "training", [train, classify, tiny], **common | classifier)
    run_from(tmp_path, "generating", [infer, tiny], **common | generated)
    files = [infer, disturb, tiny, "own.yaml"]
    run_from(tmp_path, "generating", files, **common | {"run_dir": "run", "output_dir": "second", "source": "first"})
    assert read_run(tmp_path / "run" / "classifier").iterations == 2
    assert len(read_cohort(tmp_path / "second").training) == 3
    for name in ("first", "second"):
        assert lineage(read_cohort(tmp_path / name))["guidance"]["terms"][0]["on"] == "x0hat"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort", "first", "own.yaml", "run", "second"]
