"""Grading networks: built by name, with features in front of the last layer."""

from __future__ import annotations

import pytest
import torch

from medaug.errors import ConfigError
from medaug.networks.grading import NETWORKS, build_network, penultimate


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "mobilenetv2_100", "test_vit", "test_resnet"])
@pytest.mark.parametrize("size", [32, 64])
def test_logits_are_the_last_layer_of_the_penultimate_features(name, size):
    network = build_network(name, num_classes=3, in_channels=1, image_size=size).eval()
    x = torch.randn(2, 1, size, size)
    with torch.no_grad():
        logits, features = network(x), penultimate(network, x)
        last = network.get_classifier() if hasattr(network, "get_classifier") else network.classifier
        torch.testing.assert_close(last(features), logits, atol=1e-5, rtol=1e-4)
    assert logits.shape == (2, 3)


def test_simple_cnn_is_what_the_method_says():
    network = build_network("simple_cnn", num_classes=4, in_channels=3, image_size=32)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size) for c in convolutions] == [(32, (3, 3)), (64, (3, 3)), (128, (3, 3))]
    # 3x3 weights, batch norm scale and shift, 128 x 4 + 4 in the last layer
    assert sum(p.numel() for p in network.parameters()) == 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 4 + 4
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(network(x), network(x))  # dropout
    assert torch.equal(network.eval()(x), network(x))


@pytest.mark.parametrize("size, positions", [(16, 8), (28, 14), (32, 16), (64, 16), (224, 56)])
def test_resnet18_keeps_positions_in_small_images(size, positions):
    network = build_network("resnet18", num_classes=2, in_channels=1, image_size=size).eval()
    seen = []
    network.layer1.register_forward_hook(lambda _, __, out: seen.append(out.shape[-1]))
    network(torch.randn(1, 1, size, size))
    assert seen == [positions]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"inception_v3"}))
def test_the_ten_run_at_64_px(name):
    network = build_network(name, num_classes=3, in_channels=1, image_size=64).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 64, 64)).shape == (1, 3)
        assert penultimate(network, torch.randn(1, 1, 64, 64)).ndim == 2


def test_unknown_networks_are_refused_with_the_list():
    with pytest.raises(ConfigError, match="simple_cnn, resnet18"):
        build_network("resnet_eighteen", num_classes=2)
    with pytest.raises(ConfigError, match="at least 75 px"):
        build_network("inception_v3", num_classes=2, image_size=64)
    with pytest.raises(ConfigError, match="does not give its features"):
        penultimate(torch.nn.Linear(2, 2), torch.zeros(1, 2))
