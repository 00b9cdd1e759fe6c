"""The last layer of a classifier, found and replaced by its path."""

from __future__ import annotations

from typing import Any

from torch import nn

from medaug.errors import ConfigError

__all__ = ["head_path", "last_linear", "replace_head"]


def head_path(network: nn.Module) -> str:
    """Dotted path of the last linear layer, for example ``head.fc``.

    Raises:
        ConfigError: `network-head`: the network has none, or several.
    """
    get_classifier: Any = getattr(network, "get_classifier", None)  # of timm's networks
    last = get_classifier() if callable(get_classifier) else getattr(network, "classifier", None)
    found = [path for path, module in network.named_modules() if module is last]
    if not isinstance(last, nn.Linear) or len(found) != 1:
        raise ConfigError(
            "network-head", f"{type(network).__name__} does not end in one linear layer, so its head cannot be replaced."
        )
    return found[0]


def last_linear(network: nn.Module) -> nn.Linear:
    """The last linear layer, see `head_path`."""
    layer = network.get_submodule(head_path(network))
    assert isinstance(layer, nn.Linear)
    return layer


def replace_head(network: nn.Module, head: nn.Module) -> nn.Module:
    """Put `head` in the place of the last linear layer and give the network back."""
    parent, _, name = head_path(network).rpartition(".")
    setattr(network.get_submodule(parent), name, head)
    return network
