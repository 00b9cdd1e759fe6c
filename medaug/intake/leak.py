"""How much of the test split a memory of the training split gives away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medaug import draws
from medaug.errors import DataError
from medaug.intake import duplicates
from medaug.intake.duplicates import Images


def leak_indicator(
    train_thumbs: Images, train_labels: Sequence[int], test_thumbs: Images, test_labels: Sequence[int], *, seed: int = 0
) -> dict[str, Any]:
    """How well the label of the nearest training image predicts the label of a test image.

    A patient on both sides of the split makes the nearest training image one of the same patient, so that a mere
    memory looks skilled. The figure stands beside three others: chance (1 / classes), the same with shuffled training
    labels, and a ridge classifier on few principal components that can learn the look of a class but not recall single
    images. High means: above what shuffling gives, and above the memoryless classifier by more than 0.05 and 1.645
    standard errors (bootstrap over test images); or so near to perfect (three quarters of the way from chance) that
    nothing could show a leak any more.

    Args:
        train_thumbs, test_thumbs: (N, 32, 32) in [0, 1].
        train_labels, test_labels: class index per image.
        seed: key of the shuffles and of the bootstrap.

    Returns:
        accuracy, balanced_accuracy, chance, majority, shuffled, shuffled_high (95th percentile), memoryless,
        standard_error, n, level ("low" or "high"), verdict (a sentence), warning (the sentence if high, else None).

    Raises:
        DataError: a side is empty.
    """
    known, truth = np.asarray(train_labels, dtype=np.int64), np.asarray(test_labels, dtype=np.int64)
    if not len(known) or not len(truth):
        raise DataError("split-empty", "The leak indicator needs training and test images; change the split.")
    nearest = _nearest(train_thumbs, test_thumbs)
    right = known[nearest] == truth
    forgetful = _memoryless_labels(train_thumbs, known, test_thumbs) == truth
    generator = draws.numpy_generator(seed, "leak-indicator")
    shuffled = [_balanced(generator.permutation(known)[nearest] == truth, truth) for _ in range(200)]
    balanced, memoryless = _balanced(right, truth), _balanced(forgetful, truth)
    error = _bootstrap_error(right, forgetful, truth, generator)
    result: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": balanced,
        "chance": 1.0 / len(np.union1d(known, truth)),
        "majority": float((truth == np.bincount(known).argmax()).mean()),
        "shuffled": float(np.mean(shuffled)),
        "shuffled_high": float(np.quantile(shuffled, 0.95)),
        "memoryless": memoryless,
        "standard_error": error,
        "n": len(truth),
    }
    return result | _verdict(result)


def _verdict(found: dict[str, Any]) -> dict[str, Any]:
    balanced, chance = found["balanced_accuracy"], found["chance"]
    figures = (
        f"the nearest training image has the label of {balanced:.0%} of the test images "
        f"(balanced over classes; chance {chance:.0%}, a classifier without memory {found['memoryless']:.0%})"
    )
    if balanced > found["shuffled_high"] and balanced - found["memoryless"] > max(0.05, 1.645 * found["standard_error"]):
        text = f"High: {figures}. Patients probably cross the split: "
        text += "give a patient column, or let the groups be found automatically."
        return {"level": "high", "verdict": text, "warning": text}
    if balanced > found["shuffled_high"] and balanced >= chance + 0.75 * (1 - chance):
        text = f"High: {figures}. Either patients cross the split or the classes differ at first sight (scanner, crop, marks): "
        text += "accuracies measured here say little about either."
        return {"level": "high", "verdict": text, "warning": text}
    return {"level": "low", "verdict": f"Low: {figures}. Nothing here shows that patients cross the split.", "warning": None}


def _blocks(images: Images) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of pixels, float32, some at a time: the whole set as numbers of 32 bits would grow with the cohort."""
    for start in range(0, len(images), duplicates.BLOCK):
        part = images[start : start + duplicates.BLOCK]
        yield start, np.asarray(part, dtype=np.float32).reshape(len(part), -1)


def _nearest(train: Images, test: Images) -> np.ndarray:
    """Index of the nearest training image of each test image, the first of equals."""
    index, distance = np.zeros(len(test), dtype=np.int64), np.full(len(test), np.inf, dtype=np.float32)
    for first, known in _blocks(train):
        squares = (known**2).sum(axis=1)
        for start, block in _blocks(test):
            found = squares[None, :] - 2 * block @ known.T
            best, rows = found.argmin(axis=1), slice(start, start + len(block))
            closer = found[np.arange(len(block)), best] < distance[rows]
            index[rows][closer] = best[closer] + first
            distance[rows] = np.minimum(distance[rows], found.min(axis=1))
    return index


def _balanced(right: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([right[truth == label].mean() for label in np.unique(truth)]))


def _memoryless_labels(train: Images, labels: np.ndarray, test: Images) -> np.ndarray:
    """Class-balanced ridge regression on the first components: at most 30, and 20 images for each of them."""
    mean = np.sum([block.sum(axis=0, dtype=np.float64) for _, block in _blocks(train)], axis=0) / len(train)
    deviation, basis = _principal(train, mean, int(np.clip(len(train) // 20, 1, 30)))
    scale = basis / np.maximum(deviation[:, None], 1e-6)
    classes, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    weight, target = len(train) / (len(classes) * sizes), np.eye(len(classes))
    # The normal equations block by block: the scores of all images would take 250 bytes for each, and several times.
    gram = np.diag([*[0.1 * len(train)] * len(scale), 1e-6])
    moment = np.zeros((len(gram), len(classes)))
    for start, block in _blocks(train):
        known, own = _scores(block, mean, scale), index[start : start + len(block)]
        gram += known.T @ (weight[own, None] * known)
        moment += known.T @ (weight[own, None] * target[own])
    solution = np.linalg.solve(gram, moment)
    return classes[np.concatenate([(_scores(block, mean, scale) @ solution).argmax(axis=1) for _, block in _blocks(test)])]


def _scores(block: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Components of images, and a constant, (N, K + 1)."""
    return np.append((block - mean) @ scale.T, np.ones((len(block), 1)), axis=1)


def _principal(images: Images, mean: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations (K,) along the first principal components and these, (K, pixels): eigenvectors of the covariance."""
    from scipy.linalg import eigh

    covariance = _covariance(images, mean)
    last = len(mean) - 1
    values, vectors = eigh(covariance.T, overwrite_a=True, subset_by_index=(max(last + 1 - components, 0), last))
    return np.sqrt(np.maximum(values[::-1], 0.0)), vectors[:, ::-1].T


def _covariance(images: Images, mean: np.ndarray) -> np.ndarray:
    """(pixels, pixels) float64."""
    covariance, product = np.zeros((len(mean), len(mean))), np.empty((len(mean), len(mean)))
    for _, block in _blocks(images):
        centred = block - mean
        np.matmul(centred.T, centred, out=product)
        product /= len(images)
        covariance += product
        del centred  # each of these takes 8 MB
    return covariance


def _bootstrap_error(right: np.ndarray, forgetful: np.ndarray, truth: np.ndarray, generator: np.random.Generator) -> float:
    """Standard error of the difference of two balanced accuracies, resampled within each class."""
    members = [np.nonzero(truth == label)[0] for label in np.unique(truth)]
    difference = right.astype(np.float64) - forgetful
    draws_ = [np.mean([difference[generator.choice(index, len(index))].mean() for index in members]) for _ in range(200)]
    return float(np.std(draws_))
