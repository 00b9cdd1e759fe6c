"""The U-Nets taken apart: encode once, decode as often as asked, and a hand on the output of every block."""

from __future__ import annotations

import pytest
import torch

from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.lean_unet import LeanUNet
from medaug.networks.unet import MonaiUNet

X = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
TIME, LABELS = torch.tensor([3.0, 700.0]), torch.tensor([0, 2])


def _lean() -> LeanUNet:
    return LeanUNet(1, 1, channels=(8, 16, 24), num_classes=2)


def _monai() -> MonaiUNet:
    return MonaiUNet(1, 1, channels=(8, 16, 24), norm_num_groups=8, num_head_channels=8, num_classes=2, num_res_blocks=2)


@pytest.fixture(params=[_lean, _monai])
def guided(request, awaken) -> GuidedUNet:
    torch.manual_seed(0)
    return GuidedUNet(awaken(request.param())).eval()


def test_encode_and_decode_are_forward(guided):
    encoded = guided.encode(X, TIME, LABELS)
    assert torch.equal(guided.decode(encoded), guided(X, TIME, LABELS))
    assert torch.equal(guided.decode(encoded, encoded.h + 1), guided(X, TIME, LABELS, perturb=lambda h: h + 1))


def test_decoding_leaves_what_it_decodes(guided):
    encoded = guided.encode(X, TIME, LABELS)
    kept, copies = list(encoded.skips), [skip.clone() for skip in encoded.skips]
    first = guided.decode(encoded)
    guided.decode(encoded, torch.zeros_like(encoded.h), after_block=lambda h, level: h * 2)
    assert all(a is b for a, b in zip(encoded.skips, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(encoded.skips, copies, strict=True))
    assert torch.equal(guided.decode(encoded), first)


def test_every_block_passes_the_hand_and_the_identity_changes_nothing(guided):
    seen: list[tuple[str, int, tuple[int, ...]]] = []

    def watch(name):
        return lambda h, level: (seen.append((name, level, tuple(h.shape[1:]))), h)[1]

    encoded = guided.encode(X, TIME, LABELS, after_block=watch("down"))
    out = guided.decode(encoded, after_block=watch("up"))
    assert torch.equal(out, guided(X, TIME, LABELS))
    down, up = ([entry[1] for entry in seen if entry[0] == name] for name in ("down", "up"))
    assert down == [0, 1, 2] and up == list(range(len(up))) and len(up) in (2, 3)
    assert [shape[0] for name, _, shape in seen if name == "down"] == [8, 16, 24]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_change_after_a_down_block_reaches_the_prediction_and_its_skip(guided, level):
    changed = guided.encode(X, TIME, LABELS, after_block=lambda h, at: h + 1 if at == level else h)
    plain = guided.encode(X, TIME, LABELS)
    assert (guided.decode(changed) - guided.decode(plain)).abs().max() > 1e-4
    differing = [not torch.equal(a, b) for a, b in zip(changed.skips, plain.skips, strict=True)]
    assert not differing[0]
    assert any(differing) or level == 2  # the lean network has no skip at its lowest level


def test_a_change_after_an_up_block_reaches_the_prediction(guided):
    encoded = guided.encode(X, TIME, LABELS)
    for level in (0, 1):
        other = guided.decode(encoded, after_block=lambda h, at, level=level: h + torch.randn_like(h) if at == level else h)
        assert (other - guided.decode(encoded)).abs().max() > 1e-4
