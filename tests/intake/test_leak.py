"""The leak indicator."""

from __future__ import annotations

import numpy as np
import pytest
from test_intake_duplicates import patients, smooth

from medaug.errors import DataError
from medaug.intake import duplicates, leak


def test_patients_across_the_split_give_a_high_indicator():
    generator = np.random.default_rng(8)
    thumbnails, owner = patients(generator, 60, 4, noise=0.05)
    labels = generator.integers(0, 3, 60)[owner]
    is_test = np.arange(len(owner)) % 4 == 0  # one image of every patient
    found = leak.leak_indicator(thumbnails[~is_test], labels[~is_test], thumbnails[is_test], labels[is_test])
    assert found["balanced_accuracy"] > 0.95 and found["level"] == "high" and "Patients" in found["warning"]


def test_patients_on_one_side_give_chance():
    generator = np.random.default_rng(9)
    thumbnails, owner = patients(generator, 150, 2, noise=0.05)
    labels = generator.integers(0, 3, 150)[owner]
    is_test = owner >= 100
    found = leak.leak_indicator(thumbnails[~is_test], labels[~is_test], thumbnails[is_test], labels[is_test])
    assert found["balanced_accuracy"] == pytest.approx(1 / 3, abs=0.15)
    assert found["shuffled"] == pytest.approx(1 / 3, abs=0.05)
    assert found["level"] == "low" and found["warning"] is None


def test_classes_of_different_look_are_no_leak():
    generator = np.random.default_rng(10)
    labels = generator.integers(0, 2, 400)
    # Overlapping classes: the mean of a corner differs, single images do not repeat.
    thumbnails = np.clip(smooth(generator, 400), 0, 1)
    thumbnails[:, :12, :12] = np.clip(thumbnails[:, :12, :12] + 0.35 * labels[:, None, None], 0, 1.35)
    found = leak.leak_indicator(thumbnails[:300], labels[:300], thumbnails[300:], labels[300:])
    assert found["memoryless"] > 0.75
    assert "Patients probably" not in found["verdict"]


def test_indicator_agrees_with_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    generator = np.random.default_rng(11)
    images, labels = generator.random((60, 32, 32)), generator.integers(0, 4, 60)
    found = leak.leak_indicator(images[:40], labels[:40], images[40:], labels[40:])
    model = KNeighborsClassifier(1).fit(images[:40].reshape(40, -1), labels[:40])
    expected = balanced_accuracy_score(labels[40:], model.predict(images[40:].reshape(20, -1)))
    assert found["balanced_accuracy"] == pytest.approx(expected)


def test_indicator_of_an_empty_side_is_refused():
    images = np.zeros((4, 32, 32))
    with pytest.raises(DataError, match="split-empty"):
        leak.leak_indicator(images, [0, 1, 0, 1], images[:0], [])


def test_memoryless_classifier_with_many_images():
    generator = np.random.default_rng(12)
    labels = generator.integers(0, 2, 300)
    few = generator.random((300, 16)) + labels[:, None]  # 300 > 4 x 16: the covariance path
    assert (leak._memoryless_labels(few[:200], labels[:200], few[200:]) == labels[200:]).mean() > 0.9


def test_nearest_image_does_not_depend_on_the_blocks(monkeypatch):
    generator = np.random.default_rng(5)
    train, test = generator.integers(0, 3, (70, 4)).astype(np.float16), generator.integers(0, 3, (50, 4)).astype(np.float16)
    distances = ((test[:, None].astype(float) - train[None]) ** 2).sum(axis=2)
    for block in (7, 64, 1024):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        found = leak._nearest(train, test)
        np.testing.assert_array_equal(found, distances.argmin(axis=1))  # the first of equals


def test_principal_components_are_those_of_the_singular_values(monkeypatch):
    generator = np.random.default_rng(6)
    images = generator.normal(size=(90, 8)) * np.arange(8, 0, -1) + 3
    mean = images.mean(axis=0)
    _, singular, basis = np.linalg.svd(images - mean, full_matrices=False)
    monkeypatch.setattr(duplicates, "BLOCK", 32)
    deviation, found = leak._principal(images, mean, 3)
    np.testing.assert_allclose(deviation, singular[:3] / np.sqrt(90), rtol=1e-5)
    np.testing.assert_allclose(np.abs((found * basis[:3]).sum(axis=1)), 1, rtol=1e-5)
