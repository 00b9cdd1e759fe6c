"""Grading networks of timm made fit for small images: stems, poolings, patches and windows for 32 and 64 px.

The published networks halve the sides five times and leave 1 x 1 of 32 px, so their last stages see no neighbours. Up to 64 px
each builder here changes the stem (or patch) so that the last stage keeps 2 x 2 positions or the first one works on 16 x 16; above
64 px a network is the published one.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from medaug.errors import ConfigError

SMALL = 64  # up to this side, in pixels, the stems are changed
TINY = 32  # up to this side they do not halve the image

__all__ = [
    "SMALL",
    "TINY",
    "convnext",
    "densenet",
    "efficient",
    "from_timm",
    "inception_v3",
    "resnet",
    "swin",
    "swin_v2",
    "vgg",
    "vit",
]


def from_timm(
    name: str, num_classes: int, in_channels: int, image_size: int, **options: Any
) -> Any:  # a module with the attributes of its family
    """A timm model with random weights; networks that fix their input size are told it. `options` go to the model.

    Raises:
        ConfigError: `network-image-size`: it cannot be built for such images.
    """
    given: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels} | options
    if _takes_image_size(name):
        given["img_size"] = image_size
    try:
        network: nn.Module = timm.create_model(name, **given)
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


def _stem_3x3(in_channels: int, out_channels: int, image_size: int) -> nn.Conv2d:
    """A 3x3 convolution in the place of a 7x7 one of stride 2: of stride 1 up to 32 px, of stride 2 above."""
    stem = nn.Conv2d(in_channels, out_channels, 3, stride=1 if image_size <= TINY else 2, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def resnet(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ResNets and ResNeXts whose first residual stage sees 16x16 positions at 32 and at 64 px.

    The 7x7 stem of stride 2 leaves 1x1 of a 32 px image. Up to 64 px a 3x3 stem takes its place: of stride 1 up to 32 px, of
    stride 2 above. The max-pooling stays: without it every step costs four times as much.
    """
    network = from_timm(name, num_classes, in_channels, image_size)
    if image_size <= SMALL:
        network.conv1 = _stem_3x3(in_channels, 64, image_size)
    return network


def densenet(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """DenseNets with the stem of `resnet`: 16x16 positions in the first dense block at 32 and 64 px, 2x2 in the last."""
    network = from_timm(name, num_classes, in_channels, image_size)
    if image_size <= SMALL:
        network.features.conv0 = _stem_3x3(in_channels, 64, image_size)
    return network


def vgg(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """VGG whose last map keeps 2x2 positions up to 64 px, and whose two layers of 4096 units are left out there.

    Five poolings leave 1x1 of 32 px; the last one goes, up to 32 px. The hidden layers would see one averaged position spread over
    7x7 and hold 119 of 134 million weights; a linear layer on the mean over positions takes their place.
    """
    network = from_timm(name, num_classes, in_channels, image_size)
    if image_size <= SMALL:
        if image_size <= TINY:
            network.features[-1] = nn.Identity()
        network.pre_logits = nn.Identity()
        network.head.fc = nn.Linear(network.num_features, num_classes)
        network.head.num_features = network.head_hidden_size = network.num_features
        nn.init.normal_(network.head.fc.weight, 0, 0.01)
        nn.init.zeros_(network.head.fc.bias)
    return network


def efficient(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """MobileNets and EfficientNets, whose 3x3 stem has stride 1 up to 32 px: 2x2 positions in the last stage, as at 64 px."""
    network = from_timm(name, num_classes, in_channels, image_size)
    if image_size <= TINY:
        network.conv_stem.stride = (1, 1)
    return network


def inception_v3(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Inception v3, which as published has no pixels left below 75 px.

    Below 75 px the convolutions of the stem are padded, and up to 32 px the first has stride 1: the three kinds of blocks see 7x7,
    3x3 and 1x1 positions at 32 and at 64 px.
    """
    network = from_timm(name, num_classes, in_channels, image_size)
    if image_size < 75:
        for unit in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3"):
            getattr(network, unit).conv.padding = (1, 1)
    if image_size <= TINY:
        network.Conv2d_1a_3x3.conv.stride = (1, 1)
    return network


def vit(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Vision transformers of 16 px patches: 8 px up to 64 px, which gives 4x4 tokens at 32 px and 8x8 at 64 px."""
    options = {"patch_size": 8} if image_size <= SMALL else {}
    return from_timm(name, num_classes, in_channels, image_size, **options)


def swin(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Swin transformers, 4 px patches in windows of 7: windows of 4 up to 64 px, and patches of 2 px up to 32 px.

    The four stages see 16x16, 8x8, 4x4 and 2x2 positions at 32 and at 64 px. Above, windows of 8 where 7 does not divide the grid,
    as padding would be wasted work.
    """
    return from_timm(name, num_classes, in_channels, image_size, **_swin_options(image_size, 7))


def swin_v2(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Swin v2 with the patches and windows of `swin`; windows of 8 above 64 px."""
    return from_timm(name, num_classes, in_channels, image_size, **_swin_options(image_size, 8))


def _swin_options(image_size: int, published: int) -> dict[str, int]:
    if image_size <= SMALL:
        return {"window_size": 4, "patch_size": 2 if image_size <= TINY else 4}
    return {} if image_size // 4 % published == 0 else {"window_size": 8}


def convnext(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ConvNeXts of 4 px patches, which overlap by half up to 32 px: 16x16, 8x8, 4x4 and 2x2 positions in the stages as at 64 px."""
    network = from_timm(name, num_classes, in_channels, image_size)
    if image_size <= TINY:
        stem = network.stem[0]
        stem.stride, stem.padding = (2, 2), (1, 1)
    return network
