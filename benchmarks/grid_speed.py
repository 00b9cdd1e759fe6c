"""Speed of the grading grid: ten networks x two arms on two cores, against a plain loop, and Ray against local processes.

One cohort is drawn as PNG files: discs on noise, 600 training images of 32 px. Three things are timed, one after the other, each in
processes of its own that hold the same cores:

    grid    `medaug.grading.benchmark.run_benchmark` with --workers processes of one thread
    plain   one process with all threads: timm models, fit for small images in the same way, a torch DataLoader that decodes every PNG
            in every epoch, AdamW, validation as often, the same number of optimiser steps of 32 images
    ray     as grid, on a local Ray cluster

The plain loop has no augmentation and torch's default precision and layout; the grid's second arm has the policy `crop_rotate`, and its
networks train as `medaug grade --precision bfloat16` trains them (`--precision float32` for the layout's and the processes' share alone).
Ray's workers run at the priority of the others, not at their default of nice 15. A grid counts from its start, imports and decoding
included, as does the loop. Bars: grid / plain at most 0.6 at 300 steps; peak memory of the grid, all its processes together, at most
6 GB; throughput of ray at least 0.9 of the grid's. Example:

    python benchmarks/grid_speed.py --steps 300
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rows import WORK, command_of, environment, record, settings_of

from medaug import cohort as cohorts
from medaug.cohort import Case, Cohort, read_cohort
from medaug.draws import numpy_generator

NAME = "grid_speed"
ARMS = ("none", "crop_rotate")
NUM_CLASSES = 4
BARS = {"grid_over_plain": 0.6, "peak_gb": 6.0, "ray_over_grid": 0.9}


def draw_cohort(folder: Path, training: int, held_out: int, size: int, seed: int) -> Cohort:
    """A cohort of drawn discs whose radius tells the class; `held_out` images each in validation and test."""
    from medaug.io.raster import write_unit_png

    splits: dict[str, list[Case]] = {}
    y, x = np.mgrid[:size, :size] / size
    for split, count in (("training", training), ("validation", held_out), ("test", held_out)):
        splits[split] = []
        for index in range(count):
            draw, label, name = numpy_generator(NAME, seed, split, index), index % NUM_CLASSES, f"{split}{index:05d}"
            centre_x, centre_y = draw.uniform(0.35, 0.65, 2)
            disc = (x - centre_x) ** 2 + (y - centre_y) ** 2 < (0.1 + 0.06 * label) ** 2
            image = 0.2 + 0.1 * draw.standard_normal((size, size)) + 0.4 * disc
            write_unit_png(folder / "images" / f"{name}.png", image.clip(0, 1).astype(np.float32))
            splits[split].append(Case(id=name, image=f"images/{name}.png", label=label, group=name, source=f"{name:0>64}"))
    made = Cohort(
        name="discs",
        modality="",
        classes=tuple(map(str, range(NUM_CLASSES))),
        ordinal=False,
        image_size=size,
        created_by=cohorts.created_by(NAME, {}, seed),
    )
    return cohorts.write_cohort(made.with_cases(**splits), folder)


def recipes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of every network of the grid."""
    from medaug.grading.recipe import grading_recipe

    overrides = {"num_steps": options.steps, "evaluate_every": max(options.steps // 10, 1), "precision": options.precision}
    return {name: grading_recipe("cpu32", name, overrides) for name in options.networks}


def run_grid(options: argparse.Namespace, executor: str) -> None:
    """All cells by the package."""
    from medaug.grading.arms import Arm
    from medaug.grading.benchmark import run_benchmark

    cohort = read_cohort(options.work / "cohort")
    arms = [Arm(name, policy=name) for name in ARMS]
    out = options.work / executor
    recipes = recipes_of(options)
    run_benchmark(cohort, arms, options.networks, [0], recipes, out, executor=executor, workers=options.workers)


def run_plain(options: argparse.Namespace) -> None:
    """The same cells as a plain loop would have them: one after the other, decoding every image in every epoch."""
    import torch
    from torch.utils.data import DataLoader

    from medaug.networks.grading import build_network
    from medaug.training.data import CaseImages

    torch.set_num_threads(options.workers)
    cohort = read_cohort(options.work / "cohort")
    for _arm in ARMS:
        for name, recipe in recipes_of(options).items():
            torch.manual_seed(0)
            network = build_network(name, NUM_CLASSES, 1, cohort.image_size)
            optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
            loader = DataLoader(CaseImages(cohort, cohort.training), recipe.batch_size, shuffle=True, drop_last=True)
            held_out = [DataLoader(CaseImages(cohort, cases), 256) for cases in (cohort.validation, cohort.test)]
            step = 0
            while step < recipe.num_steps:
                for batch in loader:
                    network.train()
                    loss = torch.nn.functional.cross_entropy(network(batch["image"]), batch["label"])
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                    step += 1
                    if step % recipe.evaluate_every == 0:
                        _predict(network, held_out[0])
                    if step == recipe.num_steps:
                        break
            _predict(network, held_out[1])


def _predict(network: Any, loader: Any) -> None:
    import torch

    network.eval()
    with torch.no_grad():
        for batch in loader:
            network(batch["image"])


def measured(options: argparse.Namespace, part: str) -> dict[str, float]:
    """Seconds and peak memory (resident, GB, shared pages counted once by their share) of one part, in a session of its own."""
    for folder in ("local", "ray"):
        shutil.rmtree(options.work / folder, ignore_errors=True)
    words = ["--part", part, "--work", str(options.work), "--steps", str(options.steps), "--workers", str(options.workers)]
    words += ["--precision", options.precision, "--networks", *options.networks]
    peak, over = [0.0], threading.Event()
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True)
    watch = threading.Thread(target=_watch, args=(child.pid, peak, over))
    watch.start()
    code = child.wait()
    seconds = time.perf_counter() - start
    over.set()
    watch.join()
    if code:
        raise SystemExit(f"The part {part} failed with exit code {code}.")
    return {"seconds": round(seconds, 2), "peak_gb": round(peak[0], 3)}


def _watch(root: int, peak: list[float], over: threading.Event) -> None:
    """Sample the proportional memory of `root` and all its descendants, twice a second."""
    while not over.wait(0.5):
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
        family = {root}
        while more := {child for child, parent in parents.items() if parent in family} - family:
            family |= more
        peak[0] = max(peak[0], sum(map(_share_of_memory, family)) / 2**20)


def _share_of_memory(process: int) -> float:
    """Proportional set size in kB."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[1]) for line in lines if line.startswith("Pss:"))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    from medaug.networks.grading import TEN_NETWORKS

    parser = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of every cell")
    parser.add_argument("--workers", type=int, default=2, help="processes of the grid, threads of the plain loop")
    parser.add_argument("--networks", nargs="+", default=list(TEN_NETWORKS))
    parser.add_argument("--precision", default="bfloat16", help="of the grid, as of `medaug grade`")
    parser.add_argument("--training", type=int, default=600, help="images")
    parser.add_argument("--held-out", type=int, default=150, help="images each in validation and test")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--part", choices=("grid", "plain", "ray"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=WORK / NAME)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    return parser


def main() -> None:
    """Measure, write a row to benchmarks/results/grid_speed.json, and print it."""
    parser = make_parser()
    options = parser.parse_args()
    options.work = options.work.resolve()
    parts = {
        "grid": lambda: run_grid(options, "local"),
        "ray": lambda: run_grid(options, "ray"),
        "plain": lambda: run_plain(options),
    }
    if options.part is not None:
        parts[options.part]()
        return
    os.environ.pop("OMP_NUM_THREADS", None)  # the plain loop may use all cores
    os.environ.pop("MKL_NUM_THREADS", None)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - its name
    cohort = draw_cohort(options.work / "cohort", options.training, options.held_out, options.image_size, options.seed)
    found = {part: measured(options, part) for part in ("grid", "plain", *(() if options.without_ray else ("ray",)))}
    figures = {
        "grid_over_plain": round(found["grid"]["seconds"] / found["plain"]["seconds"], 3),
        "peak_gb": found["grid"]["peak_gb"],
        "ray_over_grid": None if options.without_ray else round(found["grid"]["seconds"] / found["ray"]["seconds"], 3),
    }
    settings = {key: value for key, value in settings_of(options).items() if key != "part"}
    row = {"command": command_of(parser, options), "settings": settings, "cohort": cohort.content_sha256}
    row |= {"cells": len(options.networks) * len(ARMS), "parts": found, "figures": figures, "bars": BARS} | environment()
    if not options.no_record:
        record(row, NAME)
    print(json.dumps({"parts": found, "figures": figures, "bars": BARS}, indent=2))


if __name__ == "__main__":
    main()
