"""The pseudo-label filter: a CNN trained on the real training split must agree with the intended label, and be sure.

Accept iff argmax p(x) = intended label AND max p(x) >= threshold (guided DDPM; the paper's two sentences on agreement
and confidence are both required). The label that an accepted image carries is the intended one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medaug import storage
from medaug.cohort import Case, Cohort, fit_sha256
from medaug.errors import ConfigError, DataError
from medaug.networks.amst import fit_metadata
from medaug.networks.grading import build_network
from medaug.networks.weights import load_weights, save_weights
from medaug.quality.images import image_batches
from medaug.quality.label_source import SourceVerdict
from medaug.training.classifier import (
    ClassifierRecipe,
    confusion_counts,
    fit_classifier,
    macro_f1,
    predict_logits,
    seeded,
)
from medaug.training.data import CaseImages
from medaug.training.temperature import measure_calibration, softmax

FORMAT = 1
PAPER_THRESHOLD = 0.8
DISAGREES, UNSURE = "label-disagrees", "confidence-low"

_log = logging.getLogger(__name__)

__all__ = [
    "LabelFilter",
    "PseudoLabel",
    "accept",
    "default_recipe",
    "real_training",
    "train_filter",
]


@dataclass(frozen=True)
class PseudoLabel:
    """What the filter says of one image.

    Attributes:
        label: argmax p(x), an index.
        confidence: max p(x).
        reasons: codes, `label-disagrees` and `confidence-low`; empty means accepted.
    """

    label: int
    confidence: float
    reasons: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """True if agreement and confidence both hold."""
        return not self.reasons


def accept(probs: np.ndarray, intended: Sequence[int] | np.ndarray, threshold: float = PAPER_THRESHOLD) -> list[PseudoLabel]:
    """Judge images by the filter's probabilities.

    Args:
        probs: (N, K), rows sum to 1.
        intended: (N,) label indices the images were generated for.
        threshold: smallest accepted max p(x), in [0, 1]; 0 asks for agreement only.

    Raises:
        ConfigError: threshold outside [0, 1].
        DataError: shapes that do not fit, values that are no probabilities.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError("threshold-invalid", f"The confidence threshold must be in [0, 1], got {threshold!r}.")
    probs = np.asarray(probs, dtype=np.float64)
    wanted = np.asarray(intended)
    if probs.ndim != 2 or wanted.shape != (len(probs),):
        raise DataError(
            "probabilities-invalid", f"Expected probabilities (N, K) and N labels, got {probs.shape} and {wanted.shape}."
        )
    if not (np.isfinite(probs).all() and (probs >= 0).all() and np.allclose(probs.sum(1), 1, atol=1e-4)):
        raise DataError("probabilities-invalid", "Each row of probabilities must be finite, not negative, and sum to 1.")
    labels, confidences = probs.argmax(1), probs.max(1)
    verdicts = []
    for label, confidence, want in zip(labels, confidences, wanted, strict=True):
        reasons = [DISAGREES] * bool(label != want) + [UNSURE] * bool(confidence < threshold)
        verdicts.append(PseudoLabel(int(label), float(confidence), tuple(reasons)))
    return verdicts


@dataclass(frozen=True, eq=False)
class LabelFilter:
    """A trained filter.

    Attributes:
        network: images (B, C, H, W) in [-1, 1] -> logits (B, K), in evaluation mode.
        classes: names in class order.
        temperature: divides the logits; 1 without calibration.
        fit_groups: sorted groups of the training split it was fitted on.
        facts: what ``filter.json`` says: accuracies, recipe, hashes.
        cached: True if it was read, not trained.
    """

    network: nn.Module
    classes: tuple[str, ...]
    temperature: float
    fit_groups: tuple[str, ...]
    facts: Mapping[str, Any]
    cached: bool = False

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> np.ndarray:
        """(B, K) float64 for images (B, C, H, W)."""
        return softmax(self.network.eval()(images), self.temperature)

    def judge(self, cohort: Cohort, cases: Sequence[Case], threshold: float) -> list[PseudoLabel]:
        """`accept` over cases of a cohort, batch by batch; a case's label is the intended one."""
        if not cases:
            return []
        probs = np.concatenate([self.probabilities(batch) for batch in image_batches(cohort, cases)])
        return accept(probs, [case.label for case in cases], threshold)

    def verdicts(self, cohort: Cohort, cases: Sequence[Case], threshold: float) -> list[SourceVerdict]:
        """`judge` in the words of `LabelSource`; an accepted image keeps its label."""
        seen_by_case = self.judge(cohort, cases, threshold)
        return [self._verdict(case, seen, threshold) for case, seen in zip(cases, seen_by_case, strict=True)]

    def _verdict(self, case: Case, seen: PseudoLabel, threshold: float) -> SourceVerdict:
        intended, sees = self.classes[case.label], self.classes[seen.label]
        texts = {
            DISAGREES: f"Intended {intended}, the filter sees {sees} ({seen.confidence:.2f}).",
            UNSURE: f"The filter's confidence is {seen.confidence:.2f}, {threshold:.2f} is needed.",
        }
        lineage = {"pseudo_label": seen.label, "confidence": round(seen.confidence, 6)}
        return SourceVerdict(seen.label, tuple((code, texts[code]) for code in seen.reasons), lineage)


def default_recipe() -> ClassifierRecipe:
    """The filter is trained as carefully as a grader: whole-pixel shifts only, and long enough to be sure of what it knows.

    With half of the steps at a third of the rate it was less accurate on validation, and too unsure for the paper's threshold.
    """
    return ClassifierRecipe(
        num_steps=1200, batch_size=32, learning_rate=3e-3, evaluate_every=50, policy="weak", class_balanced=True
    )


def train_filter(
    cohort: Cohort,
    folder: Path,
    *,
    recipe: ClassifierRecipe | None = None,
    network: str = "simple_cnn",
    seed: int = 0,
    calibrate: bool = False,
    report_test: bool = False,
    device: str | torch.device = "cpu",
    on_eval: Callable[[Mapping[str, Any]], None] | None = None,
) -> LabelFilter:
    """Train a filter on the real training split, or read the same one from `folder`.

    Validation only measures it (and, if asked, gives the temperature); test is never seen unless `report_test` asks for its accuracy.
    The folder is named by the content of the cohort and every setting of the training, so another cohort or recipe never
    reuses a wrong filter, and another threshold or calibration needs no training.

    Args:
        cohort: as read from its folder.
        folder: ``<folder>/<key>/filter.safetensors`` and ``filter.json`` are written there.
        recipe: None takes `default_recipe`.
        network: a name of `medaug.networks.grading`.
        seed: decides weights, order and augmentation.
        calibrate: divide the logits by the temperature that was fitted on validation, unless that is at its lower bound. The facts
            always say what it would do.
        report_test: add accuracy on the test split to the facts.
        device: for training and prediction.
        on_eval: called with each validation result.

    Raises:
        DataError: a class without a real training image; `calibrate` without validation.  ConfigError: see `fit_classifier`.
    """
    recipe = recipe or default_recipe()
    if calibrate and not cohort.validation:
        raise DataError(
            "validation-empty", "A temperature is fitted on validation images and the cohort has none; do not calibrate."
        )
    settings = {"network": network, "recipe": asdict(recipe), "seed": seed}
    key = storage.sha256_json([FORMAT, cohort.content_sha256, list(cohort.classes), cohort.image_size, cohort.channels, settings])
    home = Path(folder) / key[:16]
    with seeded(key, "init"):
        module = build_network(network, len(cohort.classes), cohort.channels, cohort.image_size)
    facts = _read(home, key, module)
    cached = facts is not None
    if facts is None:
        facts = {"key": key, **settings, **_fit(module, cohort, recipe, key, device, on_eval)}
        metadata = {"num_classes": str(len(cohort.classes)), "network": network, "key": key} | fit_metadata(facts["fit_groups"])
        facts["weights_sha256"] = save_weights(home / "filter.safetensors", module, metadata)
        storage.write_json(home / "filter.json", facts)
    if report_test and cohort.test and "test" not in facts:
        logits = predict_logits(module, CaseImages(cohort, cohort.test))
        facts["test"] = _scores(logits, cohort.test, len(cohort.classes))
        storage.write_json(home / "filter.json", facts)
    fitted = facts["calibration"]
    # At its bound the temperature would make every confidence 1 and the threshold void.
    temperature = float(fitted["temperature"]) if calibrate and not fitted["at_lowest"] else 1.0
    facts = {**facts, "temperature": temperature}
    return LabelFilter(module.eval(), cohort.classes, temperature, tuple(facts["fit_groups"]), facts, cached)


def real_training(cohort: Cohort) -> list[Case]:
    """The real training cases, of every class at least one.

    Raises:
        DataError: a class without any.
    """
    training = [case for case in cohort.training if not case.is_synthetic]
    missing = set(range(len(cohort.classes))) - {case.label for case in training}
    if missing:
        names = ", ".join(cohort.classes[label] for label in sorted(missing))
        raise DataError("class-empty", f"Judging labels needs a real training image of every class, there is none of {names}.")
    return training


def _read(home: Path, key: str, module: nn.Module) -> dict[str, Any] | None:
    """Facts of the cached filter, its weights loaded; None if there is none or it is damaged (it is then trained again)."""
    if not (home / "filter.json").is_file():
        return None
    try:
        facts: dict[str, Any] = storage.read_json(home / "filter.json")
        load_weights(home / "filter.safetensors", module, {"key": key}, sha256=facts["weights_sha256"])
        whole = facts["key"] == key and fit_sha256(facts["fit_groups"]) == facts["fit_on"] and "calibration" in facts
        if not whole:
            raise DataError("filter-damaged", "filter.json does not belong to this filter.")
        return facts
    except (ConfigError, DataError, KeyError, TypeError, ValueError) as error:
        code = getattr(error, "code", type(error).__name__)
        _log.warning("The cached label filter is damaged (%s); it is trained again.", code)
        return None


def _fit(
    module: nn.Module,
    cohort: Cohort,
    recipe: ClassifierRecipe,
    key: str,
    device: str | torch.device,
    on_eval: Callable[[Mapping[str, Any]], None] | None,
) -> dict[str, Any]:
    """Train `module` on the real training cases and score it on validation."""
    training = real_training(cohort)
    validation = CaseImages(cohort, cohort.validation) if cohort.validation else None
    images = CaseImages(cohort, training)
    # No choice by validation: what has seen it could not be said to be fitted on the training groups alone.
    result = fit_classifier(module, images, None, recipe, key=(key, "fit"), device=device, on_eval=on_eval)
    module.to("cpu").eval()
    logits = None if validation is None else predict_logits(module, validation)
    groups = sorted({case.group for case in training})
    return {
        "format": FORMAT,
        "classes": list(cohort.classes),
        "cohort_sha256": cohort.content_sha256,
        "fit_groups": groups,
        "fit_on": fit_sha256(groups),
        "fit_cases": len(training),
        "best_step": result.best_step,
        "history": result.history,
        "calibration": _calibration(logits, cohort.validation),
        "validation": _scores(logits, cohort.validation, len(cohort.classes)),
    }


def _calibration(logits: Tensor | None, cases: Sequence[Case]) -> dict[str, Any] | None:
    """What temperature scaling on these real cases does, see `Calibration`."""
    return None if logits is None else asdict(measure_calibration(logits, [case.label for case in cases]))


def _scores(logits: Tensor | None, cases: Sequence[Case], num_classes: int) -> dict[str, Any] | None:
    """n, accuracy, balanced accuracy, macro-F1, mean confidence and confusion counts on real cases."""
    if logits is None or not cases:
        return None
    counts = confusion_counts(np.array([case.label for case in cases]), logits.argmax(1).numpy(), num_classes)
    present = counts.sum(1) > 0
    recalls = np.diagonal(counts)[present] / counts.sum(1)[present]
    return {
        "n": len(cases),
        "accuracy": float(np.trace(counts) / counts.sum()),
        "balanced_accuracy": float(recalls.mean()),
        "macro_f1": float(macro_f1(counts)),
        "mean_confidence": float(softmax(logits).max(axis=1).mean()),
        "confusion": counts.tolist(),
    }
