"""ReferenceEncoder against timm's own features and logits."""

from __future__ import annotations

import pytest
import timm
import torch

from medaug.errors import ConfigError
from medaug.networks.reference_encoder import IMAGENET_MEAN, IMAGENET_STD, STAGES, ReferenceEncoder
from medaug.networks.weights import save_weights

GREY = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _normalised(images: torch.Tensor) -> torch.Tensor:
    """The input by torchvision's convention, written out channel by channel."""
    rgb = torch.cat([images] * (3 // images.shape[1]), dim=1) / 2 + 0.5
    return torch.stack([(rgb[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1)


@pytest.mark.parametrize("stride", sorted(STAGES))
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_timm_at_every_stride(stride, channels):
    encoder = ReferenceEncoder(stride, num_classes=3, in_channels=channels).eval()
    images = GREY.expand(-1, channels, -1, -1)
    oracle = timm.create_model(
        "efficientnet_b0", pretrained=False, features_only=True, out_indices=(sorted(STAGES).index(stride),)
    ).eval()
    oracle.load_state_dict(encoder.trunk.state_dict(), strict=False)
    with torch.no_grad():
        features, logits = encoder(images)
        torch.testing.assert_close(features, oracle(_normalised(images))[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, encoder.trunk(_normalised(images)), atol=1e-5, rtol=1e-4)
        assert torch.equal(encoder.features(images), features)
    assert features.shape == (2, encoder.out_channels, 64 // stride, 64 // stride)


@pytest.mark.parametrize("stride, channels", [(12, 112), (64, 320), (1, 16)])
def test_other_strides_resize_the_nearest_stage(stride, channels):
    features, _ = ReferenceEncoder(stride, num_classes=2).eval()(GREY)
    assert features.shape == (2, channels, -(-64 // stride), -(-64 // stride))


def test_conv_head_feature():
    encoder = ReferenceEncoder(32, num_classes=2, feature="conv_head").eval()
    with torch.no_grad():
        features, logits = encoder(GREY)
        torch.testing.assert_close(features, encoder.trunk.forward_features(_normalised(GREY)), atol=1e-5, rtol=1e-4)
        assert torch.equal(encoder.features(GREY), features)
    assert features.shape == (2, 1280, 2, 2)
    assert ReferenceEncoder(16, num_classes=2, feature="conv_head").eval().features(GREY).shape == (2, 1280, 4, 4)


def test_features_stop_at_their_stage():
    encoder = ReferenceEncoder(8, num_classes=2).eval()
    ran = []
    for index, block in enumerate(encoder.trunk.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder.features(GREY)
    assert ran == [0, 1, 2]
    encoder(GREY)
    assert ran == [0, 1, 2, *range(7)]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("classes", [4, 1000])
def test_local_pretrained_weights(tmp_path, suffix, classes):
    source = timm.create_model("efficientnet_b0", pretrained=False, num_classes=classes)
    path = tmp_path / f"b0.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        save_weights(path, source)
    encoder = ReferenceEncoder(32, num_classes=4, pretrained_path=path)
    assert torch.equal(encoder.trunk.blocks[6][0].conv_pw.weight, source.blocks[6][0].conv_pw.weight)
    assert (classes == 4) == torch.equal(encoder.trunk.classifier.weight[:4], source.classifier.weight[:4])


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(path, torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="does not hold timm's efficientnet_b0"):
        ReferenceEncoder(32, num_classes=2, pretrained_path=path)
    with pytest.raises(ConfigError, match="not there"):
        ReferenceEncoder(32, num_classes=2, pretrained_path=tmp_path / "absent.safetensors")


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="blocks, conv_head"):
        ReferenceEncoder(32, num_classes=2, feature="stem")
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        ReferenceEncoder(32, num_classes=2, in_channels=2)
    with pytest.raises(ConfigError, match="expects images"):
        ReferenceEncoder(32, num_classes=2)(torch.zeros(2, 3, 32, 32))
