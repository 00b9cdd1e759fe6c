"""MonaiUNet against MONAI's own forward."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from torch.utils._python_dispatch import TorchDispatchMode

from medaug.errors import ConfigError
from medaug.networks.unet import MonaiUNet

SMALL = {"in_channels": 1, "out_channels": 1, "channels": (8, 16, 16), "norm_num_groups": 8, "num_head_channels": 8}


class _OperatorCounter(TorchDispatchMode):
    """Counts the tensor operations of a block of code."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_res_blocks": (1, 2, 1), "attention_levels": (False, True, True)},
        {"resblock_updown": True, "include_fc": False},
        {"use_flash_attention": True},
        {"spatial_dims": 3, "channels": (8, 16), "num_res_blocks": 1},
    ],
)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_four_calls_equal_monai_bit_for_bit(options, num_classes, awaken):
    unet = awaken(MonaiUNet(**{**SMALL, **options}, num_classes=num_classes)).eval()
    x = torch.randn(2, 1, *[8] * options.get("spatial_dims", 2))
    time = torch.tensor([3, 999])
    labels = None if num_classes is None else torch.tensor([1, 3])
    with torch.no_grad():
        expected = DiffusionModelUNet.forward(unet, x, time, class_labels=labels)
        temb = unet.embed(time, labels)
        h, skips = unet.encode(x, temb)
        number = len(skips)
        composed = unet.decode(unet.middle(h, temb), skips, temb)
    assert expected.abs().max() > 1e-3
    assert torch.equal(composed, expected)
    assert torch.equal(unet(x, time, labels), expected)
    assert len(skips) == number  # decode may be called again, as bottleneck perturbation does
    assert h.shape == (2, unet.bottleneck_channels, *[8 // unet.bottleneck_stride] * (x.ndim - 2))


def test_costs_the_operations_of_monai(awaken):
    unet = awaken(MonaiUNet(**SMALL))
    x, time = torch.randn(2, 1, 16, 16), torch.tensor([3, 999])
    counts = []
    for forward in (unet, lambda *a: DiffusionModelUNet.forward(unet, *a)):
        with _OperatorCounter() as counter:
            forward(x, time).square().mean().backward()
        counts.append(counter.count)
    assert counts[0] <= counts[1]


def test_state_dict_is_that_of_monai():
    ours = MonaiUNet(**SMALL, num_classes=2)
    theirs = DiffusionModelUNet(
        spatial_dims=2, num_res_blocks=1, attention_levels=(False, False, True), num_class_embeds=3, **SMALL
    )
    theirs.load_state_dict(ours.state_dict())


def test_no_label_means_the_null_class(awaken):
    unet = awaken(MonaiUNet(**SMALL, num_classes=3)).eval()
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 70.5])
    with torch.no_grad():
        assert torch.equal(unet(x, time), unet(x, time, torch.tensor([3, 3])))
        assert not torch.equal(unet(x, time), unet(x, time, torch.tensor([0, 0])))


def test_fractional_and_negative_times_differ(awaken):
    unet = awaken(MonaiUNet(**SMALL)).eval()
    x = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1)
    with torch.no_grad():
        out = unet(x, torch.tensor([-1500.0, 0.0, 0.5, 1100.0]))
    assert torch.isfinite(out).all()
    assert torch.cdist(out.flatten(1), out.flatten(1)).fill_diagonal_(1).min() > 0


@pytest.mark.parametrize("options", [{"norm_num_groups": 5}, {"num_head_channels": 0}, {"attention_levels": (True,)}])
def test_widths_that_do_not_fit_are_refused(options):
    with pytest.raises(ConfigError, match="cannot be built"):
        MonaiUNet(**{**SMALL, **options})


def test_labels_are_checked():
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ConfigError, match="without classes"):
        MonaiUNet(**SMALL)(x, time, torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"shape \(2,\)"):
        MonaiUNet(**SMALL, num_classes=2)(x, time, torch.tensor([0]))
