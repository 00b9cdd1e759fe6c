"""Grading networks: built by name, with features in front of the last layer."""

from __future__ import annotations

import pytest
import timm
import torch

from medaug.errors import ConfigError
from medaug.networks.grading import FURTHER_NETWORKS, NETWORKS, TEN_NETWORKS, build_network, penultimate
from medaug.networks.heads import last_linear


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


def test_resnet18_is_the_published_one_but_for_its_stem():
    torch.manual_seed(0)
    ours = build_network("resnet18", num_classes=3, in_channels=1, image_size=32).state_dict()
    torch.manual_seed(0)
    published = timm.create_model("resnet18", num_classes=3, in_chans=1).state_dict()
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in ours if name != "conv1.weight")
    assert ours["conv1.weight"].shape == (64, 1, 3, 3)


def test_all_means_simple_cnn_and_ten():
    assert set(NETWORKS) == {"simple_cnn", *TEN_NETWORKS}
    assert len(TEN_NETWORKS) == 10


# Positions that the last stage sees: more than one, except where the docstring says so.
POSITIONS = {
    "resnet50": 2,
    "vgg16_bn": 2,
    "densenet121": 2,
    "inception_v3": 1,
    "resnext50_32x4d": 2,
    "mobilenetv2_100": 2,
    "efficientnet_b0": 2,
    "resnet34": 2,
    "convnext_tiny": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("size, channels", [(32, 1), (64, 3)])
@pytest.mark.parametrize("name", sorted({*NETWORKS, *FURTHER_NETWORKS}))
def test_every_network_learns_a_step_at_32_and_64_px(name, size, channels):
    network = build_network(name, num_classes=3, in_channels=channels, image_size=size)
    x = torch.randn(2, channels, size, size)
    torch.nn.functional.cross_entropy(network(x), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    with torch.no_grad():
        network.eval()
        assert penultimate(network, x).shape == (2, last_linear(network).in_features)
        if name in POSITIONS:
            assert network.forward_features(x).shape[-2:] == (POSITIONS[name], POSITIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*TEN_NETWORKS, *FURTHER_NETWORKS}))
def test_at_its_own_size_a_network_is_the_published_one(name):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    published = timm.create_model(name, num_classes=3, in_chans=3)
    ours = build_network(name, num_classes=3, in_channels=3, image_size=size)
    ours.load_state_dict(published.state_dict())
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), published.eval()(x))


def test_a_network_without_pixels_left_is_refused():
    with pytest.raises(ConfigError, match="cannot take images of 16 px"):
        build_network("inception_v4", num_classes=2, image_size=16)


def test_unknown_networks_are_refused_with_the_list():
    with pytest.raises(ConfigError, match="simple_cnn, resnet18"):
        build_network("resnet_eighteen", num_classes=2)
    with pytest.raises(ConfigError, match="linear, coral"):
        build_network("simple_cnn", num_classes=2, image_size=32, head="corel")
    with pytest.raises(ConfigError, match="does not give its features"):
        penultimate(torch.nn.Linear(2, 2), torch.zeros(1, 2))
