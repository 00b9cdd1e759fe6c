"""Policies: keyed, pure, bounded, with an identity share."""

import numpy as np
import pytest
import torch

from medaug.errors import ConfigError
from medaug.transforms.policies import POLICIES, apply_policy


def images(count=8, channels=1, side=32):
    return torch.rand((count, channels, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1


def keys(count, prefix="k"):
    return [(prefix, index) for index in range(count)]


@pytest.mark.parametrize("name", POLICIES)
def test_result_belongs_to_the_key_not_to_the_batch(name):
    x = images()
    whole = apply_policy(name, x, keys(8))
    for index in range(8):
        alone = apply_policy(name, x[index : index + 1], [("k", index)])
        assert torch.allclose(whole[index], alone[0], atol=1e-6)  # the grid is computed in another batch shape
    assert torch.equal(whole, apply_policy(name, x, keys(8)))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pure_and_in_range(name, channels):
    x = images(channels=channels)
    before = x.clone()
    state = torch.get_rng_state()
    y = apply_policy(name, x, keys(8))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.min() >= x.min() - 1e-5 and y.max() <= x.max() + 1e-5


def test_none_is_the_identity():
    assert torch.equal(apply_policy("none", images(), keys(8)), images())


def test_crop_rotate_leaves_half_of_the_images_alone():
    x = images(400, side=8)
    untouched = (apply_policy("crop_rotate", x, keys(400)) == x).flatten(1).all(1)
    assert 0.4 < untouched.float().mean() < 0.6  # binomial, sd 0.025


def test_crop_rotate_keeps_angle_and_scale_in_their_limits():
    """A bright spot right of the centre moves as the matrix says: a turn up to 15 degrees, a zoom of 1 to 1 / sqrt(0.8)."""
    side = 129
    y, x = np.mgrid[:side, :side] - side // 2
    ramp = torch.from_numpy(np.stack([x, y]) / (side / 2)).float()[None].repeat(60, 1, 1, 1)
    moved = apply_policy("crop_rotate", ramp, keys(60))
    inner = slice(side // 2 - 10, side // 2 + 11)
    # The image of coordinates shows the map itself: derivatives along x are the first column of the matrix.
    column = (moved[:, :, inner, inner].diff(dim=3).mean((2, 3)) * side / 2).numpy()
    angle, scale = np.degrees(np.arctan2(column[:, 1], column[:, 0])), np.hypot(column[:, 0], column[:, 1])
    assert np.abs(angle).max() <= 15.01 and np.abs(angle).max() > 8
    assert scale.min() >= np.sqrt(0.8) - 1e-3 and scale.max() <= 1 + 1e-3


def test_weak_shifts_by_whole_pixels_and_never_mirrors():
    x = images(64, side=50)
    y = apply_policy("weak", x, keys(64))
    shifts = set()
    for before, after in zip(x, y, strict=True):
        inner = before[:, 10:40, 10:40]
        found = [
            (dy, dx)
            for dy in range(-3, 4)
            for dx in range(-3, 4)
            if torch.equal(after[:, 10 - dy : 40 - dy, 10 - dx : 40 - dx], inner)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 20


def test_refusals():
    with pytest.raises(ConfigError, match="none, crop_rotate, weak"):
        apply_policy("cutmix", images(), keys(8))
    with pytest.raises(ConfigError, match="policy-input"):
        apply_policy("weak", images(), keys(7))
    with pytest.raises(ConfigError, match="policy-input"):
        apply_policy("weak", images()[0], keys(1))
    assert len(apply_policy("crop_rotate", images()[:0], [])) == 0
