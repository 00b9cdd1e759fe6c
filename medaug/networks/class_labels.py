"""Class conditioning that the U-Nets share: K classes and one reserved index, NULL = K, for "no class"."""

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
