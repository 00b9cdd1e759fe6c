"""Generator and critic of the DAGAN: an image and a latent vector make another image of the class; a pair of images makes a number.

Antoniou, Storkey, Edwards 2017, "Data Augmentation Generative Adversarial Networks", arXiv:1711.04340. A class label is no input of either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medaug.errors import ConfigError

SLOPE = 0.2  # of the leaky ReLU
Norm = Callable[[int], nn.Module]


def layer_norm(channels: int) -> nn.Module:
    """Over channels and positions of one image: a gradient penalty is of each pair alone, which batch norm would mix."""
    return nn.GroupNorm(1, channels)


class ResidualBlock(nn.Module):
    """Norm, leaky ReLU, 3x3 convolution, twice, with drop-out between, beside a shortcut.

    Args:
        before, after: channels.
        norm: builds the normalisation of so many channels.
        stride: 2 halves the side; the shortcut is then a mean over 2 x 2.
        dropout: share of values dropped in training.
    """

    def __init__(self, before: int, after: int, norm: Norm, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.stride, self.dropout = stride, dropout
        self.norm1, self.norm2 = norm(before), norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H / stride, W / stride)."""
        h = self.conv1(F.leaky_relu(self.norm1(x), SLOPE))
        h = F.dropout(F.leaky_relu(self.norm2(h), SLOPE), self.dropout, self.training)
        side = x if self.stride == 1 else F.avg_pool2d(x, self.stride)
        made: Tensor = self.conv2(h) + self.shortcut(side)
        return made


class _Trunk(nn.Module):
    """A convolution of the image, then residual blocks: one output per level, each half the side of the one before."""

    def __init__(
        self, in_channels: int, channels: Sequence[int], patch: int, num_res_blocks: int, norm: Norm, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patch = patch
        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(0, level - 1)]
            blocks = [
                ResidualBlock(width if i else before, width, norm, 1 if i or not level else 2, dropout)
                for i in range(num_res_blocks)
            ]
            self.levels.append(nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        h, outputs = self.stem(F.pixel_unshuffle(x, self.patch)), []
        for level in self.levels:
            h = level(h)
            outputs.append(h)
        return outputs


class DaganGenerator(nn.Module):
    """G(x_i, z): a residual U-Net (UResNet) that is given a latent vector at its bottleneck and at the decoder scales above it.

    The vector is projected to `latent_channels` maps of each such scale and concatenated. Batch norm, as published: in evaluation mode an
    image does not depend on its neighbours in the batch.

    Args:
        in_channels: C of the images.
        image_size: side in pixels, a multiple of ``patch * 2 ** (len(channels) - 1)``.
        channels: width of each level, L levels; the bottleneck's side is ``image_size / patch / 2 ** (L - 1)``.
        patch: side of the pixel blocks that become channels in front, enlarged again behind; 1 is none.
        num_res_blocks: residual blocks per level of the encoder, and of the decoder.
        latent_dim: length of z.
        latent_channels: maps that z becomes at each scale.
        latent_scales: scales that z reaches, from the bottleneck upwards; at least 1, at most L.
        dropout: share of values dropped in the blocks in training, in [0, 1).

    Raises:
        ConfigError: sizes that are not positive or do not fit the image.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        channels: Sequence[int] = (64, 64, 128, 128, 256, 256),
        patch: int = 1,
        num_res_blocks: int = 2,
        latent_dim: int = 100,
        latent_channels: int = 8,
        latent_scales: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sides = _check("generator", image_size, channels, patch, num_res_blocks, dropout)
        if min(latent_dim, latent_channels, latent_scales) < 1 or latent_scales > len(channels):
            raise ConfigError(
                "network-config",
                f"The generator needs a positive latent_dim and latent_channels, and latent_scales from 1 to {len(channels)}, "
                f"got {latent_dim}, {latent_channels} and {latent_scales}.",
            )
        self.in_channels, self.image_size, self.latent_dim, self.patch = in_channels, image_size, latent_dim, patch
        self.encoder = _Trunk(in_channels, channels, patch, num_res_blocks, nn.BatchNorm2d, dropout)
        self.projections, self.decoder = nn.ModuleDict(), nn.ModuleList()
        before = 0
        for level in reversed(range(len(channels))):
            width = channels[level]
            incoming = before + width  # from below and from the skip connection; the bottleneck has only its own
            if level >= len(channels) - latent_scales:
                maps = nn.Unflatten(1, (latent_channels, sides[level], sides[level]))
                self.projections[str(level)] = nn.Sequential(nn.Linear(latent_dim, latent_channels * sides[level] ** 2), maps)
                incoming += latent_channels
            blocks = [ResidualBlock(width if i else incoming, width, nn.BatchNorm2d, 1, dropout) for i in range(num_res_blocks)]
            self.decoder.append(nn.Sequential(*blocks))
            before = width
        # Pixels are enlarged and convolved: blocks shuffled back into pixels leave the mesh of their blocks on an image.
        self.norm_out, self.fine = nn.BatchNorm2d(before), nn.Conv2d(before, max(1, before // 2), 3, padding=1)
        self.out = nn.Conv2d(max(1, before // 2), in_channels, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1].

        Args:
            x: images to vary, (B, C, H, W) in [-1, 1].
            z: (B, latent_dim), standard normal.

        Raises:
            ConfigError: images or vectors of another shape.
        """
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected or tuple(z.shape) != (len(x), self.latent_dim):
            raise ConfigError(
                "image-size",
                f"The generator takes images of shape {expected} with one latent vector of length {self.latent_dim} each, "
                f"got {tuple(x.shape)} and {tuple(z.shape)}.",
            )
        skips = self.encoder(x)
        h: Tensor | None = None
        for level, blocks in zip(reversed(range(len(skips))), self.decoder, strict=True):
            parts = [skips[level]] if h is None else [F.interpolate(h, scale_factor=2.0), skips[level]]
            if str(level) in self.projections:
                parts.append(self.projections[str(level)](z))
            h = blocks(torch.cat(parts, dim=1))
        assert h is not None
        h = F.interpolate(F.leaky_relu(self.norm_out(h), SLOPE), scale_factor=float(self.patch))
        made: Tensor = self.out(F.leaky_relu(self.fine(h), SLOPE)).tanh()
        return made


class DaganCritic(nn.Module):
    """D(x_i, x_j): how much two images look like two real ones of one class; a Wasserstein critic, any real number.

    Args:
        in_channels: C of one image; the pair is concatenated along the channels.
        image_size: side in pixels, a multiple of ``patch * 2 ** (len(channels) - 1)``.
        channels: width of each level.
        patch: side of the pixel blocks that become channels in front; 1 is none.
        num_res_blocks: residual blocks per level.

    Raises:
        ConfigError: sizes that are not positive or do not fit the image.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        channels: Sequence[int] = (64, 64, 128, 128, 256, 256),
        patch: int = 1,
        num_res_blocks: int = 2,
    ) -> None:
        super().__init__()
        sides = _check("critic", image_size, channels, patch, num_res_blocks)
        self.trunk = _Trunk(2 * in_channels, channels, patch, num_res_blocks, layer_norm)
        self.norm_out = layer_norm(channels[-1])
        self.out = nn.Linear(channels[-1] * sides[-1] ** 2, 1)

    def forward(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        """Scores (B,) of pairs, (B, C, H, W) in [-1, 1] each."""
        h = self.norm_out(self.trunk(torch.cat([x_i, x_j], dim=1))[-1])
        scores: Tensor = self.out(F.leaky_relu(h, SLOPE).flatten(1))
        return scores.squeeze(1)


def _check(
    what: str, image_size: int, channels: Sequence[int], patch: int, num_res_blocks: int, dropout: float = 0.0
) -> list[int]:
    """The side of each level.

    Raises:
        ConfigError: sizes that cannot be built.
    """
    if not channels or min(*channels, patch, num_res_blocks) < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            "network-config",
            f"The {what} needs positive channels, patch and num_res_blocks, and a dropout in [0, 1), "
            f"got channels {list(channels)}, patch {patch}, num_res_blocks {num_res_blocks}, dropout {dropout}.",
        )
    stride = patch * 2 ** (len(channels) - 1)
    if image_size < stride or image_size % stride:
        raise ConfigError(
            "image-size",
            f"A {what} of {len(channels)} levels on patches of {patch} needs an image size that is a multiple of {stride}, "
            f"got {image_size}; change patch or the number of levels.",
        )
    return [image_size // patch // 2**level for level in range(len(channels))]


def build_generator(settings: Mapping[str, Any], in_channels: int, image_size: int) -> DaganGenerator:
    """A `DaganGenerator` from plain settings, as a bundle or a run folder holds them.

    Raises:
        ConfigError: an unknown setting, or one out of range.
    """
    try:
        return DaganGenerator(in_channels, image_size, **settings)
    except TypeError as error:
        raise ConfigError("setting-unknown", f"A setting of the generator is not known: {error}.") from error


def build_critic(settings: Mapping[str, Any], in_channels: int, image_size: int) -> DaganCritic:
    """A `DaganCritic` from plain settings; errors as `build_generator`."""
    try:
        return DaganCritic(in_channels, image_size, **settings)
    except TypeError as error:
        raise ConfigError("setting-unknown", f"A setting of the critic is not known: {error}.") from error
