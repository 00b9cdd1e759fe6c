"""Does space-to-depth cost quality? KID of the guided DDPM at 64 px trained with patches of 4 and with patches of 2, for as many steps.

For every seed both networks are trained as the profile says, but for the patch, and draw as many images; a seed changes weights, batches, start noise and
references. "Within noise" is decided by the spread over seeds, pooled over both: a two-sided 95 % interval of the difference of two means. Started again
after a kill it goes on with the training run it had reached. Example:

    python benchmarks/patch_vs_kid.py --cohort runs/ct64
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from rows import command_of, environment, make_parser, open_work, settings_of
from ruler import make_ruler
from steps_vs_kid import compare, measure, summarise

from medaug.cohort import Cohort, read_cohort
from medaug.generation.sampler import make_sampler
from medaug.training.run_folder import load_network, read_run
from medaug.workflow import load_config, run_stage

NAME = "patch_vs_kid"
BUNDLE = "guided_ddpm"


def train(cohort: Path, folder: Path, profile: str, patch: int, seed: int, max_epochs: int | None) -> None:
    """A training run of the bundle with another patch; goes on if it was begun."""
    overrides: dict[str, Any] = {
        "dataset_dir": str(cohort.resolve()),
        "output_dir": str(folder),
        "seed": seed,
        "network_settings#backbone_options#patch": patch,
        "tracking": {"enabled": False},
    }
    run_stage(BUNDLE, "training", profile, overrides | ({} if max_epochs is None else {"max_epochs": max_epochs}))


def sample(cohort: Cohort, ruler: Any, folder: Path, profile: str, num_images: int, seed: int) -> dict[str, Any]:
    """KID of the run in `folder`, and how many parameters it has; a sheet beside it to look at."""
    run = read_run(folder)
    network = load_network(folder, run, cohort.classes)
    sampler = make_sampler(run.settings["diffusion"], load_config(BUNDLE, "generating", profile)["sampler_settings"], seed=seed)
    part = measure(network, cohort, ruler, sampler, num_images, folder.with_suffix(".png"))
    return part | {"iterations": run.iterations, "parameters": sum(each.numel() for each in network.parameters())}


def main() -> None:
    """Measure, write a row to benchmarks/results/patch_vs_kid.json, and print it."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--profile", default="cpu64")
    parser.add_argument("--patches", type=int, nargs="+", default=[4, 2], help="the last one is the reference")
    parser.add_argument("--max-epochs", type=int, default=None, help="of training; else the profile's")
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
    parts: dict[str, list[dict[str, Any]]] = {f"patch{patch}": [] for patch in options.patches}
    for seed in range(options.seed, options.seed + options.num_seeds):
        for patch in options.patches:
            name = f"patch{patch}-seed{seed}"
            part = work.read(name)
            if part is None:
                folder = options.work / name
                train(options.cohort, folder, options.profile, patch, seed, options.max_epochs)
                part = sample(cohort, ruler, folder, options.profile, options.num_images, seed)
                shutil.rmtree(folder)
                work.write(name, part)
            parts[f"patch{patch}"].append(part)
            print(name, part, flush=True)
    rows = {name: summarise(seeds) for name, seeds in parts.items()}
    result = compare(rows, f"patch{options.patches[-1]}", options.num_seeds)
    row = {
        "command": command_of(parser, options),
        "settings": settings_of(options),
        **facts,
        "ruler": ruler.facts,
        "patches": rows,
        "against_reference": result,
        **around,
        "torch_threads": torch.get_num_threads(),
    }
    work.finish(row, NAME, not options.no_record)
    print("against the reference:", result)


if __name__ == "__main__":
    main()
