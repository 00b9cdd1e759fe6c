"""Cost of one training step of every grader: as torch lays images out by default, with channels last, and with bfloat16 besides.

One thread, as in the cells of a benchmark. The three ways take turns, so that what the machine does meanwhile hits all; the figure of a
network is the median of the ratios to the first way. Example:

    python benchmarks/grading_step.py --rounds 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rows import command_of, environment, record, settings_of

from medaug.networks.grading import NETWORKS, build_network
from medaug.training.classifier import seeded
from medaug.training.steps import mixed_precision

NAME = "grading_step"
WAYS = {  # name -> (memory format, precision)
    "plain": (torch.contiguous_format, "float32"),
    "channels_last": (torch.channels_last, "float32"),
    "bfloat16": (torch.channels_last, "bfloat16"),
}


def make_step(name: str, way: str, batch_size: int, image_size: int) -> Callable[[], float]:
    """One step of a fresh network on drawn images; returns its seconds."""
    memory_format, precision = WAYS[way]
    with seeded(NAME, name):
        network = build_network(name, 4, 1, image_size).to(memory_format=memory_format).train()
        images, labels = torch.rand(batch_size, 1, image_size, image_size) * 2 - 1, torch.arange(batch_size) % 4
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        with mixed_precision(precision, "cpu"):
            logits = network(images).float()
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimiser.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Measure every network, print and record a row."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.networks:
        steps = {way: make_step(name, way, options.batch_size, options.image_size) for way in WAYS}
        rounds = [{way: step() for way, step in steps.items()} for _ in range(options.rounds + 1)][1:]
        found[name] = {way: {"seconds": statistics.median(turn[way] for turn in rounds)} for way in WAYS}
        for way in WAYS:
            found[name][way]["ratio"] = statistics.median(turn[way] / turn["plain"] for turn in rounds)
        print(name, {way: round(entry["ratio"], 3) for way, entry in found[name].items()}, flush=True)
    if not options.no_record:
        record(
            {"command": command_of(parser, options), "settings": settings_of(options), "networks": found} | environment(), NAME
        )


if __name__ == "__main__":
    main()
