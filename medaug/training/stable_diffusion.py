"""Fine-tuning Stable Diffusion on a cohort: U-Net only, on latents that the frozen autoencoder makes once per image.

Rombach et al. 2022, arXiv 2112.10752. The session, the checkpoints and the average are those of every other training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.diffusion.objective import WEIGHTINGS
from medaug.diffusion.parameterisation import PARAMETERISATIONS
from medaug.diffusion.schedule import NoiseSchedule
from medaug.draws import randn_batch
from medaug.errors import ConfigError
from medaug.networks.stable_diffusion import PromptSource, StableDiffusionParts, TextContexts, load_parts
from medaug.networks.stable_diffusion_folder import check_folder
from medaug.networks.tuned_unet import TunedUNet
from medaug.training.data import keep_mask, read_case
from medaug.training.diffusion import NoiseObjective, choose, optimise
from medaug.training.ema import ExponentialMovingAverage
from medaug.training.teacher import check_origin
from medaug.transforms.rgb import to_rgb

SETTINGS = "stable_diffusion"  # where a run's settings say what was fine-tuned
UNKNOWN_ORIGIN = "Nothing shows which images the base weights of Stable Diffusion were trained on; the user vouched that no held-out image was among them."


def load_trusted_parts(
    model_dir: str | Path | None,
    cohort: Cohort,
    weights_trusted: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionParts:
    """Check and load a Stable Diffusion folder that the user vouches for.

    Args:
        model_dir: the folder.
        cohort: whose held-out images it must not have seen.
        weights_trusted: the user's word: nothing in such a folder says what it was trained on.

    Raises:
        ConfigError: see `check_folder` and `load_parts`.
        LeakageError: without the user's word (code `fit-unknown`).
    """
    folder = check_folder(model_dir)
    check_origin(None, cohort, "The Stable Diffusion folder", weights_trusted)
    return load_parts(folder, device, dtype)


def check_size(size: int, parts: StableDiffusionParts) -> int:
    """The side of the images that the model works on.

    Raises:
        ConfigError: not a positive multiple of the side of a latent's cell (code `image-size-invalid`).
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % parts.stride:
        raise ConfigError("image-size-invalid", f"size must be a multiple of {parts.stride} pixels for this model, got {size!r}.")
    return size


def latent_objective(parts: StableDiffusionParts, weighting: Mapping[str, Any] | None = None) -> NoiseObjective:
    """The objective that the folder's scheduler was made for: its table of abar and its prediction type.

    Args:
        parts: of the model.
        weighting: ``weighting`` and ``weighting_options``; None is the plain error.

    Raises:
        ConfigError: an unknown prediction type, weighting or option.
    """
    chosen = dict(weighting or {})
    return NoiseObjective(
        parameterisation=choose("parameterisation", PARAMETERISATIONS, parts.scheduler.config.prediction_type),
        schedule=NoiseSchedule(parts.scheduler.alphas_cumprod),
        weighting=choose("weighting", WEIGHTINGS, chosen["weighting"], chosen.get("weighting_options"))
        if chosen.get("weighting")
        else None,
    )


class LatentCases(Dataset[dict[str, Any]]):
    """Training images as the Gaussians that the autoencoder makes of them, each encoded once and kept on the disk.

    Indexed by ``(iteration, position, case index)`` as `KeyedBatches` yields them. An image is encoded alone, so that its latents do
    not depend on the batch.

    Args:
        cohort: only its training split is used.
        parts: whose autoencoder encodes.
        size: side of the images in pixels.
        folder: where the latents are kept; a whole file is never made again.
    """

    def __init__(self, cohort: Cohort, parts: StableDiffusionParts, size: int, folder: Path | str) -> None:
        self.cohort, self.parts, self.size, self.folder = cohort, parts, check_size(size, parts), Path(folder)
        self.cases = list(cohort.training)
        self.key = storage.sha256_json([parts.folder.part_sha256("vae"), size, cohort.content_sha256])[:12]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        iteration, position, index = key
        case = self.cases[index]
        latents = self.latents(case)
        return {**latents, "label": case.label, "id": case.id, "iteration": iteration, "position": position}

    def latents(self, case: Case) -> dict[str, Tensor]:
        """``mean`` and ``std`` (4, h, w) of an image's latents, float32 on the CPU, not scaled."""
        path = self.folder / f"{case.id}-{self.key}.safetensors"
        if path.is_file():
            return safetensors.torch.load(path.read_bytes())
        found = self._encode(case)
        storage.write_bytes(path, safetensors.torch.save(found))
        return found

    @torch.no_grad()
    def _encode(self, case: Case) -> dict[str, Tensor]:
        vae: Any = self.parts.vae
        image = to_rgb(read_case(self.cohort, case)[None], self.size).contiguous()
        found = vae.encode(image.to(vae.device, vae.dtype)).latent_dist
        return {name: value[0].float().cpu().contiguous() for name, value in (("mean", found.mean), ("std", found.std))}


@dataclass
class LatentTextIteration:
    """One training step, given to `SupervisedTrainer(iteration_update=...)`; the trainer's inferer is `latent_objective`.

    L = E[lambda_t || eps - U(z_t, t, c) ||^2] with z_0 drawn from the autoencoder's Gaussian and scaled as its settings say. Every
    draw (latents, noise, level, prompt, drop) is keyed by (seed, iteration, position).

    Attributes:
        ema: updated after every step.
        scheduler: stepped after every step.
        contexts: texts to contexts.
        prompts: texts of the classes.
        latent_scale: of the autoencoder, .18215 for Stable Diffusion 1.
        seed: first part of every key.
        prompt_dropout: share of images whose prompt becomes the empty one (classifier-free guidance), per image.
        max_gradient_norm: clip.
    """

    ema: ExponentialMovingAverage
    scheduler: torch.optim.lr_scheduler.LRScheduler
    contexts: TextContexts
    prompts: PromptSource
    latent_scale: float
    seed: int = 0
    prompt_dropout: float = 0.1
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_dropout <= 1:
            raise ConfigError("prompt-dropout", f"prompt_dropout must lie in [0, 1], got {self.prompt_dropout!r}.")
        self.contexts.check_lengths(self.prompts.all())

    def texts(self, batch: Mapping[str, Any]) -> list[str]:
        """The prompt of every image of a batch, empty where it is dropped."""
        keys = _keys(batch)
        keep = keep_mask(self.prompt_dropout, [(self.seed, "drop", *key) for key in keys])
        drawn = [
            self.prompts.prompt(int(label), self.seed, "prompt", *key) for label, key in zip(batch["label"], keys, strict=True)
        ]
        return [text if kept else "" for text, kept in zip(drawn, keep.tolist(), strict=True)]

    def __call__(self, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Take one optimiser step. Returns the losses of the step.

        Raises:
            ConfigError: the loss is not finite (code `training-diverged`).
        """
        network, device, keys = engine.network, engine.state.device, _keys(batch)
        network.train()
        shape = batch["mean"].shape[1:]
        latents = batch["mean"] + batch["std"] * randn_batch(shape, keys, self.seed, "latents")
        noise = randn_batch(shape, keys, self.seed, "noise").to(device)
        level = engine.inferer.draw(self.seed, "level", keys, device)
        conditioned = partial(network, context=self.contexts(self.texts(batch)))
        loss = engine.inferer((self.latent_scale * latents).to(device), conditioned, noise=noise, level=level).mean()
        return optimise(engine, loss, keys[0][0], self)


def _keys(batch: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in zip(batch["iteration"], batch["position"], strict=True)]


def new_tuned_unet(parts: StableDiffusionParts, lora_rank: int | None, seed: int = 0) -> TunedUNet:
    """The model's U-Net, ready for fine-tuning: low-rank additions, or all weights for a rank of None."""
    return TunedUNet(parts.unet, lora_rank, seed)


def tuning_facts(parts: StableDiffusionParts, prompts: PromptSource, lora_rank: int | None, size: int) -> dict[str, Any]:
    """What ``run.json`` says of the model that was fine-tuned."""
    texts = sorted(set(prompts.all()))
    return {
        "base_sha256": parts.folder.weights_sha256(),
        "base_settings_sha256": parts.folder.settings_sha256(),
        "base_origin": UNKNOWN_ORIGIN,
        "lora_rank": lora_rank,
        "size": size,
        "prediction_type": str(parts.scheduler.config.prediction_type),
        "num_prompts": len(texts),
        "prompts_sha256": storage.sha256_json(texts),
    }
