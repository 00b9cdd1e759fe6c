"""The scale of the perturbation, from a pilot: as strong as the labels bear, and stronger than ordinary augmentation."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medaug import storage
from medaug.cohort import Cohort
from medaug.errors import ConfigError, DataError
from medaug.generation.generate import VariationBatches, check_run, tile
from medaug.generation.plan import PlannedCase, largest_remainder, variation_plan
from medaug.generation.variations import VariationSampler
from medaug.io.raster import write_unit_png
from medaug.networks.guided_unet import GuidedUNet
from medaug.progress import progress
from medaug.quality.checks import CopyRuler, GateContext
from medaug.quality.copies import nearest_distances
from medaug.quality.fidelity import features_of, task_features
from medaug.quality.pseudo_label import LabelFilter, default_recipe, train_filter
from medaug.tracking import track
from medaug.training.classifier import ClassifierRecipe
from medaug.training.run_folder import RunRecord
from medaug.transforms.policies import apply_policy
from medaug.transforms.prepare import restore

RESULT_FILE, PLOT_FILE, STRIPS_FILE = "calibration.json", "calibration.png", "strips.png"
STRIPS = 8  # seed images shown

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PilotRow:
    """What one scale does to the pilot's seed images.

    Attributes:
        scale: rho.
        agreement: share of variations in which the judge sees the label of the seed image.
        distance: median over the seed images of the distance between variation and seed image, in the judge's features.
        copy_rate: share of variations nearer to a training image than 99 % of new images are.
    """

    scale: float
    agreement: float
    distance: float
    copy_rate: float


def choose_scale(rows: Sequence[PilotRow], weak_distance: float, least_agreement: float = 0.9) -> float:
    """The largest scale that keeps the labels and changes an image more than weak augmentation does.

    Args:
        rows: one per scale; the one with scale 0 is the yardstick of agreement and never chosen.
        weak_distance: median distance that weak augmentation of the seed images produces.
        least_agreement: share of the agreement at scale 0 that must be left.

    Raises:
        ConfigError: no row with scale 0, or none besides it (code `calibration-scales`).
        DataError: no scale leaves the labels (code `calibration-labels-destroyed`), or those that do change too little
            (code `calibration-too-weak`).
    """
    calm = [row for row in rows if row.scale == 0]
    tried = [row for row in rows if row.scale > 0]
    if len(calm) != 1 or not tried:
        raise ConfigError("calibration-scales", "A calibration needs scale 0 once and at least one positive scale.")
    needed = least_agreement * calm[0].agreement
    kept = [row for row in tried if row.agreement >= needed - 1e-9 and row.agreement > 0]
    if not kept:
        best = max(tried, key=lambda row: row.agreement)
        raise DataError(
            "calibration-labels-destroyed",
            f"Every scale destroys the labels: the judge agrees with {calm[0].agreement:.2f} of the unperturbed images and at best "
            f"with {best.agreement:.2f} (scale {best.scale:g}), {needed:.2f} is needed; try smaller scales (`--set "
            "calibration_settings#scales=[0.05,0.1]`), another location or less strength (variation_settings), or train longer.",
        )
    passed = [row for row in kept if row.distance > weak_distance]
    if not passed:
        most = max(kept, key=lambda row: row.distance)
        raise DataError(
            "calibration-too-weak",
            f"No scale that keeps the labels changes an image more than weak augmentation does: {most.distance:.3f} (scale "
            f"{most.scale:g}) against {weak_distance:.3f}; try larger scales (`--set "
            "calibration_settings#scales=[1.0,2.0]`), another location or more strength (variation_settings).",
        )
    return max(row.scale for row in passed)


def pilot_counts(cohort: Cohort, num_seeds: int) -> list[int]:
    """Seed images per class: in the shares of the training split, one at least, and no more than there are."""
    there = [
        sum(case.label == label and not case.is_synthetic for case in cohort.training) for label in range(len(cohort.classes))
    ]
    if not sum(there):
        raise DataError("training-empty", "The training split holds no image to vary; use a cohort with training images.")
    total = min(num_seeds, sum(there))
    shares = largest_remainder([count / sum(there) * total for count in there], total)
    return [min(count, max(1, share)) if count else 0 for count, share in zip(there, shares, strict=True)]


@dataclass
class Calibration:
    """A pilot over several scales on seed images of the training split; resumes from its result.

    Attributes:
        cohort: real cohort the run was trained on.
        record: the run's record.
        network: the run's network, in evaluation mode.
        sampler: everything but its scale is used.
        output_dir: ``calibration.json``, ``calibration.png`` (the curve), ``strips.png`` (seed images and their variations), ``judge/``.
        seed: of the choice of seed images and of the judge.
        batch_size: variations per batch.
        scales: positive values to try.
        num_seeds: seed images, stratified by class.
        least_agreement: see `choose_scale`.
        recipe: fields of the judge's recipe that differ from the label filter's.
        tracking: keyword arguments of `medaug.tracking.track`.
    """

    cohort: Cohort
    record: RunRecord
    network: GuidedUNet
    sampler: VariationSampler
    output_dir: Path
    seed: int = 0
    batch_size: int = 16
    scales: Sequence[float] = (0.1, 0.25, 0.5, 1.0)
    num_seeds: int = 64
    least_agreement: float = 0.9
    recipe: Mapping[str, Any] = field(default_factory=dict)
    tracking: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [value for value in self.scales if isinstance(value, bool) or not value > 0]
        if not self.scales or wrong or self.num_seeds < 1 or not 0 <= self.least_agreement <= 1:
            raise ConfigError(
                "calibration-scales",
                f"A calibration needs positive scales, at least one seed image and a least agreement in [0, 1], got {list(self.scales)}, "
                f"{self.num_seeds} and {self.least_agreement}.",
            )

    def apply(self, evaluator: Any) -> float:
        """Run, or read the result, and give the evaluator a sampler with the chosen scale, which is returned."""
        scale = float(self.run()["scale"])
        evaluator.inferer = replace(self.sampler, scale=scale)
        return scale

    def run(self) -> dict[str, Any]:
        """The result: ``scale``, ``rows``, ``weak_distance``, ``bottleneck_std`` over t, facts of the judge, and
        ``reconstruction_error``: by how much scale 0 misses the seed images (images in [-1, 1], mean and max of the absolute value).

        Raises:
            DataError: no scale passes (codes of `choose_scale`); the curve is written first.
            LeakageError: the run was trained on a group that this cohort holds out.
        """
        check_run(self.record, self.cohort)
        folder = Path(self.output_dir)
        identity = storage.sha256_json(self._identity())
        with storage.locked(folder):
            path = folder / RESULT_FILE
            result = storage.read_json(path) if path.is_file() else {}
            if result.get("identity") != identity:
                with track("calibration", name=f"calibration {self.record.bundle} {identity[:8]}", **self.tracking) as run:
                    result, strips = self._pilot(folder, identity)
                    figure = calibration_figure(result)
                    write_unit_png(folder / STRIPS_FILE, strips)
                    write_figure(figure, folder / PLOT_FILE)
                    storage.write_json(path, result)
                    run.log_params({"weights_sha256": self.record.weights_sha256, "seed": self.seed, "scale": result["scale"]})
                    for index, row in enumerate(result["rows"]):
                        run.log_metrics(row, step=index)
                    run.log_image(strips, "strips", step=0)
                    run.log_figure(figure, PLOT_FILE)
        choose_scale(
            [PilotRow(**row) for row in result["rows"]], result["weak_distance"], self.least_agreement
        )  # or says why not
        return dict(result)

    def _identity(self) -> list[Any]:
        sampler = _without_scale(self.sampler)
        pilot = [list(self.scales), self.num_seeds, self.least_agreement, dict(self.recipe), self.seed]
        return [self.record.weights_sha256, self.cohort.content_sha256, sampler, pilot]

    def _pilot(self, folder: Path, identity: str) -> tuple[dict[str, Any], np.ndarray]:
        judge = train_filter(self.cohort, folder / "judge", recipe=self._recipe(), seed=self.seed + 1)
        ruler = GateContext(self.cohort, self.cohort, folder / "judge", 0.0).ruler
        counts = pilot_counts(self.cohort, self.num_seeds)
        plan = variation_plan(self.cohort, self.record, self.seed, counts=counts)
        dataset = VariationBatches(self.cohort, plan, self.batch_size)
        scales = [0.0, *sorted(float(scale) for scale in self.scales)]
        spread: dict[int, list[float]] = {}
        seeds, varied, cases = self._vary(dataset, scales, spread)
        missed = (varied[0] - seeds).abs()
        rows = [measure(scale, images, seeds, cases, judge, ruler) for scale, images in zip(scales, varied, strict=True)]
        keys = [("calibration", self.seed, case.reference.id) for case in cases]
        weak_distance = float(np.median(feature_distances(judge, seeds, apply_policy("weak", seeds, keys))))
        try:
            scale: float | None = choose_scale(rows, weak_distance, self.least_agreement)
        except DataError:
            scale = None
        result = {
            "identity": identity,
            "scale": scale,
            "rows": [vars(row) for row in rows],
            "weak_distance": weak_distance,
            "least_agreement": self.least_agreement,
            "seed_images": len(cases),
            "bottleneck_std": [{"t": t, "std": float(np.mean(values))} for t, values in sorted(spread.items(), reverse=True)],
            "reconstruction_error": {"mean": float(missed.mean()), "max": float(missed.max())},
            "sampler": _without_scale(self.sampler),
            "judge_validation": judge.facts.get("validation"),
            "weights_sha256": self.record.weights_sha256,
        }
        return result, strips(seeds, varied)

    def _recipe(self) -> ClassifierRecipe:
        try:
            return replace(default_recipe(), **self.recipe)
        except TypeError as error:
            raise ConfigError("recipe-unknown-key", f"The judge's recipe does not take these fields: {error}.") from error

    def _vary(
        self, dataset: VariationBatches, scales: Sequence[float], spread: dict[int, list[float]]
    ) -> tuple[Tensor, list[Tensor], list[PlannedCase]]:
        """Seed images (N, C, H, W), their variations per scale, and the planned cases; each seed image is inverted once."""
        samplers = [replace(self.sampler, scale=scale) for scale in scales]  # which share the inversions

        def watch(t: int, h: Tensor) -> None:
            spread.setdefault(t, []).append(float(h.flatten(1).std(dim=1, correction=0).mean()))

        seeds: list[Tensor] = []
        made: list[list[Tensor]] = [[] for _ in scales]
        cases: list[PlannedCase] = []
        with progress("calibrating", sum(map(len, dataset.batches)) * len(scales)) as advance:
            for batch in dataset:
                cases += batch["cases"]
                seeds += [batch["reference"](i) for i in range(len(batch["cases"]))]
                for images, sampler in zip(made, samplers, strict=True):
                    seen = watch if sampler.scale == 0 else None
                    out = sampler(batch, self.network.eval(), seen).cpu().float().clamp(-1, 1)
                    if not torch.isfinite(out).all():
                        raise DataError(
                            "sample-not-finite", "A variation holds NaN or infinite values; the weights are not usable."
                        )
                    images.append(out)
                    advance(len(batch["cases"]))
        return torch.stack(seeds), [torch.cat(images) for images in made], cases


def make_calibration(settings: Mapping[str, Any], **parts: Any) -> Calibration:
    """A `Calibration` from the plain settings of a config (scales, num_seeds, least_agreement, recipe) and its parts.

    Raises:
        ConfigError: an unknown setting.
    """
    known = {"scales", "num_seeds", "least_agreement", "recipe"}
    if unknown := sorted(set(settings) - known):
        raise ConfigError("setting-unknown", f"Unknown calibration setting(s) {unknown}; known are {sorted(known)}.")
    return Calibration(**parts, **settings)


def calibrated(sampler: VariationSampler, folder: Path, record: RunRecord) -> VariationSampler:
    """The sampler with the scale that a calibration in `folder` chose; as it is, where none was chosen for this run and these settings.

    Args:
        sampler: its seed and its scale may differ from the calibration's.
        folder: a calibration's output; it need not exist.
        record: of the run.
    """
    path = Path(folder) / RESULT_FILE
    result = storage.read_json(path) if path.is_file() else {}
    if result.get("scale") is None:
        return sampler
    if result.get("weights_sha256") != record.weights_sha256:
        _log.warning("The calibration beside this run is of other weights; the scale stays %g.", sampler.scale)
        return sampler
    ours, theirs = (
        {k: v for k, v in facts.items() if k != "seed"} for facts in (_without_scale(sampler), result.get("sampler", {}))
    )
    if other := sorted(name for name in ours if ours[name] != theirs.get(name)):
        _log.warning("The calibration beside this run is of another %s; the scale stays %g.", ", ".join(other), sampler.scale)
        return sampler
    return replace(sampler, scale=float(result["scale"]))


def _without_scale(sampler: VariationSampler) -> dict[str, Any]:
    return {name: value for name, value in sampler.settings().items() if name != "scale"}


def measure(
    scale: float, images: Tensor, seeds: Tensor, cases: Sequence[PlannedCase], judge: LabelFilter, ruler: CopyRuler
) -> PilotRow:
    """The row of one scale for variations (N, C, H, W) of seed images of the same shape."""
    seen = np.concatenate([judge.probabilities(batch).argmax(1) for batch in images.split(128)])
    near, _ = nearest_distances(features_of(ruler.extractor, images.split(128)), ruler.training)
    return PilotRow(
        scale=scale,
        agreement=float((seen == np.array([case.label for case in cases])).mean()),
        distance=float(np.median(feature_distances(judge, seeds, images))),
        copy_rate=float((near <= ruler.threshold).mean()),
    )


def feature_distances(judge: LabelFilter, one: Tensor, other: Tensor) -> np.ndarray:
    """Euclidean distance (N,) in [0, 2] between pairs of images in the judge's penultimate layer, at unit length."""
    extractor = task_features(judge.network)
    a, b = (features_of(extractor, images.split(128)) for images in (one, other))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    distances: np.ndarray = np.linalg.norm(a - b, axis=1)
    return distances


def strips(seeds: Tensor, varied: Sequence[Tensor]) -> np.ndarray:
    """One row per seed image, spread over the pilot: the seed image, then its variation at each scale, as a unit image."""
    shown = np.linspace(0, len(seeds) - 1, min(STRIPS, len(seeds))).round().astype(int)
    return tile([[restore(images[i]) for images in (seeds, *varied)] for i in shown])


def calibration_figure(result: Mapping[str, Any]) -> Any:
    """Agreement, distance and copy rate over the scale, with the bounds of the rule and the chosen scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    rows = result["rows"]
    bounds: dict[str, Callable[[], float] | None] = {
        "agreement": lambda: result["least_agreement"] * rows[0]["agreement"],
        "distance": lambda: result["weak_distance"],
        "copy_rate": None,
    }
    titles = {"agreement": "label agreement", "distance": "distance to the seed image", "copy_rate": "near-copies"}
    for axis, (name, bound) in zip(figure.subplots(1, 3), bounds.items(), strict=True):
        axis.plot([row["scale"] for row in rows], [row[name] for row in rows], marker="o", color="#2a6f97")
        if bound is not None:
            axis.axhline(bound(), color="#c1121f", linestyle="--", label="least")
            axis.legend(frameon=False)
        if result["scale"] is not None:
            axis.axvline(result["scale"], color="#8aa29e", linestyle=":")
        axis.set(xlabel="scale", ylabel=titles[name], ylim=(0, None))
    return figure


def write_figure(figure: Any, path: Path) -> None:
    """The figure as a PNG that appears whole."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    storage.write_bytes(path, stream.getvalue())
