"""The same noise at several scales of a guidance: strips to look at, and how sure classifiers are of each row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medaug import storage
from medaug.cohort import Cohort
from medaug.diffusion.uncertainty import EnsembleVotes, mixture
from medaug.errors import ConfigError, DataError
from medaug.generation.calibration import write_figure
from medaug.generation.disturbance import seed_ids
from medaug.generation.generate import PlanBatches, Sampler, check_fit_groups, check_run, tile
from medaug.generation.guides import GuideClassifiers, is_finite
from medaug.generation.plan import PlannedCase
from medaug.io.raster import write_unit_png
from medaug.networks.guided_unet import GuidedUNet
from medaug.progress import progress
from medaug.quality.pseudo_label import LabelFilter, default_recipe, train_filter
from medaug.tracking import track
from medaug.training.classifier import ClassifierRecipe
from medaug.training.run_folder import RunRecord
from medaug.transforms.prepare import restore

RESULT_FILE, PLOT_FILE, STRIPS_FILE = "sweep.json", "sweep.png", "strips.png"
SETTINGS = ("scales", "num_images", "columns", "recipe")


class ScaledSampler(Sampler, Protocol):
    """A sampler whose guidance has a scale, such as `ClassGuidedSampler` and `DisturbanceSampler`."""

    def with_scale(self, scale: float) -> ScaledSampler:
        """The same with another scale on every term."""

    def __call__(self, inputs: Mapping[str, Any], network: GuidedUNet) -> Tensor:
        """Images (B, C, H, W), about [-1, 1]."""


@dataclass(frozen=True)
class SweepRow:
    """What one scale gives.

    Attributes:
        scale: s or gamma, on every term.
        entropy, agreement: mean entropy in nats and share of images with the intended label, by the judge, which guided nothing.
        guide_entropy, guide_agreement: the same by the guiding classifiers at t = 0; None without them.
        change: mean absolute difference to the row of scale 0, images in [-1, 1].
    """

    scale: float
    entropy: float
    agreement: float
    guide_entropy: float | None
    guide_agreement: float | None
    change: float


def even_counts(settings: Mapping[str, Any], cohort: Cohort, seeds: str | Collection[str] | None = None) -> list[int]:
    """Images per class of a sweep: as even as can be, no class more often than it has training images, or images among the `seeds`."""
    ids = None if seeds is None else seed_ids(seeds)
    real = [case.label for case in cohort.training if not case.is_synthetic and (ids is None or case.id in ids)]
    there = [real.count(label) for label in range(len(cohort.classes))]
    wanted = -(-int(settings["num_images"]) // max(1, sum(count > 0 for count in there)))
    return [min(wanted, count) for count in there]


def certainty(probs: np.ndarray, labels: Sequence[int]) -> tuple[float, float]:
    """Mean entropy in nats, and share of rows whose largest entry is the label, of probabilities (N, K)."""
    safe = np.clip(probs, 1e-12, 1)
    return float(-(safe * np.log(safe)).sum(axis=1).mean()), float((probs.argmax(axis=1) == np.asarray(labels)).mean())


@dataclass
class Sweep:
    """Draws every image of a plan at several scales; resumes from its result.

    Attributes:
        cohort: real cohort the run was trained on.
        record, network: of the run.
        sampler: everything but its scale is used.
        classifiers: that guide it; they may be none.
        plan: the images.
        batches: plan -> batches for the sampler, such as `PlanBatches` with all else given.
        output_dir: ``sweep.json``, ``sweep.png`` (curves), ``strips.png`` (one row per scale, one column per image), ``judge/``.
        seed: of the judge.
        scales: rows; 0 is added.
        num_images: measured.
        columns: shown.
        recipe: fields of the judge's recipe that differ from the label filter's.
        tracking: keyword arguments of `medaug.tracking.track`.

    Raises:
        ConfigError: no scale, or no image.
    """

    cohort: Cohort
    record: RunRecord
    network: GuidedUNet
    sampler: ScaledSampler
    classifiers: GuideClassifiers
    plan: Sequence[Sequence[PlannedCase]]
    batches: Callable[..., PlanBatches]
    output_dir: Path
    seed: int = 0
    scales: Sequence[float] = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
    num_images: int = 48
    columns: int = 12
    recipe: Mapping[str, Any] = field(default_factory=dict)
    tracking: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        listed = isinstance(self.scales, list | tuple) and self.scales
        if not listed or not all(map(is_finite, self.scales)) or min(self.num_images, self.columns) < 1:
            raise ConfigError(
                "sweep-scales",
                f"A sweep needs finite scales and at least one image, got {self.scales!r}, num_images {self.num_images} and columns "
                f"{self.columns}.",
            )

    def run(self) -> dict[str, Any]:
        """The result: ``rows`` (see `SweepRow`), facts of sampler and judge.

        Raises:
            ConfigError: a sampler without guidance (code `sweep-unguided`), or a scale at which the guidance diverges.
            LeakageError: run or classifier saw a group that this cohort holds out.
        """
        check_run(self.record, self.cohort)
        check_fit_groups(self.sampler.fit_groups, self.cohort, "classifier")
        if not self.sampler.settings().get("guidance"):
            raise ConfigError("sweep-unguided", "The settings name no guidance, so there is no scale to sweep over; add a term.")
        folder = Path(self.output_dir)
        identity = storage.sha256_json(self._identity())
        with storage.locked(folder):
            path = folder / RESULT_FILE
            result: dict[str, Any] = storage.read_json(path) if path.is_file() else {}
            if result.get("identity") != identity:
                with track("sweep", name=f"sweep {self.record.bundle} {identity[:8]}", **self.tracking) as run:
                    result, strips = self._draw(folder, identity)
                    figure = sweep_figure(result)
                    write_unit_png(folder / STRIPS_FILE, strips)
                    write_figure(figure, folder / PLOT_FILE)
                    storage.write_json(path, result)
                    run.log_params({"weights_sha256": self.record.weights_sha256, "seed": self.seed})
                    for index, row in enumerate(result["rows"]):
                        run.log_metrics({name: value for name, value in row.items() if value is not None}, step=index)
                    run.log_image(strips, "strips", step=0)
        return result

    def _identity(self) -> list[Any]:
        sampler = self.sampler.with_scale(0.0).settings()
        own = [list(map(float, self.scales)), self.num_images, self.columns, dict(self.recipe), self.seed]
        return [
            self.record.weights_sha256,
            self.cohort.content_sha256,
            sampler,
            [[case.id for case in cases] for cases in self.plan],
            own,
        ]

    def _draw(self, folder: Path, identity: str) -> tuple[dict[str, Any], np.ndarray]:
        judge = train_filter(self.cohort, folder / "judge", recipe=_recipe(self.recipe), seed=self.seed + 1)
        cases = interleaved(self.plan)[: self.num_images]
        scales = sorted({0.0, *map(float, self.scales)})
        batches = self.batches(plan=[cases])
        made = {scale: self._sample(batches, scale) for scale in scales}
        labels = [case.label for case in cases]
        rows = [self._row(scale, made[scale], made[0.0], labels, judge) for scale in scales]
        result = {
            "identity": identity,
            "rows": [vars(row) for row in rows],
            "images": len(cases),
            "classes": list(self.cohort.classes),
            "labels_shown": labels[: self.columns],
            "sampler": self.sampler.with_scale(0.0).settings(),
            "judge_validation": judge.facts.get("validation"),
            "weights_sha256": self.record.weights_sha256,
        }
        shown = min(self.columns, len(cases))
        return result, tile([[restore(image) for image in made[scale][:shown]] for scale in scales])

    def _sample(self, batches: PlanBatches, scale: float) -> Tensor:
        sampler, made = self.sampler.with_scale(scale), []
        with progress(f"scale {scale:g}", sum(map(len, batches.batches))) as advance:
            for batch in batches:
                made.append(sampler(batch, self.network.eval()).cpu().float().clamp(-1, 1))
                advance(len(batch["cases"]))
                if not torch.isfinite(made[-1]).all():
                    raise DataError(
                        "sample-not-finite", f"An image at scale {scale:g} holds NaN or infinite values; use smaller scales."
                    )
        return torch.cat(made)

    @torch.no_grad()
    def _row(self, scale: float, images: Tensor, plain: Tensor, labels: Sequence[int], judge: LabelFilter) -> SweepRow:
        entropy, agreement = certainty(np.concatenate([judge.probabilities(part) for part in images.split(128)]), labels)
        guide: tuple[float | None, float | None] = (None, None)
        if self.classifiers.networks:
            votes = EnsembleVotes(self.classifiers.networks, len(self.cohort.classes))
            place = next(self.classifiers.networks[0].parameters())
            probs = [mixture(votes(part.to(place), 0)).exp().cpu().double().numpy() for part in images.split(128)]
            guide = certainty(np.concatenate(probs), labels)
        return SweepRow(scale, entropy, agreement, *guide, change=float((images - plain).abs().mean()))


def interleaved(plan: Sequence[Sequence[PlannedCase]]) -> list[PlannedCase]:
    """The first of every class, then the second of every class, and so on."""
    longest = max(map(len, plan), default=0)
    return [cases[i] for i in range(longest) for cases in plan if i < len(cases)]


def _recipe(fields: Mapping[str, Any]) -> ClassifierRecipe:
    try:
        return replace(default_recipe(), **fields)
    except TypeError as error:
        raise ConfigError("recipe-unknown-key", f"The judge's recipe does not take these fields: {error}.") from error


def make_sweep(settings: Mapping[str, Any], **parts: Any) -> Sweep:
    """A `Sweep` from the plain settings of a config (scales, num_images, columns, recipe) and its parts.

    Raises:
        ConfigError: an unknown setting.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ConfigError("setting-unknown", f"Unknown sweep setting(s) {unknown}; known are {sorted(SETTINGS)}.")
    return Sweep(**parts, **settings)


def sweep_figure(result: Mapping[str, Any]) -> Any:
    """Mean entropy, label agreement and change over the scale; dashed what the guiding classifiers say."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    rows = result["rows"]
    titles = {"entropy": "mean entropy (nats)", "agreement": "label agreement", "change": "change"}
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        scales = [row["scale"] for row in rows]
        axis.plot(scales, [row[name] for row in rows], marker="o", color="#2a6f97", label="judge")
        if rows[0].get(f"guide_{name}") is not None:
            axis.plot(scales, [row[f"guide_{name}"] for row in rows], marker=".", color="#c1121f", linestyle="--", label="guide")
            axis.legend(frameon=False)
        axis.set(xlabel="guidance scale", ylabel=title, ylim=(0, None))
    return figure
