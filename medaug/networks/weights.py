"""Weight files: safetensors, the same bytes for the same weights, and a clear refusal of everything else.

Nothing is unpickled, except by `read_tensors(allow_torch=True)`, which goes through torch's weights-only reader.
"""

from __future__ import annotations

import hmac
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from medaug.errors import ConfigError
from medaug.storage import sha256_bytes, sha256_file, write_bytes

_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, little endian
_NESTED_STATES = ("state_dict", "model_state_dict", "model", "network")
_UNPICKLING_FAULTS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
    TypeError,
    OSError,
)


def save_weights(path: str | Path, weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write weights to `path` atomically; the same weights and metadata always give the same bytes.

    Args:
        path: file to write, by habit ``*.safetensors``.
        weights: a module or its state dict. Tied and non-contiguous tensors are written as plain copies.
        metadata: short texts to keep with the weights, for example ``{"num_classes": "3"}``; read by `load_weights`.

    Returns:
        sha256 of the file.

    Raises:
        ConfigError: a weight is NaN or infinite.
        StorageError: the file cannot be written.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: state[name].detach().to("cpu", copy=True).contiguous() for name in sorted(state)}
    _check_finite(tensors, Path(path).name)
    data = _with_metadata(save(tensors), {} if metadata is None else metadata)
    write_bytes(Path(path), data)
    return sha256_bytes(data)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a weights file, without reading its tensors.

    Raises:
        ConfigError: no readable safetensors file.
    """
    with _opened(Path(path)) as stream:
        return dict(stream.metadata() or {})


def load_weights(
    path: str | Path, module: nn.Module, expect: Mapping[str, Any] | None = None, sha256: str | None = None
) -> dict[str, str]:
    """Load a file of `save_weights` into `module`; the module is changed only after every check has passed.

    Args:
        path: the safetensors file.
        module: must have exactly the tensors of the file, in name and shape.
        expect: metadata that the file must carry, compared as text, for example ``{"num_classes": 4}``.
        sha256: hex digest that the file must have.

    Returns:
        The file's metadata.

    Raises:
        ConfigError: missing, truncated, pickled, an LFS pointer, other digest, other metadata, other tensors, NaN or infinity.
    """
    path = Path(path)
    own = module.state_dict()
    with _opened(path) as stream:
        if sha256 is not None and not hmac.compare_digest(sha256_file(path), sha256.lower()):
            raise ConfigError(
                "weights-digest", f"{path.name} is not the weights file it should be: its sha256 differs; restore or retrain it."
            )
        metadata = dict(stream.metadata() or {})
        _check_metadata(path.name, metadata, {} if expect is None else expect)
        _check_tensors(path.name, stream, own)
        tensors = {name: stream.get_tensor(name) for name in own}
    _check_finite(tensors, path.name)
    module.load_state_dict(tensors)
    return metadata


def read_tensors(path: str | Path, allow_torch: bool = False) -> dict[str, Tensor]:
    """All tensors of a weights file, for checkpoints that other programs wrote.

    Args:
        path: a safetensors file, or with `allow_torch` a torch file, read by ``torch.load(weights_only=True)``.
        allow_torch: accept torch files.

    Raises:
        ConfigError: unreadable, other content than tensors, NaN or infinity.
    """
    path = Path(path)
    if allow_torch and _looks_pickled(_head(path)):
        tensors = _read_torch(path)
    else:
        with _opened(path) as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    _check_finite(tensors, path.name)
    return tensors


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Put sorted metadata into the header of safetensors bytes: the library itself writes it in no fixed order."""
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = {"__metadata__": {key: str(metadata[key]) for key in sorted(metadata)}} if metadata else {}
    header.update(json.loads(data[_LENGTH_BYTES:start]))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned to 8 bytes
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + data[start:]


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(64)
    except FileNotFoundError as error:
        raise ConfigError(
            "weights-missing", f"The weights file {path.name} is not there; train the bundle or name another run."
        ) from error
    except OSError as error:
        raise ConfigError("weights-unreadable", f"The weights file {path.name} cannot be read ({error.strerror}).") from error


def _looks_pickled(head: bytes) -> bool:
    """True for a zip (torch.save today) or a bare pickle; a safetensors header always starts with a brace at byte 8."""
    return head.startswith(b"PK\x03\x04") or (head.startswith(b"\x80") and head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{")


def _opened(path: Path) -> Any:
    """The safetensors file, open, after the checks that give a better message than the library's."""
    head = _head(path)
    if head.startswith(b"version https://git-lfs"):
        raise ConfigError(
            "weights-lfs-pointer", f"{path.name} is a Git LFS pointer, not the weights themselves; run `git lfs pull`."
        )
    if _looks_pickled(head):
        raise ConfigError(
            "weights-pickle", f"{path.name} is a pickled torch file, which could run code; convert it to safetensors first."
        )
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            "weights-unreadable",
            f"{path.name} is no whole safetensors file: truncated or of another kind; copy or train it again.",
        ) from error


def _check_metadata(name: str, metadata: Mapping[str, str], expect: Mapping[str, Any]) -> None:
    for key, wanted in expect.items():
        found = metadata.get(key)
        if found == str(wanted):
            continue
        if found is None:
            raise ConfigError(
                "weights-metadata", f"{name} does not say its {key}, {wanted} is needed; use weights that medaug wrote."
            )
        if key == "num_classes":
            raise ConfigError(
                "weights-classes", f"{name} was made for {found} classes, this cohort has {wanted}; train on this cohort."
            )
        raise ConfigError(
            "weights-metadata", f"{name} was made with {key} {found}, {wanted} is needed; use the run that fits or train again."
        )


def _check_tensors(name: str, stream: Any, own: Mapping[str, Tensor]) -> None:
    """Names and shapes, before any tensor is read, so that a foreign file cannot fill the memory."""
    found = set(stream.keys())
    faults = [f"{key} is missing" for key in sorted(own.keys() - found)]
    faults += [f"{key} is unknown" for key in sorted(found - own.keys())]
    for key in sorted(found & own.keys()):
        shape = tuple(stream.get_slice(key).get_shape())
        if shape != tuple(own[key].shape):
            faults.append(f"{key} is {shape} instead of {tuple(own[key].shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ConfigError("weights-mismatch", f"{name} was made for another network: {'; '.join(faults[:3])}{more}.")


def _check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                "weights-not-finite", f"{name} holds NaN or infinite numbers in {key}: training diverged or the file is damaged."
            )


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as stream:  # given a path, torch would go by the suffix of its name
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except _UNPICKLING_FAULTS as error:
        raise ConfigError(
            "weights-unreadable",
            f"{path.name} is no torch file of plain tensors (weights_only); save its state dict as safetensors.",
        ) from error
    for key in _NESTED_STATES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(
            "weights-unreadable", f"{path.name} does not hold a state dict of tensors; save `network.state_dict()` alone."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}
