"""EfficientNet-B0 that turns a reference image into a feature map for the U-Net's bottleneck and into class logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medaug.errors import ConfigError
from medaug.networks.weights import read_tensors

# EfficientNet-B0 (Tan and Le 2019, table 1): the last block of each stride, stride -> (index into `blocks`, channels).
STAGES = {2: (0, 16), 4: (1, 24), 8: (2, 40), 16: (4, 112), 32: (6, 320)}
HEAD_CHANNELS = 1280
FEATURES = ("blocks", "conv_head")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ReferenceEncoder(nn.Module):
    """EfficientNet-B0 of timm: the feature map of one stage, and logits from the same pass.

    The map is taken behind the last MBConv block of the stage whose stride is asked for (stride 32: `blocks.6`, 320 channels).
    For a stride that no stage has, the nearest stage (in octaves) is resized bilinearly, with antialiasing when it shrinks.
    Drop-path and dropout are off. Batch normalisation sees the batch it is given: torch refuses to train on one image of 32 px.

    Args:
        stride: image side divided by the side of the map, the U-Net's `bottleneck_stride`.
        num_classes: K, the number of logits.
        in_channels: 1 (grey, repeated to 3) or 3.
        feature: "blocks", or "conv_head" for the 1280 channels behind the last 1x1 convolution (resized to `stride`).
        pretrained_path: local ImageNet weights of timm's efficientnet_b0, safetensors or a torch file read with weights_only. Its
            classifier is left out unless it has K rows. None: random weights; nothing is ever downloaded.

    Raises:
        ConfigError: an unknown option, or a weights file that does not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stride: int,
        num_classes: int,
        in_channels: int = 1,
        feature: str = "blocks",
        pretrained_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        if feature not in FEATURES:
            raise ConfigError("reference-feature", f"feature must be one of {', '.join(FEATURES)}, got {feature!r}.")
        if in_channels not in (1, 3) or stride < 1 or num_classes < 1:
            raise ConfigError(
                "reference-config",
                "The reference encoder needs 1 or 3 channels, a stride and a class count of at least 1, got "
                f"{in_channels} channels, stride {stride}, {num_classes} classes.",
            )
        self.stride, self.num_classes, self.in_channels, self.feature = stride, num_classes, in_channels, feature
        nearest = 32 if feature == "conv_head" else min(STAGES, key=lambda s: abs(math.log2(s / stride)))
        self.stage, self.out_channels = STAGES[nearest]
        self._resizes = nearest != stride
        self.trunk: Any = timm.create_model(
            "efficientnet_b0", pretrained=False, num_classes=num_classes, drop_rate=0.0, drop_path_rate=0.0
        )
        if feature == "conv_head":
            self.out_channels = HEAD_CHANNELS
        # Depthwise convolutions: half the time on the CPU, and the layout tensor cores want.
        self.trunk = self.trunk.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        if pretrained_path is not None:
            _load_pretrained(self.trunk, Path(pretrained_path), num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, out_channels, H / stride, W / stride) and logits (B, K) of images (B, C, H, W) in [-1, 1].

        Gradients of both reach the trunk.
        """
        stage, rest = self._until_stage(images)
        head = self.trunk.bn2(self.trunk.conv_head(rest(stage)))
        features = head if self.feature == "conv_head" else stage
        logits: Tensor = self.trunk.forward_head(head)
        return self._at_stride(features, images), logits

    def features(self, images: Tensor) -> Tensor:
        """The features of `forward` alone: the trunk stops at the stage that makes them. For sampling, once per reference."""
        stage, _ = self._until_stage(images)
        if self.feature == "conv_head":
            stage = self.trunk.bn2(self.trunk.conv_head(stage))
        return self._at_stride(stage, images)

    def _until_stage(self, images: Tensor) -> tuple[Tensor, nn.Module]:
        h = self.trunk.bn1(self.trunk.conv_stem(self._normalise(images)))
        return self.trunk.blocks[: self.stage + 1](h), self.trunk.blocks[self.stage + 1 :]

    def _normalise(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                "reference-channels",
                f"The reference encoder expects images (B, {self.in_channels}, H, W), got {tuple(images.shape)}.",
            )
        unit = (images + 1) / 2
        return ((unit.expand(-1, 3, -1, -1) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _at_stride(self, features: Tensor, images: Tensor) -> Tensor:
        features = features.contiguous()  # the U-Net's own layout
        if not self._resizes:
            return features
        # Strided convolutions round up, in the trunk as in the U-Nets.
        size = [math.ceil(side / self.stride) for side in images.shape[-2:]]
        shrinks = size[0] < features.shape[-2] or size[1] < features.shape[-1]
        return F.interpolate(features, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def _load_pretrained(trunk: nn.Module, path: Path, num_classes: int) -> None:
    """Copy a timm efficientnet_b0 state into `trunk`; a classifier for another number of classes stays as initialised."""
    state = dict(read_tensors(path, allow_torch=True))
    own = trunk.state_dict()
    if "classifier.weight" in state and state["classifier.weight"].shape[0] != num_classes:
        for name in ("classifier.weight", "classifier.bias"):
            state[name] = own[name]
    for name in own.keys() - state.keys():
        if name.endswith("num_batches_tracked") or name.startswith("classifier."):
            state[name] = own[name]
    wrong = sorted(n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape)
    if wrong:
        raise ConfigError(
            "weights-mismatch",
            f"{path.name} does not hold timm's efficientnet_b0: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {', '.join(wrong[:3])}.",
        )
    trunk.load_state_dict(state)
