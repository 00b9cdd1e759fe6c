"""The trainable part of a large U-Net as a module of its own: low-rank additions to its attention, or all of its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medaug.draws import key_seed
from medaug.errors import ConfigError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # projections of self- and cross-attention
ADAPTER = "default"
PREFIX = "unet."


class TunedUNet(nn.Module):
    """A U-Net of which only the trained weights are parameters: they alone are optimised, averaged, saved and loaded.

    Copies, such as a running average, share the weights that stay as they are. Names in the state dict are those that
    diffusers' `load_lora_weights` reads.

    Args:
        unet: a `UNet2DConditionModel`; low-rank layers are put into it.
        rank: of the additions W + B A to the attention's projections (Hu et al. 2021, arXiv 2106.09685), of scale 1; None
            trains all weights.
        seed: decides A; B starts at 0, so the U-Net starts as it was.

    Raises:
        ConfigError: a rank below 1 (code `lora-rank`).
    """

    def __init__(self, unet: nn.Module, rank: int | None, seed: int = 0) -> None:
        super().__init__()
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ConfigError(
                "lora-rank", f"lora_rank must be a whole number of at least 1, or null for all weights, got {rank!r}."
            )
        unet.requires_grad_(rank is None)
        if rank is not None:
            _add_low_rank(unet, rank, seed)
        trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        self.rank = rank
        self._unet = (unet,)  # a tuple: not a submodule
        self._names = tuple(trained)
        self.weights = nn.ParameterList(trained.values())

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Network output (B, C, h, w) for noisy latents (B, C, h, w), timesteps (B,) and text contexts (B, L, D)."""
        own = dict(zip(self._names, self.weights, strict=True))
        options = {"encoder_hidden_states": context, "return_dict": False}
        output: Tensor = functional_call(self._unet[0], own, (latents, timesteps), options)[0]
        return output

    def merged(self) -> nn.Module:
        """The U-Net itself with the trained weights worked into it, so that generation costs what it costs without them."""
        unet: Any = self._unet[0]
        own = dict(unet.named_parameters())
        with torch.no_grad():
            for name, value in zip(self._names, self.weights, strict=True):
                own[name].copy_(value)
        if self.rank is not None:
            unet.fuse_lora()
            unet.unload_lora()
        return unet.requires_grad_(False).eval()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The trained weights by their names in the U-Net."""
        return OrderedDict((_public(name), value.detach()) for name, value in zip(self._names, self.weights, strict=True))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over weights of `state_dict`.

        Raises:
            RuntimeError: other names or shapes.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys() or any(own[name].shape != state_dict[name].shape for name in own):
            raise RuntimeError("the weights belong to another U-Net or another rank")
        for name, value in own.items():
            value.copy_(state_dict[name])
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> TunedUNet:
        self._unet[0]._apply(fn, recurse)  # moves to another device as a whole
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TunedUNet:
        twin = TunedUNet.__new__(TunedUNet)
        nn.Module.__init__(twin)
        twin.rank, twin._unet, twin._names = self.rank, self._unet, self._names
        twin.weights = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in self.weights)
        return twin


def _add_low_rank(unet: Any, rank: int, seed: int) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(key_seed(seed, "low-rank"))
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS)), ADAPTER)


def _public(name: str) -> str:
    return PREFIX + name.replace(f".{ADAPTER}.", ".")
