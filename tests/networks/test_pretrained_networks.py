"""Checkpoints of grading networks: loaded but for the head, or refused by the names that differ."""

from __future__ import annotations

import pytest
import timm
import torch

from medaug.errors import ConfigError
from medaug.networks.grading import build_network, penultimate
from medaug.networks.weights import save_weights


def test_own_weights_come_back_with_a_new_head(tmp_path):
    saved = build_network("simple_cnn", num_classes=5, image_size=32).eval()
    save_weights(tmp_path / "cnn.safetensors", saved)
    network = build_network("simple_cnn", num_classes=2, image_size=32, pretrained=tmp_path / "cnn.safetensors").eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(penultimate(network, x), penultimate(saved, x))
    assert network(x).shape == (2, 2)


@pytest.mark.parametrize("classes", [10, 3])
def test_published_colour_weights_read_grey_images(tmp_path, classes):
    colour = timm.create_model("test_resnet", num_classes=classes, in_chans=3).eval()
    save_weights(tmp_path / "colour.safetensors", colour)
    torch.manual_seed(1)
    network = build_network("test_resnet", num_classes=3, image_size=32, pretrained=tmp_path / "colour.safetensors").eval()
    x = torch.randn(2, 1, 32, 32)
    # Summed kernels see a grey image as the colour network sees three equal channels.
    torch.testing.assert_close(penultimate(network, x), penultimate(colour, x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-3)
    assert not torch.equal(network.get_classifier().weight, colour.get_classifier().weight[:3])


def test_positions_are_resampled_to_the_size(tmp_path):
    save_weights(tmp_path / "vit.safetensors", timm.create_model("test_vit", num_classes=10))
    network = build_network("test_vit", num_classes=3, image_size=64, pretrained=tmp_path / "vit.safetensors")
    assert network(torch.randn(2, 1, 64, 64)).shape == (2, 3)


def test_the_published_stem_comes_with_published_weights(tmp_path):
    save_weights(tmp_path / "r.safetensors", timm.create_model("resnet18", num_classes=10))
    network = build_network("resnet18", num_classes=3, image_size=32, pretrained=tmp_path / "r.safetensors")
    assert network.conv1.weight.shape == (64, 1, 7, 7)


def test_missing_and_foreign_weights_are_named(tmp_path):
    state = build_network("simple_cnn", num_classes=2, image_size=32).state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "features.0.weight"}
    save_weights(tmp_path / "part.safetensors", without)
    with pytest.raises(ConfigError, match=r"features\.0\.weight is missing"):
        build_network("simple_cnn", num_classes=2, image_size=32, pretrained=tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match="is no checkpoint of test_resnet: .* is missing"):
        build_network("test_resnet", num_classes=2, image_size=32, pretrained=tmp_path / "part.safetensors")
    (tmp_path / "p.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConfigError, match="could run code"):
        build_network("simple_cnn", num_classes=2, image_size=32, pretrained=tmp_path / "p.pth")
