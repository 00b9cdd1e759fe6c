"""Pixels compared over mirrors, shifts, crops and contrast: copies are found where they are, strangers stay away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from medaug.errors import DataError
from medaug.quality.alignment import PixelIndex, ssim, working_images


def pictures(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures (N, 1, S, S) in [-1, 1]."""
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(-0.8, 0.8, (n, 1, 7, 7))).float()
    return functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)


def moved(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    padded = functional.pad(x, (4, 4, 4, 4), mode="replicate")
    return padded[..., 4 - down : 4 - down + x.shape[-1], 4 - right : 4 - right + x.shape[-1]]


def zoomed(x: torch.Tensor, keep: int) -> torch.Tensor:
    cut = (x.shape[-1] - keep) // 2
    return functional.interpolate(
        x[..., cut : cut + keep, cut : cut + keep], size=x.shape[-1], mode="bilinear", align_corners=False
    )


CHANGES = {
    "exact": (lambda x: x, 1e-5),
    "mirror": (lambda x: x.flip(-1), 1e-5),
    "upside down": (lambda x: x.flip(-2), 1e-5),
    "moved": (lambda x: moved(x, 2, -2), 1e-5),
    "mirrored and moved": (lambda x: moved(x.flip(-1), -1, 3), 1e-5),
    "contrast": (lambda x: 0.4 * x + 0.2, 1e-5),
    "crop": (lambda x: zoomed(x, 30), 0.01),
    "noise": (lambda x: x + 0.04 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), 0.01),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_a_stranger_is_far(change):
    training = pictures(60)
    index = PixelIndex(working_images([training]), np.arange(60))
    alter, limit = CHANGES[change]
    match = index.match(working_images([alter(training)]))
    np.testing.assert_array_equal(match.index, np.arange(60))
    assert match.distance.max() <= limit
    strangers = index.match(working_images([pictures(40, seed=1)]))
    assert strangers.distance.min() > 5 * limit and (match.second > match.distance).all()


def test_own_group_is_passed_over():
    training = pictures(20)
    twice = working_images([torch.cat([training, moved(training, 1, 0)])])
    groups = np.tile(np.arange(20), 2)
    index = PixelIndex(twice, groups)
    assert index.match(twice).distance.max() < 1e-5
    assert index.match(twice, groups).distance.min() > 0.05
    assert (groups[index.match(twice, groups).index] != groups).all()
    assert np.isinf(PixelIndex(twice, np.zeros(40)).match(twice, np.zeros(40)).distance).all()


def test_pairs_measure_the_named_picture():
    training = pictures(8)
    index = PixelIndex(working_images([training]), np.arange(8))
    own = index.pairs(working_images([moved(training, 2, 1)]), np.arange(8))
    other = index.pairs(working_images([training]), np.roll(np.arange(8), 1))
    assert own.max() < 1e-5 and other.min() > 0.1


def test_larger_pictures_are_averaged_and_colour_is_greyed():
    training = pictures(10, size=64)
    index = PixelIndex(working_images([training]), np.arange(10))
    match = index.match(working_images([moved(training, 2, -2).expand(-1, 3, -1, -1)]))
    np.testing.assert_array_equal(match.index, np.arange(10))
    assert match.distance.max() < 1e-4


def test_the_order_of_pictures_changes_nothing():
    index, asked = PixelIndex(working_images([pictures(40)]), np.arange(40)), working_images([pictures(50, seed=2)])
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_allclose(index.match(asked).distance[order], index.match(asked[order]).distance, atol=2e-6)


def test_a_constant_picture_resembles_nothing():
    index = PixelIndex(working_images([pictures(5)]), np.arange(5))
    assert index.match(working_images([torch.zeros(1, 1, 32, 32)])).distance[0] == pytest.approx(1)


def test_ssim_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand((2, 11, 11), generator=generator) * 2 - 1, torch.rand((2, 11, 11), generator=generator) * 2 - 1
    offsets = np.arange(-5, 6)
    weights = np.exp(-0.5 * (offsets / 1.5) ** 2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    for one, two, value in zip(x.double().numpy(), y.double().numpy(), ssim(x, y).numpy(), strict=True):
        mean_1, mean_2 = (weights * one).sum(), (weights * two).sum()
        var_1, var_2 = (weights * (one - mean_1) ** 2).sum(), (weights * (two - mean_2) ** 2).sum()
        both = (weights * (one - mean_1) * (two - mean_2)).sum()
        c1, c2 = 0.02**2, 0.06**2
        expected = (2 * mean_1 * mean_2 + c1) * (2 * both + c2) / ((mean_1**2 + mean_2**2 + c1) * (var_1 + var_2 + c2))
        assert value == pytest.approx(expected, abs=1e-5)
    assert ssim(x, x).numpy() == pytest.approx([1, 1])


def test_faults_are_refused():
    with pytest.raises(DataError, match="finite"):
        working_images([torch.full((1, 1, 16, 16), torch.nan)])
    with pytest.raises(DataError, match="at least one"):
        working_images([])
    with pytest.raises(DataError, match="at least 8"):
        PixelIndex(torch.zeros(1, 5, 5), np.arange(1))
