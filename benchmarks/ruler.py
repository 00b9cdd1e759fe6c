"""One ruler for every generator: KID to the real test split in the features of one classifier; and samples to hold against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from medaug.cohort import Cohort
from medaug.generation.generate import PlanBatches, tile
from medaug.generation.plan import largest_remainder, make_plan
from medaug.generation.sampler import GuidedSampler
from medaug.io.raster import write_unit_png
from medaug.networks.grading import build_network
from medaug.networks.guided_unet import GuidedUNet
from medaug.quality.fidelity import Extractor, features_of, kid, task_features
from medaug.quality.images import image_batches
from medaug.training.classifier import ClassifierRecipe, fit_classifier, predict_logits, seeded
from medaug.training.data import CaseImages
from medaug.transforms.prepare import restore

BATCH_SIZE = 64
SHEET_SIDE = 8  # images along each side of a sheet


@dataclass(frozen=True)
class Ruler:
    """KID to the real test split.

    Attributes:
        extractor: penultimate layer of a small CNN trained on the real training split.
        test: features of the test split.
        subset_size: images per KID subset.
        facts: how good the classifier is, and the KID of the real training split: what no generator should be expected to beat.
    """

    extractor: Extractor
    test: np.ndarray
    subset_size: int
    facts: Mapping[str, Any]

    def __call__(self, images: Tensor) -> dict[str, float | None]:
        """``{"kid", "kid_std"}`` of images (N, C, H, W): mean and standard deviation over 100 subsets."""
        return self._estimate(features_of(self.extractor, images.clamp(-1, 1).split(BATCH_SIZE)))

    def _estimate(self, features: np.ndarray) -> dict[str, float | None]:
        size = min(self.subset_size, len(self.test), len(features))
        estimate = kid(self.test, features, subset_size=size, key="benchmark", minimum=2)
        return {"kid": estimate.value, "kid_std": estimate.std}


def make_ruler(cohort: Cohort, num_steps: int, subset_size: int, seed: int) -> Ruler:
    """Train the classifier (validation picks its weights, the test split has no part in it) and measure the test split.

    The same cohort, steps, seed and number of threads give the same ruler, so a measurement that goes on after a kill keeps it.
    """
    key = ("benchmark-ruler", seed)
    with seeded(*key, "init"):
        network = build_network("simple_cnn", len(cohort.classes), cohort.channels, cohort.image_size)
    recipe = ClassifierRecipe(num_steps=num_steps, evaluate_every=max(1, num_steps // 10))
    fitted = fit_classifier(network, CaseImages(cohort, cohort.training), CaseImages(cohort, cohort.validation), recipe, key=key)
    preds = predict_logits(network, CaseImages(cohort, cohort.test)).argmax(1).tolist()
    extractor = task_features(network)
    ruler = Ruler(extractor, features_of(extractor, image_batches(cohort, cohort.test)), subset_size, {})
    floor = ruler._estimate(features_of(extractor, image_batches(cohort, cohort.training)))
    facts = {
        "extractor": f"simple_cnn, {num_steps} steps",
        "validation_macro_f1": fitted.best_macro_f1,
        "test_accuracy": sum(pred == case.label for pred, case in zip(preds, cohort.test, strict=True)) / len(preds),
        "test_images": len(cohort.test),
        "kid_of_real_training": floor["kid"],
    }
    return Ruler(extractor, ruler.test, subset_size, facts)


def against_reference(rows: Mapping[str, Mapping[str, Any]], reference: str, num_seeds: int) -> dict[str, Any]:
    """How far the KID of each row lies above that of the reference, and the margin that the luck of seeds allows; None with a single seed.

    Args:
        rows: name -> its `kid`, the mean over the seeds, and `kid_std_seeds`, their standard deviation, which is pooled over the rows.
    """
    margin = None
    if num_seeds > 1:
        pooled = float(np.mean([row["kid_std_seeds"] ** 2 for row in rows.values()]))
        margin = float(student.ppf(0.975, len(rows) * (num_seeds - 1)) * (2 * pooled / num_seeds) ** 0.5)
    result: dict[str, Any] = {"margin": margin}
    for name in [name for name in rows if name != reference]:
        difference = rows[name]["kid"] - rows[reference]["kid"]
        within = None if margin is None else bool(difference <= margin)
        result[name] = {"difference": difference, "within_noise": within}
    return result


def training_counts(cohort: Cohort, num_images: int) -> list[int]:
    """Images per class in the shares of the training split: the mix that a generator without classes learns."""
    real = cohort.class_counts("training")
    return largest_remainder([count / sum(real) * num_images for count in real], num_images)


def guided_samples(
    network: GuidedUNet, cohort: Cohort, sampler: GuidedSampler, num_images: int, seed: int, batch_size: int = BATCH_SIZE
) -> Tensor:
    """`num_images` samples (N, C, H, W) as `medaug generate` makes them; `seed` decides the references, the sampler the noise."""
    sampler.cache.features.clear()  # of an earlier state of the network
    plan = make_plan(cohort, training_counts(cohort, num_images), seed, "benchmark")
    network.eval()
    return torch.cat([sampler(batch, network) for batch in PlanBatches(cohort, plan, batch_size)])


def write_sheet(path: Path, images: Tensor) -> None:
    """A sheet of images spread evenly over `images`, to look at: a KID alone does not say that it is chest CT."""
    side = min(SHEET_SIDE, int(len(images) ** 0.5))
    chosen = images[torch.linspace(0, len(images) - 1, side * side).round().long()]
    write_unit_png(path, tile([[restore(image) for image in row] for row in chosen.split(side)]))
