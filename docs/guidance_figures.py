"""Figures and numbers of docs/guidance.md: what guidance does to distributions whose perfect network is a formula.

python docs/guidance_figures.py [--out FOLDER] writes figures and numbers.json with medaug's own functions; float64, a few seconds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from medaug.diffusion import (
    DDIM,
    ClassMeasure,
    EnsembleVotes,
    GradientGuidance,
    Prediction,
    SqrtAbar,
    disturb,
    make_measure,
    make_schedule,
    noise_from_x_0,
    sample,
    spaced_timesteps,
)

SCHEDULE = make_schedule("linear_beta", 1000)
MEAN, STD = 0.6, 0.4  # the clusters N(-MEAN, STD^2) and N(MEAN, STD^2)
COLOURS = ("#2a6f97", "#c1121f", "#8aa29e", "#e09f3e")
Denoiser = Callable[[Tensor, int], Prediction]


# --- perfect networks and classifiers -----------------------------------------------------------------------------------


def gaussian(mean: Tensor | float, std: float) -> Denoiser:
    """The network of data N(mean, std^2)."""

    def denoise(x_t: Tensor, t: int) -> Prediction:
        abar = SCHEDULE.abar(t)
        gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        x_0 = mean + gain * (x_t - abar.sqrt() * mean)
        return Prediction(x_0, noise_from_x_0(x_t, x_0, abar))

    return denoise


def means(labels: Tensor, dimensions: int = 1) -> Tensor:
    """Class means (B, dimensions): the classes differ along the first axis alone."""
    found = torch.zeros(len(labels), dimensions, dtype=torch.float64)
    found[:, 0] = MEAN * (2 * labels - 1)
    return found


def logit(x: Tensor, abar: Tensor) -> Tensor:
    """log p(1 | x_t) - log p(0 | x_t), (B, 1)."""
    return 2 * abar.sqrt() * MEAN / (abar * STD**2 + 1 - abar) * x[:, :1]


def both(x_t: Tensor, t: int) -> Prediction:
    """The network of both clusters together, which knows no class."""
    abar = SCHEDULE.abar(t)
    share = torch.sigmoid(logit(x_t, abar))
    ends = [gaussian(means(torch.full((len(x_t),), label), x_t.shape[1]), STD)(x_t, t).x_0 for label in (0, 1)]
    x_0 = (1 - share) * ends[0] + share * ends[1]
    return Prediction(x_0, noise_from_x_0(x_t, x_0, abar))


def classifier(x: Tensor, time: Tensor) -> Tensor:
    """Exact logits (B, 2) of noisy images."""
    z = logit(x, SCHEDULE.abar(int(time[0])))
    return torch.cat([torch.zeros_like(z), z], dim=1)


def guide(measure: str, scale: float, labels: Tensor | None = None) -> GradientGuidance:
    """The measure of the exact classifier, driven up at this scale."""
    return GradientGuidance(ClassMeasure(make_measure(measure), EnsembleVotes([classifier], 2), labels), scale, SCHEDULE)


def entropy(x: Tensor) -> float:
    """Mean entropy in nats of the exact classifier of clean images."""
    p = torch.sigmoid(2 * MEAN / STD**2 * x[:, 0]).clamp(1e-12, 1 - 1e-12)
    return float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())


def standard(count: int, dimensions: int = 1, seed: int = 0) -> Tensor:
    """Starts with mean exactly 0 and standard deviation exactly 1: only the chain can move them."""
    x = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x - x.mean(dim=0)) / x.std(dim=0)


def _no_noise(t: int) -> Tensor:
    raise AssertionError(t)


def ddim(denoiser: Denoiser, x_T: Tensor, steps: int, guidance: Any = None) -> Tensor:  # noqa: N803 - the paper's name
    """DDIM with eta = 0 from x_T."""
    grid = spaced_timesteps(SCHEDULE, steps)
    return sample(denoiser, x_T, grid, DDIM(), schedule=SCHEDULE, noise=_no_noise, guide=guidance)


# --- one Gaussian, tilted -------------------------------------------------------------------------------------------------


def tilts() -> dict[str, dict[str, float]]:
    """Mean and standard deviation of N(0, 1) under s = 2, M_0 = x / 2, whose target is N(1, 1)."""

    def linear(factor: Callable[[int], float]) -> Any:
        return lambda x, t: 0.5 * factor(t) * x.flatten(1).sum(dim=1)

    diffused = GradientGuidance(linear(lambda t: math.sqrt(float(SCHEDULE.abar(t)))), 2.0, SCHEDULE)
    clean = GradientGuidance(linear(lambda t: 1.0), 2.0, SCHEDULE)
    faded = GradientGuidance(linear(lambda t: 1.0), 2.0, SCHEDULE, scale_schedule=SqrtAbar())
    ways = {
        "no guidance, 1000 steps": (1000, None),
        "no guidance, 50 steps": (50, None),
        "diffused energy, 1000 steps": (1000, diffused),
        "diffused energy, 50 steps": (50, diffused),
        "clean energy with sqrt_abar, 1000 steps": (1000, faded),
        "clean energy at every t, 1000 steps": (1000, clean),
    }
    made = {name: ddim(gaussian(0.0, 1.0), standard(512), steps, guidance) for name, (steps, guidance) in ways.items()}
    return {name: {"mean": round(float(x.mean()), 4), "std": round(float(x.std()), 4)} for name, x in made.items()}


def tilting_figure(numbers: dict[str, dict[str, float]]) -> Figure:
    """Data, target, and what the ways of `tilts` make."""
    figure, axis = _figure(1)
    x = torch.linspace(-4, 9, 400)

    def density(mean: float, std: float) -> Tensor:
        return torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))

    axis[0].plot(x, density(0.0, 1.0), color=COLOURS[2], label="data N(0, 1)")
    axis[0].fill_between(x, density(1.0, 1.0), color=COLOURS[3], alpha=0.3, label="target N(1, 1)")
    names = ("diffused energy, 1000 steps", "diffused energy, 50 steps", "clean energy at every t, 1000 steps")
    for name, colour, style in zip(names, (COLOURS[0], COLOURS[0], COLOURS[1]), ("-", ":", "-"), strict=True):
        axis[0].plot(x, density(**numbers[name]), color=colour, linestyle=style, label=name)
    axis[0].set(xlabel="x", ylabel="density", ylim=(0, None))
    axis[0].legend(frameon=False, fontsize=8)
    return figure


# --- two clusters -----------------------------------------------------------------------------------------------------------

LABELS = torch.arange(1024) % 2
SCALES = (0.0, 0.25, 0.5, 1.0, 2.0)
MEASURES = ("entropy", "margin", "least_confidence", "classifier")


def network(classes: bool) -> Denoiser:
    """Of the labels `LABELS`, or of both clusters together."""
    return gaussian(means(LABELS), STD) if classes else both


def clusters() -> list[dict[str, Any]]:
    """Mean entropy and mean distance to the boundary per network, measure and scale."""
    rows = []
    for classes in (True, False):
        for measure in MEASURES:
            for scale in sorted({*SCALES, *(-s for s in SCALES)}) if measure != "classifier" else SCALES:
                x = ddim(network(classes), standard(len(LABELS)), 50, guide(measure, scale, LABELS))
                row = {"network": "with classes" if classes else "without classes", "measure": measure, "scale": scale}
                kept = float(((x[:, 0] > 0).long() == LABELS).double().mean())
                rows.append(
                    row
                    | {"entropy": round(entropy(x), 4), "distance": round(float(x.abs().mean()), 4), "label_kept": round(kept, 4)}
                )
    return rows


def histogram_figure() -> Figure:
    """Where images lie under guidance to uncertainty and to the class."""
    figure, axes = _figure(2)
    for axis, measure in zip(axes, ("entropy", "classifier"), strict=True):
        for scale, colour in zip((0.0, 0.5, 2.0), (COLOURS[2], COLOURS[0], COLOURS[1]), strict=True):
            x = ddim(network(True), standard(len(LABELS)), 50, guide(measure, scale, LABELS))
            axis.hist(x[:, 0].numpy(), bins=60, range=(-2.2, 2.2), histtype="step", color=colour, label=f"scale {scale:g}")
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="x", ylabel="images", title=f"guided by {measure}")
        axis.legend(frameon=False, fontsize=8)
    return figure


def scales_figure(rows: list[dict[str, Any]]) -> Figure:
    """Mean entropy over the scale."""
    figure, axes = _figure(2)
    for axis, name in zip(axes, ("with classes", "without classes"), strict=True):
        for measure, colour in zip(MEASURES, COLOURS, strict=True):
            mine = [row for row in rows if row["network"] == name and row["measure"] == measure]
            axis.plot([row["scale"] for row in mine], [row["entropy"] for row in mine], marker=".", color=colour, label=measure)
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="guidance scale", ylabel="mean entropy (nats)", title=f"network {name}", ylim=(0, math.log(2)))
        axis.legend(frameon=False, fontsize=8)
    return figure


def disturbance_figure() -> Figure:
    """Where given images of two dimensions go: the classes differ along x alone."""
    figure, axes = _figure(2)
    labels = torch.arange(60) % 2
    x_0 = means(labels, 2) + STD * standard(60, 2, seed=3)
    denoiser = gaussian(means(labels, 2), STD)
    for axis, gamma in zip(axes, (0.0, 1.0), strict=True):
        grid = spaced_timesteps(SCHEDULE, 100)
        moved = disturb(denoiser, x_0, grid, schedule=SCHEDULE, guide=guide("entropy", gamma), clip=False, refinements=1)
        for label in (0, 1):
            mine = labels == label
            axis.scatter(*moved[mine].T.numpy(), s=12, color=COLOURS[label], label=f"class {label}")
        step = (moved - x_0).numpy()
        axis.quiver(*x_0.T.numpy(), *step.T, angles="xy", scale_units="xy", scale=1, width=0.003, color=COLOURS[2])
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="what tells the classes apart", ylabel="what does not", title=f"entropy, scale {gamma:g}", xlim=(-2, 2))
        axis.legend(frameon=False, fontsize=8)
    return figure


def _figure(columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.4 * columns, 3.0) if columns > 1 else (6.0, 3.0), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def main() -> None:
    """Write figures and numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "guidance")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {"tilting": tilts(), "two_clusters": clusters()}
    figures = {
        "tilting": tilting_figure(numbers["tilting"]),
        "two_clusters": histogram_figure(),
        "scales": scales_figure(numbers["two_clusters"]),
        "disturbance": disturbance_figure(),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", metadata={"Software": None})
    lines = ",\n".join(f"  {json.dumps(row)}" for row in numbers["two_clusters"])
    tilting = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in numbers["tilting"].items())
    (out / "numbers.json").write_text(f'{{"tilting": {{\n{tilting}\n}}, "two_clusters": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
