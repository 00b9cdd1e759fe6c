"""Which images show the same patient.

Slices of one patient look alike. Where nothing says which patient an image is of, groups are found from the pixels: a
perceptual hash joins near-copies, then average-linkage clustering joins images that are about as close as nearest
neighbours are in this cohort. Labels are never used for it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cmp_to_key

import numpy as np
from PIL import Image

from medaug.intake.spool import THUMBNAIL_SIZE, Thumbnails
from medaug.io.blocks import row_blocks

Images = np.ndarray | Thumbnails  # (N, 32, 32) in [0, 1]

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
        self._parent = array("q", range(size))

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
    thumbnails: Images, together: Sequence[Hashable | None] | None = None, *, near_copies_only: bool = False
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
    order = _content_order(thumbnails)
    stack = thumbnails[order]
    sets = Union(count)
    hashes = _by_blocks(perceptual_hash, stack, 64)
    _join_near_copies(sets, hashes, np.arange(count), HASH_RADIUS, limit)
    near_copies = _in_company(sets, count)
    if together is not None:
        sets.join_equal([together[index] for index in order])
    neighbours, threshold = np.full(count, np.nan), None
    if FEW <= count <= MAX_CLUSTERED and not near_copies_only:
        vectors = _by_blocks(features, stack, THUMBNAIL_SIZE**2 + 512)
        neighbours = _neighbour_distances(vectors)
        threshold = min(float(np.quantile(neighbours, NEIGHBOUR_QUANTILE)), TYPICAL_SHARE * _typical_distance(vectors))
        _join_similar(sets, vectors, threshold, limit)
    roots, distances = np.empty(count, dtype=np.int64), np.empty(count)
    roots[order] = [sets.find(index) for index in range(count)]
    distances[order] = neighbours
    return Grouping(_renumber(roots), threshold, distances, near_copies, limit)


def _content_order(thumbnails: Images) -> np.ndarray:
    """Indices in the order of the images' bytes: the order of ties must not depend on that of the files.

    Two images at a time are looked at; all of them as keys would take the memory that the spool saves.
    """

    def compare(first: int, second: int) -> int:
        left, right = thumbnails[first].tobytes(), thumbnails[second].tobytes()
        return (left > right) - (left < right)

    return np.array(sorted(range(len(thumbnails)), key=cmp_to_key(compare)), dtype=np.int64)


def _by_blocks(function: Callable[[np.ndarray], np.ndarray], images: Images, width: int) -> np.ndarray:
    """(N, width) float32 of a function of thumbnails whose steps take several times the memory of what it gives."""
    result = np.empty((len(images), width), dtype=np.float32)
    for start in range(0, len(images), BLOCK):
        result[start : start + BLOCK] = function(images[start : start + BLOCK])
    return result


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
