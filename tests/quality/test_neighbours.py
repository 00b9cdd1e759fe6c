"""Blocked nearest neighbours: scikit-learn's brute force agrees, close pairs keep their digits, groups are passed over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from medaug.errors import DataError
from medaug.quality import neighbours
from medaug.quality.neighbours import nearest


def normal(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), m=st.integers(5, 60), d=st.integers(1, 40), k=st.integers(1, 5), offset=st.sampled_from([0.0, 1e3]))
def test_agrees_with_brute_force(n, m, d, k, offset):
    x, y = normal(n, d, seed=n) + offset, normal(m, d, seed=m + 100) + offset
    distances, indices = nearest(x, y, k)
    expected, places = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y - offset).kneighbors(x - offset)
    np.testing.assert_allclose(distances, expected, rtol=1e-7, atol=1e-7)  # scikit-learn's own product rounds, too
    assert (indices == places).mean() > 0.99


def test_close_pairs_keep_their_digits(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 1000)
    y = normal(200, 300) + 50
    x = y + 1e-9
    distances, indices = nearest(x, y)
    np.testing.assert_array_equal(indices[:, 0], np.arange(200))
    np.testing.assert_allclose(distances[:, 0], np.linalg.norm(x - y, axis=1), rtol=1e-12)


def test_own_group_is_passed_over_and_a_lone_group_has_no_neighbour():
    x = normal(10)
    groups = np.array([0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    distances, indices = nearest(x, x, x_groups=groups, y_groups=groups)
    every = np.linalg.norm(x[:, None] - x[None], axis=2)
    every[groups[:, None] == groups[None]] = np.inf
    np.testing.assert_array_equal(indices[:, 0], every.argmin(1))
    np.testing.assert_allclose(distances[:, 0], every.min(1), rtol=1e-12)
    alone = nearest(x, x, x_groups=np.zeros(10), y_groups=np.zeros(10))
    assert np.isinf(alone[0]).all() and (alone[1] == -1).all()


def test_many_ties_stay_bounded():
    x = np.ones((500, 20))
    distances, indices = nearest(x, x, 3)
    assert (distances == 0).all() and ((indices >= 0) & (indices < 500)).all()
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_faults_are_refused():
    with pytest.raises(DataError, match="as many images"):
        nearest(normal(3), normal(2), 3)
    with pytest.raises(DataError, match="finite"):
        nearest(np.array([[np.nan]]), normal(2, 1))
    with pytest.raises(DataError, match=r"\(N, D\) and \(M, D\)"):
        nearest(normal(3, 2), normal(3, 4))
