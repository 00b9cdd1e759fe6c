"""Conditions as tokens: class indices or prompts become a context (B, L, D) that a U-Net attends to."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medaug.errors import ConfigError
from medaug.networks.text_encoder import LocalTransformersText, folder_digest

_log = logging.getLogger(__name__)
# A word, or one sign that is neither letter nor blank: "grade+" and "grade-" must not be the same.
_WORDS = re.compile(r"\w+|[^\w\s]")


class ConditionEncoder(Protocol):
    """What a network asks of the thing that reads its conditions.

    Attributes:
        dimension: D of the context.
        takes_text: True reads prompts, False class indices.
    """

    dimension: int
    takes_text: bool

    def encode(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Context (B, L, D) of B prompts, or of class indices (B,); equal conditions give equal contexts."""

    def null_context(self, batch: int) -> Tensor:
        """The context (B, L, D) of no condition at all."""


class ClassToken(nn.Module):
    """A few learned tokens per class, and a row of their own for NULL.

    Args:
        num_classes: K; index K is NULL.
        dimension: D.
        tokens: L.

    Raises:
        ConfigError: a size below 1.
    """

    name = "class_token"
    takes_text = False

    def __init__(self, num_classes: int, dimension: int = 64, tokens: int = 1) -> None:
        super().__init__()
        _check_sizes(num_classes=num_classes, dimension=dimension, tokens=tokens)
        self.num_classes, self.dimension, self.tokens = num_classes, dimension, tokens
        self.embedding = nn.Embedding(num_classes + 1, tokens * dimension)

    def encode(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Tokens (B, L, D) of class indices (B,) in [0, K].

        Raises:
            ConfigError: texts instead of indices, or an index out of range.
        """
        if not isinstance(prompts, Tensor):
            raise ConfigError(
                "condition-kind", "Class tokens read class indices, not prompts; leave prompts out or use hashed_text."
            )
        if prompts.numel() and not 0 <= int(prompts.min()) <= int(prompts.max()) <= self.num_classes:
            raise ConfigError("condition-kind", f"Class indices must lie in [0, {self.num_classes}], where the last is NULL.")
        rows: Tensor = self.embedding(prompts.to(self.embedding.weight.device))
        return rows.reshape(len(prompts), self.tokens, self.dimension)

    def null_context(self, batch: int) -> Tensor:
        """The NULL row, (batch, L, D)."""
        return self.encode(torch.full((batch,), self.num_classes, device=self.embedding.weight.device))


class HashedText(nn.Module):
    """Any text without a vocabulary: words and character trigrams are hashed to rows of a learned embedding.

    Words come first and trigrams behind them, so that a prompt that is cut loses trigrams before words. Each token is its row plus a sinusoidal
    position (Vaswani et al. 2017, section 3.5); what is left of the L places is zero. Trigrams as in fastText (Bojanowski et al. 2017), hashing as in
    Weinberger et al. 2009.

    Args:
        dimension: D, even.
        length: L, the most tokens of a prompt.
        vocabulary: V, rows of the embedding.

    Raises:
        ConfigError: a size below 1, or an odd D.
    """

    name = "hashed_text"
    takes_text = True

    def __init__(self, dimension: int = 64, length: int = 32, vocabulary: int = 4096) -> None:
        super().__init__()
        _check_sizes(dimension=dimension, length=length, vocabulary=vocabulary)
        if dimension % 2:
            raise ConfigError("conditioning-size", f"dimension must be even for sinusoidal positions, got {dimension}.")
        self.dimension, self.length, self.vocabulary = dimension, length, vocabulary
        self.embedding = nn.Embedding(vocabulary, dimension)
        self.null = nn.Parameter(torch.randn(length, dimension))

    def encode(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Context (B, L, D) of B texts.

        Raises:
            ConfigError: class indices instead of texts.
        """
        if isinstance(prompts, Tensor):
            raise ConfigError("condition-kind", "Hashed text reads prompts, got class indices; give prompts or use class_token.")
        distinct = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        device = self.embedding.weight.device
        ids = torch.full((len(distinct), self.length), -1, dtype=torch.long)
        for text, row in distinct.items():
            found = self._ids(text)
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.long)
        ids = ids.to(device)
        tokens = self.embedding(ids.clamp(min=0)) + sinusoidal_positions(self.length, self.dimension).to(device)
        context = tokens * (ids >= 0).unsqueeze(-1)
        return context[torch.tensor([distinct[text] for text in prompts], dtype=torch.long, device=device)]

    def null_context(self, batch: int) -> Tensor:
        """The learned context of no prompt, (batch, L, D)."""
        return self.null.expand(batch, -1, -1)

    def _ids(self, text: str) -> tuple[int, ...]:
        found = hashed_tokens(text, self.vocabulary)
        if len(found) > self.length:
            _say_cut(self.length)
        return found[: self.length]


@lru_cache(maxsize=4096)
def hashed_tokens(text: str, vocabulary: int) -> tuple[int, ...]:
    """Rows of the words of a text, then of their distinct trigrams, each in the order of the text.

    A word is a run of letters and digits, or one other sign, after NFKC and lower-casing; "<" and ">" mark its ends in its trigrams. The row is
    blake2b, 8 bytes, little endian, of "w:" + word or "t:" + trigram, modulo `vocabulary`: the same on every machine.
    """
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).lower())
    marked = [f"<{word}>" for word in words]
    trigrams = dict.fromkeys(word[i : i + 3] for word in marked for i in range(len(word) - 2))
    return tuple(_row(token, vocabulary) for token in [*(f"w:{word}" for word in words), *(f"t:{part}" for part in trigrams)])


def _row(token: str, vocabulary: int) -> int:
    return int.from_bytes(blake2b(token.encode(), digest_size=8).digest(), "little") % vocabulary


@lru_cache(maxsize=8)
def _say_cut(length: int) -> None:
    """Once per process and length."""
    _log.warning(
        "prompt-cut: a prompt has more than %d words and trigrams; the rest of it is not read. Shorten prompts, or raise length.",
        length,
    )


@lru_cache(maxsize=8)
def sinusoidal_positions(length: int, dimension: int) -> Tensor:
    """Sines, then cosines, of 0 .. length - 1 at dimension / 2 periods: (length, dimension)."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(dimension // 2) / (dimension // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(
                "conditioning-size", f"{name} of the condition encoder must be a whole number of at least 1, got {size!r}."
            )


Builder = Callable[[int, Path | None, Mapping[str, Any]], nn.Module]


def _without_folder(build: Callable[[int, Mapping[str, Any]], nn.Module]) -> Builder:
    def checked(num_classes: int, folder: Path | None, options: Mapping[str, Any]) -> nn.Module:
        if folder is not None:
            raise ConfigError(
                "text-encoder-option",
                "text_encoder_dir is read by the encoder local_text only; leave it out or choose that encoder.",
            )
        return build(num_classes, options)

    return checked


ENCODERS: dict[str, Builder] = {
    ClassToken.name: _without_folder(lambda num_classes, options: ClassToken(num_classes, **options)),
    HashedText.name: _without_folder(lambda num_classes, options: HashedText(**options)),
    LocalTransformersText.name: lambda num_classes, folder, options: LocalTransformersText(folder, **options),
}


def build_condition_encoder(
    settings: Mapping[str, Any], num_classes: int, text_encoder_dir: str | Path | None = None
) -> nn.Module:
    """A `ConditionEncoder` from plain settings.

    Args:
        settings: ``encoder``, a name in `ENCODERS`, and ``options``, its arguments.
        num_classes: K.
        text_encoder_dir: folder of the encoder local_text.

    Raises:
        ConfigError: an unknown name (code `encoder-unknown`) or option (`setting-unknown`); what the encoder refuses.
    """
    unknown = set(settings) - {"encoder", "options"}
    name = settings.get("encoder", HashedText.name)
    if unknown or name not in ENCODERS:
        what = f"unknown setting(s) {sorted(unknown)}" if unknown else repr(name)
        raise ConfigError(
            "encoder-unknown", f"Conditioning takes options and an encoder, one of {', '.join(ENCODERS)}; got {what}."
        )
    folder = None if text_encoder_dir is None else Path(text_encoder_dir)
    try:
        return ENCODERS[name](num_classes, folder, settings.get("options") or {})
    except TypeError as error:
        raise ConfigError("setting-unknown", f"The condition encoder {name} does not take these options: {error}.") from error


def with_conditioning(
    network_settings: Mapping[str, Any], conditioning_settings: Mapping[str, Any], text_encoder_dir: str | Path | None = None
) -> dict[str, Any]:
    """Settings of a network that learns of the class by its context alone, whatever a profile says of class embeddings.

    Args:
        network_settings: see `medaug.networks.build.build_guided_unet`.
        conditioning_settings: see `build_condition_encoder`.
        text_encoder_dir: its files' sha256 goes into the settings, its path does not.

    Raises:
        ConfigError: the folder lacks a file.
    """
    options = dict(conditioning_settings.get("options") or {})
    if text_encoder_dir is not None and conditioning_settings.get("encoder") == LocalTransformersText.name:
        options["sha256"] = folder_digest(Path(text_encoder_dir))
    conditioning = {**conditioning_settings, "options": options}
    return {**network_settings, "class_conditional": False, "conditioning": conditioning}
