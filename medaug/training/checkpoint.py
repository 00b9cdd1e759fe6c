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
from medaug.training.ema import ExponentialMovingAverage

FILE_NAME = "checkpoint.safetensors"


@dataclass
class TrainingState:
    """What a run needs to go on as if it had never stopped."""

    network: nn.Module
    ema: ExponentialMovingAverage
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


def save_checkpoint(path: Path, state: TrainingState, *, epoch: int, iteration: int, config_sha256: str) -> None:
    """Write network, EMA, optimiser, schedule, epoch, iteration and random state atomically.

    Every draw of training is keyed by (seed, iteration), so the data order is the iteration number; the state of
    torch's global generator is kept for networks that use it.
    """
    tensors = {f"network/{name}": value for name, value in state.network.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in state.ema.network.state_dict().items()}
    optimizer = state.optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in optimizer["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{slot}"] = value
            else:
                plain.setdefault(str(index), {})[slot] = value
    tensors["random/torch"] = torch.get_rng_state()
    header = {
        "epoch": epoch,
        "iteration": iteration,
        "ema_updates": state.ema.num_updates,
        "param_groups": optimizer["param_groups"],
        "optimizer": plain,
        "scheduler": _plain(state.scheduler.state_dict()),
        "config_sha256": config_sha256,
    }
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
        state.network.load_state_dict(_part(tensors, "network/"))
        state.ema.network.load_state_dict(_part(tensors, "ema/"))
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
    slots: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["optimizer"].items()}
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for name, value in _part(tensors, "optimizer/").items():
        index, slot = name.split("/", 1)
        slots.setdefault(int(index), {})[slot] = _laid_out_like(parameters[int(index)], value)
    state.optimizer.load_state_dict({"state": slots, "param_groups": header["param_groups"]})
    state.scheduler.load_state_dict(header["scheduler"])
    torch.set_rng_state(tensors["random/torch"])
    return int(header["epoch"]), int(header["iteration"])


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
