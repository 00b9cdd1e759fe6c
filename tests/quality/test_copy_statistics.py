"""Whether a set lies nearer to training than new images do: copies say yes, honest images half and half."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu
from sklearn.metrics import roc_auc_score

from medaug.errors import DataError
from medaug.quality.copy_statistics import closeness, closer_to_training, nearer_than


def normal(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_copies_are_all_nearer_and_new_images_half():
    training, held_out = normal(200), normal(60, seed=1)
    copied = closeness(training[:50], training, held_out)
    assert (copied.n, copied.n_training, copied.n_held_out, copied.repeats) == (50, 60, 60, 10)
    assert copied.auc == 1 and copied.p < 1e-10
    assert copied.share > 0.5  # only 3 of 10 originals are in a subset of 60 of 200
    equal = closeness(training[:50], training[:60], held_out)
    assert (equal.share, equal.repeats, equal.high) == (1, 1, 1)
    honest = closeness(normal(400, seed=2), training, held_out)
    assert honest.share == pytest.approx(0.5, abs=0.15)  # one held-out set of 60 is one draw
    assert honest.low < honest.share < honest.high


def test_interval_and_test_are_the_known_ones():
    training, held_out, new = normal(40), normal(40, seed=1), normal(30, seed=2)
    found = closeness(new, training, held_out)
    expected = binomtest(round(found.share * 30), 30).proportion_ci(method="exact")
    assert (found.low, found.high) == (expected.low, expected.high)
    a, b = np.random.default_rng(0).random(20), np.random.default_rng(1).random(30) + 0.1
    auc, p = nearer_than(a, b)
    assert auc == pytest.approx(roc_auc_score([0] * 20 + [1] * 30, np.r_[a, b]))
    assert p == mannwhitneyu(a, b, alternative="less").pvalue


def test_ties_count_half_and_the_order_of_images_does_not_matter():
    x = normal(20)
    assert closer_to_training(x, x, x)[0] == 0.5
    new = normal(30, seed=2)
    order = np.random.default_rng(0).permutation(30)
    assert closeness(new, x, normal(10, seed=1)) == closeness(new[order], x, normal(10, seed=1))


def test_without_held_out_images_it_is_refused():
    with pytest.raises(DataError, match="held-out"):
        closeness(normal(5), normal(5), normal(0))
