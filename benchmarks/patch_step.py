"""Cost of one training step of the guided DDPM by size of image and of patch: what does space-to-depth save at 64 px?

Three networks of the same widths take training steps (draws, reference features, joint loss, backward, AdamW; no clipping, average or data) on the same
number of images in one process, in turns whose order rotates, so that what the machine does meanwhile hits all: 32 px with patches of 2, as cpu32 has
them, 64 px with patches of 4, as cpu64 has them, and 64 px with patches of 2. The figures are medians of the ratios within a turn. Example:

    python benchmarks/patch_step.py --turns 30
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import environment, record
from torch import nn

from medaug.draws import randn
from medaug.networks.build import build_guided_unet
from medaug.training.diffusion import GuidedIteration, build_objective, guided_losses
from medaug.workflow import load_config

NAME = "patch_step"
CLASSES = 4
SIDES = {
    "small": (32, "cpu32"),
    "patched": (64, "cpu64"),
    "fine": (64, "cpu32"),
}  # image size, profile whose patch the network has
RATIOS = (("patched", "small"), ("fine", "small"), ("patched", "fine"))


def make_step(image_size: int, profile: str, batch_size: int) -> tuple[Callable[[], None], dict[str, int]]:
    """One training step on a batch of noise, and the patch and number of parameters of its network."""
    config = load_config("guided_ddpm", "training", profile)
    torch.manual_seed(0)
    network = build_guided_unet(config["network_settings"], 1, CLASSES).train()
    objective = build_objective(config["diffusion_settings"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["learning_rate"])
    iteration = GuidedIteration(ema=None, scheduler=None, condition_dropout=0.1, label_dropout=0.1)  # type: ignore[arg-type]
    shape = (batch_size, 1, image_size, image_size)
    batch = {
        "image": randn(shape, "benchmark", "image").clamp(-1, 1),
        "reference": randn(shape, "benchmark", "reference").clamp(-1, 1),
        "label": torch.arange(batch_size) % CLASSES,
        "iteration": torch.ones(batch_size, dtype=torch.long),
        "position": torch.arange(batch_size),
    }

    def step() -> None:
        losses = guided_losses(network, objective, nn.functional.cross_entropy, batch, iteration, "cpu")
        optimizer.zero_grad(set_to_none=True)
        (losses["loss_noise"] + iteration.label_loss_weight * losses["loss_label"]).backward()
        optimizer.step()

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return step, {
        "image_size": image_size,
        "patch": config["network_settings"]["backbone_options"]["patch"],
        "parameters": parameters,
    }


def measure(steps: dict[str, Callable[[], None]], turns: int, warmup: int) -> dict[str, Any]:
    """Median seconds of each step, and medians and quartiles of the ratios within a turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(warmup + turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {},
    }
    for ours, theirs in RATIOS:
        ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found["ratios"][f"{ours}/{theirs}"] = {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]}
    return found


def main() -> None:
    """Measure, write a row to benchmarks/results/patch_step.json, and print it."""
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--turns", type=int, default=30, help="measured turns")
    parser.add_argument("--warmup", type=int, default=3, help="turns that are not counted")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()

    around = environment()
    sides = {name: make_step(size, profile, options.batch_size) for name, (size, profile) in SIDES.items()}
    row: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key != "no_record"},
        "networks": {name: facts for name, (_, facts) in sides.items()},
        **measure({name: step for name, (step, _) in sides.items()}, options.turns, options.warmup),
        "torch_threads": torch.get_num_threads(),
        **around,
    }
    if not options.no_record:
        record(row, NAME)
    for name, ratio in row["ratios"].items():
        print(f"{name} {ratio['median']:.2f} (quartiles {ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})")


if __name__ == "__main__":
    main()
