"""What another setting of the training does to the images: KID, and the fine noise left in them, of networks trained for as many steps.

For every seed the bundle is trained as the profile says and once with each change, and every network draws as many images; a seed decides weights, batches,
start noise and references. "Within noise" is decided by the spread over seeds, pooled over all: a two-sided 95 % interval of the difference of two means.
Started again after a kill it goes on with the training run it had reached. Example, does space-to-depth at 64 px cost quality, and does heavier noise:

    python benchmarks/training_vs_kid.py --cohort runs/ct64 --change network_settings#backbone_options#patch=2
        --change diffusion_settings#parameterisation_options#p_mean=-1.2
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import command_of, environment, make_parser, open_work, settings_of
from ruler import BATCH_SIZE, Ruler, against_reference, guided_samples, make_ruler, write_sheet
from torch import Tensor

from medaug.cohort import Cohort, read_cohort
from medaug.generation.sampler import make_sampler
from medaug.quality.images import image_batches
from medaug.training.run_folder import load_network, read_run
from medaug.workflow import load_config, parse_overrides, run_stage

NAME = "training_vs_kid"
BUNDLE = "guided_ddpm"
UNCHANGED = "as the profile"


def noise_left(images: Tensor) -> float:
    """Standard deviation of the fine noise in images (N, C, H, W): median over them of Donoho and Johnstone's (1994, section 7) robust estimate.

    The median absolute diagonal detail of the finest Haar level over 0.6745; an image of flat regions and edges has next to none.
    """
    detail = (images[..., ::2, ::2] - images[..., ::2, 1::2] - images[..., 1::2, ::2] + images[..., 1::2, 1::2]) / 2
    return float((detail.abs().flatten(1).median(1).values / 0.6745).median())


def measure(cohort: Cohort, ruler: Ruler, folder: Path, profile: str, num_images: int, seed: int) -> dict[str, Any]:
    """KID and noise of images of the run in `folder`; a sheet beside it to look at."""
    run = read_run(folder)
    network = load_network(folder, run, cohort.classes)
    sampler = make_sampler(run.settings["diffusion"], load_config(BUNDLE, "generating", profile)["sampler_settings"], seed=seed)
    images = guided_samples(network, cohort, sampler, num_images, seed).clamp(-1, 1)
    write_sheet(folder.with_suffix(".png"), images)
    parameters = sum(each.numel() for each in network.parameters())
    return {
        "seed": seed,
        **ruler(images),
        "noise_left": noise_left(images),
        "iterations": run.iterations,
        "parameters": parameters,
    }


def summarise(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of KID and noise, and the spread of KID over seeds."""
    values = [part["kid"] for part in parts]
    return {
        "kid": float(np.mean(values)),
        "kid_std_seeds": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "noise_left": float(np.mean([part["noise_left"] for part in parts])),
        "seeds": parts,
    }


def main() -> None:
    """Measure, write a row to benchmarks/results/training_vs_kid.json, and print it."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--profile", default="cpu64")
    parser.add_argument("--change", action="append", default=[], metavar="KEY=VALUE", help="of the training; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in all trainings; repeatable")
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--subset-size", type=int, default=100, help="images per KID subset")
    parser.add_argument("--ruler-steps", type=int, default=500, help="training steps of the feature extractor")
    options = parser.parse_args()

    cohort = read_cohort(options.cohort)
    facts = {"cohort": cohort.name, "cohort_sha256": cohort.content_sha256, "image_size": cohort.image_size}
    around = environment()
    work = open_work(options, facts, around)
    ruler = make_ruler(cohort, options.ruler_steps, options.subset_size, options.seed)
    real = torch.cat(list(image_batches(cohort, cohort.training, BATCH_SIZE)))
    common = {"dataset_dir": str(options.cohort.resolve()), "tracking": {"enabled": False}, **parse_overrides(options.set)}
    variants: dict[str, Mapping[str, Any]] = {UNCHANGED: {}} | {text: parse_overrides([text]) for text in options.change}
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in range(options.seed, options.seed + options.num_seeds):
        for number, (name, change) in enumerate(variants.items()):
            part = work.read(f"{number}-seed{seed}")
            if part is None:
                folder = options.work.resolve() / f"{number}-seed{seed}"
                run_stage(BUNDLE, "training", options.profile, {**common, "output_dir": str(folder), "seed": seed, **change})
                part = measure(cohort, ruler, folder, options.profile, options.num_images, seed)
                shutil.rmtree(folder)
                work.write(f"{number}-seed{seed}", part)
            parts[name].append(part)
            print(name, part, flush=True)
    rows = {name: summarise(seeds) for name, seeds in parts.items()}
    row = {
        "command": command_of(parser, options),
        "settings": settings_of(options),
        **facts,
        "ruler": ruler.facts,
        "noise_in_real_training": noise_left(real),
        "trainings": rows,
        "against_reference": against_reference(rows, UNCHANGED, options.num_seeds),
        **around,
        "torch_threads": torch.get_num_threads(),
    }
    work.finish(row, NAME, not options.no_record)
    print("against the profile:", row["against_reference"])


if __name__ == "__main__":
    main()
