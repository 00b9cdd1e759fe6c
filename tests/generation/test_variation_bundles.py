"""The bundles `bottleneck_perturbation` and `sdedit` through their own configs: plans, bytes, lineage, refusals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_run import DIFFUSION, World
from test_variations import new_network
from tiny_run import BACKBONE

from medaug import assets
from medaug.cohort import Cohort, check_against, read_cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.generation import generate as generation
from medaug.generation.generate import PlanBatches, VariationBatches
from medaug.generation.plan import make_plan, seed_batches, variation_plan
from medaug.generation.pretrained import digest, start_from
from medaug.io.raster import read_unit_png
from medaug.networks.build import build_guided_unet
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.weights import save_weights
from medaug.training.run_folder import new_record, write_run
from medaug.workflow import STAGES, load_config, read_yaml, run_stage

BUNDLES = ("bottleneck_perturbation", "sdedit")
NETWORK = {"backbone": "lean", "class_conditional": True, "backbone_options": BACKBONE, "reference": None}
SAMPLER = {"num_inference_steps": 4, "spacing": "karras", "sigma_min": 0.02, "sigma_max": 80.0, "guidance_scale": 1.5}
QUIET = {"tracking": {"enabled": False}, "device_name": "cpu"}
TINY = QUIET | {
    "network_settings#backbone_options": BACKBONE,
    "batch_size": 4,
    "epoch_length": 2,
    "max_epochs": 2,
    "preview_every": 0,
}


@pytest.fixture(scope="module")
def world(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("variations")
    cohort = make_cohort(root / "cohort", per_class=10)
    settings = {"network": NETWORK, "diffusion": DIFFUSION, "sampler": SAMPLER}
    record = new_record("bottleneck_perturbation", cohort, settings, 0)
    return World(cohort, write_run(root / "run", record, new_network(dtype=torch.float32), 1), root / "run")


def generate(world: World, out: Path, bundle: str = "bottleneck_perturbation", **overrides: Any) -> Cohort:
    """`medaug generate` in this process."""
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(out)}
    made: Cohort = run_stage(bundle, "generating", None, paths | QUIET | {"generation_batch_size": 4} | overrides)
    return made


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


# --- plans ------------------------------------------------------------------------------------------------------------


def test_every_training_image_has_n_variations(world: World) -> None:
    plan = variation_plan(world.cohort, world.record, 0, synthetic_per_real=3)
    cases = [case for label in plan for case in label]
    assert Counter(case.reference.id for case in cases) == {case.id: 3 for case in world.cohort.training}
    assert {case.variation for case in cases} == {0, 1, 2}
    assert len({case.id for case in cases}) == len(cases)
    assert all(case.label == case.reference.label for case in cases)


@pytest.mark.parametrize(("small", "large"), [(1, 2), (2, 30)])
def test_ids_stay_when_a_plan_grows(world: World, small: int, large: int) -> None:
    few, many = (variation_plan(world.cohort, world.record, 0, synthetic_per_real=n) for n in (small, large))
    for one, other in zip(few, many, strict=True):
        assert other[: len(one)] == one


def test_an_id_belongs_to_its_seed_image_not_to_its_place(world: World) -> None:
    chosen = [case.id for case in world.cohort.training][::2]
    whole, part = (
        {(case.reference.id, case.variation): case.id for label in plan for case in label}
        for plan in (
            variation_plan(world.cohort, world.record, 0, synthetic_per_real=4),
            variation_plan(world.cohort, world.record, 0, counts=[5, 5, 5], seeds=chosen),
        )
    )
    assert part.items() <= whole.items() and {name for name, _ in part} == set(chosen)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("counts", [[18, 0, 5], [1, 1, 1], [60, 6, 7]])
def test_batches_hold_every_image_once_and_whole_seed_images(world: World, batch_size: int, counts: list[int]) -> None:
    plan = variation_plan(world.cohort, world.record, 0, counts=counts)
    cut = seed_batches(plan, batch_size)
    assert sorted(case.id for batch in cut for case in batch) == sorted(case.id for label in plan for case in label)
    assert max(map(len, cut)) <= batch_size
    places: dict[str, list[int]] = {}
    for index, batch in enumerate(cut):
        for name in {case.reference.id for case in batch}:
            places.setdefault(name, []).append(index)
    for indices in places.values():  # a seed image in several batches has them to itself
        if len(indices) > 1:
            assert indices == list(range(indices[0], indices[-1] + 1))
            assert all(len({case.reference.id for case in cut[i]}) == 1 for i in indices)


def test_p3_13_a_held_out_seed_image_is_refused(world: World, tmp_path: Path) -> None:
    for split in ("validation", "test"):
        held = world.cohort.split(split)[0]
        with pytest.raises(LeakageError, match=f"reference-held-out.*{held.id}") as caught:
            generate(world, tmp_path / "s", seeds=[world.cohort.training[0].id, held.id], counts=[1, 0, 0])
        assert caught.value.exit_code == 4 and not (tmp_path / "s").exists()
        plan = make_plan(world.cohort, [1, 0, 0], 0, "w")
        plan[0][0] = replace(plan[0][0], reference=held)
        for batches in (PlanBatches, VariationBatches):
            with pytest.raises(LeakageError, match="reference-held-out"):
                batches(world.cohort, plan, 4)
    with pytest.raises(DataError, match="seed-unknown"):
        generate(world, tmp_path / "s", seeds=["nobody"], counts=[1, 0, 0])


# --- generation -------------------------------------------------------------------------------------------------------


def test_a_variation_has_its_lineage(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", synthetic_per_real=2, seed=3, **{"variation_settings#strength": 0.75})
    check_against(made, world.cohort)
    training = {case.id: case for case in world.cohort.training}
    assert len(made.training) == 2 * len(training)
    for case in made.training:
        lineage = case.lineage or {}
        seed_image = training[lineage["reference"]]
        assert (case.group, case.label, case.patient) == (seed_image.group, seed_image.label, seed_image.patient)
        assert lineage["noise"] == {
            "scale": 0.25,
            "mode": "relative",
            "location": "bottleneck",
            "terms": "x0_only",
            "cfg_noise": "shared",
        }
        assert lineage["inversion"] == {"name": "cycle", "strength": 0.75, "eta": 1.0}
        assert lineage["guidance"] == {"scale": 1.5} and lineage["variation"] in (0, 1)
        assert (lineage["bundle"], lineage["seed"], lineage["sampler"]["seed"]) == ("bottleneck_perturbation", 3, 3)
        assert lineage["fit_on"] == world.record.fit_on and lineage["weights_sha256"] == world.record.weights_sha256


def test_scale_0_gives_the_training_images_back_as_files(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", counts=[3, 0, 3], **{"variation_settings#scale": 0.0})
    training = {case.id: case for case in world.cohort.training}
    for case in made.training:
        real = read_unit_png(world.cohort.path(training[(case.lineage or {})["reference"]]))
        assert abs(read_unit_png(made.path(case)) - real).max() < 1e-3  # float32 over the way there and back


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_killed_generation_goes_on_with_the_same_bytes(
    world: World, tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(world, tmp_path / "whole", bundle, counts=[13, 6, 2])
    calls, original = [], generation.save_batch

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "save_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(world, tmp_path / "killed", bundle, counts=[13, 6, 2])
    (tmp_path / "killed" / "images" / next(iter(images(tmp_path / "killed")))).unlink()
    resumed = generate(world, tmp_path / "killed", bundle, counts=[13, 6, 2])
    assert images(tmp_path / "killed") == images(tmp_path / "whole")
    assert resumed.content_sha256 == whole.content_sha256


def test_a_larger_plan_costs_what_it_adds(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(world, tmp_path / "s", synthetic_per_real=2)
    before, made = images(tmp_path / "s"), []
    original = generation.sample_batch

    def counting(engine: Any, batch: Any) -> Any:
        made.extend(batch["id"])
        return original(engine, batch)

    monkeypatch.setattr(generation, "sample_batch", counting)
    generate(world, tmp_path / "s", synthetic_per_real=3)
    after = images(tmp_path / "s")
    assert before.items() <= after.items() and len(made) == len(after) - len(before) == len(world.cohort.training)


def test_an_image_is_inverted_once_for_all_its_variations(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = GuidedUNet.encode

    def counting(self: GuidedUNet, x: Any, *more: Any, **named: Any) -> Any:
        sizes.append(len(x) // 2)  # two passes of guidance
        return encode(self, x, *more, **named)

    monkeypatch.setattr(GuidedUNet, "encode", counting)
    generate(world, tmp_path / "s", synthetic_per_real=6, generation_batch_size=4)  # a seed image needs two batches
    steps, seeds = 3, len(world.cohort.training)  # 0.8 of 4 steps
    assert sum(sizes) == steps * seeds + steps * 6 * seeds


def test_other_settings_need_another_folder(world: World, tmp_path: Path) -> None:
    generate(world, tmp_path / "s", counts=[1, 0, 0])
    for change in ({"variation_settings#scale": 0.5}, {"variation_settings#location": "xt"}, {"seed": 1}):
        with pytest.raises(ConfigError, match="generation-other-config"):
            generate(world, tmp_path / "s", counts=[1, 0, 0], **change)


def test_classes_with_two_images_are_varied(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    whole = make_cohort(tmp_path / "cohort", num_classes=2, per_class=10)
    few = [case for label in range(2) for case in [c for c in whole.training if c.label == label][:2]]
    cohort = write_cohort(whole.with_cases(training=few), tmp_path / "cohort")
    settings = {"network": NETWORK, "diffusion": DIFFUSION, "sampler": SAMPLER}
    network = build_guided_unet(NETWORK, 1, 2)
    record = write_run(tmp_path / "run", new_record("bottleneck_perturbation", cohort, settings, 0), network, 1)
    made = generate(World(cohort, record, tmp_path / "run"), tmp_path / "s", synthetic_per_real=30)
    assert made.class_counts("training") == [60, 60]


def test_the_calibrated_scale_is_the_one_used(world: World, tmp_path: Path) -> None:
    pilot = {
        "scales": [0.05],
        "num_seeds": 6,
        "least_agreement": 0.0,
        "recipe": {"num_steps": 4, "evaluate_every": 2, "batch_size": 8},
    }
    options = {"calibrate": True, "calibration_settings": pilot, "calibration_dir": str(tmp_path / "c"), "counts": [1, 0, 0]}
    # Four steps of a judge see no difference that weak augmentation does not make: the rule may refuse, but it has run.
    try:
        made = generate(world, tmp_path / "s", **options)
        assert (made.training[0].lineage or {})["noise"]["scale"] == 0.05
    except DataError as error:
        assert error.code in ("calibration-too-weak", "calibration-labels-destroyed")
        assert not (tmp_path / "s").exists()
    assert (tmp_path / "c" / "calibration.json").is_file()


def test_amst_labels_the_variations(world: World, tmp_path: Path) -> None:
    generate(world, tmp_path / "s", counts=[3, 3, 3])
    few = {"num_steps": 4, "evaluate_every": 2, "batch_size": 8}
    options = {"accepted_dir": str(tmp_path / "a"), "amst_settings": {"threshold": 1.0}, "amst_classifier": few}
    run = {"generating": ["$@labeller()"]}
    result: Any = generate(world, tmp_path / "s", counts=[3, 3, 3], **run, **options)
    verdicts = json.loads((tmp_path / "a" / "gate.json").read_text())["verdicts"]
    assert len(verdicts) == 9 and all(0 <= entry["uncertainty"] < 1 for entry in verdicts)
    assert {entry["id"] for entry in verdicts} >= {case.id for case in result.accepted.training}


# --- training ---------------------------------------------------------------------------------------------------------


def train(cohort: Cohort, out: Path, bundle: str = "bottleneck_perturbation", **overrides: Any) -> Any:
    return run_stage(bundle, "training", "tiny", TINY | {"dataset_dir": str(cohort.root), "output_dir": str(out)} | overrides)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_trains_generates_and_measures(world: World, tmp_path: Path, bundle: str) -> None:
    record = train(world.cohort, tmp_path / "run", bundle, preview_every=2)
    assert record.settings["network"]["reference"] is None and record.settings["network"]["class_conditional"]
    assert record.settings["diffusion"]["weighting"] is None and record.settings["diffusion"]["parameterisation"] == "edm"
    assert (tmp_path / "run" / "samples" / "epoch_0002.png").is_file()
    made = generate(World(world.cohort, record, tmp_path / "run"), tmp_path / "s", bundle, counts=[2, 2, 0])
    assert (made.training[0].lineage or {})["sampler"]["num_inference_steps"] == 8  # of the profile
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(tmp_path / "run"), "output_dir": str(tmp_path / "e")}
    judge = {"samples_per_class": 2}
    metrics = run_stage(bundle, "evaluating", "tiny", paths | QUIET | judge)
    assert metrics["scale"] == (0.25 if bundle == "bottleneck_perturbation" else 0.0)
    assert metrics["samples"] == 6 and metrics["weights_sha256"] == record.weights_sha256


def test_p2_trains_a_network_that_predicts_the_noise(world: World, tmp_path: Path) -> None:
    p2 = {"weighting": "p2", "weighting_options": {"k": 1.0, "gamma": 1.0}}
    linear = {"parameterisation": "epsilon", "schedule": "linear_beta", "num_train_timesteps": 1000}
    record = train(world.cohort, tmp_path / "run", diffusion_settings=linear, weighting_settings=p2)
    assert record.settings["diffusion"] == linear | p2


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_weighting_over_edm_and_two_weightings_are_refused(world: World, tmp_path: Path, bundle: str) -> None:
    p2, linear = {"weighting": "p2"}, {"parameterisation": "epsilon", "schedule": "linear_beta", "num_train_timesteps": 1000}
    for code, changes in (
        ("weighting-edm.*p2.*weighting_settings", {"weighting_settings": p2}),
        ("weighting-edm", {"diffusion_settings#weighting": "p2"}),
        ("weighting-twice", {"diffusion_settings": linear | {"weighting": "min_snr"}, "weighting_settings": p2}),
    ):
        with pytest.raises(ConfigError, match=code):
            train(world.cohort, tmp_path / "run", bundle, **changes)
    assert not (tmp_path / "run" / "run.json").exists()


def test_evaluation_takes_the_calibrated_scale(world: World, tmp_path: Path) -> None:
    record = train(world.cohort, tmp_path / "run")
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(tmp_path / "run")}

    def scale(name: str, **changes: Any) -> float:
        options = {"output_dir": str(tmp_path / name), "evaluating": ["$@session.evaluator.inferer.scale"]}
        return float(run_stage("bottleneck_perturbation", "evaluating", "tiny", paths | QUIET | options | changes))

    assert scale("before") == 0.25
    few = {"num_steps": 4, "evaluate_every": 2, "batch_size": 8}
    pilot = {"scales": [0.6], "num_seeds": 6, "least_agreement": 0.0, "recipe": few}
    step = {"generating": ["$@calibration.run()"], "calibration_settings": pilot}
    with suppress(DataError):  # the judge of four steps may refuse
        run_stage("bottleneck_perturbation", "generating", "tiny", paths | QUIET | step)
    file = tmp_path / "run" / "calibration" / "calibration.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"scale": 0.6}))
    assert result["weights_sha256"] == record.weights_sha256
    assert scale("after") == 0.6
    assert scale("asked", **{"variation_settings#scale": 0.1}) == 0.1


def test_training_goes_on_from_a_checkpoint(world: World, tmp_path: Path) -> None:
    fresh = train(world.cohort, tmp_path / "a")
    start = str(tmp_path / "a" / "model.safetensors")
    on = train(world.cohort, tmp_path / "b", checkpoint=start, learning_rate=1e-12)
    assert on.settings["training"]["checkpoint"] == fresh.weights_sha256 == digest(start)
    assert on.config_sha256 != fresh.config_sha256
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_a_checkpoint_that_does_not_fit_is_refused(world: World, make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    train(world.cohort, tmp_path / "a")
    start = tmp_path / "a" / "model.safetensors"
    two = make_cohort(tmp_path / "two", num_classes=2)
    with pytest.raises(ConfigError, match="weights-classes.*3 classes, this cohort has 2"):
        train(two, tmp_path / "b", checkpoint=str(start))
    with pytest.raises(ConfigError, match="weights-missing"):
        train(world.cohort, tmp_path / "b", checkpoint=str(tmp_path / "none.safetensors"))
    with pytest.raises(ConfigError, match="weights-mismatch"):
        train(world.cohort, tmp_path / "b", checkpoint=str(start), **{"network_settings#backbone_options": {"channels": [8, 16]}})
    held = world.cohort.with_cases(training=world.cohort.training[2:], test=world.cohort.test + world.cohort.training[:2])
    network = new_network(dtype=torch.float32)
    write_run(tmp_path / "c", world.record, network, 1)
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        start_from(network, str(tmp_path / "c" / "model.safetensors"), held)


def test_a_checkpoint_of_unknown_origin_needs_the_users_word(world: World, tmp_path: Path) -> None:
    source, network = new_network(seed=5, dtype=torch.float32), new_network(dtype=torch.float32)
    path = tmp_path / "foreign.safetensors"
    save_weights(path, source, {"num_classes": "3"})
    with pytest.raises(LeakageError, match="fit-unknown.*checkpoint_trusted") as caught:
        start_from(network, str(path), world.cohort)
    assert caught.value.exit_code == 4
    start_from(network, str(path), world.cohort, trusted=True)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), source.parameters(), strict=True))
    assert start_from(network, None, world.cohort) is network and digest(None) is None


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("profile", [None, *assets.list_profiles()])
def test_every_profile_fits_and_leaves_the_method_alone(bundle: str, profile: str | None) -> None:
    config = load_config(bundle, "training", profile)
    assert config["network_settings"]["reference"] is None and config["network_settings"]["class_conditional"] is True
    edm = config["diffusion_settings"]["parameterisation"] == "edm"  # which has a weighting of its own
    assert config["weighting_settings"] == (None if edm else {"weighting": "p2", "weighting_options": {"k": 1.0, "gamma": 1.0}})
    assert edm == (profile is not None) and not config["diffusion_settings"].get("weighting")
    assert not {"reference", "condition_dropout"} & set(config)
    inference = load_config(bundle, "generating", profile)
    assert inference["variation_settings"] == load_config(bundle, "generating")["variation_settings"]
    guided = load_config("guided_ddpm", "training", profile)
    assert guided["network_settings"]["reference"] == {"feature": "blocks", "pretrained_path": None}


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("stage", STAGES)
def test_bundle_names_itself_and_holds_no_path(bundle: str, stage: str) -> None:
    path = assets.bundle_root(bundle) / "configs" / STAGES[stage]
    assert read_yaml(path)["bundle_root"] == f"$str(assets.bundle_root('{bundle}'))"
    assert "lambda " not in path.read_text().replace("lambda =", "")


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(("stage", "kind"), [("training", "train"), ("generating", "infer")])
def test_monai_finds_the_properties_it_asks_for(world: World, tmp_path: Path, bundle: str, stage: str, kind: str) -> None:
    from monai.bundle import ConfigWorkflow

    root = assets.bundle_root(bundle)
    workflow = ConfigWorkflow(
        config_file=[str(root / "configs" / STAGES[stage]), str(assets.profile_path("tiny"))],
        workflow_type=kind,
        run_id=stage,
        init_id=None,
        final_id=None,
        logging_file=str(root / "configs" / "logging.conf"),
        dataset_dir=str(world.cohort.root),
        output_dir=str(tmp_path / "out"),
        **({"run_dir": str(world.run)} if stage == "generating" else {}),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert not (tmp_path / "out").exists()


def test_both_bundles_sample_the_same_weights(world: World, tmp_path: Path) -> None:
    one, other = (generate(world, tmp_path / bundle, bundle, counts=[2, 0, 0]) for bundle in BUNDLES)
    assert [case.id for case in one.training] == [case.id for case in other.training]
    assert one.content_sha256 != other.content_sha256
    inversion = (read_cohort(tmp_path / "sdedit").training[0].lineage or {})["inversion"]
    assert inversion == {"name": "none", "strength": 0.5, "step": "dpm_solver_pp_2m"}
