"""Old checkpoints: against the real `generative` package, and the refusals."""

from __future__ import annotations

import logging

import pytest
import torch

from medaug.errors import ConfigError
from medaug.networks.legacy import load_monai_generative
from medaug.networks.unet import MonaiUNet
from medaug.networks.weights import save_weights

SIZES = {"num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": 8, "num_head_channels": 8}


def _unet(**options) -> MonaiUNet:
    return MonaiUNet(1, 1, channels=(8, 16), include_fc=False, **{**SIZES, **options})


def _old_names(unet: MonaiUNet) -> dict[str, torch.Tensor]:
    """The state under the old package's names, with its unused projection."""
    state = {}
    for name, tensor in unet.state_dict().items():
        state[name.replace(".attn.to_", ".to_").replace("postconv", "conv")] = tensor.clone()
        if ".attn.to_q." in name:
            state[name.replace(".attn.to_q.", ".proj_attn.")] = torch.randn_like(tensor)
    return state


@pytest.fixture
def generative(monkeypatch):
    """The old package's U-Net module; it wants a name that MONAI has moved."""
    import monai.config
    import monai.utils

    monkeypatch.setattr(monai.config, "IgniteInfo", monai.utils.IgniteInfo, raising=False)
    return pytest.importorskip("generative.networks.nets", exc_type=ImportError)


@pytest.mark.integration
@pytest.mark.parametrize("resblock_updown", [False, True])
@pytest.mark.parametrize("rows", [None, 3])
def test_equals_the_old_package(generative, awaken, tmp_path, resblock_updown, rows):
    old = awaken(
        generative.DiffusionModelUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            num_channels=(8, 16),
            resblock_updown=resblock_updown,
            num_class_embeds=rows,
            **SIZES,
        )
    ).eval()
    labels = None if rows is None else torch.tensor([0, 2])
    x, time = torch.randn(2, 1, 16, 16), torch.tensor([3, 900])
    with torch.no_grad():
        expected = old(x, time, class_labels=labels)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    unet = _unet(resblock_updown=resblock_updown, num_classes=None if rows is None else rows - 1)
    load_monai_generative(tmp_path / "old.pt", unet, probe=(x, time, expected) if rows is None else None)
    with torch.no_grad():
        torch.testing.assert_close(unet.eval()(x, time, labels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["state", "safetensors"])
def test_old_names_are_read(awaken, tmp_path, kind, capsys):
    source, target = awaken(_unet()).eval(), _unet().eval()
    state = _old_names(source)
    x, time = torch.randn(2, 1, 16, 16), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        probe = (x, time, source(x, time))
    if kind == "safetensors":
        save_weights(tmp_path / "old.safetensors", state)
        load_monai_generative(tmp_path / "old.safetensors", target, probe)
    else:
        names = set(state)
        load_monai_generative(state, target, probe)
        assert set(state) == names  # the caller's dict is left alone
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))
    assert capsys.readouterr().out == ""


def test_missing_null_class_is_the_mean_and_said(awaken, caplog):
    state = _old_names(awaken(_unet(num_classes=2)))  # 3 rows
    target = _unet(num_classes=3)
    with caplog.at_level(logging.WARNING):
        load_monai_generative(state, target)
    assert "mean of its 3 classes" in caplog.text
    torch.testing.assert_close(target.class_embedding.weight[3], state["class_embedding.weight"].mean(dim=0))


def test_what_does_not_fit_is_refused_and_changes_nothing(awaken):
    state, unet = _old_names(awaken(_unet())), _unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    x, time = torch.randn(1, 1, 16, 16), torch.tensor([3.0])
    cases = [
        ("include_fc=False", state, MonaiUNet(1, 1, channels=(8, 16), **SIZES), None),
        ("conv_in", {k: v for k, v in state.items() if k != "conv_in.conv.weight"}, unet, None),
        ("left over", {**state, "extra.weight": torch.zeros(1)}, unet, None),
        ("does not fit", {**state, "conv_in.conv.bias": torch.zeros(5)}, unet, None),
        ("does not fit", {k: v for k, v in state.items() if ".to_q." not in k}, unet, None),
        ("does not fit", {}, unet, None),
        ("forward pass differs", state, unet, (x, time, torch.ones(1, 1, 16, 16))),
    ]
    for match, broken, target, probe in cases:
        with pytest.raises(ConfigError, match=match):
            load_monai_generative(broken, target, probe)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
