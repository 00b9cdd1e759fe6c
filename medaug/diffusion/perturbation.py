"""Noise on the bottleneck of the network, for diversity. The draw is an argument: the same draw, the same result."""

from __future__ import annotations

from torch import Tensor

from medaug.errors import ConfigError

MODES = ("relative", "absolute")


def bottleneck_noise(h: Tensor, draw: Tensor, scale: float, mode: str = "relative") -> Tensor:
    """h + sigma * draw, with sigma = scale * std(h) per image ("relative") or sigma = scale ("absolute").

    Args:
        h: activation of the middle block, shape (B, C, *spatial).
        draw: standard normal, shape of `h`.
        scale: strength, at least 0; 0 leaves h as it is.
        mode: "relative" has a meaning for any network, "absolute" only for the network it was tuned on.

    Raises:
        ConfigError: on an unknown mode, a negative scale or a draw of another shape.
    """
    if mode not in MODES:
        raise ConfigError("perturbation-mode", f"the mode of bottleneck noise must be one of {', '.join(MODES)}, got {mode!r}.")
    if not scale >= 0:
        raise ConfigError("perturbation-scale", f"the scale of bottleneck noise must be at least 0, got {scale}.")
    if draw.shape != h.shape:
        raise ConfigError("perturbation-draw", f"draw must have the shape {tuple(h.shape)} of h, got {tuple(draw.shape)}.")
    if mode == "absolute":
        return h + scale * draw
    per_sample = tuple(range(1, h.ndim))
    return h + scale * h.std(dim=per_sample, correction=0, keepdim=True) * draw
