"""Asymmetric multi-head self-training (AMST, of DreamDA): auxiliary heads beside a network's own last layer.

The network is any of `build_network`; its last layer is the main head, so what is left for inference is the plain
network and nothing else. The auxiliary heads, two for weak and two for strong views, see the features in front of it,
with drop-out, and label images: where all agree under drop-out, the label is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medaug.draws import torch_generator
from medaug.errors import ConfigError
from medaug.networks.grading import penultimate
from medaug.networks.weights import read_metadata, read_tensors

FOUR_HEADS = ("weak", "weak", "strong", "strong")
ONE_HEAD = ("weak",)
_NETWORK, _HEADS = "network.", "heads."  # the parts of a file that holds both

__all__ = [
    "FOUR_HEADS",
    "ONE_HEAD",
    "AuxiliaryHeads",
    "feature_dimension",
    "fit_metadata",
    "load_backbone",
    "main_head",
    "mc_probabilities",
    "orthogonality_penalty",
]


def orthogonality_penalty(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the absolute entries of W1^T W2, a scalar >= 0; 0 if every row of one is orthogonal to every row of the other.

    Args:
        first, second: weights (K, d) as torch stores them, so the product is first @ second.T, (K, K). No biases.

    Source: DreamDA, eq. 7; the norm is that of tri-training (Saito et al. 2017).
    """
    return (first @ second.T).abs().sum()


class AuxiliaryHeads(nn.Module):
    """The heads f_1^w, f_2^w, f_1^s, f_2^s: linear d -> K, drop-out in front of each.

    Args:
        dimension: d, length of the features.
        num_classes: K.
        views: which view each head learns from, "weak" or "strong".
        dropout: probability in [0, 1) that a feature is dropped.
    """

    def __init__(self, dimension: int, num_classes: int, views: Sequence[str] = FOUR_HEADS, dropout: float = 0.5) -> None:
        super().__init__()
        self.views, self.dropout = tuple(views), dropout
        self.heads = nn.ModuleList(nn.Linear(dimension, num_classes) for _ in views)

    def logits(self, view: str, features: Tensor) -> list[Tensor]:
        """Logits (B, K) of each head of `view` for features (B, d); drop-out, drawn per head, in training mode only."""
        return [
            head(nn.functional.dropout(features, self.dropout, self.training))
            for name, head in zip(self.views, self.heads, strict=True)
            if name == view
        ]

    def penalty(self) -> Tensor:
        """`orthogonality_penalty` summed over the pairs of heads that see the same view; 0 for a single head."""
        total = self._weight(0).new_zeros(())
        for i in range(len(self.views)):
            for j in range(i + 1, len(self.views)):
                if self.views[i] == self.views[j]:
                    total = total + orthogonality_penalty(self._weight(i), self._weight(j))
        return total

    def _weight(self, index: int) -> Tensor:
        weight: Tensor = self.heads[index].weight  # type: ignore[assignment]
        return weight

    def mc_logits(self, features: Tensor, keys: Sequence[Sequence[object]], passes: int) -> Tensor:
        """Logits (J, B, M, K) of M passes with fresh drop-out per pass, head and image, whatever the module's mode.

        Args:
            features: (B, d).
            keys: one per image; its masks depend on its key alone, not on its neighbours.
            passes: M.
        """
        if self.dropout == 0:
            once = torch.stack([head(features) for head in self.heads])
            return once[:, :, None].expand(-1, -1, passes, -1)
        shape = (len(self.views), passes, features.shape[1])
        draws = [torch.rand(shape, generator=torch_generator(*key, "dropout")) for key in keys]
        kept = (torch.stack(draws, dim=1) >= self.dropout).to(features)  # (J, B, M, d)
        dropped = features[:, None] / (1 - self.dropout)
        return torch.stack([head(dropped * kept[index]) for index, head in enumerate(self.heads)])


@torch.no_grad()
def mc_probabilities(
    network: nn.Module, heads: AuxiliaryHeads, images: Tensor, keys: Sequence[Sequence[object]], passes: int = 20
) -> Tensor:
    """Class probabilities (J, B, M, K), float64: the backbone runs once per image, only the heads M times.

    Batch norm and any drop-out inside the backbone are in evaluation mode; the modes are put back.

    Args:
        network: of `build_network`.  heads: its auxiliary heads.
        images: (B, C, H, W) in [-1, 1].
        keys: one per image, see `AuxiliaryHeads.mc_logits`.
        passes: M, at least 1.
    """
    was_training = network.training
    network.eval()
    features = penultimate(network, images)
    network.train(was_training)
    return torch.softmax(heads.mc_logits(features, keys, passes).double(), dim=-1)


@torch.no_grad()
def feature_dimension(network: nn.Module, channels: int, image_size: int) -> int:
    """Length d of `penultimate` for images of this size; leaves the network as it is."""
    was_training = network.training
    network.eval()
    parameter = next(network.parameters())
    size = penultimate(network, torch.zeros(1, channels, image_size, image_size).to(parameter)).shape[1]
    network.train(was_training)
    return int(size)


def main_head(network: nn.Module) -> nn.Module:
    """The last layer of a network of `build_network`: f_5."""
    layer: Any = network.get_classifier() if hasattr(network, "get_classifier") else getattr(network, "classifier", None)  # type: ignore[operator]
    if not isinstance(layer, nn.Module):
        raise ConfigError(
            "network-no-features", f"{type(network).__name__} does not name its last layer; use a network of build_network."
        )
    return layer


def load_backbone(path: Path, network: nn.Module, *, replace_head: bool = False) -> tuple[str, ...] | None:
    """Start `network` from a local safetensors checkpoint, medaug's own or timm's.

    A first convolution for three channels is summed over them for grey images, as timm does. Of a file that holds a network
    beside its auxiliary heads, the network is taken.

    Args:
        path: the file.
        network: of `build_network`, the architecture of the file.
        replace_head: leave the last layer as it is, for a checkpoint of other classes.

    Returns:
        The groups that the checkpoint was fitted on (metadata ``fit_groups``, see `fit_metadata`); None if it does not say, which
        is not "no group": see `medaug.training.teacher.check_origin`.

    Raises:
        ConfigError: `weights-classes` for a checkpoint of another class count, `weights-mismatch` for another
            architecture; unreadable or pickled files, see `medaug.networks.weights`.
    """
    metadata, tensors = read_metadata(path), read_tensors(path)
    if any(key.startswith(_HEADS) for key in tensors):
        tensors = {key.removeprefix(_NETWORK): value for key, value in tensors.items() if not key.startswith(_HEADS)}
    own, name = network.state_dict(), Path(path).name
    head = {id(parameter) for parameter in main_head(network).parameters()}
    last = {key for key, parameter in network.named_parameters() if id(parameter) in head}
    other = [key for key in last if key in tensors and tensors[key].shape != own[key].shape]
    if other and not replace_head:
        found, wanted = len(tensors[other[0]]), len(own[other[0]])
        raise ConfigError(
            "weights-classes",
            f"{name} was made for {found} classes, this cohort has {wanted}; use a checkpoint of this cohort's classes, "
            "or keep its backbone only (replace_head).",
        )
    first = (getattr(network, "default_cfg", None) or {}).get("first_conv")
    key = f"{first}.weight"
    if key in tensors and key in own and own[key].shape[1] == 1 and tensors[key].shape[1] == 3:
        tensors[key] = tensors[key].sum(dim=1, keepdim=True)
    wanted_keys = own.keys() - (last if replace_head else set())
    faults = [f"{key} is missing" for key in sorted(wanted_keys - tensors.keys())]
    faults += [f"{key} is unknown" for key in sorted(tensors.keys() - own.keys())]
    faults += [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(wanted_keys & tensors.keys())
        if tensors[key].shape != own[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ConfigError("weights-mismatch", f"{name} was made for another network: {'; '.join(faults[:3])}{more}.")
    network.load_state_dict({key: tensors[key] for key in wanted_keys}, strict=False)
    return _groups(metadata["fit_groups"], name) if "fit_groups" in metadata else None


def fit_metadata(groups: Iterable[str]) -> dict[str, str]:
    """Metadata entry of a weights file that says which groups (pseudonymous names) its network was fitted on, sorted."""
    return {"fit_groups": json.dumps(sorted(set(groups)))}


def _groups(text: str, name: str) -> tuple[str, ...]:
    try:
        groups = json.loads(text)
    except ValueError:
        groups = None
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise ConfigError("weights-metadata", f"{name} does not list the groups it was fitted on as it should; train it again.")
    return tuple(groups)
