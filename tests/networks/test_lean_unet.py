"""LeanUNet: shapes, conditioning, gradients, and that it learns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.errors import ConfigError
from medaug.networks.lean_unet import LeanUNet, noise_level_waves

SMALL = {"in_channels": 1, "out_channels": 1, "channels": (8, 16), "patch": 2}


@settings(deadline=None, max_examples=15)
@given(
    channels=st.lists(st.sampled_from([4, 6, 8, 32]), min_size=1, max_size=3),
    patch=st.sampled_from([1, 2, 4]),
    blocks=st.integers(1, 2),
    sides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    in_channels=st.sampled_from([1, 3]),
)
def test_any_size_that_is_a_multiple_of_the_stride(channels, patch, blocks, sides, in_channels):
    unet = LeanUNet(in_channels, 2, channels, patch=patch, num_res_blocks=blocks).eval()
    stride = patch * 2 ** (len(channels) - 1)
    assert unet.bottleneck_stride == stride
    x = torch.randn(2, in_channels, sides[0] * stride, sides[1] * stride)
    temb = unet.embed(torch.tensor([0.0, 5.0]))
    h, skips = unet.encode(x, temb)
    assert h.shape == (2, unet.bottleneck_channels, *sides)
    assert unet.middle(h, temb).shape == h.shape
    assert unet.decode(h, skips, temb).shape == (2, 2, *x.shape[-2:])


def test_fresh_network_returns_zero(awaken):
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([-1500.0, 1100.0])
    assert not LeanUNet(**SMALL)(x, time).any()
    assert awaken(LeanUNet(**SMALL))(x, time).any()


def test_four_calls_equal_forward(awaken):
    unet = awaken(LeanUNet(**SMALL, num_classes=2)).eval()
    x, time, labels = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2])
    temb = unet.embed(time, labels)
    h, skips = unet.encode(x, temb)
    h = unet.middle(h, temb)
    first = unet.decode(h, skips, temb)
    assert torch.equal(first, unet.decode(h, skips, temb))
    assert torch.equal(first, unet(x, time, labels))


def test_no_label_means_the_null_class(awaken):
    unet = awaken(LeanUNet(**SMALL, num_classes=3)).eval()
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 70.5])
    assert torch.equal(unet(x, time), unet(x, time, torch.tensor([3, 3])))
    assert not torch.equal(unet(x, time), unet(x, time, torch.tensor([0, 3])))
    with pytest.raises(ConfigError, match="without classes"):
        LeanUNet(**SMALL)(x, time, torch.tensor([0, 1]))


def test_an_image_does_not_see_its_batch(awaken):
    unet = awaken(LeanUNet(**SMALL, num_classes=2)).eval()
    x, time, labels = torch.randn(5, 1, 8, 8), torch.linspace(-1500, 1100, 5), torch.tensor([0, 1, 2, 0, 1])
    together = unet(x, time, labels)
    alone = torch.cat([unet(x[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)  # another order of sums, nothing else


def test_waves_tell_every_noise_level_apart():
    time = torch.cat(
        [torch.arange(0, 1000, dtype=torch.float32), torch.linspace(-1500, -1, 1500), torch.linspace(1000, 1100, 101)]
    )
    waves = noise_level_waves(time, 64)
    assert waves.shape == (len(time), 64)
    distance = torch.cdist(waves, waves, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(1)
    assert distance.min() > 0.1  # neighbours one step apart; no two far levels coincide
    far = distance.masked_fill((time[:, None] - time).abs() < 20, 9.0)
    assert far.min() > 1


@pytest.mark.parametrize("num_classes", [None, 2])
def test_every_parameter_gets_a_gradient(num_classes, awaken):
    unet = awaken(LeanUNet(**SMALL, num_classes=num_classes))
    labels = None if num_classes is None else torch.tensor([0, 1, 2])
    (unet(torch.randn(3, 1, 16, 16), torch.tensor([1.0, 20.0, 300.0]), labels) ** 2).mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_input_passes_by_the_network(awaken):
    """With everything before the last convolution cut off, the image still reaches the output."""
    unet = awaken(LeanUNet(**SMALL)).eval()
    with torch.no_grad():
        unet.conv_out.weight[:, : SMALL["channels"][0]] = 0
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])
    assert not torch.equal(unet(x, time), unet(x.flip(-1), time))


def test_learns_one_batch():
    torch.manual_seed(0)
    unet = LeanUNet(**SMALL, num_classes=1)
    x, time, labels = torch.randn(4, 1, 16, 16), torch.tensor([10.0, 200.0, 500.0, 900.0]), torch.zeros(4, dtype=torch.long)
    target = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1) * time.view(-1, 1, 1, 1) / 500
    optimiser = torch.optim.Adam(unet.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = (unet(x, time, labels) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


def test_dropout_only_in_training(awaken):
    unet = awaken(LeanUNet(**SMALL, dropout=0.5))
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 70.5])
    assert not torch.equal(unet(x, time), unet(x, time))
    unet.eval()
    assert torch.equal(unet(x, time), unet(x, time))


@pytest.mark.parametrize(
    "options", [{"channels": ()}, {"patch": 0}, {"num_res_blocks": 0}, {"dropout": 1.0}, {"channels": (8, -8)}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError, match="positive"):
        LeanUNet(**{**SMALL, **options})


def test_image_size_must_fit_the_stride():
    with pytest.raises(ConfigError, match="multiples of 4"):
        LeanUNet(**SMALL)(torch.randn(1, 1, 10, 8), torch.zeros(1))
