"""Weak and strong views: keyed, within range, and nothing a medical image must not suffer unless it is asked for."""

from __future__ import annotations

import pytest
import torch

from medaug.errors import ConfigError
from medaug.transforms.views import COLOUR_OPERATIONS, GREY_OPERATIONS, OPERATIONS, Views, cutout


def images(count=12, channels=1, side=32):
    return torch.rand((count, channels, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1


def keys(count):
    return [("k", index) for index in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("view", ["weak", "strong"])
def test_view_belongs_to_the_key_and_stays_in_range(channels, view):
    x = images(channels=channels)
    before, state = x.clone(), torch.get_rng_state()
    whole = getattr(Views(), view)(x, keys(12))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert whole.shape == x.shape and whole.abs().max() <= 1 and not torch.equal(whole, x)
    for index in range(12):
        alone = getattr(Views(), view)(x[index : index + 1], [("k", index)])
        torch.testing.assert_close(alone[0], whole[index], atol=2e-5, rtol=0)  # the grid is computed in another batch shape


def test_weak_view_is_a_crop_of_the_padded_image():
    """Every view is one of the whole-pixel shifts by up to an eighth of the side, and never a mirror image."""
    x = images(40, side=24)
    shifts = set()
    for before, after in zip(x, Views().weak(x, keys(40)), strict=True):
        inner = before[:, 8:16, 8:16]
        found = [
            (dy, dx)
            for dy in range(-3, 4)
            for dx in range(-3, 4)
            if torch.equal(after[:, 8 - dy : 16 - dy, 8 - dx : 16 - dx], inner)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 15


def test_mirror_only_on_request_and_then_in_both_views():
    x = images(200, side=8)
    still = Views(pad=0, cutout=0, num_operations=0)
    assert torch.equal(still.weak(x, keys(200)), x) and torch.equal(still.strong(x, keys(200)), x)
    flipping = Views(pad=0, cutout=0, num_operations=0, flip=True)
    weak, strong = flipping.weak(x, keys(200)), flipping.strong(x, keys(200))
    mirrored = (weak == x.flip(-1)).flatten(1).all(1)
    assert ((weak == x).flatten(1).all(1) ^ mirrored).all() and 70 < int(mirrored.sum()) < 130
    assert torch.equal(weak, strong)


def test_default_lists_suit_medical_images():
    refused = {"saturation", "posterise", "solarise", "invert"}
    assert not set(GREY_OPERATIONS) & refused and set(COLOUR_OPERATIONS) - set(GREY_OPERATIONS) == {"saturation"}
    with pytest.raises(ConfigError, match="needs 3 channels"):
        Views(operations=("saturation",)).strong(images(), keys(12))


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"invert", "posterise"}))
def test_magnitude_zero_leaves_the_image_alone(name):
    x = images(4, channels=3)
    torch.testing.assert_close(OPERATIONS[name](x, torch.zeros(4)), x, atol=1e-5, rtol=0)


def test_operations_by_hand():
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0]).reshape(1, 1, 2, 2)
    one = torch.ones(1)
    assert OPERATIONS["brightness"](x, one).flatten().tolist() == [-0.5, 0.0, 0.5, 1.5]
    assert OPERATIONS["contrast"](x, one).flatten().tolist() == pytest.approx([-1.875, -0.875, 0.125, 2.125])
    assert OPERATIONS["gamma"](x, one).flatten().tolist() == pytest.approx([-1, -0.875, -0.5, 1])
    assert OPERATIONS["solarise"](x, 0.75 * one).flatten().tolist() == [-1, -0.5, 0, -1]
    assert OPERATIONS["invert"](x, one).flatten().tolist() == [1, 0.5, 0, -1]
    ramp = torch.linspace(-1, 1, 20).reshape(1, 1, 1, 20).repeat(1, 1, 20, 1)
    moved = OPERATIONS["translate_x"](ramp, 0.5 * one)  # 15 % of the side: three of twenty pixels
    torch.testing.assert_close(moved[..., :17], ramp[..., 3:], atol=1e-5, rtol=0)
    turned = OPERATIONS["rotate"](ramp, one)[0, 0, 8:12, 8:12]
    assert (turned[1:] - turned[:-1]).mean() / (turned[:, 1:] - turned[:, :-1]).mean() == pytest.approx(
        -0.577, abs=0.01
    )  # tan 30


def test_cutout_is_a_square_of_grey_up_to_half_of_the_side():
    x = torch.ones(100, 1, 40, 40)
    blank = cutout(x, keys(100), 0.5) == 0
    assert blank.flatten(1).sum(1).max() <= 20**2 and blank.flatten(1).sum(1).max() > 10**2
    for mask in blank[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])


def test_refusals():
    with pytest.raises(ConfigError, match="equalise"):
        Views(operations=("rotate", "equalise"))
    for wrong in ({"pad": 0.6}, {"cutout": 1.5}, {"num_operations": -1}):
        with pytest.raises(ConfigError, match="view-invalid"):
            Views(**wrong)
