"""Local checkpoints for grading networks: all weights but the head's, or a refusal that names what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from medaug.errors import ConfigError
from medaug.networks.heads import head_path
from medaug.networks.weights import read_tensors

__all__ = ["load_pretrained"]


def load_pretrained(
    name: str,
    build: Callable[[int, int, int], nn.Module],
    path: Path,
    num_classes: int,
    in_channels: int,
    image_size: int,
) -> nn.Module:
    """The network with the weights of a file and a new head.

    A file made from the network as `build` makes it is loaded as it is. One of the published network gives the published
    network, stem and all: timm turns colour kernels into grey ones (their sum) and resamples positions and windows to this image size.

    Args:
        name, build: of the network.
        path: safetensors, a state dict in timm's names.
        num_classes, in_channels, image_size: as in `build_network`; the head of the file may have any number of classes.

    Raises:
        ConfigError: `weights-mismatch`: tensors are missing or unknown or have another shape; or the file is unreadable.
    """
    state = read_tensors(path)
    network = build(num_classes, in_channels, image_size)
    if _fits(state, network):
        head = head_path(network)
        network.load_state_dict(_without_head(state, head), strict=False)
        return network
    if not timm.is_model(name):
        _refuse(name, path, state, network)
    published = _published(name, num_classes, in_channels)
    if _names_differ(state, published):
        _refuse(name, path, state, published)
    overlay = {"state_dict": _without_head(state, head_path(published)), "num_classes": num_classes + 1}
    sized: dict[str, Any] = {"img_size": image_size} if "pos_embed" in state or _fixed_size(name) else {}
    try:
        loaded: nn.Module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, in_chans=in_channels, **sized
        )
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        first = str(error).splitlines()[-1].strip()
        raise ConfigError("weights-mismatch", f"{path.name} does not fit {name} at {image_size} px: {first}.") from error
    return loaded


def _fixed_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config is not None and bool(config.fixed_input_size)


def _published(name: str, num_classes: int, in_channels: int) -> nn.Module:
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return network


def _without_head(state: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{head}.")}


def _names_differ(state: Mapping[str, Tensor], network: nn.Module) -> set[str]:
    head = head_path(network)
    return _without_head(network.state_dict(), head).keys() ^ _without_head(state, head).keys()


def _fits(state: Mapping[str, Tensor], network: nn.Module) -> bool:
    own = _without_head(network.state_dict(), head_path(network))
    return not _names_differ(state, network) and all(state[key].shape == tensor.shape for key, tensor in own.items())


def _refuse(name: str, path: Path, state: Mapping[str, Tensor], network: nn.Module) -> None:
    head = head_path(network)
    own, found = _without_head(network.state_dict(), head), _without_head(state, head)
    faults = [f"{key} is missing" for key in sorted(own.keys() - found.keys())]
    faults += [f"{key} is unknown" for key in sorted(found.keys() - own.keys())]
    faults += [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & found.keys())
        if own[key].shape != found[key].shape
    ]
    more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
    raise ConfigError("weights-mismatch", f"{path.name} is no checkpoint of {name}: {'; '.join(faults[:5])}{more}.")
