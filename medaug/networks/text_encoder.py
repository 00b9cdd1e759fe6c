"""A CLIP-like text encoder from a local folder: frozen, kept out of the weights of the network it serves, never from the network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medaug import storage
from medaug.errors import ConfigError, DataError, MissingDependencyError
from medaug.networks.weights import read_metadata
from medaug.storage import sha256_file, sha256_json

_log = logging.getLogger(__name__)
OPTION = "text_encoder_dir"
WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
MAX_CACHED = 512  # contexts; 77 x 768 numbers are 236 kB


class LocalTransformersText(nn.Module):
    """Last hidden states of a frozen CLIP text model, padded or cut to its own length. The null context is that of the empty text.

    The model stays on the CPU and reads each distinct prompt once, alone, so that a context does not depend on its batch. It has no part in the
    state dict: a run records the sha256 of its files instead.

    Args:
        folder: of a text model with its tokenizer as `transformers` saves them, together or in ``text_encoder/`` and ``tokenizer/``.
        sha256: of `folder_digest`, if the files must be those of before.

    Raises:
        ConfigError: no folder (code `text-encoder-missing`), no such file in it (`text-encoder-file`), a pickle where safetensors belongs
            (`weights-pickle`), other files than recorded (`text-encoder-changed`), or files that cannot be read (`text-encoder-unreadable`).
        MissingDependencyError: `transformers` is not installed.
    """

    name = "local_text"
    takes_text = True

    def __init__(self, folder: Path | None, sha256: str | None = None) -> None:
        super().__init__()
        if folder is None:
            raise ConfigError("text-encoder-missing", f"The encoder {self.name} reads a local folder; name it in {OPTION}.")
        check_folder(folder)
        if sha256 is not None and folder_digest(folder) != sha256:
            raise ConfigError(
                "text-encoder-changed",
                f"The files in {OPTION} ({folder.name}) are not those that the network was trained with (sha256 differs).",
            )
        self._frozen = _Frozen(*_load(folder))
        self.dimension: int = self._frozen.dimension

    def encode(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Context (B, L, D) of B texts, on the CPU.

        Raises:
            ConfigError: class indices instead of texts.
        """
        if isinstance(prompts, Tensor):
            raise ConfigError(
                "condition-kind", "A text encoder reads prompts, got class indices; give prompts or use class_token."
            )
        return torch.stack([self._frozen(text) for text in prompts])

    def null_context(self, batch: int) -> Tensor:
        """The context of the empty text, (batch, L, D)."""
        return self._frozen("").expand(batch, -1, -1)


class _Frozen:
    """Tokenizer and model, hidden from `nn.Module`; copies of the network share it."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model.float().eval().requires_grad_(False)
        self.length, self.dimension = int(model.config.max_position_embeddings), int(model.config.hidden_size)
        self.contexts: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        return self

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        if text not in self.contexts:
            if len(self.tokenizer(text)["input_ids"]) > self.length:
                _say_cut(self.length)
            ids = self.tokenizer([text], padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
            context: Tensor = self.model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0]
            if len(self.contexts) >= MAX_CACHED:
                self.contexts.pop(next(iter(self.contexts)))
            self.contexts[text] = context.clone()  # a tensor made without gradients may still enter one
        return self.contexts[text]


@lru_cache(maxsize=8)
def _say_cut(length: int) -> None:
    """Once per process and length."""
    _log.warning("prompt-cut: a prompt has more than %d tokens; the rest of it is not read. Shorten prompts.", length)


def check_folder(folder: Path) -> None:
    """Refuse a folder without the files of a text encoder, before anything of it is read.

    Raises:
        ConfigError: see `LocalTransformersText`.
    """
    if not folder.is_dir():
        raise ConfigError(
            "text-encoder-missing",
            f"{OPTION} names {folder.name!r}, which is no folder here; put a CLIP text model there, nothing is downloaded.",
        )
    encoder, tokenizer = _parts(folder)
    if not (encoder / "config.json").is_file():
        raise _missing(encoder, "config.json")
    weights = sorted(encoder.glob("model*.safetensors"))
    if not (encoder / WEIGHTS).is_file() and not (encoder / SHARDS).is_file():
        if pickles := sorted(path.name for path in encoder.glob("*.bin")):
            raise ConfigError(
                "weights-pickle",
                f"{OPTION} holds {pickles[0]}, a pickled file which could run code, and no {WEIGHTS}; convert it to safetensors first.",
            )
        raise _missing(encoder, WEIGHTS)
    if not (encoder / WEIGHTS).is_file():
        _check_shards(encoder)
    for path in weights:
        read_metadata(path)  # refuses pickles, Git LFS pointers and truncated files by what they hold
    if not any(all((tokenizer / name).is_file() for name in names) for names in VOCABULARIES):
        raise _missing(tokenizer, "tokenizer.json (or vocab.json and merges.txt)")


def _check_shards(encoder: Path) -> None:
    """The index may name safetensors of its own folder only: those that are checked and digested."""
    try:
        shards = list(storage.read_json(encoder / SHARDS)["weight_map"].values())
        plain = bool(shards) and all(Path(name).name == name for name in shards)
    except (DataError, AttributeError, KeyError, TypeError, ValueError):
        shards, plain = [], False
    if pickles := sorted(name for name in shards if plain and name.endswith(".bin")):
        raise ConfigError(
            "weights-pickle",
            f"{OPTION} holds {pickles[0]}, a pickled file which could run code, among its shards; convert it to safetensors first.",
        )
    if not plain or not all(fnmatchcase(name, "model*.safetensors") for name in shards):
        raise ConfigError(
            "text-encoder-unreadable",
            f"{SHARDS} in {OPTION} does not list files model*.safetensors of its own folder; copy it again.",
        )
    if absent := sorted(name for name in shards if not (encoder / name).is_file()):
        raise _missing(encoder, absent[0])


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of the files that make an encoder what it is.

    Raises:
        ConfigError: see `check_folder`.
    """
    check_folder(folder)
    encoder, tokenizer = _parts(folder)
    files = {f"encoder/{path.name}": path for path in [encoder / "config.json", *encoder.glob("model*.safetensors*")]}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        files[f"tokenizer/{name}"] = tokenizer / name
    return sha256_json({name: sha256_file(path) for name, path in sorted(files.items()) if path.is_file()})


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where the model and where the tokenizer lies."""
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    return (encoder if encoder.is_dir() else folder, tokenizer if tokenizer.is_dir() else folder)


def _missing(folder: Path, name: str) -> ConfigError:
    return ConfigError("text-encoder-file", f"The folder {folder.name} of {OPTION} has no {name}; copy the whole model there.")


def _load(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "text-extra-missing", "A local text encoder needs `pip install -e '.[text]'` where medaug was checked out."
        ) from error
    encoder, tokenizer = _parts(folder)
    try:
        words = CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        model = CLIPTextModel.from_pretrained(str(encoder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(
            "text-encoder-unreadable",
            f"The files in {OPTION} ({folder.name}) are no CLIP text model with its tokenizer ({type(error).__name__}); copy it again.",
        ) from error
    return words, model
