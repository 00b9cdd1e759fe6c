"""Networks that grade: a plain CNN, a ResNet-18 fit for small images, and any classifier of timm by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from medaug.errors import ConfigError

Builder = Callable[[int, int, int], nn.Module]

# Measured on timm 1.0.31: below this side a network has no pixels left.
_SMALLEST_SIDE = {"inception_v3": 75}


class SimpleCNN(nn.Module):
    """Three blocks of 3x3 convolution (32, 64, 128), batch norm, ReLU and 2x2 max-pooling; mean over positions; dropout; linear.

    Args:
        num_classes: K.
        in_channels: channels of the image.
        dropout: before the last layer.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((in_channels, 32), (32, 64), (64, 128)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(128, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, 128, H / 8, W / 8) of images (B, C, H, W), sides of at least 8."""
        out: Tensor = self.features(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the pooled features (B, 128), of a map."""
        pooled = x.mean(dim=(-2, -1))
        if pre_logits:
            return pooled
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.forward_head(self.forward_features(x))


def _simple_cnn(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return SimpleCNN(num_classes, in_channels)


def _resnet18(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ResNet-18 whose first residual stage sees 16x16 positions at 32 and at 64 px.

    The 7x7 stem of stride 2 leaves 1x1 of a 32 px image. Up to 64 px a 3x3 stem takes its place: of stride 1 up to 32 px, of
    stride 2 above. The max-pooling stays: without it every step costs four times as much.
    """
    network = _from_timm("resnet18", num_classes, in_channels, image_size)
    if image_size <= 64:
        stem = nn.Conv2d(in_channels, 64, 3, stride=1 if image_size <= 32 else 2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        network.conv1 = stem
    return network


def _from_timm(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """A timm model with random weights; networks that fix their input size are told it."""
    options: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    if image_size < _SMALLEST_SIDE.get(name, 1):
        raise ConfigError(
            "network-image-size", f"{name} needs images of at least {_SMALLEST_SIDE[name]} px, this cohort has {image_size} px."
        )
    try:
        if _takes_image_size(name):
            options["img_size"] = image_size
        network: nn.Module = timm.create_model(name, **options)
    except (AssertionError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(
            "network-image-size",
            f"{name} cannot be built for images of {image_size} px with {in_channels} channels ({error}); "
            "choose another network or image_size.",
        ) from error
    return network


def _takes_image_size(name: str) -> bool:
    """True for models that are built for one input size, such as transformers: they have an `img_size` argument."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config is not None and bool(config.fixed_input_size)


NETWORKS: dict[str, Builder] = {
    "simple_cnn": _simple_cnn,
    "resnet18": _resnet18,
    **{
        name: partial(_from_timm, name)
        for name in (
            "resnet50",
            "vgg16_bn",
            "densenet121",
            "inception_v3",
            "resnext50_32x4d",
            "mobilenetv2_100",
            "efficientnet_b0",
            "vit_small_patch16_224",
            "swin_tiny_patch4_window7_224",
        )
    },
}


def build_network(name: str, num_classes: int, in_channels: int = 1, image_size: int = 224) -> nn.Module:
    """A classifier with random weights: images (B, C, H, W) in [-1, 1] -> logits (B, K).

    Args:
        name: a key of `NETWORKS`, or any other model of timm.
        num_classes: K.
        in_channels: channels of the image.
        image_size: side in pixels; decides the stem of resnet18 and the grid of transformers.

    Raises:
        ConfigError: an unknown name, or a network that cannot take images of this size.
    """
    if name in NETWORKS:
        return NETWORKS[name](num_classes, in_channels, image_size)
    if timm.is_model(name):
        return _from_timm(name, num_classes, in_channels, image_size)
    raise ConfigError(
        "network-unknown",
        f"There is no network {name!r}; choose one of {', '.join(NETWORKS)}, or another model of timm by its exact name.",
    )


def penultimate(network: nn.Module, x: Tensor) -> Tensor:
    """Features (B, D) that the last linear layer of a network of `build_network` would see, for images (B, C, H, W).

    The network's mode (train or eval) and gradients are the caller's affair.

    Raises:
        ConfigError: the network has no `forward_features` and `forward_head`.
    """
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        raise ConfigError(
            "network-no-features", f"{type(network).__name__} does not give its features; use a network of build_network."
        )
    return torch.flatten(network.forward_head(network.forward_features(x), pre_logits=True), 1)  # type: ignore[operator]
