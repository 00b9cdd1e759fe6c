"""Groups found from pixels."""

from __future__ import annotations

import numpy as np

from medaug.intake import duplicates


def smooth(generator: np.random.Generator, count: int) -> np.ndarray:
    """Different blurred random pictures, (count, 32, 32) in [0, 1]."""
    images = np.kron(generator.random((count, 8, 8)), np.ones((1, 4, 4)))
    for axis in (1, 2):
        images = sum(np.roll(images, shift, axis) for shift in range(-3, 4)) / 7
    return (images - images.min((1, 2), keepdims=True)) / np.ptp(images, axis=(1, 2), keepdims=True)


def patients(generator: np.random.Generator, number: int, images: int, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """`images` slightly different pictures of each of `number` patients, and whose they are."""
    owner = np.repeat(np.arange(number), images)
    pictures = smooth(generator, number)[owner] + noise * generator.standard_normal((number * images, 32, 32))
    return np.clip(pictures, 0, 1).astype(np.float16), owner


def partition(labels) -> set[frozenset[int]]:
    return {frozenset(np.nonzero(np.array(labels) == label)[0].tolist()) for label in set(labels)}


def test_planted_patients_are_found():
    thumbnails, owner = patients(np.random.default_rng(0), 30, 4)
    assert partition(duplicates.find_groups(thumbnails).labels) == partition(owner.tolist())


def test_groups_do_not_depend_on_order():
    thumbnails, _ = patients(np.random.default_rng(1), 20, 3, noise=0.2)
    order = np.random.default_rng(2).permutation(len(thumbnails))
    straight = partition(duplicates.find_groups(thumbnails).labels)
    shuffled = duplicates.find_groups(thumbnails[order]).labels
    assert {frozenset(int(order[index]) for index in part) for part in partition(shuffled)} == straight


def test_groups_stay_below_the_cap():
    generator = np.random.default_rng(3)
    # One picture with a little noise: without the cap all of it would be one group.
    thumbnails = np.clip(smooth(generator, 1) + 0.05 * generator.standard_normal((200, 32, 32)), 0, 1)
    found = duplicates.find_groups(thumbnails)
    assert max(np.bincount(found.labels)) <= found.largest_allowed == 10


def test_images_of_one_volume_stay_together():
    thumbnails = smooth(np.random.default_rng(4), 20)
    keys = ["volume" if index in (2, 7, 11) else None for index in range(20)]
    labels = duplicates.find_groups(thumbnails, keys).labels
    assert labels[2] == labels[7] == labels[11]


def test_small_and_empty_input():
    assert duplicates.find_groups(np.zeros((0, 32, 32))).labels == ()
    assert len(set(duplicates.find_groups(smooth(np.random.default_rng(5), 3)).labels)) == 3


def test_large_components_are_linked_in_pieces(monkeypatch):
    thumbnails, owner = patients(np.random.default_rng(6), 20, 4)
    whole = partition(duplicates.find_groups(thumbnails).labels)
    monkeypatch.setattr(duplicates, "MAX_LINKED", 10)
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    assert partition(duplicates.find_groups(thumbnails).labels) == whole == partition(owner.tolist())


def test_hash_ignores_brightness_and_contrast():
    images = smooth(np.random.default_rng(7), 5)
    assert (duplicates.perceptual_hash(images) == duplicates.perceptual_hash(0.2 + 0.5 * images)).mean() > 0.99


def test_pixel_sha256_tells_stored_images_apart():
    image = np.full((8, 8), 0.25, np.float32)
    other = image.copy()
    other[0, 0] += 1 / 65535
    assert duplicates.pixel_sha256(image) == duplicates.pixel_sha256(image.astype(np.float64))
    assert duplicates.pixel_sha256(image) != duplicates.pixel_sha256(other)
    assert duplicates.pixel_sha256(image) != duplicates.pixel_sha256(image.reshape(4, 16))
