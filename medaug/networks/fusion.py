"""Fusion of a reference image's features into the bottleneck of a U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medaug.errors import ConfigError


class FeatureFusion(nn.Module):
    """Learnable 1x1 convolution over the concatenated bottleneck and reference features, without norm or activation.

    It starts as the identity on the bottleneck plus a whisper of the reference, so that a network begins as (or goes on from) the
    plain U-Net. `null_features`, one learned value per channel, stands for "no reference" when the condition is dropped.

    Args:
        bottleneck_channels: C_b, channels of the U-Net's bottleneck.
        reference_channels: C_r, channels of the reference features.
        reference_std: standard deviation of the initial weights on the reference; 0 makes it the exact identity.
    """

    def __init__(self, bottleneck_channels: int, reference_channels: int, reference_std: float = 1e-3) -> None:
        super().__init__()
        self.bottleneck_channels = bottleneck_channels
        self.reference_channels = reference_channels
        self.conv = nn.Conv2d(bottleneck_channels + reference_channels, bottleneck_channels, 1)
        self.null_features = nn.Parameter(torch.zeros(1, reference_channels, 1, 1))
        with torch.no_grad():
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
            nn.init.normal_(self.conv.weight, std=reference_std)
            self.conv.weight[:, :bottleneck_channels, 0, 0] = torch.eye(bottleneck_channels)

    def forward(self, h: Tensor, features: Tensor | None = None, keep_reference: Tensor | None = None) -> Tensor:
        """Fused bottleneck (B, C_b, h, w).

        Args:
            h: bottleneck activation (B, C_b, h, w).
            features: reference features (B, C_r, h, w), or of batch 1 for one reference shared by all; None for no reference.
            keep_reference: (B,) booleans; False puts the null features in place of that image's reference.

        Raises:
            ConfigError: the reference has another number of channels, another size or another batch than the bottleneck.
        """
        shape = (h.shape[0], self.reference_channels, *h.shape[-2:])
        if features is None:
            return self._fuse(h, self.null_features.to(h.dtype).expand(shape))
        if features.shape[1:] != shape[1:] or features.shape[0] not in (1, h.shape[0]):
            raise ConfigError(
                "reference-shape",
                f"Reference features must have shape {shape} like the bottleneck, got {tuple(features.shape)}; "
                "build the reference encoder with the U-Net's bottleneck_stride and give references of the same image size.",
            )
        if keep_reference is not None:
            features = torch.where(
                keep_reference.to(h.device)[:, None, None, None], features, self.null_features.to(features.dtype)
            )
        return self._fuse(h, features.expand(shape))

    def _fuse(self, h: Tensor, features: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([h, features], dim=1))
        return out
