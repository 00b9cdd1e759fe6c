"""One small synthetic folder per bundle and overlay, made by their own configs from networks with random weights, in batches of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from guided_world import QUIET, new_guided_run
from random_run import DIFFUSION, World, new_run
from test_dagan_bundle import GENERATOR
from test_text_to_image import new_text_run
from test_variation_bundles import NETWORK, SAMPLER
from test_variations import new_network
from tiny_diffusion import SIZE, save_model
from tiny_run import randomised

from medaug.cohort import Cohort, read_cohort
from medaug.training import dagan
from medaug.training.run_folder import new_record, write_run
from medaug.workflow import run_stage

FEW_STEPS = {"num_inference_steps": 3, "spacing": "karras", "sigma_min": 0.02, "sigma_max": 80.0}


@dataclass(frozen=True)
class Made:
    """A synthetic folder, what made it, and what a replay has to be told besides cohort and run."""

    folder: Path
    world: World
    more: tuple[str, ...] = ()
    has_run: bool = True

    @property
    def cohort(self) -> Cohort:
        return read_cohort(self.folder)


def generate(world: World, out: Path, bundle: str, overlay: str | None = None, **overrides: Any) -> Cohort:
    """`medaug generate` in this process."""
    paths = {"dataset_dir": str(world.cohort.root), "run_dir": str(world.run), "output_dir": str(out)}
    plain = QUIET | {"counts": [5, 3, 2], "generation_batch_size": 4}
    made: Cohort = run_stage(bundle, "generating", None, paths | plain | overrides, overlay=overlay)
    return made


def variations_run(cohort: Cohort, folder: Path) -> World:
    settings = {"network": NETWORK, "diffusion": DIFFUSION, "sampler": SAMPLER}
    record = new_record("bottleneck_perturbation", cohort, settings, 0)
    return World(cohort, write_run(folder, record, new_network(dtype=torch.float32), 1), folder)


def dagan_run(cohort: Cohort, folder: Path, seed: int = 0) -> World:
    record = new_record("dagan", cohort, {dagan.SETTINGS: GENERATOR}, seed)
    network = randomised(dagan.new_generator(GENERATOR, cohort, seed), seed)
    return World(cohort, write_run(folder, record, network, 1), folder)


def guided_ddpm(cohort: Cohort, root: Path) -> Made:
    world = new_run(cohort, root / "run")
    generate(world, root / "s", "guided_ddpm", sampler_settings=FEW_STEPS | {"guidance_scale": 1.5})
    return Made(root / "s", world)


def bottleneck_perturbation(cohort: Cohort, root: Path) -> Made:
    world = variations_run(cohort, root / "run")
    generate(world, root / "s", "bottleneck_perturbation", counts=None, synthetic_per_real=1.5)
    return Made(root / "s", world)


def sdedit(cohort: Cohort, root: Path) -> Made:
    world = variations_run(cohort, root / "run")  # trained by another bundle
    generate(world, root / "s", "sdedit")
    return Made(root / "s", world)


def uncertainty_guidance(cohort: Cohort, root: Path) -> Made:
    world = new_guided_run(cohort, root / "run")
    more = {
        "guidance_settings#cfg_scale": 1.5,
        "guidance_settings#spread": 0.2,
        "guidance_settings#annealing": {"noise_scale": 0.25},
    }
    generate(world, root / "s", "uncertainty_guidance", **more)
    return Made(root / "s", world)


def autoguidance(cohort: Cohort, root: Path) -> Made:
    world, weak = new_guided_run(cohort, root / "run"), new_guided_run(cohort, root / "weak", seed=1)
    settings = {"run_dir": str(weak.run), "scale": 1.5}
    generate(world, root / "s", "uncertainty_guidance", **{"guidance_settings#autoguidance": settings})
    return Made(root / "s", world, ("--set", f"guidance_settings#autoguidance#run_dir={weak.run}"))


def disturbed_on_the_way(cohort: Cohort, root: Path) -> Made:
    world = new_guided_run(cohort, root / "run")
    generate(world, root / "s", "uncertainty_guidance", "disturbance", target_label="class1")
    return Made(root / "s", world)


def disturbed_real(cohort: Cohort, root: Path) -> Made:
    world = new_guided_run(cohort, root / "run")
    generate(world, root / "s", "uncertainty_guidance", "disturbance", source="real")
    return Made(root / "s", world)


def disturbed_finished(cohort: Cohort, root: Path) -> Made:
    made = uncertainty_guidance(cohort, root)
    generate(made.world, root / "d", "uncertainty_guidance", "disturbance", source=str(made.folder), counts=[4, 2, 0])
    return replace(made, folder=root / "d", more=("--source", str(made.folder)))


def text_to_image(cohort: Cohort, root: Path) -> Made:
    world = new_text_run(cohort, root / "run")
    texts = (
        root / "prompts.jsonl"
    )  # the user may have moved it: the record holds the texts, even one that looks like an expression
    texts.write_text(
        "".join(f'{{"label": "class{i}", "prompt": "{text}"}}\n' for i in range(3) for text in (f"$dose {i}", f"b{i}"))
    )
    generate(world, root / "s", "text_to_image", prompt_settings={"file": str(texts)}, negative_prompt="blurred")
    texts.unlink()
    return Made(root / "s", world)


def stable_diffusion(cohort: Cohort, root: Path) -> Made:
    model = save_model(root / "sd")
    settings = {"stable_diffusion_settings#size": SIZE, "stable_diffusion_settings#num_inference_steps": 2}
    more = {"model_dir": str(model), "run_dir": None, "weights_trusted": True} | settings
    world = World(cohort, new_record("text_to_image", cohort, {}, 0), root)
    generate(world, root / "s", "text_to_image", "stable_diffusion", **more)
    return Made(root / "s", world, ("--set", f"model_dir={model}"), has_run=False)


def dagan_bundle(cohort: Cohort, root: Path) -> Made:
    world = dagan_run(cohort, root / "run")
    generate(world, root / "s", "dagan")
    return Made(root / "s", world)


WORLDS: dict[str, Callable[[Cohort, Path], Made]] = {
    "guided_ddpm": guided_ddpm,
    "bottleneck_perturbation": bottleneck_perturbation,
    "sdedit": sdedit,
    "uncertainty_guidance": uncertainty_guidance,
    "autoguidance": autoguidance,
    "disturbance, on the way": disturbed_on_the_way,
    "disturbance, real": disturbed_real,
    "disturbance, finished stage 1": disturbed_finished,
    "text_to_image": text_to_image,
    "stable_diffusion": stable_diffusion,
    "dagan": dagan_bundle,
}
