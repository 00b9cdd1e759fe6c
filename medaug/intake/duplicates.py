"""Which images show the same patient, and how much of the test split a memory of the training split gives away.

Slices of one patient look alike. Where nothing says which patient an image is of, groups are found from the pixels: a
perceptual hash joins near-copies, then average-linkage clustering joins images that are about as close as nearest
neighbours are in this cohort. Labels are never used for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from medaug import draws
from medaug.errors import DataError
from medaug.io.blocks import row_blocks

THUMBNAIL_SIZE = 32
HASH_RADIUS = 6  # differing bits of 64 up to which two images count as near-copies
NEIGHBOUR_QUANTILE = 0.9  # nine images of ten have their nearest neighbour within the linkage threshold
TYPICAL_SHARE = 0.5  # ... which is at most this share of the typical distance: unlike images must not become groups
MAX_CLUSTERED = 20_000  # above it, comparing all pairs takes too long: hash only
MAX_LINKED = 6_000  # images in one linkage: 6000^2 / 2 distances of 8 bytes are 144 MB
BLOCK = 1024
FEW = 8  # images below which there is no distribution of neighbour distances to take a threshold from


@dataclass(frozen=True)
class Grouping:
    """Patient-like groups of N images.

    Attributes:
        labels: group number per image, numbered by first member; images with equal numbers belong together.
        threshold: mean distance (1 - similarity, in [0, 2]) up to which clusters were joined; None if not clustered.
        neighbour_distances: distance of each image to its nearest neighbour, shape (N,).
        near_copies: images that share their hash neighbourhood with another one.
        largest_allowed: cap on the size of a group that was found by similarity.
    """

    labels: tuple[int, ...]
    threshold: float | None
    neighbour_distances: np.ndarray
    near_copies: int
    largest_allowed: int


class Union:
    """Disjoint sets over 0 .. n-1."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, index: int) -> int:
        """The smallest member of the set that holds `index`."""
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def join(self, first: int, second: int) -> None:
        """Make one set of two."""
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low

    def join_equal(self, keys: Sequence[Hashable | None]) -> None:
        """Join all indices with the same key; None joins nothing."""
        first: dict[Hashable, int] = {}
        for index, key in enumerate(keys):
            if key is not None:
                self.join(first.setdefault(key, index), index)


def pixel_sha256(unit_image: np.ndarray) -> str:
    """sha256 of a unit image as the cohort stores it: 16-bit grey, 8-bit colour."""
    levels = 65535 if np.ndim(unit_image) == 2 else 255
    digest = hashlib.sha256(repr(np.shape(unit_image)).encode())
    for block in row_blocks(np.asarray(unit_image)):
        digest.update(np.rint(np.asarray(unit_image[block], dtype=np.float64) * levels).astype("<u2").tobytes())
    return digest.hexdigest()


def thumbnail(unit_image: np.ndarray) -> np.ndarray:
    """Grey (32, 32) float16 in [0, 1] of a square unit image (H, W) or (H, W, 3)."""
    grey = np.asarray(unit_image, dtype=np.float32)
    grey = grey.mean(axis=-1) if grey.ndim == 3 else grey
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    if grey.shape != size:
        grey = np.asarray(Image.fromarray(np.ascontiguousarray(grey)).resize(size, Image.Resampling.BILINEAR))
    return np.clip(grey, 0.0, 1.0).astype(np.float16)


def perceptual_hash(thumbnails: np.ndarray) -> np.ndarray:
    """64 signs (+1, -1) per image: low DCT coefficients against their median, shape (N, 64) float32.

    The 8 x 8 lowest frequencies without the constant one, which has no sign worth keeping.
    """
    from scipy.fft import dctn

    low = dctn(thumbnails.astype(np.float32), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbnails), 64)
    low[:, 0] = 0.0
    return np.where(low > np.median(low[:, 1:], axis=1, keepdims=True), 1.0, -1.0).astype(np.float32)


def features(thumbnails: np.ndarray) -> np.ndarray:
    """Unit vectors whose inner product is the similarity of two images, shape (N, 1536) float32.

    Half is the correlation of the pixels, half the correlation of gradient histograms (8 orientations in cells of
    4 x 4 pixels, after Dalal and Triggs 2005), which do not follow brightness and windowing.
    """
    pixels = thumbnails.astype(np.float32)
    both = np.concatenate([_centred(pixels.reshape(len(pixels), -1)), _centred(_gradient_histograms(pixels))], axis=1)
    return both * np.float32(np.sqrt(0.5))


def _centred(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors - vectors.mean(axis=1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _gradient_histograms(pixels: np.ndarray, cell: int = 4, orientations: int = 8) -> np.ndarray:
    down, across = np.gradient(pixels, axis=(1, 2))
    strength = np.hypot(across, down)
    angle = (np.arctan2(down, across) % np.pi) / np.pi * orientations
    lower = np.floor(angle).astype(np.int64) % orientations
    upper_share = angle - np.floor(angle)
    count, side = len(pixels), THUMBNAIL_SIZE // cell
    histogram = np.empty((count, side, side, orientations), dtype=np.float32)
    for index in range(orientations):
        share = strength * ((1 - upper_share) * (lower == index) + upper_share * ((lower + 1) % orientations == index))
        histogram[..., index] = share.reshape(count, side, cell, side, cell).sum(axis=(2, 4))
    histogram = np.sqrt(histogram)  # a strong edge must not drown the texture
    return (histogram / (np.linalg.norm(histogram, axis=-1, keepdims=True) + 0.1)).reshape(count, -1)


def largest_group(count: int) -> int:
    """Cap on a group found by similarity: a twentieth of the cohort; at least 8 images where the cohort has 64."""
    return max(2, min(8, count // 8), -(-count // 20))


def find_groups(
    thumbnails: np.ndarray, together: Sequence[Hashable | None] | None = None, *, near_copies_only: bool = False
) -> Grouping:
    """Group images that look as if they were of one patient.

    Near-copies (at most 6 of 64 hash bits differ) are joined first; then clusters are joined by average linkage as long
    as their mean distance is below the 90th percentile of the distances between nearest neighbours, and below half the
    median distance of all pairs. That threshold comes from the images alone. Groups larger than `largest_group` are
    taken apart again along the linkage tree.

    Args:
        thumbnails: (N, 32, 32) in [0, 1].
        together: key per image; images with the same key (slices of one volume) are never taken apart. None for no key.
        near_copies_only: leave out the clustering, for splits that are given and must not lose look-alikes.

    Returns:
        the same groups whatever the order of the images.
    """
    count = len(thumbnails)
    limit = largest_group(count)
    # The order of ties must not depend on the order of the files.
    order = np.array(sorted(range(count), key=lambda index: thumbnails[index].tobytes()), dtype=np.int64)
    stack = np.asarray(thumbnails)[order]
    sets = Union(count)
    hashes = perceptual_hash(stack) if count else np.zeros((0, 64), np.float32)
    _join_near_copies(sets, hashes, np.arange(count), HASH_RADIUS, limit)
    near_copies = _in_company(sets, count)
    if together is not None:
        sets.join_equal([together[index] for index in order])
    neighbours, threshold = np.full(count, np.nan), None
    if FEW <= count <= MAX_CLUSTERED and not near_copies_only:
        vectors = features(stack)
        neighbours = _neighbour_distances(vectors)
        threshold = min(float(np.quantile(neighbours, NEIGHBOUR_QUANTILE)), TYPICAL_SHARE * _typical_distance(vectors))
        _join_similar(sets, vectors, threshold, limit)
    roots, distances = np.empty(count, dtype=np.int64), np.empty(count)
    roots[order] = [sets.find(index) for index in range(count)]
    distances[order] = neighbours
    return Grouping(_renumber(roots), threshold, distances, near_copies, limit)


def _renumber(roots: np.ndarray) -> tuple[int, ...]:
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(int(root), len(numbers)) for root in roots)


def _in_company(sets: Union, count: int) -> int:
    roots = np.array([sets.find(index) for index in range(count)], dtype=np.int64)
    sizes = np.bincount(roots, minlength=count)
    return int((sizes[roots] > 1).sum()) if count else 0


def _components(vectors: np.ndarray, members: np.ndarray, similarity: float) -> list[np.ndarray]:
    """Connected components of the graph of pairs whose inner product is at least `similarity`, block by block."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    own = vectors[members]
    labels = np.arange(len(members))
    for start in range(0, len(members), BLOCK):
        rows, columns = np.nonzero(own[start : start + BLOCK] @ own.T >= similarity)
        rows = np.concatenate([rows + start, np.arange(len(members))])
        columns = np.concatenate([columns, labels])  # each image to the representative of its component so far
        graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(members),) * 2)
        component = connected_components(graph, directed=False)[1]
        _, labels = np.unique(component, return_index=True)
        labels = labels[component]
    return [members[labels == label] for label in np.unique(labels)]


def _join_near_copies(sets: Union, hashes: np.ndarray, members: np.ndarray, radius: int, limit: int) -> None:
    """Join within `radius` bits; a chain that grows beyond the limit is taken apart with a smaller radius."""
    for part in _components(hashes, members, 64 - 2 * radius) if len(members) else []:
        if len(part) > limit and radius > 0:
            _join_near_copies(sets, hashes, part, radius // 2, limit)
        elif len(part) <= limit:
            for index in part[1:]:
                sets.join(int(part[0]), int(index))


def _neighbour_distances(vectors: np.ndarray) -> np.ndarray:
    nearest = np.empty(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        similarity = vectors[start : start + BLOCK] @ vectors.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        nearest[start : start + BLOCK] = 1.0 - similarity.max(axis=1)
    return np.maximum(nearest, 0.0)


def _typical_distance(vectors: np.ndarray) -> float:
    """Median distance of pairs, from at most 1024 images evenly spread over the (sorted) images."""
    some = vectors[:: -(-len(vectors) // BLOCK)]
    pairs = np.triu_indices(len(some), k=1)
    return float(np.median(1.0 - (some @ some.T)[pairs]))


def _join_similar(sets: Union, vectors: np.ndarray, threshold: float, limit: int) -> None:
    """Average linkage, component by component: clusters cannot join across a gap wider than the threshold."""
    pending = [(np.arange(len(vectors)), threshold)]
    while pending:
        members, reach = pending.pop()
        for part in _components(vectors, members, 1.0 - reach):
            if len(part) > MAX_LINKED:
                pending.append((part, reach * 0.8))
            elif len(part) > 1:
                _link(sets, vectors, part, min(reach, threshold), limit)


def _link(sets: Union, vectors: np.ndarray, members: np.ndarray, threshold: float, limit: int) -> None:
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distances = np.maximum(1.0 - (vectors[members] @ vectors[members].T).astype(np.float64), 0.0)
    distances = (distances + distances.T) / 2
    roots = np.array([sets.find(int(index)) for index in members])
    distances[roots[:, None] == roots[None, :]] = 0.0  # what belongs together already stays so
    tree = linkage(squareform(distances, checks=False), method="average")
    clusters: dict[int, list[int]] = {index: [int(member)] for index, member in enumerate(members)}
    for step, (left, right, height, _) in enumerate(tree):
        first, second = clusters.pop(int(left), None), clusters.pop(int(right), None)
        if first is None or second is None or height > threshold:
            continue
        joined = first + second
        if len(joined) > limit and height > 0:
            continue  # both halves stay groups of their own
        clusters[len(members) + step] = joined
        for index in joined[1:]:
            sets.join(joined[0], index)


def leak_indicator(
    train_thumbs: np.ndarray, train_labels: Sequence[int], test_thumbs: np.ndarray, test_labels: Sequence[int], *, seed: int = 0
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


def _blocks(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of pixels, float32, some at a time: the whole set as numbers of 32 bits would grow with the cohort."""
    for start in range(0, len(images), BLOCK):
        part = images[start : start + BLOCK]
        yield start, np.asarray(part, dtype=np.float32).reshape(len(part), -1)


def _nearest(train: np.ndarray, test: np.ndarray) -> np.ndarray:
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


def _memoryless_labels(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Class-balanced ridge regression on the first components: at most 30, and 20 images for each of them."""
    mean = np.sum([block.sum(axis=0, dtype=np.float64) for _, block in _blocks(train)], axis=0) / len(train)
    deviation, basis = _principal(train, mean, int(np.clip(len(train) // 20, 1, 30)))
    scale = basis / np.maximum(deviation[:, None], 1e-6)
    known, unknown = (
        np.concatenate([np.append((block - mean) @ scale.T, np.ones((len(block), 1)), axis=1) for _, block in _blocks(side)])
        for side in (train, test)
    )
    classes, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    weight = (len(train) / (len(classes) * sizes))[index][:, None]
    target = np.eye(len(classes))[index]
    penalty = np.diag([*[0.1 * len(train)] * (known.shape[1] - 1), 1e-6])
    solution = np.linalg.solve(known.T @ (weight * known) + penalty, known.T @ (weight * target))
    return classes[(unknown @ solution).argmax(axis=1)]


def _principal(images: np.ndarray, mean: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations (K,) along the first principal components and these, (K, pixels): eigenvectors of the covariance."""
    from scipy.linalg import eigh

    covariance = np.zeros((len(mean), len(mean)))
    for _, block in _blocks(images):
        centred = block - mean
        covariance += centred.T @ centred / len(images)
    last = len(mean) - 1
    values, vectors = eigh(covariance, subset_by_index=(max(last + 1 - components, 0), last))
    return np.sqrt(np.maximum(values[::-1], 0.0)), vectors[:, ::-1].T


def _bootstrap_error(right: np.ndarray, forgetful: np.ndarray, truth: np.ndarray, generator: np.random.Generator) -> float:
    """Standard error of the difference of two balanced accuracies, resampled within each class."""
    members = [np.nonzero(truth == label)[0] for label in np.unique(truth)]
    difference = right.astype(np.float64) - forgetful
    draws_ = [np.mean([difference[generator.choice(index, len(index))].mean() for index in members]) for _ in range(200)]
    return float(np.std(draws_))
