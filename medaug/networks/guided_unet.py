"""A U-Net guided by the features of a reference image: encode, fuse, middle, perturb, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medaug.errors import ConfigError
from medaug.networks.fusion import FeatureFusion
from medaug.networks.lean_unet import LeanUNet
from medaug.networks.reference_encoder import ReferenceEncoder
from medaug.networks.unet import MonaiUNet

UNet = MonaiUNet | LeanUNet
AfterBlock = Callable[[Tensor, int], Tensor]  # (output of a block, its index) -> what takes its place


class Encoded(NamedTuple):
    """A noisy batch behind the middle block: all that the decoder needs, as often as it is asked."""

    h: Tensor  # middle block's output, (B, C_b, h, w)
    skips: list[Tensor]
    temb: Tensor  # noise level and class, (B, D)
    context: Tensor | None = None  # what it attends to, (B, L, D)


class GuidedUNet(nn.Module):
    """U-Net whose bottleneck takes up reference features and can be perturbed.

    The reference encoder does not depend on the noise level: call `reference` once per reference and give its features to every
    step. Without an encoder, or with `with_fusion=False`, it is the plain U-Net at the plain U-Net's cost.

    Args:
        unet: the denoising network.
        reference_encoder: makes the features; its stride must be the U-Net's `bottleneck_stride`.
        with_fusion: False leaves the fusion out, also if there is an encoder.
        condition_encoder: a `medaug.networks.conditioning.ConditionEncoder` that makes the U-Net's context of prompts or classes.

    Raises:
        ConfigError: the strides, or the widths of the context, differ.
    """

    def __init__(
        self,
        unet: UNet,
        reference_encoder: ReferenceEncoder | None = None,
        with_fusion: bool = True,
        condition_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if reference_encoder is not None and reference_encoder.stride != unet.bottleneck_stride:
            raise ConfigError(
                "reference-stride",
                f"The reference encoder has stride {reference_encoder.stride}, the U-Net's bottleneck {unet.bottleneck_stride}; "
                "build the encoder with the U-Net's bottleneck_stride.",
            )
        dimension = None if condition_encoder is None else condition_encoder.dimension
        if dimension != unet.context_dim:
            raise ConfigError(
                "context-shape", f"The condition encoder has width {dimension}, the U-Net's context {unet.context_dim}."
            )
        self.unet = unet
        self.reference_encoder = reference_encoder
        self.with_fusion = with_fusion and reference_encoder is not None
        self.fusion = (
            FeatureFusion(unet.bottleneck_channels, reference_encoder.out_channels)
            if self.with_fusion and reference_encoder
            else None
        )
        self.condition_encoder = condition_encoder

    @property
    def in_channels(self) -> int:
        """Channels of the noisy image."""
        return self.unet.in_channels

    @property
    def num_classes(self) -> int | None:
        """K of the class embedding (NULL = K), or None."""
        return self.unet.num_classes

    def reference(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C_r, h, w) and logits (B, K) of reference images (B, C, H, W) in [-1, 1], in one pass, with gradients."""
        features, logits = self._encoder()(images)
        return features, logits

    def reference_features(self, images: Tensor) -> Tensor:
        """The features of `reference` alone, stopping the encoder where they are made: for sampling."""
        return self._encoder().features(images)

    @property
    def takes_text(self) -> bool:
        """Whether `context` reads prompts; else it reads class indices.

        Raises:
            ConfigError: a network without condition encoder.
        """
        return bool(self._condition_encoder().takes_text)

    def context(self, conditions: Sequence[str] | Tensor, keep: Tensor | None = None) -> Tensor:
        """Context (B, L, D) of prompts or class indices (B,), on the network's device: make it once per image, not once per step.

        Args:
            conditions: see `takes_text`.
            keep: (B,) booleans; False gives that image the null context (condition drop-out).

        Raises:
            ConfigError: a network without condition encoder, or conditions of the other kind.
        """
        context: Tensor = self._condition_encoder().encode(conditions).to(self._weight)
        return context if keep is None else torch.where(keep[:, None, None], context, self.null_context(len(context)))

    def null_context(self, batch: int) -> Tensor:
        """The context (batch, L, D) of no condition.

        Raises:
            ConfigError: a network without condition encoder.
        """
        null: Tensor = self._condition_encoder().null_context(batch).to(self._weight)
        return null

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        class_labels: Tensor | None = None,
        features: Tensor | None = None,
        keep_reference: Tensor | None = None,
        perturb: Callable[[Tensor], Tensor] | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Prediction (B, out_channels, H, W).

        Args:
            x: noisy images (B, in_channels, H, W).
            time: (B,) noise level as the parameterisation tells it.
            class_labels: (B,) integers in [0, K]; None means NULL = K.
            features: of `reference`, batch B or 1; None means the learned null features.
            keep_reference: (B,) booleans; False replaces that image's features by the null features (condition drop-out).
            perturb: applied to the middle block's output (B, C_b, h, w); skips stay as they are.
            context: (B, L, D) of `context`; None means the null context, for a network with one.

        Raises:
            ConfigError: features for a network without fusion, or of another shape than the bottleneck; a context for a network without.
        """
        encoded = self.encode(x, time, class_labels, features, keep_reference, context=context)
        return self.decode(encoded, None if perturb is None else perturb(encoded.h))

    def encode(
        self,
        x: Tensor,
        time: Tensor,
        class_labels: Tensor | None = None,
        features: Tensor | None = None,
        keep_reference: Tensor | None = None,
        after_block: AfterBlock | None = None,
        context: Tensor | None = None,
    ) -> Encoded:
        """Encoder, fusion and middle block; arguments and errors as for `forward`.

        Args:
            after_block: changes the output of each down block; the change enters its skip too.
        """
        if context is None and self.condition_encoder is not None:
            context = self.null_context(len(x))
        temb = self.unet.embed(time, class_labels, context)
        h, skips = self.unet.encode(x, temb, after_block, context)
        if self.fusion is not None:
            h = self.fusion(h, features, keep_reference)
        elif features is not None:
            raise ConfigError(
                "reference-unexpected",
                "Reference features were given to a U-Net without fusion; leave them out or set with_fusion.",
            )
        return Encoded(self.unet.middle(h, temb, context), skips, temb, context)

    def decode(self, encoded: Encoded, h: Tensor | None = None, after_block: AfterBlock | None = None) -> Tensor:
        """Prediction (B, out_channels, H, W); `encoded` is left as it was, so it can be decoded again.

        Args:
            encoded: of `encode`.
            h: takes the place of the middle block's output, same shape; the skips stay.
            after_block: changes the output of each up block.
        """
        return self.unet.decode(encoded.h if h is None else h, encoded.skips, encoded.temb, after_block, encoded.context)

    @property
    def _weight(self) -> Tensor:
        return next(self.unet.parameters())

    def _condition_encoder(self) -> Any:
        if self.condition_encoder is None:
            raise ConfigError(
                "context-unexpected",
                "This network was built without a condition encoder, so it reads no prompt; train the bundle text_to_image.",
            )
        return self.condition_encoder

    def _encoder(self) -> ReferenceEncoder:
        if self.reference_encoder is None:
            raise ConfigError("reference-unexpected", "This U-Net was built without a reference encoder; give one to GuidedUNet.")
        return self.reference_encoder
