"""Shared by the network tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


def _awaken(module: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


@pytest.fixture
def awaken() -> Callable[..., nn.Module]:
    """Give every all-zero parameter random values: a fresh U-Net returns 0 and hides every difference."""
    return _awaken
