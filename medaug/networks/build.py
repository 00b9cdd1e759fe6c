"""A guided diffusion network from plain settings, as a bundle or a run folder holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medaug.errors import ConfigError
from medaug.networks.conditioning import build_condition_encoder
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.lean_unet import LeanUNet
from medaug.networks.reference_encoder import ReferenceEncoder
from medaug.networks.unet import MonaiUNet

BACKBONES = {"lean": LeanUNet, "monai": MonaiUNet}
SETTINGS = ("backbone", "class_conditional", "backbone_options", "reference", "conditioning")


def refuse_blind_levels(settings: Mapping[str, Any]) -> None:
    """Refuse a MONAI U-Net in which a level is blind to noise level and class.

    Its residual blocks add the embedding channel by channel and normalise next: where each group is one channel, the norm takes it out
    again. A network that was trained so is still read.

    Args:
        settings: as for `build_guided_unet`.

    Raises:
        ConfigError: a width that equals `norm_num_groups` (code `network-blind`).
    """
    if settings.get("backbone", "monai") != "monai":
        return
    known = inspect.signature(MonaiUNet).parameters
    options = {name: known[name].default for name in ("channels", "norm_num_groups")} | dict(
        settings.get("backbone_options") or {}
    )
    blind = sorted({int(width) for width in options["channels"] if width == options["norm_num_groups"]})
    if blind:
        raise ConfigError(
            "network-blind",
            f"Levels of {blind[0]} channels in {options['norm_num_groups']} norm groups do not see noise level and class; "
            "give fewer norm_num_groups or wider channels.",
        )


def build_guided_unet(
    settings: Mapping[str, Any], in_channels: int, num_classes: int, text_encoder_dir: str | Path | None = None
) -> GuidedUNet:
    """Build U-Net, reference encoder and fusion, condition encoder.

    Args:
        settings: ``backbone`` ("lean" or "monai"), ``class_conditional``, ``backbone_options`` (arguments of the
            backbone), ``reference`` (arguments of the reference encoder, or None for no fusion), ``conditioning`` (settings of
            `build_condition_encoder`, or None for no context).
        in_channels: image channels C.
        num_classes: K, for the label embedding, class tokens and the reference encoder's classifier.
        text_encoder_dir: local folder of a text encoder, if the conditioning reads one.

    Raises:
        ConfigError: unknown backbone or option.
    """
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise ConfigError("setting-unknown", f"Unknown network setting(s) {sorted(unknown)}; known are {list(SETTINGS)}.")
    name = settings.get("backbone", "monai")
    if name not in BACKBONES:
        raise ConfigError("backbone-unknown", f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}.")
    labels = num_classes if settings.get("class_conditional") else None
    conditioning = settings.get("conditioning")
    conditions: Any = None if conditioning is None else build_condition_encoder(conditioning, num_classes, text_encoder_dir)
    context = {} if conditions is None else {"context_dim": conditions.dimension}
    try:
        unet: Any = BACKBONES[name](
            in_channels=in_channels,
            out_channels=in_channels,
            num_classes=labels,
            **context,
            **settings.get("backbone_options") or {},
        )
        reference = settings.get("reference")
        if reference is None:
            return GuidedUNet(unet, None, condition_encoder=conditions)
        features = ReferenceEncoder(stride=unet.bottleneck_stride, num_classes=num_classes, in_channels=in_channels, **reference)
        return GuidedUNet(unet, features, condition_encoder=conditions)
    except TypeError as error:
        raise ConfigError("setting-unknown", f"A network setting is not known: {error}.") from error
