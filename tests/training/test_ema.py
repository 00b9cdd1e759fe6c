from __future__ import annotations

import pytest
import torch
from torch import nn

from medaug.errors import ConfigError
from medaug.training.ema import ExponentialMovingAverage


def test_ema_follows_its_formula() -> None:
    network = nn.Linear(2, 1, bias=False)
    ema = ExponentialMovingAverage(network, decay=0.5)
    expected = network.weight.detach().clone().double()
    for n in range(1, 30):
        with torch.no_grad():
            network.weight.copy_(torch.full((1, 2), float(n)))
        ema.update(network)
        d = min(0.5, (1 + n) / (10 + n))  # warm-up until n = 8
        expected = d * expected + (1 - d) * n
    assert torch.allclose(ema.network.weight.double(), expected, atol=1e-5)
    assert ema.num_updates == 29


def test_ema_copies_buffers_and_keeps_apart_from_the_network() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = ExponentialMovingAverage(network, decay=0.9)
    network(torch.rand(4, 1, 3, 3))  # moves the running means
    ema.update(network)
    for shadow, buffer in zip(ema.network.buffers(), network.buffers(), strict=True):
        assert torch.equal(shadow, buffer)
        assert shadow is not buffer
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_constant_network_stays_as_it_is() -> None:
    network = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(network, decay=0.999)
    for _ in range(20):
        ema.update(network)
    assert torch.allclose(ema.network.weight, network.weight, atol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="ema-decay"):
        ExponentialMovingAverage(nn.Linear(1, 1), decay)
