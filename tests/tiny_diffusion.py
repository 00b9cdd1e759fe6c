"""Stable Diffusion at its smallest, random weights, saved as diffusers saves it; images of 16 px, latents of 8."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medaug.draws import numpy_generator

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,"
TOKENS = 20
SIZE = 16


def save_model(folder: Path, seed: int = 0) -> Path:
    """Write the folder; the same seed gives the same weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = {text: index for index, text in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS)])}
    start, end = len(vocabulary), len(vocabulary) + 1
    vocabulary |= {"<|startoftext|>": start, "<|endoftext|>": end}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=SIZE,
        )
        config = CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(vocabulary),
            max_position_embeddings=TOKENS,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
        text_encoder = CLIPTextModel(config)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder / "model"))
    return folder / "model"


@dataclass(frozen=True)
class TwoTemplates:
    """The interface of `medaug.prompts`: two texts per class."""

    classes: tuple[str, ...]

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(self._of, range(len(self.classes))))

    def prompt(self, label: int, *key: str | int) -> str:
        return self._of(label)[int(numpy_generator("two", *key).integers(2))]

    def all(self) -> tuple[str, ...]:
        return tuple(text for label in range(len(self.classes)) for text in self._of(label))

    def _of(self, label: int) -> tuple[str, str]:
        return self.classes[label], f"a {self.classes[label]}"


@contextmanager
def no_network() -> Iterator[list[Any]]:
    """Every attempt to reach another machine fails and is noted."""
    tried: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(args[-1:])
        raise OSError("the network is blocked in this test")

    before = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    lookup = socket.getaddrinfo
    try:
        for name in before:
            setattr(socket.socket, name, refuse)
        socket.getaddrinfo = refuse  # type: ignore[assignment]
        yield tried
    finally:
        for name, original in before.items():
            setattr(socket.socket, name, original)
        socket.getaddrinfo = lookup
