"""A small U-Net for two CPU cores: it works on patches, so no wide map has the size of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medaug.errors import ConfigError
from medaug.networks.class_labels import check_context, embedded_labels

# `time` runs over 0..999 (discrete steps) or about -1500..1100 (1000 c_noise = 250 ln sigma, Karras et al. 2022, table 1).
# The longest period holds that range without folding; the shortest is 0.16 in ln sigma, fine enough and still smooth.
SHORTEST_PERIOD = 40.0
LONGEST_PERIOD = 8000.0


def noise_level_waves(time: Tensor, dim: int) -> Tensor:
    """Sine and cosine of `time` (B,) at dim / 2 geometrically spaced periods: (B, dim), float32."""
    periods = torch.logspace(math.log10(SHORTEST_PERIOD), math.log10(LONGEST_PERIOD), dim // 2, device=time.device)
    angles = time.float()[:, None] * (2 * math.pi / periods)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels, affine=affine)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class _Film(nn.Module):
    """Scale and shift each channel by the noise level (Perez et al. 2018): x (1 + gain) + bias, the identity at the start."""

    def __init__(self, embedding_dim: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        gain, bias = self.linear(temb)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(bias, x, 1 + gain)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip; the second starts at zero, so the block starts as its skip."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels, affine=False)
        self.film = _Film(embedding_dim, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.film(self.norm2(h), temb))
        out: Tensor = self.skip(x) + self.conv2(self.dropout(h))
        return out


class _Attention(nn.Module):
    """Self-attention over the positions of a map, with heads of 32 channels where the width allows it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // 32) if channels % 32 == 0 else 1
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, height, width)
        out: Tensor = x + self.project(mixed)
        return out


class _CrossAttention(nn.Module):
    """Attention of the positions of a map to the tokens of a context (B, L, D), heads as in `_Attention`."""

    def __init__(self, channels: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // 32) if channels % 32 == 0 else 1
        self.norm = _group_norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(context_dim, 2 * channels)
        self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        head = (self.num_heads, channels // self.num_heads)
        q = self.query(self.norm(x)).reshape(batch, *head, height * width).transpose(2, 3)
        k, v = self.key_value(context).reshape(batch, -1, 2, *head).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, height, width)
        out: Tensor = x + self.project(mixed)
        return out


class LeanUNet(nn.Module):
    """U-Net on patches: space-to-depth in front, depth-to-space behind, the noise level as scale and shift everywhere.

    The input, as patches, also enters the last convolution, scaled and shifted by the noise level: without that path fine noise
    has to pass the whole network. Residual branches, attention and the last convolution start at zero: a fresh network returns 0.
    The lowest level has no skip connection: everything there passes the middle block.

    A context reaches it twice: its mean over the tokens joins the embedding of the noise level, so that it scales and shifts every level,
    and the middle block attends to its tokens.

    Args:
        in_channels: channels of the noisy image.
        out_channels: channels of the prediction.
        channels: width of each level; L levels halve the patch grid L - 1 times.
        patch: side of a patch in pixels; 2 for images of 32 px, 4 for 64 px.
        num_classes: K, giving K + 1 class embeddings with NULL = K; None for a network without classes.
        num_res_blocks: residual blocks per level, down and up.
        dropout: drop probability inside the residual blocks.
        context_dim: D of a context (B, L, D); None for a network without.

    Raises:
        ConfigError: an empty or non-positive setting.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (64, 96, 128),
        patch: int = 2,
        num_classes: int | None = None,
        num_res_blocks: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not channels or min(*channels, patch, num_res_blocks, in_channels, out_channels) < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "network-config",
                "LeanUNet needs positive channels, patch and num_res_blocks and a dropout in [0, 1), got "
                f"channels {tuple(channels)}, patch {patch}, num_res_blocks {num_res_blocks}, dropout {dropout}.",
            )
        self.in_channels, self.out_channels, self.patch, self.num_classes = in_channels, out_channels, patch, num_classes
        self.context_dim = context_dim
        self.bottleneck_channels = int(channels[-1])
        self.bottleneck_stride = patch * 2 ** (len(channels) - 1)
        self.num_waves, dim = channels[0] + channels[0] % 2, 4 * channels[0]
        self.time_embed = nn.Sequential(nn.Linear(self.num_waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)
            # MLP outputs are small at the start; unit-variance rows would drown the noise level.
            nn.init.normal_(self.class_embedding.weight, std=0.1)
        if context_dim is not None:
            self.context_norm = nn.LayerNorm(context_dim)
            self.context_embed = nn.Linear(context_dim, dim)
            nn.init.normal_(self.context_embed.weight, std=0.1 / math.sqrt(context_dim))  # as small as a class's
            self.context_attention = _CrossAttention(channels[-1], context_dim)

        def blocks(first: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(_ResidualBlock(first if i == 0 else width, width, dim, dropout) for i in range(num_res_blocks))

        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(blocks(width, width) for width in channels)
        self.shrink = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels[:-1], channels[1:], strict=True)
        )
        self.lowest_attention = _Attention(channels[-1])
        self.middle_before = _ResidualBlock(channels[-1], channels[-1], dim, dropout)
        self.middle_attention = _Attention(channels[-1])
        self.middle_after = _ResidualBlock(channels[-1], channels[-1], dim, dropout)
        # From the lowest level up. A 1x1 convolution and nearest up-sampling commute, so the cheap order is taken.
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(channels[-2::-1], channels[:0:-1], strict=True))
        self.up_blocks = nn.ModuleList(blocks(2 * width, width) for width in channels[-2::-1])
        self.norm_out = _group_norm(channels[0], affine=False)
        self.film_out = _Film(dim, channels[0])
        self.film_input = _Film(dim, in_channels * patch**2)
        self.conv_out = _zeroed(nn.Conv2d(channels[0] + in_channels * patch**2, out_channels * patch**2, 3, padding=1))

    def embed(self, time: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Embedding (B, 4 * channels[0]) of noise level, class and mean context.

        Args:
            time: (B,) noise level as the parameterisation tells it.
            class_labels: (B,) integers in [0, K]; None means NULL = K everywhere.
            context: (B, L, D) for a network with one.

        Raises:
            ConfigError: labels or a context that the network was not built for, or none where it needs one.
        """
        labels = embedded_labels(class_labels, self.num_classes, time.shape[0], time.device)
        check_context(context, self.context_dim, time.shape[0])
        temb = self.time_embed(noise_level_waves(time, self.num_waves).to(self.stem.weight.dtype))
        if context is not None:
            temb = temb + self.context_embed(self.context_norm(context.mean(dim=1)))
        return F.silu(temb if labels is None else temb + self.class_embedding(labels))

    def encode(
        self,
        x: Tensor,
        temb: Tensor,
        after_block: Callable[[Tensor, int], Tensor] | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Bottleneck activation (B, bottleneck_channels, H / stride, W / stride) and skips: input patches, then one per level.

        Args:
            x: noisy images (B, in_channels, H, W).
            temb: of `embed`.
            after_block: (output of a level, its index from 0) -> what takes its place, also in the skip.
            context: not used here: `embed` and `middle` take it in.

        Raises:
            ConfigError: H or W is no multiple of `bottleneck_stride`.
        """
        if x.shape[-2] % self.bottleneck_stride or x.shape[-1] % self.bottleneck_stride:
            raise ConfigError(
                "image-size",
                f"LeanUNet needs image sides that are multiples of {self.bottleneck_stride}, got {tuple(x.shape[-2:])}; "
                "change image_size, patch or the number of levels.",
            )
        patches = F.pixel_unshuffle(x, self.patch)
        h = self.stem(patches)
        skips = [patches]
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                skips.append(h)
                h = self.shrink[level - 1](h)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, temb)
            h = self.lowest_attention(h) if level == len(self.down_blocks) - 1 else h
            if after_block is not None:
                h = after_block(h, level)
        return h, skips

    def middle(self, h: Tensor, temb: Tensor, context: Tensor | None = None) -> Tensor:
        """Residual block, attention, attention to a context, residual block at the lowest level, shape unchanged."""
        h = self.middle_attention(self.middle_before(h, temb))
        if context is not None:
            h = self.context_attention(h, context)
        out: Tensor = self.middle_after(h, temb)
        return out

    def decode(
        self,
        h: Tensor,
        skips: list[Tensor],
        temb: Tensor,
        after_block: Callable[[Tensor, int], Tensor] | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Prediction (B, out_channels, H, W) from the middle block's output; `skips` is left as it was.

        Args:
            h: output of `middle`.
            skips: of `encode`.
            temb: of `embed`.
            after_block: (output of a level, its index from the lowest, 0) -> what takes its place.
            context: not used here.
        """
        for level, (grow, blocks, skip) in enumerate(zip(self.grow, self.up_blocks, skips[:0:-1], strict=True)):
            h = torch.cat([F.interpolate(grow(h), scale_factor=2.0, mode="nearest"), skip], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, temb)
            if after_block is not None:
                h = after_block(h, level)
        h = F.silu(self.film_out(self.norm_out(h), temb))
        return F.pixel_shuffle(self.conv_out(torch.cat([h, self.film_input(skips[0], temb)], dim=1)), self.patch)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Prediction (B, out_channels, H, W) for noisy images `x` (B, in_channels, H, W) at noise level `time` (B,)."""
        temb = self.embed(time, class_labels, context)
        h, skips = self.encode(x, temb)
        return self.decode(self.middle(h, temb, context), skips, temb)
