"""Class probabilities of every training image by a network that never saw its group: k folds by group, resumable per fold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import DataError
from medaug.networks.grading import build_network
from medaug.splits import grouped_folds
from medaug.training.classifier import ClassifierRecipe, LabelledImages, fit_classifier, predict_logits, seeded
from medaug.training.data import CaseImages
from medaug.training.temperature import softmax

FORMAT = 1

_log = logging.getLogger(__name__)

__all__ = ["OutOfFold", "out_of_fold"]


@dataclass(frozen=True)
class OutOfFold:
    """What networks say of the images that they were not trained on.

    Attributes:
        probs: (N, K) float64, rows sum to 1.
        folds: (N,) the fold that each image was held out in.
    """

    probs: np.ndarray
    folds: np.ndarray


def out_of_fold(
    cohort: Cohort,
    cases: Sequence[Case],
    folder: Path,
    *,
    network: str,
    recipe: ClassifierRecipe,
    num_folds: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> OutOfFold:
    """Train one network per fold on the other folds and let it judge its own; a fold that is there is read, not trained.

    Args:
        cohort: as read from its folder.
        cases: real training cases.
        folder: ``<folder>/<key>/fold-<i>.json``, whole or absent; the key holds the cohort's content and every setting.
        network: of `build_network`.
        recipe: of every fold; the last weights count, as nothing may be chosen by a held-out image.
        num_folds: at least 2, at most the groups of the rarest class.
        seed: decides folds, weights, order and augmentation.
        advance: called with 1 after each fold.

    Raises:
        ConfigError, DataError: see `grouped_folds` and `fit_classifier`.
    """
    folds = np.array(grouped_folds([case.label for case in cases], [case.group for case in cases], num_folds, seed))
    settings = {"network": network, "recipe": asdict(recipe), "folds": num_folds, "seed": seed}
    content = [cohort.content_sha256, list(cohort.classes), cohort.image_size, cohort.channels]
    key = storage.sha256_json([FORMAT, content, [case.id for case in cases], settings])
    probs = np.zeros((len(cases), len(cohort.classes)))
    images: LabelledImages | None = None
    for fold in range(num_folds):
        path, held = Path(folder) / key[:16] / f"fold-{fold}.json", np.flatnonzero(folds == fold)
        known = _read(path, key, (len(held), len(cohort.classes)))
        if known is None:
            images = images or LabelledImages(CaseImages(cohort, cases))
            known = _judged(cohort, images, np.flatnonzero(folds != fold), held, network, recipe, (key, fold))
            storage.write_json(path, {"key": key, "fold": fold, "probs": known.tolist()})
        probs[held] = known
        advance(1)
    return OutOfFold(probs, folds)


def _judged(
    cohort: Cohort,
    images: LabelledImages,
    seen: np.ndarray,
    held: np.ndarray,
    network: str,
    recipe: ClassifierRecipe,
    key: tuple[str, int],
) -> np.ndarray:
    """Probabilities (M, K) of the images `held` by a network that is trained on `seen`."""
    with seeded(*key, "init"):
        module = build_network(network, len(cohort.classes), cohort.channels, cohort.image_size)
    fit_classifier(module, images.select(seen.tolist()), None, recipe, key=(*key, "fit"))
    return softmax(predict_logits(module, images.select(held.tolist())))


def _read(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Probabilities of a fold; None if there are none or they are damaged (the fold is then trained again)."""
    if not path.is_file():
        return None
    try:
        content = storage.read_json(path)
        probs = np.array(content["probs"], dtype=np.float64)
        if content["key"] == key and probs.shape == shape and np.allclose(probs.sum(1), 1):  # NaN is not close
            return probs
    except (DataError, KeyError, TypeError, ValueError):
        pass
    _log.warning("The kept probabilities of %s are damaged; the fold is trained again.", path.stem)
    return None
