"""MONAI's diffusion U-Net, opened at its bottleneck: the same weights and numbers, in four calls instead of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, get_timestep_embedding
from torch import Tensor

from medaug.errors import ConfigError
from medaug.networks.class_labels import check_context, embedded_labels


class MonaiUNet(DiffusionModelUNet):
    """`monai.networks.nets.DiffusionModelUNet` whose encoder, middle block and decoder can be called one by one.

    ``decode(middle(h, temb), skips, temb)`` with ``h, skips = encode(x, temb)`` equals MONAI's own forward bit for bit, and the
    state dict is MONAI's. A fresh network returns exactly 0: MONAI sets its last convolution to zero.

    Args:
        in_channels: channels of the noisy image.
        out_channels: channels of the prediction.
        channels: width of each level; all divisible by `norm_num_groups`. L levels halve the image L - 1 times.
        num_classes: K, giving K + 1 class embeddings with NULL = K; None for a network without classes.
        num_res_blocks: residual blocks per level.
        attention_levels: which levels have self-attention; None means only the lowest.
        norm_num_groups: groups of the group normalisation.
        num_head_channels: channels per attention head, one number or one per level. The last one also serves the middle block.
        resblock_updown: residual blocks for down- and up-sampling.
        include_fc: final linear layer in each attention; False for weights of the old `generative` package.
        use_flash_attention: torch's fused attention.
        context_dim: D of a context (B, L, D) that the levels with attention and the middle block attend to; None for a network without.
        spatial_dims: 2 for images (B, C, H, W), 3 for volumes (B, C, H, W, D).

    Raises:
        ConfigError: widths, levels and groups that do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (32, 64, 64),
        num_classes: int | None = None,
        num_res_blocks: int | Sequence[int] = 1,
        attention_levels: Sequence[bool] | None = None,
        norm_num_groups: int = 32,
        num_head_channels: int | Sequence[int] = 32,
        resblock_updown: bool = False,
        include_fc: bool = True,
        use_flash_attention: bool = False,
        spatial_dims: int = 2,
        context_dim: int | None = None,
    ) -> None:
        levels = len(channels)
        if attention_levels is None:
            attention_levels = [False] * (levels - 1) + [True]
        try:
            super().__init__(
                spatial_dims=spatial_dims,
                in_channels=in_channels,
                out_channels=out_channels,
                channels=tuple(channels),
                num_res_blocks=num_res_blocks if isinstance(num_res_blocks, int) else tuple(num_res_blocks),
                attention_levels=tuple(attention_levels),
                norm_num_groups=norm_num_groups,
                num_head_channels=num_head_channels if isinstance(num_head_channels, int) else tuple(num_head_channels),
                num_class_embeds=None if num_classes is None else num_classes + 1,
                resblock_updown=resblock_updown,
                include_fc=include_fc,
                use_flash_attention=use_flash_attention,
                with_conditioning=context_dim is not None,
                cross_attention_dim=context_dim,
            )
        # MONAI answers num_head_channels 0 at the lowest level with a ZeroDivisionError.
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                "network-config",
                f"MonaiUNet cannot be built with channels {tuple(channels)}, norm_num_groups {norm_num_groups} and "
                f"num_head_channels {num_head_channels}: {error}; each width must be a multiple of both.",
            ) from error
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.bottleneck_channels = int(channels[-1])
        self.bottleneck_stride = 2 ** (levels - 1)

    def embed(self, time: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Embedding of noise level and class.

        Args:
            time: (B,) the noise level as the parameterisation tells it; whole or fractional.
            class_labels: (B,) integers in [0, K], K = NULL; None means NULL everywhere.
            context: (B, L, D); only checked here, MONAI's network takes it in by attention alone.

        Returns:
            (B, 4 * channels[0]).

        Raises:
            ConfigError: labels or a context that the network was not built for, or none where it needs one.
        """
        check_context(context, self.context_dim, time.shape[0])
        labels = embedded_labels(class_labels, self.num_classes, time.shape[0], time.device)
        temb: Tensor = self.time_embed(
            get_timestep_embedding(time, self.block_out_channels[0]).to(next(self.time_embed.parameters()).dtype)
        )
        return temb if labels is None else temb + self.class_embedding(labels)

    def encode(
        self,
        x: Tensor,
        temb: Tensor,
        after_block: Callable[[Tensor, int], Tensor] | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Bottleneck activation (B, bottleneck_channels, H / stride, W / stride) and the skip connections, first to last.

        Args:
            x: noisy images (B, in_channels, H, W).
            temb: of `embed`.
            after_block: (output of a down block, its index from 0) -> what takes its place, also in the skip.
            context: (B, L, D) for a network with one.
        """
        h = self.conv_in(x)
        skips = [h]
        for level, block in enumerate(self.down_blocks):
            h, block_skips = block(hidden_states=h, temb=temb, context=context)
            if after_block is not None:
                h = after_block(h, level)
                block_skips = [*block_skips[:-1], h]  # a down block's last skip is its output
            skips.extend(block_skips)
        return h, skips

    def middle(self, h: Tensor, temb: Tensor, context: Tensor | None = None) -> Tensor:
        """The middle block, shape unchanged."""
        out: Tensor = self.middle_block(hidden_states=h, temb=temb, context=context)
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
            after_block: (output of an up block, its index from the lowest, 0) -> what takes its place.
            context: as for `encode`.
        """
        end = len(skips)
        for level, block in enumerate(self.up_blocks):
            start = end - len(block.resnets)  # type: ignore[arg-type]
            h = block(hidden_states=h, res_hidden_states_list=skips[start:end], temb=temb, context=context)
            if after_block is not None:
                h = after_block(h, level)
            end = start
        out: Tensor = self.out(h)
        return out

    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Prediction (B, out_channels, H, W) for noisy images `x` (B, in_channels, H, W) at noise level `time` (B,)."""
        temb = self.embed(time, class_labels, context)
        h, skips = self.encode(x, temb, context=context)
        return self.decode(self.middle(h, temb, context), skips, temb, context=context)
