"""Stable Diffusion as a sampler: the same images as diffusers', whatever the batch, with lineage, and never with the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_diffusion import SIZE, TOKENS, TwoTemplates, no_network, save_model

from medaug.cohort import Cohort, check_against, fit_sha256
from medaug.draws import randn, torch_generator
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.generation.generate import GenerationSession, PlanBatches, sample_batch
from medaug.generation.plan import plan_for
from medaug.generation.stable_diffusion import (
    StableDiffusionSampler,
    TextToImageModel,
    load_model,
    make_pipeline,
    make_stable_diffusion_sampler,
)
from medaug.grading.arms import Arm
from medaug.grading.notes import arm_notes
from medaug.io.raster import read_unit_png
from medaug.networks.stable_diffusion import TextContexts
from medaug.transforms.rgb import from_rgb, to_rgb
from medaug.workflow import load_config

SETTINGS: dict[str, Any] = {"size": SIZE, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("real") / "cohort", size=12, per_class=10)


@pytest.fixture(scope="module")
def model(folder: Path, cohort: Cohort) -> TextToImageModel:
    torch.set_num_threads(1)
    return load_model(folder, cohort, weights_trusted=True)


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    with no_network() as tried:
        yield
    assert not tried


def make(model: TextToImageModel, cohort: Cohort, **changes: Any) -> StableDiffusionSampler:
    return make_stable_diffusion_sampler(SETTINGS | changes, model, TwoTemplates(cohort.classes), cohort, seed=3)


def inputs(cohort: Cohort, count: int = 5) -> dict[str, Any]:
    labels = [i % 3 for i in range(count)]
    references = [randn((1, 12, 12), "reference", i).clamp(-1, 1) for i in range(count)]
    return {
        "id": [f"s{i}" for i in range(count)],
        "label": torch.tensor(labels),
        "reference": lambda i: references[i],
        "shape": (12, 12),
    }


def session(model: TextToImageModel, cohort: Cohort, sampler: StableDiffusionSampler, out: Path, batch: int) -> GenerationSession:
    from monai.engines import SupervisedEvaluator

    plan = plan_for(cohort, model.record, 3, counts=[3, 2, 0])
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=PlanBatches(cohort, plan, batch, out),  # type: ignore[arg-type]
        network=model.unet,
        inferer=sampler,  # type: ignore[arg-type]
        iteration_update=sample_batch,
    )
    quiet = {"enabled": False}
    return GenerationSession(cohort, model.record, plan, evaluator, out, seed=3, tracking=quiet, notes=model.notes)


def test_images_are_those_of_diffusers_given_the_same_draws(model: TextToImageModel, cohort: Cohort) -> None:
    sampler, batch = make(model, cohort, negative_prompt="blurred", guidance_scale=3.0), inputs(cohort, 3)
    ours = sampler(batch)
    theirs = make_pipeline(model.parts, from_images=False)(
        [sampler.prompt(i % 3, f"s{i}") for i in range(3)],
        negative_prompt=["blurred"] * 3,
        latents=torch.stack([randn((4, 8, 8), 3, "start", f"s{i}") for i in range(3)]),
        guidance_scale=3.0,
        num_inference_steps=4,
        height=SIZE,
        width=SIZE,
        output_type="pt",
    ).images
    assert ours.shape == (3, 1, 12, 12)
    assert torch.equal(ours, from_rgb(theirs, 1, 12) * 2 - 1)
    assert ours.std() > 0.05


def test_image_to_image_is_that_of_diffusers_given_the_same_draws(model: TextToImageModel, cohort: Cohort) -> None:
    sampler, batch = make(model, cohort, strength=0.5), inputs(cohort, 2)
    theirs = make_pipeline(model.parts, from_images=True)(
        [sampler.prompt(i, f"s{i}") for i in range(2)],
        image=to_rgb(torch.stack([batch["reference"](i) for i in range(2)]), SIZE) / 2 + 0.5,
        generator=[torch_generator(3, "steps", f"s{i}") for i in range(2)],
        strength=0.5,
        guidance_scale=7.5,
        num_inference_steps=4,
        output_type="pt",
    ).images
    assert torch.allclose(sampler(batch), from_rgb(theirs, 1, 12) * 2 - 1, atol=1e-6)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_an_image_does_not_depend_on_its_batch(model: TextToImageModel, cohort: Cohort, strength: float | None) -> None:
    sampler, batch = make(model, cohort, strength=strength), inputs(cohort)
    together = sampler(batch)
    for i in (0, 3):
        alone = {"id": [f"s{i}"], "label": batch["label"][i : i + 1], "shape": (12, 12)}
        alone["reference"] = lambda _, i=i: batch["reference"](i)
        assert torch.allclose(sampler(alone)[0], together[i], atol=1e-4)  # rounding of another batch size
    assert (together[0] - together[3]).abs().max() > 0.01  # the same class, another draw


@pytest.mark.parametrize("strength", [None, 0.5])
def test_noise_inside_the_steps_is_keyed_too(model: TextToImageModel, cohort: Cohort, strength: float | None) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    parts = replace(model.parts, scheduler=EulerAncestralDiscreteScheduler.from_config(model.parts.scheduler.config))
    sampler, batch = make(replace(model, parts=parts), cohort, strength=strength), inputs(cohort, 2)
    together = sampler(batch)
    last = {"id": ["s1"], "label": batch["label"][1:], "shape": (12, 12), "reference": lambda _: batch["reference"](1)}
    assert torch.allclose(sampler(last)[0], together[1], atol=1e-4)


def test_the_weaker_the_strength_the_nearer_the_training_image(model: TextToImageModel, cohort: Cohort) -> None:
    batch, step = inputs(cohort), {"num_inference_steps": 20, "guidance_scale": 1.0}
    vae: Any = model.parts.vae
    images = to_rgb(torch.stack([batch["reference"](i) for i in range(5)]), SIZE)
    with torch.no_grad():
        through = from_rgb(vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1), 1, 12)
    distances = [
        float((make(model, cohort, strength=strength, **step)(batch) - through).square().mean()) for strength in (0.05, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.7 * distances[-1]  # not nearer: the Gaussians of a random autoencoder are wide


def test_a_prompt_is_encoded_once_and_as_diffusers_encodes_it(model: TextToImageModel, cohort: Cohort) -> None:
    sampler = make(model, cohort)
    for _ in range(3):
        sampler(inputs(cohort))
    assert sampler.contexts.encoded <= len(sampler.prompts.all()) + 1
    contexts = TextContexts(model.parts)
    theirs, _ = make_pipeline(model.parts, False).encode_prompt(["class1", "a class2"], torch.device("cpu"), 1, False)
    assert torch.allclose(contexts(["class1", "a class2"]), theirs, atol=1e-6)
    assert contexts(["class1", "class1"]).shape == (2, TOKENS, 16) and contexts.encoded == 2


def test_the_context_cache_is_bounded(model: TextToImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medaug.networks.stable_diffusion.CACHE_BYTES", 3 * TOKENS * 16 * 4)
    contexts = TextContexts(model.parts)
    for text in "abcdefg":
        contexts([text])
    assert len(contexts._cache) == 3


def test_a_long_prompt_is_cut_and_said_once(model: TextToImageModel, cohort: Cohort, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = make_stable_diffusion_sampler(SETTINGS, model, TwoTemplates(("opacity in the left lower lobe",)), cohort)
        sampler({"id": ["s0"], "label": torch.tensor([0]), "shape": (12, 12)})
    said = [record.getMessage() for record in caplog.records if record.name.startswith("medaug")]
    letters = len("aopacityintheleftlowerlobe")  # one token each, and the marks of beginning and end
    assert said == [
        f"prompt-too-long: 2 of 3 prompt(s) have up to {letters + 2} tokens, the text encoder takes {TOKENS}; what is over is cut off."
    ]


def test_session_writes_a_synthetic_cohort_with_lineage(model: TextToImageModel, cohort: Cohort, tmp_path: Path) -> None:
    sampler = make(model, cohort, negative_prompt="blurred")
    made = session(model, cohort, sampler, tmp_path / "out", 2).run()
    assert made.class_counts("training") == [3, 2, 0]
    assert (made.channels, made.image_size) == (1, 12)
    case = made.training[0]
    lineage = case.lineage or {}
    assert lineage["prompt"] in ("class0", "a class0") and lineage["negative_prompt"] == "blurred"
    assert lineage["guidance"] == {"scale": 7.5} and lineage["num_inference_steps"] == 4 and "strength" not in lineage
    assert lineage["weights_sha256"] == case.source == model.parts.folder.weights_sha256()
    assert lineage["generator_trusted"] is True and lineage["fit_on"] == fit_sha256(())
    assert "Nothing shows" in made.notes["generator"] and case.acquisition == {}
    check_against(made, cohort)
    assert any("began from weights of unknown origin" in note for note in arm_notes(cohort, [Arm("sd", synthetic=made)]))


def test_image_to_image_inherits_where_its_reference_lies(model: TextToImageModel, cohort: Cohort, tmp_path: Path) -> None:
    sampler = make(model, cohort, strength=0.5)
    made = session(model, cohort, sampler, tmp_path / "out", 2).run()
    assert sampler.keeps_geometry and {(case.lineage or {})["strength"] for case in made.training} == {0.5}


def test_a_resumed_run_ends_with_the_same_bytes_and_makes_nothing_twice(
    model: TextToImageModel, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session(model, cohort, make(model, cohort), tmp_path / "whole", 2).run()
    calls = 0
    original = StableDiffusionSampler.__call__

    def dies(self: StableDiffusionSampler, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(StableDiffusionSampler, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        session(model, cohort, make(model, cohort), tmp_path / "killed", 2).run()
    assert len(list((tmp_path / "killed" / "images").glob("*.png"))) == 2
    again = session(model, cohort, make(model, cohort), tmp_path / "killed", 2).run()
    assert calls == 4 and again.content_sha256 == whole.content_sha256  # batches 1, 2 (killed), 2, 3
    session(model, cohort, make(model, cohort), tmp_path / "killed", 2).run()
    assert calls == 4
    with pytest.raises(ConfigError, match="other sampler settings"):
        session(model, cohort, make(model, cohort, guidance_scale=2.0), tmp_path / "killed", 2).run()


def test_another_batch_size_changes_pixels_by_rounding_only(model: TextToImageModel, cohort: Cohort, tmp_path: Path) -> None:
    one, three = (session(model, cohort, make(model, cohort), tmp_path / str(size), size).run() for size in (1, 3))
    for left, right in zip(one.training, three.training, strict=True):
        assert left.id == right.id
        assert np.abs(read_unit_png(one.path(left)) - read_unit_png(three.path(right))).max() < 1e-4


def test_colour_cohorts_get_colour(model: TextToImageModel, cohort: Cohort) -> None:
    images = make(model, replace(cohort, channels=3))(inputs(cohort, 1))
    assert images.shape == (1, 3, 12, 12) and (images[:, 0] - images[:, 1]).abs().max() > 0.01


def test_the_folder_itself_says_nothing_of_its_origin(folder: Path, cohort: Cohort) -> None:
    with pytest.raises(LeakageError, match="set weights_trusted") as caught:
        load_model(folder, cohort)
    assert caught.value.code == "fit-unknown"


def test_a_run_that_is_not_there_is_refused(folder: Path, cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished training run"):
        load_model(folder, cohort, tmp_path, weights_trusted=True)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"size": 15}, "image-size-invalid"),
        ({"size": 0}, "image-size-invalid"),
        ({"num_inference_steps": 0}, "num-inference-steps"),
        ({"guidance_scale": 0.5}, "guidance-scale"),
        ({"guidance_scale": float("nan")}, "guidance-scale"),
        ({"strength": 0.0}, "strength-range"),
        ({"strength": 1.5}, "strength-range"),
        ({"strength": 0.2}, "strength-empty"),
        ({"negative_prompt": 3}, "negative-prompt"),
        ({"steps": 3}, "setting-unknown"),
    ],
)
def test_values_out_of_range_are_refused(model: TextToImageModel, cohort: Cohort, settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(model, cohort, **settings)
    assert caught.value.code == code


@pytest.mark.parametrize(("stage", "overlay"), [("generating", "stable_diffusion"), ("training", "finetune")])
def test_prompt_settings_may_be_given_in_part(cohort: Cohort, stage: str, overlay: str) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser(load_config("text_to_image", stage, None, overlay))
    parser["cohort"] = cohort
    parser["prompt_settings"] = {"templates": "syn2"}
    prompts = parser.get_parsed_content("prompts")
    assert prompts.texts[0] == (f"a photo of a {cohort.classes[0].replace('_', ' ')}",)
