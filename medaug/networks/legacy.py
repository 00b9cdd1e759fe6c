"""Checkpoints of the former `monai-generative` package, read into the U-Net that succeeded it.

That package's attention never applied its output projection. MONAI's reader of old states therefore gives wrong images,
silently, unless the network has `include_fc=False`. Here every tensor is accounted for, and one forward pass can be compared.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from medaug.errors import ConfigError
from medaug.networks.unet import MonaiUNet
from medaug.networks.weights import read_tensors

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-4  # float32 sums in another order differ by about 5e-6
_CLASSES = "class_embedding.weight"


def load_monai_generative(
    state: Mapping[str, Tensor] | str | Path, unet: MonaiUNet, probe: tuple[Tensor, Tensor, Tensor] | None = None
) -> None:
    """Load the state of a `generative.networks.nets.DiffusionModelUNet` into `unet`, which is changed only if all is well.

    A class-conditional checkpoint of K rows fits `num_classes=K - 1` if its last row was trained as "no class", and
    `num_classes=K` if not: then that row becomes the mean of the others, with a warning, and wants fine-tuning.

    Args:
        state: the state dict, or a safetensors or torch file (read with weights_only) of it.
        unet: built with the checkpoint's sizes and `include_fc=False`.
        probe: (x, time, expected): what the old network answered, checked to 1e-4 (of its largest value, if above 1).

    Raises:
        ConfigError: `include_fc=True`, tensors that are missing, left over or of another shape, or another answer to the probe.
    """
    if any(".out_proj." in name and "transformer_blocks" not in name for name in unet.state_dict()):
        raise ConfigError(
            "legacy-include-fc",
            "Checkpoints of monai-generative need a MonaiUNet with include_fc=False: the extra layer makes their images wrong.",
        )
    name = Path(state).name if isinstance(state, str | Path) else "The state dict"
    tensors = dict(read_tensors(state, allow_torch=True) if isinstance(state, str | Path) else state)
    trial = copy.deepcopy(unet)
    _with_null_class(tensors, trial)
    _load(name, tensors, trial)
    if probe is not None:
        _check_probe(name, trial, *probe)
    unet.load_state_dict(trial.state_dict())


def _with_null_class(tensors: dict[str, Tensor], unet: MonaiUNet) -> None:
    """Add a "no class" row to a class embedding that has none."""
    rows = tensors.get(_CLASSES)
    if rows is not None and unet.num_classes is not None and rows.shape[0] == unet.num_classes:
        logger.warning(
            "The old checkpoint has no embedding for 'no class': the mean of its %d classes is used.", unet.num_classes
        )
        tensors[_CLASSES] = torch.cat([rows, rows.mean(dim=0, keepdim=True)])


def _load(name: str, tensors: dict[str, Tensor], unet: MonaiUNet) -> None:
    """MONAI's renaming, with the checks it lacks: nothing keeps its initial value, nothing is left over but the unused layer."""
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(torch.nan)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints here
            unet.load_old_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(
            "weights-mismatch", f"{name} does not fit this MonaiUNet ({_first_fault(error)}); use the checkpoint's sizes."
        ) from error
    missing = [key for key, value in unet.state_dict().items() if bool(torch.isnan(value).any())]
    unused = [key for key in tensors if key not in unet.state_dict() and ".proj_attn." not in key]
    if missing or unused:
        raise ConfigError(
            "weights-mismatch",
            f"{name} does not fit this MonaiUNet: {len(missing)} tensors missing or NaN, {len(unused)} left over, "
            f"such as {', '.join((missing + unused)[:3])}; use the checkpoint's sizes.",
        )


def _first_fault(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[1] if len(lines) > 1 else lines[0]).strip().rstrip(".")


@torch.no_grad()
def _check_probe(name: str, unet: MonaiUNet, x: Tensor, time: Tensor, expected: Tensor) -> None:
    was_training = unet.training
    difference = float((unet.eval()(x, time) - expected).abs().max())
    unet.train(was_training)
    if not difference <= PROBE_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ConfigError(
            "legacy-probe",
            f"{name} loads, but one forward pass differs from the old network's by {difference:.2g}; the settings differ.",
        )
