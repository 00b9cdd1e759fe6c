"""Features of a network whose weights lie on this machine: Inception, RadImageNet, torchxrayvision as safetensors.

Nothing is downloaded and nothing unpickled. The file's sha256 is asked for, and is part of the extractor's name: figures of other
weights are other figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from medaug import storage
from medaug.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

__all__ = ["ARCHITECTURES", "LocalFeatures", "local_features"]


def _timm(name: str, channels: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ConfigError("architecture-unknown", f"timm knows no architecture {name!r}; `timm.list_models()` lists them.")
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    return network


def _torchvision(name: str, channels: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError("architecture-unknown", f"torchvision knows no classifier {name!r}; `models.list_models()` lists them.")
    network: nn.Module = models.get_model(name, weights=None)
    for head in ("fc", "classifier", "head", "heads"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
    _first_channels(network, channels)
    return network


def _first_channels(network: nn.Module, channels: int) -> None:
    """Give the first convolution as many input channels as the weights have."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                if child.in_channels != channels:
                    shape: dict[str, Any] = {"kernel_size": child.kernel_size, "stride": child.stride, "padding": child.padding}
                    setattr(parent, name, nn.Conv2d(channels, child.out_channels, bias=child.bias is not None, **shape))
                return


ARCHITECTURES: Mapping[str, Callable[[str, int], nn.Module]] = {"timm": _timm, "torchvision": _torchvision}


class LocalFeatures:
    """Features before the head of a network with local weights.

    Args:
        network: images (B, channels, size, size) -> (B, D).
        name: of the extractor.
        channels: that the network takes; grey images are repeated, colour averaged to fit.
        size: side in pixels that images are resized to.
        mean, std: of each channel, for images in [0, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        channels: int = 3,
        size: int = 224,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        self.name = name
        self._network, self._channels, self._size = network.eval(), channels, size
        self._mean = torch.tensor(list(mean) or [0.5] * channels).view(1, -1, 1, 1)
        self._std = torch.tensor(list(std) or [0.5] * channels).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W) in [-1, 1]."""
        x = (images + 1) / 2
        if x.shape[1] != self._channels:
            x = x.mean(dim=1, keepdim=True).expand(-1, self._channels, -1, -1)
        x = functional.interpolate(x, size=(self._size, self._size), mode="bilinear", align_corners=False, antialias=True)
        found = self._network((x - self._mean) / self._std)
        return found.flatten(1)


def local_features(
    path: Path | str,
    sha256: str,
    architecture: str,
    *,
    channels: int = 3,
    size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    prefix: str = "",
) -> LocalFeatures:
    """The extractor of a safetensors file.

    Args:
        path: the file.
        sha256: of the file, hex.
        architecture: "timm:NAME" or "torchvision:NAME".
        channels, size, mean, std: what the network was trained with; see `LocalFeatures`.
        prefix: of the names in the file, taken off ("module." or "backbone.").

    Raises:
        ConfigError: no such file (code `weights-missing`), another sha256 (code `weights-sha256`), not safetensors or not of this
            architecture (code `weights-malformed`), an unknown architecture.
    """
    path = Path(path)
    kind, _, name = architecture.partition(":")
    if kind not in ARCHITECTURES or not name:
        raise ConfigError("architecture-unknown", f"An architecture is timm:NAME or torchvision:NAME, got {architecture!r}.")
    if not path.is_file():
        raise ConfigError("weights-missing", f"There are no weights at {path.name}; nothing is downloaded, so give a local file.")
    found = storage.sha256_file(path)
    if found != str(sha256).lower():
        raise ConfigError(
            "weights-sha256", f"{path.name} has sha256 {found[:12]}..., {str(sha256)[:12]}... was asked for; get the right file."
        )
    network = ARCHITECTURES[kind](name, channels)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError("weights-malformed", f"{path.name} is not a safetensors file; convert the state dict first.") from error
    own = {key.removeprefix(prefix): value for key, value in state.items()}
    _load(network, own, path.name)
    return LocalFeatures(network, f"{architecture}-{found[:16]}-{size}px", channels, size, mean, std)


def _load(network: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Every parameter of the network must be there with its shape; heads in the file are left over."""
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    broken = [key for key in wanted if key in state and not bool(torch.isfinite(state[key].float()).all())]
    if missing or wrong or broken:
        raise ConfigError(
            "weights-malformed",
            f"{name} does not hold this architecture: {len(missing)} tensors missing, {len(wrong)} of another shape, {len(broken)} not finite; "
            "check architecture, channels and prefix.",
        )
    network.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)
