"""Groups found from pixels, and the leak indicator."""

from __future__ import annotations

import numpy as np
import pytest

from medaug.errors import DataError
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


def test_patients_across_the_split_give_a_high_indicator():
    generator = np.random.default_rng(8)
    thumbnails, owner = patients(generator, 60, 4, noise=0.05)
    labels = generator.integers(0, 3, 60)[owner]
    is_test = np.arange(len(owner)) % 4 == 0  # one image of every patient
    found = duplicates.leak_indicator(thumbnails[~is_test], labels[~is_test], thumbnails[is_test], labels[is_test])
    assert found["balanced_accuracy"] > 0.95 and found["level"] == "high" and "Patients" in found["warning"]


def test_patients_on_one_side_give_chance():
    generator = np.random.default_rng(9)
    thumbnails, owner = patients(generator, 150, 2, noise=0.05)
    labels = generator.integers(0, 3, 150)[owner]
    is_test = owner >= 100
    found = duplicates.leak_indicator(thumbnails[~is_test], labels[~is_test], thumbnails[is_test], labels[is_test])
    assert found["balanced_accuracy"] == pytest.approx(1 / 3, abs=0.15)
    assert found["shuffled"] == pytest.approx(1 / 3, abs=0.05)
    assert found["level"] == "low" and found["warning"] is None


def test_classes_of_different_look_are_no_leak():
    generator = np.random.default_rng(10)
    labels = generator.integers(0, 2, 400)
    # Overlapping classes: the mean of a corner differs, single images do not repeat.
    thumbnails = np.clip(smooth(generator, 400), 0, 1)
    thumbnails[:, :12, :12] = np.clip(thumbnails[:, :12, :12] + 0.35 * labels[:, None, None], 0, 1.35)
    found = duplicates.leak_indicator(thumbnails[:300], labels[:300], thumbnails[300:], labels[300:])
    assert found["memoryless"] > 0.75
    assert "Patients probably" not in found["verdict"]


def test_indicator_agrees_with_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    generator = np.random.default_rng(11)
    images, labels = generator.random((60, 32, 32)), generator.integers(0, 4, 60)
    found = duplicates.leak_indicator(images[:40], labels[:40], images[40:], labels[40:])
    model = KNeighborsClassifier(1).fit(images[:40].reshape(40, -1), labels[:40])
    expected = balanced_accuracy_score(labels[40:], model.predict(images[40:].reshape(20, -1)))
    assert found["balanced_accuracy"] == pytest.approx(expected)


def test_indicator_of_an_empty_side_is_refused():
    images = np.zeros((4, 32, 32))
    with pytest.raises(DataError, match="split-empty"):
        duplicates.leak_indicator(images, [0, 1, 0, 1], images[:0], [])


def test_memoryless_classifier_with_many_images():
    generator = np.random.default_rng(12)
    labels = generator.integers(0, 2, 300)
    few = generator.random((300, 16)) + labels[:, None]  # 300 > 4 x 16: the covariance path
    assert (duplicates._memoryless_labels(few[:200], labels[:200], few[200:]) == labels[200:]).mean() > 0.9


def test_nearest_image_does_not_depend_on_the_blocks(monkeypatch):
    generator = np.random.default_rng(5)
    train, test = generator.integers(0, 3, (70, 4)).astype(np.float16), generator.integers(0, 3, (50, 4)).astype(np.float16)
    distances = ((test[:, None].astype(float) - train[None]) ** 2).sum(axis=2)
    for block in (7, 64, 1024):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        found = duplicates._nearest(train, test)
        np.testing.assert_array_equal(found, distances.argmin(axis=1))  # the first of equals


def test_principal_components_are_those_of_the_singular_values(monkeypatch):
    generator = np.random.default_rng(6)
    images = generator.normal(size=(90, 8)) * np.arange(8, 0, -1) + 3
    mean = images.mean(axis=0)
    _, singular, basis = np.linalg.svd(images - mean, full_matrices=False)
    monkeypatch.setattr(duplicates, "BLOCK", 32)
    deviation, found = duplicates._principal(images, mean, 3)
    np.testing.assert_allclose(deviation, singular[:3] / np.sqrt(90), rtol=1e-5)
    np.testing.assert_allclose(np.abs((found * basis[:3]).sum(axis=1)), 1, rtol=1e-5)
