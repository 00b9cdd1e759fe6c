"""Text-conditioned training and sampling, and the bundle `text_to_image` through its own configs."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai_run import run_from
from random_run import DIFFUSION, World
from tiny_run import BACKBONE, randomised

from medaug import assets
from medaug.cohort import Cohort, check_against
from medaug.draws import randn
from medaug.errors import ConfigError
from medaug.generation import generate as generation
from medaug.generation.generate import read_synthetic
from medaug.generation.text_to_image import PromptedSampler, make_prompted_sampler, run_prompts
from medaug.io.raster import read_unit_png
from medaug.networks.build import build_guided_unet
from medaug.networks.conditioning import with_conditioning
from medaug.prompts import Prompts, make_prompts
from medaug.training import diffusion as training
from medaug.training.diffusion import GuidedIteration, build_objective, guided_losses
from medaug.training.run_folder import new_record, write_run
from medaug.workflow import STAGES, load_config, read_yaml, run_stage

BUNDLE = assets.bundle_root("text_to_image")
QUIET = {"tracking": {"enabled": False}, "device_name": "cpu"}
TEXT = {"encoder": "hashed_text", "options": {"dimension": 8}}
TOKENS = {"encoder": "class_token", "options": {"dimension": 8, "tokens": 2}}
NETWORK = {"backbone": "lean", "backbone_options": BACKBONE}
SAMPLER = {
    "step": "dpm_solver_pp_2m",
    "num_inference_steps": 3,
    "spacing": "karras",
    "sigma_min": 0.02,
    "sigma_max": 80.0,
    "guidance_scale": 2.0,
}
TINY = QUIET | {
    "network_settings#backbone_options": BACKBONE,
    "conditioning_settings#options": {"dimension": 8},
    "batch_size": 4,
    "epoch_length": 2,
    "max_epochs": 3,
    "warmup_steps": 2,
    "preview_every": 0,
}


def text_network(conditioning: Any = TEXT, num_classes: int = 3, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_guided_unet(with_conditioning(NETWORK, conditioning), 1, num_classes)
    randomised(network.unet, seed, 0.2)
    return network.eval()


def new_text_run(cohort: Cohort, folder: Path, conditioning: Any = TEXT) -> World:
    """A run folder as training leaves it, with random weights."""
    texts = make_prompts(cohort.classes, templates=["syn1", "syn2"]).texts
    named = {"network": with_conditioning(NETWORK, conditioning), "diffusion": DIFFUSION, "sampler": SAMPLER}
    record = new_record("text_to_image", cohort, named | {"prompts": [list(choices) for choices in texts]}, 0)
    return World(cohort, write_run(folder, record, text_network(conditioning, len(cohort.classes)), 1), folder)


@pytest.fixture(scope="module")
def world(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("text")
    return new_text_run(make_cohort(root / "cohort", per_class=10), root / "run")


def generate(world: World, out: Path, counts: list[int], **overrides: Any) -> Cohort:
    """`medaug generate` in this process."""
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(out)}
    plain = QUIET | {"counts": counts, "generation_batch_size": 4}
    made: Cohort = run_stage("text_to_image", "generating", None, paths | plain | overrides)
    return made


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def request(number: int, label: int = 0) -> dict[str, Any]:
    return {"id": [f"i{n}" for n in range(number)], "label": torch.full((number,), label), "shape": (16, 16)}


# --- sampler ----------------------------------------------------------------------------------------------------------


def own_sampler(prompts: Prompts, **settings: Any) -> PromptedSampler:
    return make_prompted_sampler(DIFFUSION, SAMPLER, prompts, **settings)


def test_scale_1_is_the_conditional_model_and_0_the_one_without_a_prompt() -> None:
    network, prompts = text_network(), make_prompts(["a", "b", "c"])
    x_t = randn((3, 1, 16, 16), "x")
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        for scale, context in ((1.0, network.context(["a", "b", "c"])), (0.0, network.null_context(3))):
            asked = own_sampler(prompts, guidance_scale=scale).conditional({"id": ["x", "y", "z"], "label": labels}, network)
            found = asked(x_t, 500)
            plain = replace(asked, context=context, guidance_scale=1.0)(x_t, 500)
            torch.testing.assert_close(found.x_0, plain.x_0, atol=1e-5, rtol=1e-5)  # a batch of 6 beside one of 3
            assert asked.passes == (1 if scale == 1 else 2)


def test_guidance_is_linear_in_its_scale_and_leads_away_from_the_negative_prompt() -> None:
    network, prompts, x_t = text_network(), make_prompts(["a", "b", "c"]), randn((2, 1, 16, 16), "x")
    with torch.no_grad():

        def estimate(scale: float, negative: str | None = None, label: int = 0) -> torch.Tensor:
            sampler = own_sampler(prompts, guidance_scale=scale, negative_prompt=negative)
            return sampler.conditional(request(2, label), network)(x_t, 500).x_0

        for negative in (None, "b"):
            zero = estimate(0.0, negative)
            torch.testing.assert_close(estimate(3.0, negative), zero + 3 * (estimate(1.0) - zero), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(estimate(0.0, "b"), estimate(1.0, label=1), atol=1e-5, rtol=1e-5)


def test_images_follow_their_own_prompts_and_not_their_batch() -> None:
    network, prompts = text_network(), make_prompts(["a", "b", "c"], templates=["syn1", "syn2"])
    sampler = own_sampler(prompts)
    together = sampler(request(6), network)
    drawn = [sampler.prompt(0, f"i{n}") for n in range(6)]
    assert set(drawn) == {"a", "a photo of a a"}  # the key sees both
    alone = torch.cat([sampler({"id": [f"i{n}"], "label": torch.tensor([0]), "shape": (16, 16)}, network) for n in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    other = own_sampler(Prompts((("something else",), ("b",), ("c",))))(request(6), network)
    assert (together - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_class_tokens_read_the_class() -> None:
    network = text_network(TOKENS)
    sampler = own_sampler(make_prompts(["a", "b", "c"]))
    assert (sampler(request(2, 0), network) - sampler(request(2, 1), network)).abs().max() > 1e-3
    renamed = own_sampler(make_prompts(["x", "y", "z"]))
    assert torch.equal(sampler(request(2), network), renamed(request(2), network))
    with pytest.raises(ConfigError, match="negative-prompt-unread.*class tokens"):
        own_sampler(make_prompts(["a", "b", "c"]), negative_prompt="b")(request(2), network)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"negative_prompt": " "}, "prompt-empty"),
        ({"negative_prompt": "b", "guidance_scale": 1.0}, "negative-prompt-unread"),
        ({"guidance_scale": float("nan")}, "guidance-scale"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        own_sampler(make_prompts(["a"]), **settings)
    with pytest.raises(ConfigError, match="setting-unknown"):
        make_prompted_sampler(DIFFUSION, SAMPLER | {"steps": 3}, make_prompts(["a"]))


# --- training ---------------------------------------------------------------------------------------------------------


def step_of(prompts: Prompts | None, **options: Any) -> Any:
    nothing = SimpleNamespace()
    return GuidedIteration(ema=nothing, scheduler=nothing, prompts=prompts, **options)  # type: ignore[arg-type]


def keyed_batch(images: torch.Tensor, labels: list[int], iteration: int) -> dict[str, Any]:
    size = len(labels)
    return {"image": images, "label": torch.tensor(labels), "iteration": [iteration] * size, "position": list(range(size))}


@pytest.mark.parametrize("conditioning", [TEXT, TOKENS], ids=["text", "class"])
def test_the_context_is_dropped_per_image_with_its_share(conditioning: Any) -> None:
    network, objective, seen = text_network(conditioning), build_objective(DIFFUSION), []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True)
    size, shares = 500, {}
    for share in (0.0, 0.1, 1.0):
        step = step_of(make_prompts(["a", "b", "c"]), label_dropout=share)
        with torch.no_grad():
            guided_losses(network, objective, None, keyed_batch(torch.zeros(size, 1, 4, 4), [1] * size, 7), step, "cpu")  # type: ignore[arg-type]
            is_null = (seen[-1] == network.null_context(size)).flatten(1).all(dim=1)
            own = network.context(["b"] if network.takes_text else torch.tensor([1]))
            assert (seen[-1][~is_null] == own).all()
        shares[share] = float(is_null.float().mean())
    assert (shares[0.0], shares[1.0]) == (0.0, 1.0)
    assert shares[0.1] == pytest.approx(0.1, abs=4 * (0.09 / size) ** 0.5)
    own_sampler(make_prompts(["a", "b", "c"]), guidance_scale=1.0)(request(2), network)
    network(
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2),
        context=network.context(["a", "b"] if network.takes_text else torch.tensor([0, 1])),
    )
    assert not (seen[-1] == network.null_context(2)).flatten(1).all(dim=1).any()  # nothing is dropped but in training


def test_a_network_that_reads_texts_is_not_trained_without() -> None:
    with pytest.raises(ConfigError, match="prompts-missing"):
        batch = keyed_batch(torch.zeros(1, 1, 4, 4), [0], 1)
        guided_losses(text_network(), build_objective(DIFFUSION), None, batch, step_of(None), "cpu")  # type: ignore[arg-type]


def test_prompts_decide_the_class_of_an_overfitted_model() -> None:
    """Two pictures, two classes whose names share a word, two templates: the same noise becomes the picture that the prompt names."""
    pictures = torch.full((2, 1, 8, 8), -0.5)
    pictures[0, :, :4], pictures[1, :, 4:] = 0.5, 0.5
    prompts = make_prompts(["alpha_nodule", "beta_nodule"], templates=["syn1", "syn2"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {"backbone": "lean", "backbone_options": {"channels": [16, 16], "patch": 2}}
        network = build_guided_unet(with_conditioning(small, TEXT), 1, 2)
    # Heavy noise in training: there the picture is decided, and the prompt alone can tell which.
    diffusion = DIFFUSION | {"parameterisation_options": {"p_mean": 0.5, "p_std": 1.5}}
    objective, step = build_objective(diffusion), step_of(prompts, label_dropout=0.1)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    labels = [0, 1] * 8
    for iteration in range(250):
        batch = keyed_batch(pictures[labels], labels, iteration)
        loss = guided_losses(network, objective, None, batch, step, "cpu")["loss_noise"]  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    sampler = make_prompted_sampler(diffusion, SAMPLER | {"num_inference_steps": 8, "sigma_max": 20.0}, prompts)
    for label in (0, 1):
        samples = sampler(request(8, label) | {"shape": (8, 8)}, network)
        assert {sampler.prompt(label, f"i{n}") for n in range(8)} == set(prompts.texts[label])
        errors = (samples[:, None] - pictures[None]).square().mean(dim=(2, 3, 4))
        assert (errors.argmin(dim=1) == label).all()


def test_a_killed_training_ends_with_the_same_bytes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(out: str) -> Any:
        own = {"dataset_dir": str(world.cohort.root), "output_dir": str(tmp_path / out)}
        return run_stage("text_to_image", "training", "tiny", TINY | own)

    whole, calls, original = train("whole"), [], training.guided_losses

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "guided_losses", failing)
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    assert train("killed") == whole == train("whole")
    assert (tmp_path / "killed" / "run.json").read_bytes() == (tmp_path / "whole" / "run.json").read_bytes()
    assert whole.settings["network"]["class_conditional"] is False  # the profile says otherwise
    assert whole.settings["prompts"][1] == ["class1", "a photo of a class1"]


# --- bundle -----------------------------------------------------------------------------------------------------------


def test_the_papers_values() -> None:
    train, generating = load_config(str(BUNDLE), "training"), load_config(str(BUNDLE), "generating")
    assert (train["learning_rate"], train["label_dropout"], train["prompt_settings"]["templates"]) == (
        1e-4,
        0.1,
        ["syn1", "syn2"],
    )
    sampler = train["sampler_settings"]
    assert (sampler["step"], sampler["num_inference_steps"], sampler["guidance_scale"]) == ("ddim", 50, 7.5)
    assert generating["synthetic_per_real"] == 1.0 and generating["prompt_settings"] is None


@pytest.mark.parametrize("profile", assets.list_profiles())
def test_every_profile_fits(profile: str) -> None:
    config = load_config("text_to_image", "training", profile)
    options = config["conditioning_settings"]
    network = build_guided_unet(with_conditioning(config["network_settings"], options), 1, 3)
    assert network.num_classes is None and network.takes_text and not network.with_fusion
    make_prompted_sampler(config["diffusion_settings"], config["sampler_settings"], make_prompts(["a"]))
    make_prompted_sampler(config["diffusion_settings"], config["preview_sampler"], make_prompts(["a"]))


def test_the_preset_can_be_built() -> None:
    config = load_config("text_to_image", "training")
    with torch.device("meta"):
        network = build_guided_unet(with_conditioning(config["network_settings"], config["conditioning_settings"]), 1, 3)
    assert network.unet.context_dim == 128
    make_prompted_sampler(config["diffusion_settings"], config["sampler_settings"], make_prompts(["a"]))


@pytest.mark.parametrize("name", sorted(path.name for path in (BUNDLE / "configs").glob("*.yaml")))
def test_configs_hold_no_path_and_no_program(name: str) -> None:
    assert "lambda " not in (BUNDLE / "configs" / name).read_text()
    if name in STAGES.values():
        assert read_yaml(BUNDLE / "configs" / name)["bundle_root"] == "$str(assets.bundle_root('text_to_image'))"


@pytest.mark.parametrize(("stage", "kind"), [("training", "train"), ("generating", "infer")])
def test_monai_finds_the_properties_it_asks_for(world: World, tmp_path: Path, stage: str, kind: str) -> None:
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / STAGES[stage]), str(assets.profile_path("tiny"))],
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


def test_every_image_says_what_it_was_asked_for(world: World, tmp_path: Path) -> None:
    made = generate(world, tmp_path / "s", [3, 2, 0], seed=5, negative_prompt="noise", guidance_scale=4.0)
    assert read_synthetic(tmp_path / "s") == made and made.class_counts("training") == [3, 2, 0]
    check_against(made, world.cohort)
    training_cases = {case.id: case for case in world.cohort.training}
    prompts = run_prompts(world.record, world.cohort.classes)
    for case in made.training:
        lineage = case.lineage or {}
        assert lineage["prompt"] == prompts.prompt(case.label, 5, case.id)
        assert (lineage["negative_prompt"], lineage["guidance"], lineage["num_inference_steps"]) == ("noise", {"scale": 4.0}, 3)
        reference = training_cases[lineage["reference"]]
        assert (case.group, case.label, case.acquisition) == (reference.group, reference.label, {})
    other = tmp_path / "prompts.jsonl"
    other.write_text("\n".join(json.dumps({"label": name, "prompt": f"{name} again"}) for name in world.cohort.classes))
    again = generate(world, tmp_path / "t", [1, 0, 0], prompt_settings={"file": str(other)})
    assert (again.training[0].lineage or {})["prompt"] == "class0 again"
    assert str(tmp_path) not in (tmp_path / "t" / "cohort.json").read_text()
    with pytest.raises(ConfigError, match="generation-other-config"):
        generate(world, tmp_path / "t", [1, 0, 0])


def test_images_do_not_depend_on_their_batch(world: World, tmp_path: Path) -> None:
    for size in (1, 4):
        generate(world, tmp_path / str(size), [3, 2, 0], generation_batch_size=size)
    one, four = (tmp_path / name / "images" for name in ("1", "4"))
    for path in one.iterdir():
        np.testing.assert_allclose(read_unit_png(path), read_unit_png(four / path.name), atol=2e-4)


def test_a_killed_generation_ends_with_the_same_bytes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(world, tmp_path / "whole", [5, 6, 2])
    calls, original = [], generation.save_batch

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "save_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(world, tmp_path / "killed", [5, 6, 2])
    resumed = generate(world, tmp_path / "killed", [5, 6, 2])
    assert pixels(tmp_path / "killed") == pixels(tmp_path / "whole")
    assert resumed.content_sha256 == whole.content_sha256


def test_training_and_generation_ask_no_network(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    own = {"dataset_dir": str(world.cohort.root), "output_dir": str(tmp_path / "run"), "max_epochs": 1, "preview_every": 1}
    tokens = {"conditioning_settings": TOKENS}
    record = run_stage("text_to_image", "training", "tiny", TINY | own | tokens)
    made = generate(World(world.cohort, record, tmp_path / "run"), tmp_path / "s", [1, 1, 0])
    assert [(case.lineage or {})["prompt"] for case in made.training] == ["class0", "class1"]  # a token has no other words
    assert generate(world, tmp_path / "t", [1, 0, 0]).class_counts("training") == [1, 0, 0]


def test_runs_that_read_no_prompt_are_refused(world: World, tmp_path: Path) -> None:
    bare = replace(world.record, settings={"network": NETWORK})
    with pytest.raises(ConfigError, match="prompts-missing.*text_to_image"):
        run_prompts(bare, world.cohort.classes)
    tokens = replace(world.record, settings=world.record.settings | {"network": {"conditioning": TOKENS}})
    with pytest.raises(ConfigError, match="prompts-unread"):
        run_prompts(tokens, world.cohort.classes, {"templates": "syn1"})
    with pytest.raises(ConfigError, match="prompts-missing.*record"):
        run_prompts(replace(world.record, settings={"network": {"conditioning": TEXT}}), world.cohort.classes)
    with pytest.raises(ConfigError, match="setting-unknown.*template"):
        generate(world, tmp_path / "s", [1, 0, 0], prompt_settings={"template": "syn1"})
    with pytest.raises(ConfigError, match="text-encoder-option"):
        generate(world, tmp_path / "s", [1, 0, 0], text_encoder_dir=str(tmp_path))
    assert not (tmp_path / "s" / "images").exists()


@pytest.mark.slow  # trains a judge
def test_evaluation_measures_fresh_images(world: World, tmp_path: Path) -> None:
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(tmp_path / "e")}
    assert run_stage("text_to_image", "evaluating", None, QUIET | paths | {"samples_per_class": 2})["samples"] == 6


@pytest.mark.slow
@pytest.mark.integration
def test_monai_runs_the_bundle_from_another_folder(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    make_cohort(tmp_path / "cohort")
    shared = {"dataset_dir": "cohort", "tracking#enabled": False, "device_name": "cpu"}
    small = {"max_epochs": 1, "epoch_length": 2, "batch_size": 4, "network_settings#backbone_options": BACKBONE}
    stages: dict[str, dict[str, Any]] = {
        "training": small | {"output_dir": "run"},
        "generating": {"run_dir": "run", "output_dir": "synthetic", "counts": [1, 1, 1], "guidance_scale": 2.0},
    }
    for stage, own in stages.items():
        files = [BUNDLE / "configs" / STAGES[stage], assets.profile_path("tiny")]
        run_from(tmp_path, stage, files, **shared | own)
    assert read_synthetic(tmp_path / "synthetic").class_counts("training") == [1, 1, 1]
