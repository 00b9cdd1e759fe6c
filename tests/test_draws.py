from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.draws import key_seed, numpy_generator, randn, randn_batch, torch_generator

parts = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


def test_key_seed_is_the_same_on_every_machine() -> None:
    # sha256 of "(0, 'noise', 1)", its first eight bytes shifted right by one
    assert key_seed(0, "noise", 1) == 1413489107338554685


@settings(deadline=None, max_examples=25)
@given(parts, parts)
def test_only_equal_keys_have_equal_seeds(a: list[object], b: list[object]) -> None:
    assert (key_seed(*a) == key_seed(*b)) == (a == b)
    assert 0 <= key_seed(*a) < 2**63


def test_draws_do_not_depend_on_what_ran_before() -> None:
    before = randn((3,), 1, "a")
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    randn((3,), 2, "a")
    assert torch.equal(randn((3,), 1, "a"), before)


def test_draws_leave_the_global_generators_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    randn((4,), "x")
    numpy_generator("x").normal()
    torch.rand((), generator=torch_generator("x"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    batch = randn_batch((2, 3), ["a", "b", "c"], 0, "start")
    assert batch.shape == (3, 2, 3)
    assert torch.equal(batch[1], randn_batch((2, 3), ["b"], 0, "start")[0])
    assert torch.equal(batch[1], randn((2, 3), 0, "start", "b"))


def test_draws_are_standard_normal() -> None:
    values = torch.stack([randn((50,), "law", key) for key in range(200)])
    assert float(values.mean()) == pytest.approx(0, abs=0.03)  # 3 standard errors of 10,000
    assert float(values.std()) == pytest.approx(1, abs=0.03)
    assert float((values[:-1] * values[1:]).mean()) == pytest.approx(0, abs=0.03)  # neighbouring keys are independent
