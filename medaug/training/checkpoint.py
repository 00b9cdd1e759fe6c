"""Training state in one safetensors file: tensors beside a JSON header, nothing pickled, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from medaug import storage
from medaug.errors import ConfigError
from medaug.training.best import BestNetwork
from medaug.training.ema import ExponentialMovingAverage

FILE_NAME = "checkpoint.safetensors"


@dataclass
class TrainingState:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        network, ema, optimizer: what is trained, its average, and how.
        scheduler: of the learning rate; None for a constant one.
        adversary, adversary_optimizer: a network that is trained against it, such as the critic of a GAN.
        best: the best average so far; None when the last one is what the run is for.
    """

    network: nn.Module
    ema: ExponentialMovingAverage
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    adversary: nn.Module | None = None
    adversary_optimizer: torch.optim.Optimizer | None = None
    best: BestNetwork | None = None

    @property
    def chosen(self) -> nn.Module:
        """The network that the run is for."""
        return self.ema.network if self.best is None else self.best.network

    def networks(self) -> dict[str, nn.Module]:
        """All networks, by their name in a checkpoint."""
        found = {"network": self.network, "ema": self.ema.network}
        found |= {} if self.adversary is None else {"adversary": self.adversary}
        return found | ({} if self.best is None else {"best": self.best.network})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers, by the prefix of their names in a checkpoint."""
        return {"": self.optimizer} | ({} if self.adversary_optimizer is None else {"adversary_": self.adversary_optimizer})


def save_checkpoint(path: Path, state: TrainingState, *, epoch: int, iteration: int, config_sha256: str) -> None:
    """Write networks, optimisers, schedule, epoch, iteration and random state atomically.

    Every draw of training is keyed by (seed, iteration), so the data order is the iteration number; the state of
    torch's global generator is kept for networks that use it.
    """
    tensors = {
        f"{part}/{name}": value for part, module in state.networks().items() for name, value in module.state_dict().items()
    }
    tensors["random/torch"] = torch.get_rng_state()
    header: dict[str, Any] = {
        "epoch": epoch,
        "iteration": iteration,
        "ema_updates": state.ema.num_updates,
        "scheduler": None if state.scheduler is None else _plain(state.scheduler.state_dict()),
        "best": None if state.best is None else [state.best.figure, state.best.iteration],
        "config_sha256": config_sha256,
    }
    for prefix, optimizer in state.optimizers().items():
        found, plain = _optimizer_parts(optimizer)
        tensors |= {f"{prefix}optimizer/{name}": value for name, value in found.items()}
        header |= {f"{prefix}param_groups": optimizer.state_dict()["param_groups"], f"{prefix}optimizer": plain}
    data = safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        metadata={"medaug": json.dumps(header)},
    )
    storage.write_bytes(path, data)


def load_checkpoint(path: Path, state: TrainingState, *, config_sha256: str) -> tuple[int, int]:
    """Restore everything `save_checkpoint` wrote. Returns (epoch, iteration).

    Raises:
        ConfigError: not a whole checkpoint, or one of another configuration.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["medaug"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise ConfigError(
            "checkpoint-unreadable", f"{path.name} is not a whole medaug checkpoint; delete it to train from the start."
        ) from error
    if header.get("config_sha256") != config_sha256:
        raise ConfigError(
            "checkpoint-other-config",
            "The output folder holds a run with other settings or another cohort; repeat its settings or choose another output folder.",
        )
    try:
        for part, module in state.networks().items():
            module.load_state_dict(_part(tensors, f"{part}/"))
    except RuntimeError as error:
        raise ConfigError(
            "checkpoint-other-network", f"{path.name} belongs to another network; choose another output folder."
        ) from error
    try:
        return _restore(header, tensors, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ConfigError(
            "checkpoint-unreadable", f"{path.name} lacks a part of the training state; delete it to train from the start."
        ) from error


def _restore(header: Mapping[str, Any], tensors: Mapping[str, Tensor], state: TrainingState) -> tuple[int, int]:
    """Everything but the networks' weights. Returns (epoch, iteration)."""
    state.ema.num_updates = header["ema_updates"]
    for prefix, optimizer in state.optimizers().items():
        slots: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header[f"{prefix}optimizer"].items()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, value in _part(tensors, f"{prefix}optimizer/").items():
            index, slot = name.split("/", 1)
            slots.setdefault(int(index), {})[slot] = _laid_out_like(parameters[int(index)], value)
        optimizer.load_state_dict({"state": slots, "param_groups": header[f"{prefix}param_groups"]})
    if state.scheduler is not None:
        state.scheduler.load_state_dict(header["scheduler"])
    if state.best is not None:
        state.best.figure, state.best.iteration = header["best"]
    torch.set_rng_state(tensors["random/torch"])
    return int(header["epoch"]), int(header["iteration"])


def _optimizer_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimiser's state: tensors by "index/slot", and what is no tensor by index and slot."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{slot}"] = value
            else:
                plain.setdefault(str(index), {})[slot] = value
    return tensors, plain


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory layout of its parameter: another layout may round differently, and the bytes would part ways."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, int | float | str | list | bool) and name != "lr_lambdas"
    } | {"lr_lambdas": [None for _ in state.get("lr_lambdas", [])]}
