"""Fusion and the guided U-Net: the properties of the method at the level of the network."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medaug.draws import randn
from medaug.errors import ConfigError
from medaug.networks.fusion import FeatureFusion
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.lean_unet import LeanUNet
from medaug.networks.reference_encoder import ReferenceEncoder
from medaug.networks.unet import MonaiUNet

X = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
REFERENCES = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
TIME = torch.tensor([3.0, 700.0])
LABELS = torch.tensor([0, 2])


def _lean() -> LeanUNet:
    return LeanUNet(1, 1, channels=(8, 16, 16), num_classes=2)


def _monai() -> MonaiUNet:
    return MonaiUNet(1, 1, channels=(8, 16, 16), norm_num_groups=8, num_head_channels=8, num_classes=2)


@pytest.fixture(params=[_lean, _monai])
def guided(request, awaken) -> GuidedUNet:
    torch.manual_seed(0)
    unet = awaken(request.param())
    return GuidedUNet(unet, ReferenceEncoder(unet.bottleneck_stride, num_classes=2))


def test_shapes_of_the_paper_at_256():
    with torch.device("meta"):
        unet = MonaiUNet(
            1,
            1,
            channels=(128, 128, 256, 256, 512, 512),
            num_res_blocks=2,
            attention_levels=(False, False, False, False, True, False),
            num_head_channels=64,
        )
        guided = GuidedUNet(unet, ReferenceEncoder(unet.bottleneck_stride, num_classes=4)).eval()
        images, time = torch.empty(2, 1, 256, 256), torch.empty(2)
        features, logits = guided.reference(images)
        h, _ = unet.encode(images, unet.embed(time))
        assert features.shape == (2, 320, 8, 8)
        assert logits.shape == (2, 4)
        assert h.shape == (2, 512, 8, 8)
        assert guided.fusion(h, features).shape == (2, 512, 8, 8)
        assert guided(images, time, features=features).shape == images.shape


def test_fresh_fusion_is_the_plain_unet(guided):
    plain = guided.unet.eval()(X, TIME, LABELS)
    features, _ = guided.eval().reference(REFERENCES)
    # The default start adds a whisper of the reference.
    torch.testing.assert_close(guided(X, TIME, LABELS, features), plain, atol=5e-2 * plain.abs().max().item(), rtol=0)
    guided.fusion = FeatureFusion(guided.unet.bottleneck_channels, features.shape[1], reference_std=0.0)
    torch.testing.assert_close(guided(X, TIME, LABELS, features), plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(guided(X, TIME, LABELS, 100 * features), plain, atol=1e-6, rtol=1e-6)


def test_reference_changes_the_output_once_fusion_has_learned(guided):
    guided.eval()
    torch.nn.init.normal_(guided.fusion.conv.weight, std=0.1)
    one, other = guided.reference(REFERENCES)[0], guided.reference(-REFERENCES)[0]
    assert (guided(X, TIME, LABELS, one) - guided(X, TIME, LABELS, other)).abs().max() > 1e-4
    assert (guided(X, TIME, LABELS, one) - guided(X, TIME, LABELS)).abs().max() > 1e-4


def test_bottleneck_noise_is_the_draw_and_nothing_else(guided, awaken):
    guided.eval()

    def out(scale: float, seed: int) -> torch.Tensor:
        return guided(X, TIME, LABELS, perturb=lambda h: h + scale * randn(h.shape, "bottleneck", seed))

    assert torch.equal(out(0.0, 1), guided(X, TIME, LABELS))
    assert torch.equal(out(1.0, 1), out(1.0, 1))
    assert (out(1.0, 1) - out(1.0, 2)).abs().max() > 1e-4


@pytest.mark.parametrize("make", [_lean, _monai])
def test_bottleneck_noise_is_invisible_in_a_fresh_network(make):
    guided = GuidedUNet(make()).eval()
    assert torch.equal(guided(X, TIME, perturb=lambda h: h + 1), guided(X, TIME))


def test_perturb_sees_the_output_of_the_middle_block(guided):
    seen = []
    guided.eval()(X, TIME, LABELS, perturb=lambda h: (seen.append(h), h)[1])
    temb = guided.unet.embed(TIME, LABELS)
    h, _ = guided.unet.encode(X, temb)
    assert torch.equal(seen[0], guided.unet.middle(guided.fusion(h), temb))


def test_gradients_of_both_losses_reach_the_encoder(guided):
    trunk = guided.reference_encoder.trunk
    features, logits = guided.reference(REFERENCES)
    (guided(X, TIME, LABELS, features) ** 2).mean().backward()
    assert trunk.conv_stem.weight.grad.any()
    assert trunk.classifier.weight.grad is None  # the noise loss goes through the fusion only
    guided.zero_grad()
    features, logits = guided.reference(REFERENCES)
    guided(X, TIME, LABELS, features.detach()).square().mean().backward()
    assert all(p.grad is None for p in guided.reference_encoder.parameters())
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert trunk.conv_stem.weight.grad.any()
    assert trunk.classifier.weight.grad.any()


def test_encoder_runs_once_per_reference(guided):
    calls = []
    guided.eval().reference_encoder.trunk.conv_stem.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        features = guided.reference_features(REFERENCES)
        for t in range(5, -1, -1):
            guided(X, torch.full((2,), float(t)), LABELS, features)
    assert len(calls) == 1


def test_dropped_reference_is_the_null_features(guided):
    guided.eval()
    torch.nn.init.normal_(guided.fusion.conv.weight, std=0.1)
    torch.nn.init.normal_(guided.fusion.null_features)
    features = guided.reference_features(REFERENCES)
    mixed = guided(X, TIME, LABELS, features, keep_reference=torch.tensor([True, False]))
    kept, dropped = guided(X, TIME, LABELS, features), guided(X, TIME, LABELS)
    torch.testing.assert_close(mixed[0], kept[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1], dropped[1], atol=1e-6, rtol=1e-5)
    assert (kept[1] - dropped[1]).abs().max() > 1e-4
    mixed.square().mean().backward()
    assert guided.fusion.null_features.grad.any()


def test_one_reference_serves_a_batch(guided):
    guided.eval()
    features = guided.reference_features(REFERENCES[:1])
    assert torch.equal(guided(X, TIME, LABELS, features), guided(X, TIME, LABELS, features.repeat(2, 1, 1, 1)))


def test_without_fusion_it_costs_and_gives_what_the_plain_unet_does(guided):
    plain = GuidedUNet(guided.unet, guided.reference_encoder, with_fusion=False).eval()
    assert plain.fusion is None
    flops = []
    for network in (guided.unet, plain):
        with FlopCounterMode(display=False) as counter:
            out = network(X, TIME, LABELS)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert torch.equal(out, guided.unet(X, TIME, LABELS))


def test_wrong_partners_are_refused(guided):
    with pytest.raises(ConfigError, match="stride 32"):
        GuidedUNet(guided.unet, ReferenceEncoder(32, num_classes=2))
    with pytest.raises(ConfigError, match="must have shape"):
        guided(X, TIME, LABELS, torch.zeros(2, guided.fusion.reference_channels, 3, 3))
    with pytest.raises(ConfigError, match="must have shape"):
        guided(X, TIME, LABELS, guided.reference(REFERENCES)[0].repeat(2, 1, 1, 1))
    plain = GuidedUNet(guided.unet)
    with pytest.raises(ConfigError, match="without fusion"):
        plain(X, TIME, LABELS, torch.zeros(2, 1, 4, 4))
    with pytest.raises(ConfigError, match="without a reference encoder"):
        plain.reference(REFERENCES)
