"""Few steps against many: KID of DPM-Solver++ with 10, 15 and 20 steps beside DDIM with 250, from the weights of one run.

Every sampler gets the same start noise and the same references; a seed changes both. "Within noise" is decided by the spread
over sampling seeds, pooled over the samplers: a two-sided 95 % interval of the difference of two means. Started again after a
kill it goes on with the sampler and seed it had reached. Example:

    python benchmarks/steps_vs_kid.py --cohort runs/ct --run runs/ct_run/run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rows import command_of, environment, make_parser, open_work, settings_of
from ruler import Ruler, against_reference, guided_samples, make_ruler, write_sheet

from medaug.cohort import Cohort, read_cohort
from medaug.generation.generate import check_run
from medaug.generation.sampler import GuidedSampler, make_sampler
from medaug.training.run_folder import load_network, read_run
from medaug.workflow import load_config

NAME = "steps_vs_kid"
REFERENCE = "ddim"


def samplers(settings: Mapping[str, Any], few: Sequence[int], many: int) -> dict[str, dict[str, Any]]:
    """Name -> sampler settings: the profile's own with another step and another number of steps."""
    fast = {f"dpm_solver_pp_2m-{count}": {"step": "dpm_solver_pp_2m", "num_inference_steps": count} for count in few}
    chosen = fast | {f"{REFERENCE}-{many}": {"step": "ddim", "num_inference_steps": many}}
    return {name: {**settings, **change} for name, change in chosen.items()}


def measure(network: Any, cohort: Cohort, ruler: Ruler, sampler: GuidedSampler, num_images: int, sheet: Path) -> dict[str, Any]:
    """KID and sampling seconds of one sampler with its seed."""
    start = perf_counter()
    images = guided_samples(network, cohort, sampler, num_images, sampler.seed)
    seconds = perf_counter() - start
    write_sheet(sheet, images)
    return {"seed": sampler.seed, **ruler(images), "seconds": seconds}


def summarise(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over sampling seeds of KID, its spread over subsets and its spread over seeds."""
    values = [part["kid"] for part in parts]
    subsets = [part["kid_std"] for part in parts if part["kid_std"] is not None]
    return {
        "kid": float(np.mean(values)),
        "kid_std_subsets": float(np.mean(subsets)) if subsets else None,
        "kid_std_seeds": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seconds": float(np.mean([part["seconds"] for part in parts])),
        "seeds": list(parts),
    }


def compare(rows: Mapping[str, Mapping[str, Any]], reference: str, num_seeds: int) -> dict[str, Any]:
    """`against_reference`, and how many times faster than the reference every sampler is."""
    result = against_reference(rows, reference, num_seeds)
    for name in rows.keys() - {reference}:
        result[name]["times_faster"] = rows[reference]["seconds"] / rows[name]["seconds"]
    return result


def main() -> None:
    """Measure, write a row to benchmarks/results/steps_vs_kid.json, and print it."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training run")
    parser.add_argument("--profile", default="cpu32", help="whose sampler settings are used, but for step and count")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20], help="of DPM-Solver++")
    parser.add_argument("--reference-steps", type=int, default=250, help="of DDIM")
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--subset-size", type=int, default=100, help="images per KID subset")
    parser.add_argument("--ruler-steps", type=int, default=500, help="training steps of the feature extractor")
    parser.add_argument("--bottleneck-scale", type=float, default=None, help="instead of the profile's; 0: no noise")
    options = parser.parse_args()

    cohort, run = read_cohort(options.cohort), read_run(options.run)
    check_run(run, cohort)
    network = load_network(options.run, run, cohort.classes)
    facts: dict[str, Any] = {"cohort": cohort.name, "cohort_sha256": cohort.content_sha256}
    facts |= {"weights_sha256": run.weights_sha256, "iterations": run.iterations}
    around = environment()
    work = open_work(options, facts, around)
    ruler = make_ruler(cohort, options.ruler_steps, options.subset_size, options.seed)
    settings = load_config(run.bundle, "generating", options.profile)["sampler_settings"]
    if options.bottleneck_scale is not None:
        settings = {**settings, "bottleneck_scale": options.bottleneck_scale}
    rows = {}
    for name, chosen in samplers(settings, options.steps, options.reference_steps).items():
        parts = []
        for seed in range(options.seed, options.seed + options.num_seeds):
            part = work.read(f"{name}-seed{seed}")
            if part is None:
                sheet = options.work / f"{name}-seed{seed}.png"
                sampler = make_sampler(run.settings["diffusion"], chosen, seed=seed)
                part = measure(network, cohort, ruler, sampler, options.num_images, sheet)
                work.write(f"{name}-seed{seed}", part)
            parts.append(part)
        rows[name] = summarise(parts)
        print(name, {key: value for key, value in rows[name].items() if key != "seeds"}, flush=True)
    result = compare(rows, f"{REFERENCE}-{options.reference_steps}", options.num_seeds)
    row = {
        "command": command_of(parser, options),
        "settings": settings_of(options) | {"sampler": settings},
        **facts,
        "ruler": ruler.facts,
        "samplers": rows,
        "against_reference": result,
        **around,
        "torch_threads": torch.get_num_threads(),
    }
    work.finish(row, NAME, not options.no_record)
    print("against the reference:", result)


if __name__ == "__main__":
    main()
