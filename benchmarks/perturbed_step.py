"""Cost of one perturbed sampling step beside its parts: encoder and middle block once, decoder twice, of the same network.

The whole step is what generation runs: network and guidance in one batch, the keyed noise, eq. 6, the step from t to p. Both sides are
timed in one process in interleaved pairs whose order alternates, so that what the machine does meanwhile hits both. The figure is the median
of the ratios of the pairs. Example:

    python benchmarks/perturbed_step.py --pairs 60
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
from torch import Tensor

from medaug.diffusion.schedule import pairs
from medaug.diffusion.steps import DDIM
from medaug.draws import randn_batch
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.generation.variations import VariationSampler, make_variation_sampler
from medaug.networks.build import build_guided_unet
from medaug.networks.guided_unet import GuidedUNet
from medaug.training.diffusion import NoiseObjective
from medaug.workflow import load_config

NAME = "perturbed_step"
BAR = 1.05


def build(profile: str | None, backbone: str | None) -> tuple[GuidedUNet, NoiseObjective, VariationSampler]:
    """Network with every weight moved (a fresh one returns 0), objective and sampler of the bundle under this profile."""
    config = load_config("bottleneck_perturbation", "training", profile)
    settings = dict(config["network_settings"])
    if backbone == "monai":
        options = {"channels": [32, 64, 64], "norm_num_groups": 32, "num_head_channels": 32}
        settings |= {"backbone": "monai", "backbone_options": options}
    torch.manual_seed(0)
    network = build_guided_unet(settings, 1, 3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    variation = load_config("bottleneck_perturbation", "generating", profile)["variation_settings"]
    sampler = make_variation_sampler(config["diffusion_settings"], variation, config["sampler_settings"])
    assert isinstance(sampler.objective, NoiseObjective)
    return network, sampler.objective, sampler


def make_sides(
    network: GuidedUNet, objective: NoiseObjective, sampler: VariationSampler, batch_size: int, size: int
) -> dict[str, Callable[[], Tensor]]:
    """ "step": one perturbed step. "parts": the network's parts alone, on the batch that the step gives them."""
    ids = [f"image-{i}" for i in range(batch_size)]
    x_t = randn_batch((1, size, size), ids, "benchmark", "x_t")
    labels = torch.arange(batch_size) % 3
    conditional = ConditionalDenoiser(network, objective, labels, guidance_scale=sampler.guidance_scale)
    t, p = pairs(sampler.timesteps)[len(sampler.timesteps) // 2]
    denoise = sampler._denoiser(conditional, ids, sampler.perturbation)
    step, z = DDIM(1.0), randn_batch((1, size, size), ids, "benchmark", "z")
    query = conditional.ask(x_t, t)
    seen = objective.parameterisation.network_input(query.x, query.level.abar)
    both = torch.cat([labels, torch.full_like(labels, 3)]) if conditional.passes == 2 else labels

    def whole() -> Tensor:
        return step(denoise(x_t, t), x_t, t, p, schedule=objective.schedule, noise=lambda t: z, previous=None)

    def parts() -> Tensor:
        encoded = network.encode(seen, query.level.time, both)
        network.decode(encoded)
        return network.decode(encoded)

    return {"step": whole, "parts": parts}


@torch.no_grad()
def measure(sides: dict[str, Callable[[], Tensor]], num_pairs: int, warmup: int) -> dict[str, Any]:
    """Seconds of each side and the ratio step / parts, over `num_pairs` pairs after `warmup` discarded ones."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warmup + num_pairs):
        for name in sorted(sides, reverse=bool(index % 2)):
            start = time.perf_counter()
            sides[name]()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["step"], seconds["parts"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = {f"seconds_{name}_median": statistics.median(values) for name, values in seconds.items()}
    return {"ratio_median": statistics.median(ratios), "ratio_quartiles": [quartiles[0], quartiles[2]], "bar": BAR} | medians


def count(network: GuidedUNet, whole: Callable[[], Tensor]) -> dict[str, int]:
    """How often one step calls the parts: what makes the comparison fair."""
    calls = {"encode": 0, "middle": 0, "decode": 0}
    for name in calls:
        original = getattr(network.unet, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            calls[_name] += 1
            return _original(*args, **named)

        object.__setattr__(network.unet, name, counting)
    with torch.no_grad():
        whole()
    for name in calls:
        object.__delattr__(network.unet, name)
    if calls != {"encode": 1, "middle": 1, "decode": 2}:
        raise SystemExit(f"A perturbed step must encode once and decode twice, it called {calls}.")
    return calls


def main() -> None:
    """Measure, write a row to benchmarks/results/perturbed_step.json, and print it."""
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pairs", type=int, default=60, help="measured pairs")
    parser.add_argument("--warmup", type=int, default=5, help="pairs that are not counted")
    parser.add_argument("--profile", default="cpu32", help="whose network, grid and guidance")
    parser.add_argument("--backbone", choices=["monai"], default=None, help="MONAI's U-Net in place of the profile's")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()

    around = environment()
    network, objective, sampler = build(options.profile, options.backbone)
    sides = make_sides(network, objective, sampler, options.batch_size, options.image_size)
    row: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key != "no_record"},
        "guidance_scale": sampler.guidance_scale,
        "calls": count(network, sides["step"]),
        **measure(sides, options.pairs, options.warmup),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch_threads": torch.get_num_threads(),
        **around,
    }
    if not options.no_record:
        record(row, NAME)
    print(
        f"ratio {row['ratio_median']:.3f} (quartiles {row['ratio_quartiles'][0]:.3f} to {row['ratio_quartiles'][1]:.3f}, bar {BAR}), "
        f"step {row['seconds_step_median']:.4f} s, parts {row['seconds_parts_median']:.4f} s"
    )


if __name__ == "__main__":
    main()
