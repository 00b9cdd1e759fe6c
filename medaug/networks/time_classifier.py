"""A classifier of noisy images that is told how noisy they are: what guides a sampler towards a class or away from certainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from medaug.errors import ConfigError

FINE_PATCHES = 32  # px; larger images are cut into patches of 4, or the first level would cost most of the time


class TimeClassifier(nn.Module):
    """Half of MONAI's diffusion U-Net on patches, the mean over positions, drop-out, a linear layer.

    Group norm only: an image's logits do not depend on its neighbours in the batch. Drop-out sits in front of the last layer alone, so that
    many votes (see `vote_logits`) cost one pass of the trunk.

    Args:
        in_channels: channels of the noisy image.
        num_classes: K, at least 2.
        image_size: side in pixels; images of another size are refused, since a mean over positions would not notice.
        channels: width of each level; all multiples of `norm_num_groups` and larger. L levels halve the patch grid L - 1 times.
        patch: side of a patch in pixels; None takes 2 up to 32 px and 4 above.
        num_res_blocks: residual blocks per level.
        norm_num_groups: groups of the group normalisation.
        dropout: share of the pooled features that are dropped, in [0, 1).

    Raises:
        ConfigError: fewer than 2 classes, widths that do not divide, or an image size that is no multiple of the stride.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: int,
        channels: Sequence[int] = (32, 64, 64),
        patch: int | None = None,
        num_res_blocks: int = 1,
        norm_num_groups: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if patch is None:
            patch = 2 if image_size <= FINE_PATCHES else 4
        if num_classes < 2:
            raise ConfigError("guidance-classes", f"a classifier of noisy images needs at least 2 classes, got {num_classes}.")
        sizes = (*channels, patch, num_res_blocks, norm_num_groups, in_channels)
        # The noise level is added channel by channel, and a norm over a single channel would take it out again.
        blind = any(width % norm_num_groups or width == norm_num_groups for width in channels) if norm_num_groups > 0 else True
        if not channels or min(sizes) < 1 or not 0 <= dropout < 1 or blind:
            raise ConfigError(
                "network-config",
                "TimeClassifier needs positive sizes, channels that are multiples of norm_num_groups and larger, and a dropout in [0, 1), got "
                f"channels {tuple(channels)}, norm_num_groups {norm_num_groups}, patch {patch}, num_res_blocks {num_res_blocks}, "
                f"dropout {dropout}.",
            )
        stride = patch * 2 ** (len(channels) - 1)
        if image_size < stride or image_size % stride:
            raise ConfigError(
                "image-size",
                f"TimeClassifier with patch {patch} and {len(channels)} levels needs an image size that is a multiple of {stride}, "
                f"got {image_size}; change patch or the number of levels.",
            )
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self.patch, self.dropout, self.feature_dimension = patch, dropout, int(channels[-1])
        self.num_waves, dim = int(channels[0]), 4 * int(channels[0])
        self.time_embed = nn.Sequential(nn.Linear(self.num_waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        before = int(channels[0])
        for level, width in enumerate(channels):
            for index in range(num_res_blocks):
                down = level > 0 and index == 0  # halves the grid
                self.blocks.append(
                    DiffusionUNetResnetBlock(2, before, dim, int(width), down=down, norm_num_groups=norm_num_groups)
                )
                before = int(width)
        self.norm_out = nn.GroupNorm(norm_num_groups, before)
        self.classifier = nn.Linear(before, num_classes)

    def features(self, x: Tensor, time: Tensor) -> Tensor:
        """Pooled features (B, D), before drop-out.

        Args:
            x: noisy images (B, in_channels, image_size, image_size), about standard deviation 1 at the top.
            time: (B,) timesteps of the training schedule in [0, T-1], also where the sampler visits few of them.

        Raises:
            ConfigError: another image size or number of channels (code `image-size`), or not one timestep for each image.
        """
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ConfigError(
                "image-size",
                f"the classifier was built for images of shape {expected}, got {tuple(x.shape[1:])}; train another one.",
            )
        if time.shape != x.shape[:1]:
            raise ConfigError(
                "classifier-time", f"time must have shape ({len(x)},), one timestep per image, got {tuple(time.shape)}."
            )
        temb = self.time_embed(get_timestep_embedding(time, self.num_waves).to(self.stem.weight.dtype))
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        for block in self.blocks:
            h = block(h, temb)
        return F.silu(self.norm_out(h)).mean(dim=(-2, -1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Logits (B, K), with drop-out in training mode only; arguments and errors as for `features`."""
        logits: Tensor = self.classifier(F.dropout(self.features(x, time), self.dropout, self.training))
        return logits

    def vote_logits(self, x: Tensor, time: Tensor, kept: Tensor) -> Tensor:
        """Logits (M, B, K) of M sub-networks, whatever the mode; arguments and errors as for `features`.

        Args:
            x, time: as for `features`.
            kept: (M, B, D) with 1 for a feature that is kept and 0 for one that is dropped, drawn with P(0) = `dropout`.
        """
        logits: Tensor = self.classifier(self.features(x, time) * kept / (1 - self.dropout))
        return logits


def build_time_classifier(settings: Mapping[str, Any], in_channels: int, num_classes: int, image_size: int) -> TimeClassifier:
    """A `TimeClassifier` from plain settings, as a bundle or a run folder holds them.

    Raises:
        ConfigError: an unknown setting, or one out of range.
    """
    try:
        return TimeClassifier(in_channels, num_classes, image_size, **settings)
    except TypeError as error:
        raise ConfigError("setting-unknown", f"A setting of the classifier is not known: {error}.") from error
