"""The parts of Stable Diffusion from a checked local folder, and its text encoder with every prompt encoded once.

Rombach et al. 2022, arXiv 2112.10752. diffusers and transformers are optional (extra ``text``) and are imported when they are needed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medaug.errors import ConfigError, MissingDependencyError
from medaug.networks.stable_diffusion_folder import ModelFolder

CACHE_BYTES = 256 * 2**20

_log = logging.getLogger(__name__)


class PromptSource(Protocol):
    """Texts for classes."""

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Per class, in class order, the texts that may be drawn."""

    def prompt(self, label: int, *key: str | int) -> str:
        """The text of one image of class `label`, drawn by its key."""

    def all(self) -> tuple[str, ...]:
        """Every text that may be drawn."""


@dataclass(frozen=True, eq=False)
class StableDiffusionParts:
    """What a folder holds, in evaluation mode, without gradients.

    Attributes:
        unet: predicts from (latents (B, 4, h, w), timesteps (B,), context (B, L, D)).
        vae: images (B, 3, H, W) in [-1, 1] to latents and back.
        text_encoder, tokenizer: texts to contexts (1, L, D).
        scheduler: of diffusers; its table of abar and its prediction type are those that the U-Net was trained with.
        folder: where they come from.
    """

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: Any
    folder: ModelFolder

    @property
    def stride(self) -> int:
        """Side of an image divided by the side of its latents."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)  # type: ignore[union-attr, arg-type]


def load_parts(
    folder: ModelFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionParts:
    """Load all parts; safetensors only, files of the folder only.

    Raises:
        MissingDependencyError: the extra ``text`` is not installed (code `extra-missing`).
        ConfigError: a part cannot be read, or its weights are not all there (code `model-unloadable`).
    """
    diffusers, transformers = text_packages()
    readers: dict[str, tuple[Any, dict[str, Any]]] = {
        "unet": (diffusers.UNet2DConditionModel, {"torch_dtype": dtype, "use_safetensors": True}),
        "vae": (diffusers.AutoencoderKL, {"torch_dtype": dtype, "use_safetensors": True}),
        "text_encoder": (transformers.CLIPTextModel, {"torch_dtype": dtype, "use_safetensors": True}),
        "tokenizer": (transformers.CLIPTokenizer, {}),
        "scheduler": (getattr(diffusers, folder.scheduler), {}),
    }
    with _quiet(diffusers, transformers):
        parts = {name: _read(folder, name, reader, options) for name, (reader, options) in readers.items()}
    for name in folder.weights:
        parts[name] = parts[name].to(device).eval().requires_grad_(False)
    return StableDiffusionParts(folder=folder, **parts)


def text_packages() -> tuple[Any, Any]:
    """diffusers and transformers.

    Raises:
        MissingDependencyError: one of them, or peft, is not installed.
    """
    try:
        import diffusers
        import peft  # noqa: F401 - diffusers uses it for low-rank weights
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "extra-missing",
            "Stable Diffusion needs diffusers, transformers and peft; run `pip install -e '.[text]'` where medaug was checked out.",
        ) from error
    return diffusers, transformers


def _read(folder: ModelFolder, name: str, reader: Any, options: dict[str, Any]) -> Any:
    more: dict[str, Any] = {"output_loading_info": True} if name in folder.weights else {}
    try:
        found = reader.from_pretrained(str(folder.root / name), local_files_only=True, **options, **more)
    except Exception as error:  # noqa: BLE001 - settings and tensors of any kind may be wrong, and each library has its own errors
        raise ConfigError(
            "model-unloadable",
            f"The {name} of the model folder cannot be loaded ({type(error).__name__}: {_first_line(error)}); copy the folder again.",
        ) from error
    if not more:
        return found
    part, facts = found
    lacking = [*facts["missing_keys"], *facts["mismatched_keys"]]
    if lacking:
        raise ConfigError(
            "model-unloadable",
            f"The weights of the {name} lack or mistype {len(lacking)} tensor(s), such as {sorted(map(str, lacking))[0][:80]}; "
            "they would be random. Copy the folder again.",
        )
    return part


def _first_line(error: Exception) -> str:
    """No folder of the user's machine in a message."""
    words = (str(error).splitlines() or [""])[0].split()
    return " ".join(word if "/" not in word else "..." for word in words)[:120]


@contextmanager
def _quiet(*packages: Any) -> Iterator[None]:
    """Silences the loaders: what they warn of is refused, and the progress bar is ours."""
    loggers = [package.utils.logging for package in packages]
    before = [logger.get_verbosity() for logger in loggers]
    bars = [getattr(logger, "is_progress_bar_enabled", lambda: True)() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logging.CRITICAL)
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level, bar in zip(loggers, before, bars, strict=True):
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()


@dataclass(eq=False)
class TextContexts:
    """Texts to contexts; each distinct text is encoded once, alone, and kept while it fits in `CACHE_BYTES`.

    Attributes:
        parts: tokenizer and text encoder.
        encoded: how often the encoder ran.
    """

    parts: StableDiffusionParts
    encoded: int = 0
    _cache: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, repr=False)

    @property
    def max_tokens(self) -> int:
        """Tokens that the encoder takes, the marks of beginning and end included."""
        return int(min(self.parts.tokenizer.model_max_length, self.parts.text_encoder.config.max_position_embeddings))  # type: ignore[union-attr, arg-type]

    def check_lengths(self, texts: Collection[str]) -> int:
        """Say once how many of these texts are longer than the encoder takes; they are cut. Returns their number."""
        tokenize: Callable[..., Any] = self.parts.tokenizer
        counts = [len(tokenize(text, verbose=False).input_ids) for text in dict.fromkeys(texts)]
        long = [count for count in counts if count > self.max_tokens]
        if long:
            _log.warning(
                "prompt-too-long: %d of %d prompt(s) have up to %d tokens, the text encoder takes %d; what is over is cut off.",
                len(long),
                len(counts),
                max(long),
                self.max_tokens,
            )
        return len(long)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Contexts (B, L, D) of B texts, on the encoder's device and in its dtype."""
        found = {text: self._cache[text] if text in self._cache else self._encode(text) for text in dict.fromkeys(texts)}
        for text, context in found.items():
            self._cache[text] = context
            self._cache.move_to_end(text)
        size = next(iter(found.values())).nbytes
        while len(self._cache) > max(1, CACHE_BYTES // size):
            self._cache.popitem(last=False)
        return torch.stack([found[text] for text in texts])

    def _encode(self, text: str) -> Tensor:
        self.encoded += 1
        encoder: Any = self.parts.text_encoder
        tokens = self.parts.tokenizer(
            text, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
        context: Tensor = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0][0]
        return context
