"""Training in several processes, one per device: each takes its share of every batch, and together they take the step of one process.

``multi_gpu_train.yaml`` of a bundle calls `start` and `stop`; torchrun starts the processes. Weights begin equal, since they depend on the
seed alone, and stay equal, since every process steps down the same averaged gradient. Batch normalisation and drop-out inside the networks
see the joined batch too (`joined_batch`). So the number of processes changes the speed, and the result by rounding only.

There is no `DistributedDataParallel`: a step here calls several submodules, and the penalty of a GAN differentiates twice.
Without a process group everything here is what one process does.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from medaug.errors import ConfigError

# A process that dies is noticed at once, by torchrun and by its neighbours. This is for one that hangs, and has to be longer than what the
# first process does alone at the end of an epoch: sample sheets, measurements, a checkpoint.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")

# --- the processes ----------------------------------------------------------------------------------------------------


def local_device(name: str = "auto") -> torch.device:
    """The device of this process: the CUDA device that torchrun's LOCAL_RANK counts, or the CPU.

    Args:
        name: cuda, cpu, or auto for CUDA where there is one.

    Raises:
        ConfigError: a single device for all (code `device-shared`); more processes than devices (`device-missing`).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(
            "device-shared", f"Several processes need device_name auto, cpu or cuda, since each has its own; got {name!r}."
        )
    if name == "cpu":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            "device-missing",
            f"torchrun started more than {count} process(es) for {count} CUDA device(s); lower --nproc_per_node.",
        )
    return torch.device("cuda", local)


def start(device: torch.device) -> None:
    """Join the processes that torchrun started, by NCCL on CUDA and gloo elsewhere; alone without torchrun.

    torchrun ends the other processes by SIGTERM when one fails. It is taken as Ctrl-C, so that the first process closes its record in MLflow.
    """
    if "RANK" not in os.environ:
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


# --- what they tell each other ----------------------------------------------------------------------------------------


def share(members: Sequence[T]) -> Sequence[T]:
    """This process's part of a batch: as many as every other, in their order, so that the parts of all in order of rank are the batch.

    Raises:
        ConfigError: the batch cannot be shared evenly (code `batch-uneven`).
    """
    size, rest = divmod(len(members), world_size())
    if rest:
        raise ConfigError(
            "batch-uneven", f"batch_size must be a multiple of the {world_size()} processes that share it, got {len(members)}."
        )
    return members[rank() * size : (rank() + 1) * size]


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in order of rank, once all have called it. JSON types only: nothing is unpickled."""
    if world_size() == 1:
        return [value]
    own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=_meeting_place())
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    parts = [own.new_zeros(max(int(size) for size in sizes)) for _ in sizes]
    dist.all_gather(parts, F.pad(own, (0, len(parts[0]) - len(own))))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def refuse_difference(value: Any) -> None:
    """Refuse processes that are about to train different things.

    Args:
        value: what has to be the same in all, of JSON types.

    Raises:
        ConfigError: code `processes-differ`.
    """
    found = gather(value)
    if any(other != found[0] for other in found):
        raise ConfigError(
            "processes-differ",
            "The processes have different settings, cohorts or checkpoints; start all by one command, on folders that all machines see.",
        )


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes, without gradient."""
    return value.detach() if world_size() == 1 else _Mean.apply(value)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every parameter the mean of its gradients over the processes: with equal shares and a mean loss, that of the joined batch.

    One message for all of them. Where no process has a gradient there is none afterwards; where some have one, it counts as 0 for the others.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not wanted:
        return
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in wanted]
    present = parts[0].new_tensor([parameter.grad is not None for parameter in wanted])
    *sums, present = mean(torch.cat([*parts, present])).split([*(len(part) for part in parts), len(present)])
    for parameter, value, known in zip(wanted, sums, present.tolist(), strict=True):
        if known:
            # The parameter's own memory layout, which is that of a gradient of one process.
            parameter.grad = torch.empty_like(parameter).copy_(value.view(parameter.shape))


def _meeting_place() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


# --- layers that look at the whole batch ------------------------------------------------------------------------------


def joined_batch() -> AbstractContextManager[Any]:
    """In the block, layers in training mode act on their process's share as they would on the joined batch.

    Batch normalisation takes its statistics over all processes, and drop-out draws the mask of the joined batch and keeps the rows of the
    share. Both are caught as functions, so that layers of any library are meant, on any device: `torch.nn.SyncBatchNorm` works on CUDA
    only. Every process has to run the same layers in the same order. Layers in evaluation mode are left alone.
    """
    return nullcontext() if world_size() == 1 else _JoinedBatch()


class _Mean(torch.autograd.Function):
    """Mean over the processes. Its adjoint, for the sum of the processes' losses, is itself."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        found = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found)
        return found / world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Mean.apply(*gradients)


def _batch_norm(
    input: Tensor,  # noqa: A002 - the names of torch.nn.functional
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with the statistics of the joined batch.

    The variance is taken around the joined mean in a second message: E[x^2] - E[x]^2 would lose digits.
    """
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    axes, shape = [0, *range(2, input.ndim)], (1, -1, *[1] * (input.ndim - 2))
    centre = _Mean.apply(input.mean(axes))
    centred = input - centre.view(shape)
    variance = _Mean.apply(centred.square().mean(axes))
    count = world_size() * input.numel() // input.shape[1]
    with torch.no_grad():
        for running, found in ((running_mean, centre), (running_var, variance * count / (count - 1))):
            if running is not None:
                running.lerp_(found, momentum)
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    scaled = centred * scale.view(shape)
    return scaled if bias is None else scaled + bias.view(shape)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """`torch.nn.functional.dropout` with this process's rows of the joined batch's mask; the generators of all stand alike."""
    if not training or p == 0:
        return F.dropout(input, p, training, inplace)
    with torch.no_grad():
        mask = F.dropout(torch.ones_like(torch.cat([input] * world_size())), p)
    return input * mask[rank() * len(input) :][: len(input)]


_JOINED: dict[Any, Callable[..., Tensor]] = {F.batch_norm: _batch_norm, F.dropout: _dropout}


class _JoinedBatch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _JOINED.get(func, func)(*args, **(kwargs or {}))
