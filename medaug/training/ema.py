"""Exponential moving average of weights, warmed up for short runs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from medaug.errors import ConfigError


class ExponentialMovingAverage:
    """Shadow of a network: ``shadow = d shadow + (1 - d) weights`` with d = min(decay, (1 + n) / (10 + n)).

    The warm-up keeps a run of a few hundred steps from dragging its random start along. Buffers (running means of
    batch normalisation) are copied.

    Args:
        network: the network that is trained.
        decay: upper bound of d, in [0, 1).

    Raises:
        ConfigError: a decay outside [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError("ema-decay", f"ema_decay must lie in [0, 1), got {decay!r}.")
        self.decay = decay
        self.num_updates = 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the shadow one step towards `network`."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        for shadow, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            shadow.copy_(buffer)
