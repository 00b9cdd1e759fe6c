"""Cost of one guided sampling step beside the step without a guide, its parts, and the same step written plainly with MONAI's own classes.

The whole step is what generation runs: network, gradient of the measure through the classifier, the step from t to p. The bar: at most the
network's forward and three forwards of the classifier. All sides are timed in one process in interleaved rounds whose order alternates, so
that what the machine does meanwhile hits all; a figure is the median over the rounds. Then one run of many guided steps shows whether
memory grows with them. Example:

    OMP_NUM_THREADS=1 python benchmarks/guided_step.py --rounds 40
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler
from rows import environment, record
from torch import Tensor, nn

from medaug.diffusion import (
    DDIM,
    ClassMeasure,
    EnsembleVotes,
    GradientGuidance,
    OnPredictedX0,
    Timeless,
    make_measure,
    sample,
    spaced_timesteps,
)
from medaug.diffusion.schedule import pairs
from medaug.draws import randn_batch
from medaug.generation.class_guidance import dropout_votes
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.networks.build import build_guided_unet
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.time_classifier import TimeClassifier
from medaug.training.diffusion import NoiseObjective, build_objective

NAME = "guided_step"
BAR = 1.0
CLASSES = 3
SCALE = 5.0
SIDES = ("guided", "unguided", "network", "classifier", "monai")


def build(options: argparse.Namespace) -> tuple[GuidedUNet, TimeClassifier, NoiseObjective]:
    """MONAI's U-Net and the classifier with every weight moved (a fresh U-Net returns 0), and the objective of the paper."""
    backbone = {"channels": options.channels, "norm_num_groups": 16, "num_head_channels": 32}
    settings = {"backbone": "monai", "class_conditional": True, "backbone_options": backbone}
    torch.manual_seed(0)
    network = build_guided_unet(settings, 1, CLASSES).eval()
    classifier = TimeClassifier(1, CLASSES, options.image_size, patch=2 if options.image_size <= 32 else 4, dropout=0.1).eval()
    with torch.no_grad():
        for parameter in [*network.parameters(), *classifier.parameters()]:
            parameter += 0.02 * torch.randn_like(parameter)
    return network, classifier, build_objective({"parameterisation": "epsilon", "schedule": "linear_beta"})


def make_guide(
    classifier: TimeClassifier, denoiser: ConditionalDenoiser, objective: NoiseObjective, ids: list[str], measure: str, on: str
) -> GradientGuidance:
    """The guide of the measured step."""
    if on == "x0hat":
        clean = Timeless(_AtZero(classifier))
        inner = ClassMeasure(make_measure(measure), EnsembleVotes([clean], CLASSES), denoiser.labels)
        return GradientGuidance(OnPredictedX0(inner, denoiser), SCALE, objective.schedule)
    votes = dropout_votes(classifier, ids, 0) if measure == "bald" else EnsembleVotes([classifier], CLASSES)
    return GradientGuidance(ClassMeasure(make_measure(measure), votes, denoiser.labels), SCALE, objective.schedule)


class _AtZero(nn.Module):
    """The classifier as one of clean images."""

    def __init__(self, classifier: TimeClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x, torch.zeros(len(x)))
        return logits


def make_sides(
    network: GuidedUNet, classifier: TimeClassifier, objective: NoiseObjective, options: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, see `SIDES`; "monai" is the guided step (entropy, on x_t) in plain lines over MONAI's scheduler."""
    ids = [f"image-{i}" for i in range(options.batch_size)]
    x_t = randn_batch((1, options.image_size, options.image_size), ids, "benchmark", "x_t")
    labels = torch.arange(options.batch_size) % CLASSES
    denoiser = ConditionalDenoiser(network, objective, labels)
    guide = make_guide(classifier, denoiser, objective, ids, options.measure, options.on)
    timesteps = spaced_timesteps(objective.schedule, options.num_inference_steps, "leading")
    t, p = pairs(timesteps)[len(timesteps) // 2]
    step, schedule, when = DDIM(), objective.schedule, torch.full((options.batch_size,), float(t))
    scheduler = DDIMScheduler(1000, schedule="linear_beta", beta_start=1e-4, beta_end=2e-2, clip_sample=False)
    scheduler.set_timesteps(options.num_inference_steps)

    def stepped(chosen: GradientGuidance | None) -> Tensor:
        return sample(denoiser, x_t, [t], _To(step, p), schedule=schedule, noise=_none, guide=chosen)

    def plain() -> Tensor:
        noise = network.unet(x_t, when, labels)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_probs = classifier(x, when).log_softmax(dim=1)
            entropy = -(log_probs.exp() * log_probs).sum()
            (gradient,) = torch.autograd.grad(entropy, x)
        noise = noise - (1 - scheduler.alphas_cumprod[t]).sqrt() * SCALE * gradient
        found: Tensor = scheduler.step(noise, t, x_t)[0]
        return found

    return {
        "guided": lambda: stepped(guide),
        "unguided": lambda: stepped(None),
        "network": lambda: network(x_t, when, labels),
        "classifier": lambda: classifier(x_t, when),
        "monai": plain,
    }


class _To:
    """A step that goes to p, also where the grid ends."""

    def __init__(self, step: DDIM, p: int) -> None:
        self.step, self.p = step, p

    def __call__(self, prediction: Any, x_t: Tensor, t: int, p: int, **rest: Any) -> Tensor:
        return self.step(prediction, x_t, t, self.p, **rest)


def _none(t: int) -> Tensor:
    raise SystemExit(f"A step with eta = 0 drew noise at {t}.")


@torch.no_grad()
def measure(sides: dict[str, Callable[[], Tensor]], rounds: int, warmup: int) -> dict[str, Any]:
    """Seconds of each side and the ratios of each round, over `rounds` rounds after `warmup` discarded ones."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warmup + rounds):
        for name in sorted(sides, reverse=bool(index % 2)):
            start = time.perf_counter()
            sides[name]()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    by_round = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    ratios = {
        "ratio_to_parts": [r["guided"] / (r["network"] + 3 * r["classifier"]) for r in by_round],
        "ratio_to_unguided": [r["guided"] / r["unguided"] for r in by_round],
        "ratio_to_monai": [r["guided"] / r["monai"] for r in by_round],
    }
    found: dict[str, Any] = {"bar_to_parts": BAR}
    for name, values in ratios.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found |= {f"{name}_median": statistics.median(values), f"{name}_quartiles": [quartiles[0], quartiles[2]]}
    return found | {f"steps_per_second_{name}": 1 / statistics.median(seconds[name]) for name in ("guided", "unguided", "monai")}


@torch.no_grad()
def growth(
    network: GuidedUNet, classifier: TimeClassifier, objective: NoiseObjective, options: argparse.Namespace
) -> dict[str, Any]:
    """Peak memory in megabytes after the first tenth of a guided run and after all of it."""
    ids = [f"image-{i}" for i in range(options.batch_size)]
    x_top = randn_batch((1, options.image_size, options.image_size), ids, "benchmark", "x_t")
    denoiser = ConditionalDenoiser(network, objective, torch.arange(options.batch_size) % CLASSES)
    guide = make_guide(classifier, denoiser, objective, ids, options.measure, options.on)
    timesteps, peaks = spaced_timesteps(objective.schedule, options.memory_steps), []
    sample(
        denoiser,
        x_top,
        timesteps,
        DDIM(),
        schedule=objective.schedule,
        noise=_none,
        guide=guide,
        clip=True,
        on_step=lambda t, x, prediction: peaks.append(_peak_mb()),
    )
    first = peaks[max(0, len(peaks) // 10 - 1)]
    return {"steps": len(peaks), "peak_mb_first_tenth": first, "peak_mb_all": peaks[-1], "growth_mb": peaks[-1] - first}


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def check(sides: dict[str, Callable[[], Tensor]], options: argparse.Namespace) -> float | None:
    """Largest difference between the guided step and MONAI's, which must be the same step; None where MONAI's is another."""
    if (options.measure, options.on) != ("entropy", "x_t") or 1000 % options.num_inference_steps:
        return None
    with torch.no_grad():
        difference = float((sides["guided"]() - sides["monai"]()).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"The guided step and MONAI's are not the same step: they differ by {difference}.")
    return difference


def main() -> None:
    """Measure, write a row to benchmarks/results/guided_step.json, and print it."""
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--measure", choices=["classifier", "entropy", "margin", "least_confidence", "bald"], default="entropy")
    parser.add_argument("--on", choices=["x_t", "x0hat"], default="x_t")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 64], help="of the U-Net")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--memory-steps", type=int, default=200, help="steps of the run whose memory is watched")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()

    around = environment()
    parts = build(options)
    sides = make_sides(*parts, options)
    row: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key != "no_record"},
        "difference_to_monai": check(sides, options),
        **measure(sides, options.rounds, options.warmup),
        "memory": growth(*parts, options),
        "parameters": {
            name: sum(p.numel() for p in part.parameters()) for name, part in zip(("network", "classifier"), parts, strict=False)
        },
        "torch_threads": torch.get_num_threads(),
        **around,
    }
    if not options.no_record:
        record(row, NAME)
    low, high = row["ratio_to_parts_quartiles"]
    print(
        f"guided step {row['ratio_to_parts_median']:.3f} of network + 3 classifier forwards (quartiles {low:.3f} to {high:.3f}, bar {BAR}), "
        f"{row['ratio_to_unguided_median']:.3f} of the unguided step, {row['ratio_to_monai_median']:.3f} of MONAI's; "
        f"{row['steps_per_second_guided']:.2f} guided, {row['steps_per_second_unguided']:.2f} unguided steps per second; "
        f"memory grew by {row['memory']['growth_mb']:.1f} MB over {row['memory']['steps']} steps"
    )


if __name__ == "__main__":
    main()
