"""Conditions that the U-Nets share: K classes with one reserved index, NULL = K, for "no class", and contexts of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from medaug.errors import ConfigError


def embedded_labels(class_labels: Tensor | None, num_classes: int | None, batch: int, device: torch.device) -> Tensor | None:
    """Indices into an embedding of K + 1 rows, or None for a network without classes.

    Args:
        class_labels: (B,) integers in [0, K], K meaning "no class", or None for "no class" everywhere.
        num_classes: K, or None if the network was built without classes.
        batch: B.
        device: where the indices are wanted.

    Raises:
        ConfigError: labels for a network without classes, or as many labels as there are not images.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ConfigError(
                "class-labels-unexpected",
                "class_labels were given to a U-Net that was built without classes; set num_classes or leave the labels out.",
            )
        return None
    if class_labels is None:
        return torch.full((batch,), num_classes, dtype=torch.long, device=device)
    if class_labels.shape != (batch,):
        raise ConfigError(
            "class-labels-shape", f"class_labels must have shape ({batch},), one per image, got {tuple(class_labels.shape)}."
        )
    return class_labels.to(device=device, dtype=torch.long)


def check_context(context: Tensor | None, context_dim: int | None, batch: int) -> None:
    """Refuse a context that does not fit the network.

    Args:
        context: (B, L, D), or None.
        context_dim: D of the network, or None if it was built without a context.
        batch: B.

    Raises:
        ConfigError: a context for a network without, none for a network with one, or another shape.
    """
    if context_dim is None:
        if context is not None:
            raise ConfigError(
                "context-unexpected", "A context was given to a U-Net that was built without; set conditioning or leave it out."
            )
        return
    if context is None or context.ndim != 3 or (context.shape[0], context.shape[2]) != (batch, context_dim):
        shape = None if context is None else tuple(context.shape)
        raise ConfigError("context-shape", f"This U-Net needs a context of shape ({batch}, L, {context_dim}), got {shape}.")
