"""Policies: keyed, pure, bounded, with an identity share."""

import numpy as np
import pytest
import torch

from medaug.errors import ConfigError
from medaug.networks.ordinal import weighted_cross_entropy
from medaug.transforms import operations
from medaug.transforms.policies import POLICIES, apply_policy, augment_batch


def images(count=8, channels=1, side=32):
    return torch.rand((count, channels, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1


def keys(count, prefix="k"):
    return [(prefix, index) for index in range(count)]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"cutmix"}))
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
    y = augment_batch(name, x, keys(8, MIXING)).images
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.min() >= -1 and y.max() <= 1


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


def test_randaugment_applies_two_operations_to_half_of_the_images():
    x = images(400, side=8)
    y = apply_policy("randaugment", x, keys(400))
    untouched = (y == x).flatten(1).all(1).float().mean()
    assert 0.43 < untouched < 0.58  # one half, and identity drawn twice (1 %) of the rest; sd 0.025
    assert y.min() >= -1 and y.max() <= 1


def test_randaugment_leaves_grey_values_and_sides_their_meaning():
    assert not {"saturation", "posterise", "solarise", "invert"} & set(operations.usual_operations(1))
    assert "saturation" in operations.usual_operations(3)
    ramp = torch.linspace(-1, 1, 33).expand(1, 1, 33, 33).repeat(200, 1, 1, 1)
    y = apply_policy("randaugment", ramp, keys(200))
    assert ((y[..., -4:].mean((1, 2, 3)) - y[..., :4].mean((1, 2, 3))) > 0.5).all()  # neither mirrored nor inverted


def test_random_erasing_sets_one_rectangle_to_the_mean():
    x = images(400, side=20)
    y = apply_policy("random_erasing", x, keys(400))
    changed = (y != x)[:, 0]
    touched = changed.flatten(1).any(1)
    assert 0.4 < touched.float().mean() < 0.6
    for before, after, where in zip(x[touched], y[touched], changed[touched], strict=True):
        rows, columns = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
        box = after[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        torch.testing.assert_close(box, before.mean().expand_as(box))
        assert where.sum() == box.numel() and 0.01 < box.numel() / 400 < 0.36  # sides are rounded


MIXING = next(
    prefix for prefix in "abcdefgh" if augment_batch("cutmix", torch.rand(2, 1, 8, 8), keys(2, prefix)).partner is not None
)


def test_cutmix_shares_are_the_areas():
    x = torch.arange(6.0)[:, None, None, None].expand(6, 1, 16, 16) / 6
    shares = []
    for prefix in range(300):
        mixture = augment_batch("cutmix", x, keys(6, prefix))
        shares.append(mixture.share)
        if mixture.partner is None:
            assert torch.equal(mixture.images, x) and mixture.share == 1
            continue
        expected = mixture.share * x.mean((1, 2, 3)) + (1 - mixture.share) * x[mixture.partner].mean((1, 2, 3))
        torch.testing.assert_close(mixture.images.mean((1, 2, 3)), expected)
    mixed = [share for share in shares if share < 1]
    assert 0.4 < len(mixed) / 300 < 0.6
    assert 0.5 < np.mean(mixed) < 0.75  # uniform shares, raised by boxes that the border cuts


def test_cutmix_mixes_the_loss_by_the_shares():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    mixture = augment_batch("cutmix", images(4), keys(4, MIXING))
    hard = torch.nn.functional.one_hot(target, 3).float()
    soft = mixture.share * hard + (1 - mixture.share) * hard[mixture.partner]
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixture.loss(weighted_cross_entropy, logits, target), expected)
    counts = torch.tensor([1.0, 1.0, 0.0, 2.0])  # of the third image neither its own label nor as a partner counts
    own, other = (
        (-logits.log_softmax(1).gather(1, y[:, None])[:, 0], w)
        for y, w in ((target, counts), (target[mixture.partner], counts[mixture.partner]))
    )
    weighted = mixture.share * (own[0] * own[1]).mean() + (1 - mixture.share) * (other[0] * other[1]).mean()  # both sum to 4
    torch.testing.assert_close(mixture.loss(weighted_cross_entropy, logits, target, counts), weighted)


def test_refusals():
    with pytest.raises(ConfigError, match="none, crop_rotate, weak"):
        apply_policy("cutmixx", images(), keys(8))
    with pytest.raises(ConfigError, match="labels are mixed"):
        apply_policy("cutmix", images(), keys(8, MIXING))
    with pytest.raises(ConfigError, match="policy-input"):
        apply_policy("weak", images(), keys(7))
    with pytest.raises(ConfigError, match="policy-input"):
        apply_policy("weak", images()[0], keys(1))
    assert len(apply_policy("crop_rotate", images()[:0], [])) == 0
