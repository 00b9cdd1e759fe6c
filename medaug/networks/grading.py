"""Networks that grade: a plain CNN, ten networks fit for small images, and any other classifier of timm by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from medaug.errors import ConfigError
from medaug.networks import small_images
from medaug.networks.ordinal import HEADS
from medaug.networks.pretrained import load_pretrained

Builder = Callable[[int, int, int], nn.Module]


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


def _simple_cnn_builder(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return SimpleCNN(num_classes, in_channels)


_ADAPTED: dict[str, Callable[[str, int, int, int], nn.Module]] = {
    "resnet18": small_images.resnet,
    "resnet50": small_images.resnet,
    "vgg16_bn": small_images.vgg,
    "densenet121": small_images.densenet,
    "inception_v3": small_images.inception_v3,
    "resnext50_32x4d": small_images.resnet,
    "mobilenetv2_100": small_images.efficient,
    "efficientnet_b0": small_images.efficient,
    "vit_small_patch16_224": small_images.vit,
    "swin_tiny_patch4_window7_224": small_images.swin,
}
_FURTHER: dict[str, Callable[[str, int, int, int], nn.Module]] = {
    "resnet34": small_images.resnet,
    "vgg16": small_images.vgg,
    "swinv2_tiny_window8_256": small_images.swin_v2,
    "convnext_tiny": small_images.convnext,
}

TEN_NETWORKS = tuple(_ADAPTED)
# name -> builder: simple_cnn and the ten, which `all` means.
NETWORKS: dict[str, Builder] = {
    "simple_cnn": _simple_cnn_builder,
    **{name: partial(build, name) for name, build in _ADAPTED.items()},
}
# Further networks that are fit for small images; any other model of timm is built as published.
FURTHER_NETWORKS: dict[str, Builder] = {name: partial(build, name) for name, build in _FURTHER.items()}


def _builder(name: str) -> Builder:
    """The builder of a name.

    Raises:
        ConfigError: `network-unknown`.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if name in FURTHER_NETWORKS:
        return FURTHER_NETWORKS[name]
    if timm.is_model(name):
        return partial(small_images.from_timm, name)
    raise ConfigError(
        "network-unknown",
        f"There is no network {name!r}; choose one of {', '.join([*NETWORKS, *FURTHER_NETWORKS])}, or another model of timm by its "
        "exact name.",
    )


def check_network(name: str) -> None:
    """Refuse a name that no network has.

    Raises:
        ConfigError: `network-unknown`.
    """
    _builder(name)


def build_network(
    name: str,
    num_classes: int,
    in_channels: int = 1,
    image_size: int = 224,
    *,
    head: str = "linear",
    pretrained: Path | None = None,
) -> nn.Module:
    """A classifier: images (B, C, H, W) in [-1, 1] -> logits (B, K).

    Args:
        name: a key of `NETWORKS` or `FURTHER_NETWORKS`, or any other model of timm.
        num_classes: K.
        in_channels: channels of the image.
        image_size: side in pixels; decides stems, patches and windows, see `medaug.networks.small_images`.
        head: "linear", or "coral" for ordered classes, see `medaug.networks.ordinal`.
        pretrained: safetensors file that all but the head comes from, see `medaug.networks.pretrained`; None draws weights.

    Raises:
        ConfigError: an unknown name or head, a network that cannot take images of this size, a file of another network.
    """
    build = _builder(name)
    if head not in HEADS:
        raise ConfigError("head-unknown", f"The head of a network must be one of {', '.join(HEADS)}, got {head!r}.")
    if pretrained is None:
        network = build(num_classes, in_channels, image_size)
    else:
        network = load_pretrained(name, build, pretrained, num_classes, in_channels, image_size)
    _check_takes(name, network, in_channels, image_size)
    return HEADS[head](network, num_classes)


def _check_takes(name: str, network: nn.Module, in_channels: int, image_size: int) -> None:
    """Send one black image through: a network that has no pixels left of it is refused before any training.

    Raises:
        ConfigError: `network-image-size`.
    """
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, in_channels, image_size, image_size))
    except (AssertionError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(
            "network-image-size",
            f"{name} cannot take images of {image_size} px with {in_channels} channels ({error}); choose another network or image_size.",
        ) from error
    finally:
        network.train(was_training)


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
