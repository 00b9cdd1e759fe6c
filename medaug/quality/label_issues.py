"""Which labels are doubtful, by confident learning, and how doubtful: a score that knows the order of grades.

Probabilities must come from networks that did not see the image's group, see `medaug.quality.out_of_fold`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from medaug.errors import MissingDependencyError

__all__ = ["class_thresholds", "confident_issues", "label_quality", "load_cleanlab", "ordinal_quality"]


def load_cleanlab(module: str = "count") -> ModuleType:
    """Import a module of cleanlab.

    Raises:
        MissingDependencyError: it is not installed (code `labels-not-installed`).
    """
    try:
        return importlib.import_module(f"cleanlab.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            "labels-not-installed",
            "Finding label issues needs the package cleanlab; run `pip install -e '.[labels]'` where medaug was checked out.",
        ) from error


def class_thresholds(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """(K,) mean probability of a class over the images labelled so (Northcutt et al. 2021, eq. 2): from there on, confident."""
    thresholds: np.ndarray = load_cleanlab().get_confident_thresholds(labels, probs)
    return thresholds


def confident_issues(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Images that are confidently of another class than their label: off the diagonal of the confident joint.

    With the thresholds of the same labels this is cleanlab's ``find_label_issues(filter_by="confident_learning")``; with those
    of the training images the same rule serves images that were never trained on, however few they are.

    Args:
        labels: (N,) given classes, indices.
        probs: (N, K), rows sum to 1.
        thresholds: (K,) of `class_thresholds`.

    Returns:
        (N,) bool. An image whose label is its most probable class is never among them.

    Reference: Northcutt, Jiang, Chuang 2021, Confident Learning, eq. 1, with collisions going to the most probable class.
    """
    issues = np.zeros(len(labels), dtype=bool)
    if len(labels):
        _, found = load_cleanlab().compute_confident_joint(
            labels, probs, thresholds=thresholds, calibrate=False, return_indices_of_off_diagonals=True
        )
        issues[found] = True
    return issues & (probs.argmax(1) != labels)


def ordinal_quality(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """1 - sum_k p_k |k - y| / (K - 1), (N,) in [0, 1]: a neighbouring grade costs less than a far one.

    The sum is the expected distance between the label y and a grade drawn from p, which is the Wasserstein-1 distance between
    p and the label; K - 1 is the largest there is. For two classes it is p_y. The score is ours.

    Args:
        labels: (N,) grades, 0 to K - 1.
        probs: (N, K) with K of at least 2, rows sum to 1.
    """
    grades = np.arange(probs.shape[1])
    return 1 - (probs * np.abs(grades - np.asarray(labels)[:, None])).sum(1) / (len(grades) - 1)


def label_quality(labels: np.ndarray, probs: np.ndarray, *, ordinal: bool) -> np.ndarray:
    """(N,) in [0, 1], low for a label that is probably wrong.

    `ordinal_quality` for ordered classes; else cleanlab's normalised margin (p_y - max_{k != y} p_k + 1) / 2, which suits classes
    that were taken for one another (Kuan, Mueller 2022, Model-agnostic label quality scoring). Both are p_y for two classes.
    """
    if ordinal:
        return ordinal_quality(labels, probs)
    scores: np.ndarray = load_cleanlab("rank").get_label_quality_scores(labels, probs, method="normalized_margin")
    return scores
