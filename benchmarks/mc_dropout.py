"""MC-dropout scoring for AMST: the backbone once per image and the heads M times, against the whole network M times.

Both are timed in the same run, batch by batch in turn, with the parts of ours (backbone, heads) beside the sum. Example:

    python benchmarks/mc_dropout.py
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import torch
from rows import command_of, environment, record, settings_of

from medaug.draws import randn_batch
from medaug.networks.amst import AuxiliaryHeads, feature_dimension, mc_probabilities
from medaug.networks.grading import build_network, penultimate
from medaug.training.classifier import seeded

NAME = "mc_dropout"
BATCH_SIZE = 32


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for all images of ours and its parts, and for the repeated backbone on as many images as asked for."""
    with seeded(NAME):
        network = build_network(options.network, options.classes, 1, options.image_size).eval()
        heads = AuxiliaryHeads(feature_dimension(network, 1, options.image_size), options.classes)
    seconds = dict.fromkeys(("ours", "backbone", "heads", "repeated"), 0.0)
    repeated_images, shape = 0, (1, options.image_size, options.image_size)
    for start in range(-BATCH_SIZE, options.images, BATCH_SIZE):  # the first batch warms up and is not counted
        names = range(start, min(start + BATCH_SIZE, options.images) if start >= 0 else 0)
        images, keys = randn_batch(shape, list(names), NAME), [(NAME, name) for name in names]
        times = [perf_counter()]
        mc_probabilities(network, heads, images, keys, options.passes)
        times.append(perf_counter())
        features = penultimate(network, images)
        times.append(perf_counter())
        torch.softmax(heads.mc_logits(features, keys, options.passes).double(), dim=-1)
        times.append(perf_counter())
        repeat = start < 0 or repeated_images < options.repeated_images
        for number in range(options.passes if repeat else 0):
            again = [(NAME, name, number) for name in names]
            torch.softmax(heads.mc_logits(penultimate(network, images), again, 1).double(), dim=-1)
        times.append(perf_counter())
        if start >= 0:
            for part, before, after in zip(seconds, times, times[1:], strict=False):
                seconds[part] += after - before
            repeated_images += len(names) if repeat else 0
    ours, repeated = seconds["ours"] / options.images, seconds["repeated"] / repeated_images
    return {
        "seconds": seconds,
        "repeated_images": repeated_images,
        "milliseconds_per_image": {"ours": 1000 * ours, "repeated": 1000 * repeated},
        "speedup": repeated / ours,
        "ours_over_backbone": seconds["ours"] / seconds["backbone"],
    }


def main() -> None:
    """Measure, write a row to benchmarks/results/mc_dropout.json, and print it."""
    parser = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeated-images", type=int, default=128, help="images that the slow way is timed on")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--passes", type=int, default=20, help="stochastic passes per image and head")
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()
    row = {"command": command_of(parser, options), "settings": settings_of(options)} | measure(options) | environment()
    row["torch_threads"] = torch.get_num_threads()
    if not options.no_record:
        record(row, NAME)
    print(
        f"{options.images} images: {row['seconds']['ours']:.1f} s (backbone {row['seconds']['backbone']:.1f} s, heads "
        f"{row['seconds']['heads']:.1f} s); repeating the backbone is {row['speedup']:.1f} times slower per image"
    )


if __name__ == "__main__":
    main()
