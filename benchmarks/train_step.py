"""Cost of one training step: medaug's guided U-Net without fusion against MONAI's own DiffusionModelUNet of the same size.

Both run in one process, in the same loop (noise, forward, mean squared error, backward, AdamW), in interleaved pairs whose order
alternates, so that what the machine does meanwhile hits both. The figure is the median of the ratios of the pairs. Example:

    python benchmarks/train_step.py --pairs 40
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from medaug.draws import randn
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.unet import MonaiUNet
from medaug.storage import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"
Step = Callable[[Tensor, Tensor], float]


def make_pair(channels: Sequence[int], groups: int) -> tuple[nn.Module, nn.Module]:
    """(ours, MONAI's) with the same weights: the output of one is the output of the other."""
    ours = MonaiUNet(1, 1, channels=channels, norm_num_groups=groups, num_head_channels=channels[-1])
    theirs = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=tuple(channels),
        num_res_blocks=1,
        attention_levels=(*[False] * (len(channels) - 1), True),
        norm_num_groups=groups,
        num_head_channels=channels[-1],
    )
    theirs.load_state_dict(ours.state_dict())
    return GuidedUNet(ours, None), theirs


def make_step(network: nn.Module) -> Step:
    """One training step on `network`; returns its loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(noisy: Tensor, noise: Tensor) -> float:
        timesteps = torch.linspace(0, 999, len(noisy)).round()
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(network(noisy, timesteps), noise)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(ours: Step, theirs: Step, batch: tuple[Tensor, Tensor], pairs: int, warmup: int) -> dict[str, Any]:
    """Seconds of each step and the ratio ours / theirs, over `pairs` pairs after `warmup` discarded ones."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    steps = {"ours": ours, "theirs": theirs}
    for index in range(warmup + pairs):
        losses = {}
        for name in sorted(steps, reverse=bool(index % 2)):
            start = time.perf_counter()
            losses[name] = steps[name](*batch)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
        if abs(losses["ours"] - losses["theirs"]) > 1e-4 * losses["theirs"]:
            raise SystemExit(f"The two networks do not do the same work: losses {losses['ours']} and {losses['theirs']}.")
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "seconds_ours_median": statistics.median(seconds["ours"]),
        "seconds_theirs_median": statistics.median(seconds["theirs"]),
    }


def record(row: dict[str, Any], path: Path) -> None:
    """Append a row to the JSON file at `path`."""
    rows = read_json(path)["rows"] if path.is_file() else []
    write_json(path, {"rows": [*rows, row]})


def main() -> None:
    """Measure, write a row to benchmarks/results/train_step.json, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="measured pairs of steps")
    parser.add_argument("--warmup", type=int, default=5, help="pairs that are not counted")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--groups", type=int, default=32, help="groups of the group normalisation")
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()

    torch.manual_seed(0)
    ours, theirs = make_pair(options.channels, options.groups)
    shape = (options.batch_size, 1, options.image_size, options.image_size)
    batch = (randn(shape, "benchmark", "image"), randn(shape, "benchmark", "noise"))
    row: dict[str, Any] = {"settings": {key: value for key, value in vars(options).items() if key != "no_record"}}
    row |= measure(make_step(ours), make_step(theirs), batch, options.pairs, options.warmup)
    row["parameters"] = sum(parameter.numel() for parameter in theirs.parameters())
    row["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    row["versions"] = {name: version(name) for name in ("medaug", "monai", "torch")}
    if not options.no_record:
        record(row, RESULTS / "train_step.json")
    print(
        f"ratio {row['ratio_median']:.3f} (quartiles {row['ratio_quartiles'][0]:.3f} to {row['ratio_quartiles'][1]:.3f}), "
        f"ours {row['seconds_ours_median']:.3f} s, MONAI {row['seconds_theirs_median']:.3f} s per step"
    )


if __name__ == "__main__":
    main()
