"""Seconds per image of Stable Diffusion as medaug runs it beside diffusers' own pipeline: the same weights, prompts, steps, size and batch.

Ours is what generation runs: keyed starts, prompts encoded once for all batches, the pipeline, luminance and the cohort's size. Theirs is one call
of `StableDiffusionPipeline` with the texts. The model is small and random, made here: what is measured is what surrounds the networks, which with
the published weights would take nearly all of the time. Both sides are timed in one process in interleaved pairs whose order alternates; the figure
is the median of the ratios of the pairs. Example:

    python benchmarks/text_to_image_speed.py --pairs 40
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import environment, record
from torch import Tensor

from medaug.cohort import Cohort
from medaug.draws import numpy_generator
from medaug.generation.stable_diffusion import StableDiffusionSampler, load_model, make_pipeline, make_stable_diffusion_sampler

NAME = "text_to_image_speed"
BAR = 1.0
CLASSES = ("no nodule", "a few nodules", "many nodules")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Templates:
    """Two texts per class, as of `medaug.prompts`."""

    def prompt(self, label: int, *key: str | int) -> str:
        """One of the two, by its key."""
        return self._of(label)[int(numpy_generator("prompt", *key).integers(2))]

    def all(self) -> tuple[str, ...]:
        """All six."""
        return tuple(text for label in range(len(CLASSES)) for text in self._of(label))

    def _of(self, label: int) -> tuple[str, str]:
        return CLASSES[label], f"a photo of {CLASSES[label]}"


def save_model(folder: Path, size: int) -> Path:
    """A Stable Diffusion of the published layout with few channels and random weights."""
    import json

    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    marks = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, **marks
    )
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=size // 8,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=4,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            sample_size=size,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder / "model"))
    return folder / "model"


def make_sides(sampler: StableDiffusionSampler, image_size: int, batch_size: int) -> dict[str, Callable[[int], Any]]:
    """ "ours" and "theirs": one batch each, by its number."""
    pipeline = make_pipeline(sampler.model.parts, from_images=False)

    def inputs(number: int) -> dict[str, Any]:
        ids = [f"s{number}-{i}" for i in range(batch_size)]
        return {"id": ids, "label": torch.arange(batch_size) % len(CLASSES), "shape": (image_size, image_size)}

    def ours(number: int) -> Tensor:
        return sampler(inputs(number))

    def theirs(number: int) -> np.ndarray:
        batch = inputs(number)
        texts = [sampler.prompt(int(label), name) for label, name in zip(batch["label"], batch["id"], strict=True)]
        options = {"num_inference_steps": sampler.num_inference_steps, "height": sampler.size, "width": sampler.size}
        found: np.ndarray = pipeline(texts, guidance_scale=sampler.guidance_scale, output_type="np", **options).images
        return found

    return {"ours": ours, "theirs": theirs}


def measure(sides: dict[str, Callable[[int], Any]], num_pairs: int, warmup: int, batch_size: int) -> dict[str, Any]:
    """Seconds per image of each side and the ratio ours / theirs, over `num_pairs` pairs after `warmup` discarded ones."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warmup + num_pairs):
        for name in sorted(sides, reverse=bool(index % 2)):
            start = time.perf_counter()
            sides[name](index)
            if index >= warmup:
                seconds[name].append((time.perf_counter() - start) / batch_size)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [float(value) for value in np.quantile(ratios, (0.25, 0.75))],
        "bar": BAR,
        "seconds_per_image_ours_median": statistics.median(seconds["ours"]),
        "seconds_per_image_theirs_median": statistics.median(seconds["theirs"]),
    }


def main() -> None:
    """Measure, write a row to benchmarks/results/text_to_image_speed.json, and print it."""
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pairs", type=int, default=40, help="measured pairs")
    parser.add_argument("--warmup", type=int, default=3, help="pairs that are not counted")
    parser.add_argument("--size", type=int, default=64, help="side at which the model works")
    parser.add_argument("--image-size", type=int, default=32, help="side of the cohort's images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()

    around = environment()
    cohort = Cohort(name="none", modality="", classes=CLASSES, ordinal=False, image_size=options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(save_model(Path(folder), options.size), cohort, weights_trusted=True)
    settings = {"size": options.size, "num_inference_steps": options.steps}
    sampler = make_stable_diffusion_sampler(settings, model, Templates(), cohort)
    row: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key != "no_record"},
        "guidance_scale": sampler.guidance_scale,
        **measure(make_sides(sampler, options.image_size, options.batch_size), options.pairs, options.warmup, options.batch_size),
        "parameters": sum(parameter.numel() for parameter in model.unet.parameters()),
        "torch_threads": torch.get_num_threads(),
        **around,
    }
    row["versions"] |= {name: version(name) for name in ("diffusers", "transformers")}
    if not options.no_record:
        record(row, NAME)
    print(
        f"ratio {row['ratio_median']:.3f} (quartiles {row['ratio_quartiles'][0]:.3f} to {row['ratio_quartiles'][1]:.3f}, bar {BAR}), "
        f"ours {row['seconds_per_image_ours_median']:.4f} s, theirs {row['seconds_per_image_theirs_median']:.4f} s per image"
    )


if __name__ == "__main__":
    main()
