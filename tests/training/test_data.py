from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.cohort import Cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError
from medaug.training.data import REFERENCE_MODES, CaseImages, KeyedBatches, ReferencePairs, jitter, keep_mask, read_case, shifted


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("channels", [1, 3])
def test_case_images_are_network_tensors(make_cohort: Callable[..., Cohort], tmp_path: Path, channels: int) -> None:
    made = make_cohort(tmp_path, channels=channels, num_classes=2)
    images = CaseImages(made, made.test)
    assert len(images) == len(made.test) > 0
    row = images[0]
    assert row["image"].shape == (channels, 16, 16)
    assert row["image"].dtype == torch.float32
    assert -1 <= float(row["image"].min()) < float(row["image"].max()) <= 1
    assert (row["label"], row["id"]) == (made.test[0].label, made.test[0].id)


# --- order ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 3))
def test_every_pass_meets_every_case_once(num_cases: int, batch_size: int, seed: int) -> None:
    batches = KeyedBatches(num_cases, batch_size, seed)
    flat = [case for iteration in range(1, 3 * num_cases + 1) for _, _, case in batches.batch(iteration)]
    for start in range(0, 3 * num_cases, num_cases):
        assert sorted(flat[start : start + num_cases]) == list(range(num_cases))
    assert len(batches) == -(-num_cases // batch_size)


def test_resumed_order_is_the_tail_of_the_whole() -> None:
    whole, resumed = KeyedBatches(7, 3, 1), KeyedBatches(7, 3, 1)
    resumed.next_iteration = 5
    expected = [whole.batch(iteration) for iteration in range(5, 9)]
    assert [batch for batch, _ in zip(resumed, range(4), strict=False)] == expected
    assert [row[:2] for row in expected[0]] == [(5, 0), (5, 1), (5, 2)]


def test_order_follows_the_seed_and_differs_between_passes() -> None:
    orders = {tuple(case for i in range(1, 3) for _, _, case in KeyedBatches(20, 10, seed).batch(i)) for seed in range(3)}
    orders |= {tuple(case for i in range(3, 5) for _, _, case in KeyedBatches(20, 10, 0).batch(i))}
    assert len(orders) == 4


@pytest.mark.parametrize(("num_cases", "batch_size"), [(0, 1), (1, 0)])
def test_empty_batches_are_refused(num_cases: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match="batch-invalid"):
        KeyedBatches(num_cases, batch_size)


# --- references -------------------------------------------------------------------------------------------------------


def which(cohort: Cohort, image: torch.Tensor) -> str:
    """The id of the case that has these pixels."""
    return next(case.id for case in cohort.cases() if torch.equal(read_case(cohort, case), image))


def test_references_come_from_the_training_split_and_the_class(cohort: Cohort) -> None:
    pairs = ReferencePairs(cohort, "same_class")
    training = {case.id: case for case in cohort.training}
    for iteration in range(1, 4):
        for index in range(len(pairs)):
            row = pairs[(iteration, 0, index)]
            reference = training[which(cohort, row["reference"])]  # a KeyError would be a validation or test case
            assert reference.label == row["label"]
            assert reference.id != row["id"]


def test_reference_self_is_the_image(cohort: Cohort) -> None:
    row = ReferencePairs(cohort, "self", shift=0.1)[(1, 0, 0)]
    assert row["reference"] is row["image"]
    moved = ReferencePairs(cohort, "self_augmented")[(1, 0, 0)]
    assert not torch.equal(moved["reference"], moved["image"])
    assert float((moved["reference"] - moved["image"]).abs().mean()) < 0.3


def test_only_case_of_a_class_refers_to_itself(cohort: Cohort) -> None:
    alone = cohort.with_cases(training=[next(case for case in cohort.training if case.label == label) for label in range(3)])
    row = ReferencePairs(alone, "same_class")[(1, 0, 2)]
    assert torch.equal(row["reference"], row["image"])


@pytest.mark.parametrize("mode", REFERENCE_MODES)
def test_a_pair_belongs_to_its_key(cohort: Cohort, mode: str) -> None:
    pairs = [ReferencePairs(cohort, mode, seed=seed, shift=0.1) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    pairs[0][(9, 9, 1)]  # another draw before must not matter
    first, second, other = (made[(2, 1, 3)] for made in pairs)
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["reference"], second["reference"])
    assert not torch.equal(first["image"], other["image"])


def test_unknown_reference_is_refused(cohort: Cohort) -> None:
    with pytest.raises(ConfigError, match="reference-unknown.*same_class"):
        ReferencePairs(cohort, "other")  # type: ignore[arg-type]


# --- jitter and drop-out ----------------------------------------------------------------------------------------------


def test_jitter_of_zero_is_the_identity() -> None:
    image = torch.rand(1, 8, 8)
    assert jitter(image, numpy_generator(0), 0.0) is image


def test_jitter_shifts_by_at_most_its_share() -> None:
    size, shift = 32, 0.125
    y, x = np.mgrid[:size, :size]
    image = torch.from_numpy(np.stack([x, y]).astype(np.float32))  # each pixel holds its own place
    offsets = []
    for index in range(50):
        moved = jitter(image, numpy_generator(index), shift)
        offsets.append((moved - image)[:, size // 2, size // 2].numpy())
    assert np.abs(offsets).max() <= shift * size + 1e-3
    assert np.abs(offsets).max() > 0.8 * shift * size
    assert np.abs(np.mean(offsets)) < 1


def test_a_shift_keeps_every_value_as_it_is() -> None:
    """Interpolation would blur what the generator learns: only values of the image may occur, in whole rows and columns."""
    image = torch.rand(1, 16, 16)
    for index in range(20):
        moved = jitter(image, numpy_generator(index), 0.1)
        assert torch.isin(moved, image).all()
        assert moved.shape == image.shape


def test_shifted_repeats_the_border() -> None:
    image = torch.arange(9.0).reshape(1, 3, 3)
    assert shifted(image, 1, 0)[0].tolist() == [[3, 4, 5], [6, 7, 8], [6, 7, 8]]
    assert shifted(image, 0, -1)[0].tolist() == [[0, 0, 1], [3, 3, 4], [6, 6, 7]]


def test_keep_mask_drops_the_share_and_belongs_to_its_keys() -> None:
    keys = [(0, "drop", index) for index in range(2000)]
    mask = keep_mask(0.3, keys)
    assert float(mask.float().mean()) == pytest.approx(0.7, abs=0.03)  # 3 standard errors
    assert torch.equal(mask[7:9], keep_mask(0.3, keys[7:9]))
    assert bool(keep_mask(0.0, keys).all()) and not bool(keep_mask(1.0, keys).any())
