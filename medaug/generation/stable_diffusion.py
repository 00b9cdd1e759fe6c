"""Stable Diffusion as a sampler of the generation session: text to image, and image to image from training images.

The loop is diffusers' own; starts, noise and prompts are keyed, lineage, resuming and tracking are those of all generation.
Rombach et al. 2022, arXiv 2112.10752; image to image is SDEdit (Meng et al. 2022, arXiv 2108.01073) in the latent space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medaug import storage
from medaug.cohort import Cohort, fit_sha256
from medaug.draws import randn_batch, torch_generator
from medaug.errors import ConfigError, DataError
from medaug.generation.generate import check_run
from medaug.generation.plan import PlannedCase
from medaug.networks.stable_diffusion import PromptSource, StableDiffusionParts, TextContexts, text_packages
from medaug.networks.tuned_unet import TunedUNet
from medaug.networks.weights import load_weights
from medaug.prompts import check_readable
from medaug.training.run_folder import WEIGHTS_FILE, RunRecord, new_record, read_run
from medaug.training.stable_diffusion import SETTINGS, UNKNOWN_ORIGIN, check_size, load_trusted_parts
from medaug.transforms.rgb import from_rgb, to_rgb


@dataclass(frozen=True, eq=False)
class TextToImageModel:
    """A model folder, perhaps fine-tuned, and what is known of it.

    Attributes:
        parts: of the model, with the fine-tuned weights merged in.
        record: of the generator: its weights are those of the folder and of the run, its groups those of the run, none without one.
        facts: for settings and lineage.
    """

    parts: StableDiffusionParts
    record: RunRecord
    facts: Mapping[str, Any]

    @property
    def unet(self) -> nn.Module:
        """The network of the evaluator."""
        return self.parts.unet

    @property
    def notes(self) -> dict[str, Any]:
        """What travels with the images."""
        return {"generator": UNKNOWN_ORIGIN}


def load_model(
    model_dir: str | Path | None,
    cohort: Cohort,
    run_dir: str | Path | None = None,
    weights_trusted: bool = False,
    device: torch.device | str = "cpu",
    bundle: str = "text_to_image",
) -> TextToImageModel:
    """Load Stable Diffusion, float16 on CUDA and float32 elsewhere.

    Args:
        model_dir: a folder as diffusers saves it, see `medaug.networks.stable_diffusion_folder.check_folder`.
        cohort: real cohort that images are made for.
        run_dir: folder of a fine-tuning on this cohort; None takes the folder as it is.
        weights_trusted: the user's word that the folder's own weights saw no held-out image.
        bundle: name in the record of a folder that was not fine-tuned.

    Raises:
        ConfigError: a folder that cannot be used; a run that fine-tuned another model (code `model-other`).
        DataError: no finished run.  LeakageError: no word for the base weights, or a run that saw a held-out group.
    """
    run = None if run_dir is None else read_run(Path(run_dir))
    if run is not None:
        check_run(run, cohort)
    half = torch.device(device).type == "cuda"
    parts = load_trusted_parts(model_dir, cohort, weights_trusted, device, torch.float16 if half else torch.float32)
    base = {"base_sha256": parts.folder.weights_sha256(), "base_settings_sha256": parts.folder.settings_sha256()}
    if run is None or run_dir is None:
        known = new_record(bundle, cohort, {SETTINGS: base}, 0)
        record = replace(known, fit_groups=(), fit_on=fit_sha256(()), weights_sha256=base["base_sha256"])
        return TextToImageModel(parts, record, {**base, "tuned_sha256": None})
    parts = replace(parts, unet=_tuned(parts, Path(run_dir), run, base))
    record = replace(run, weights_sha256=parts.folder.weights_sha256(Path(run_dir) / WEIGHTS_FILE))
    return TextToImageModel(parts, record, {**base, "tuned_sha256": run.weights_sha256})


def _tuned(parts: StableDiffusionParts, folder: Path, run: RunRecord, base: Mapping[str, str]) -> nn.Module:
    facts = run.settings.get(SETTINGS)
    if not isinstance(facts, Mapping) or "lora_rank" not in facts:
        raise ConfigError(
            "run-malformed",
            f"The run {folder.name} did not fine-tune Stable Diffusion; name one of the overlay finetune, or set run_dir to null for the "
            "model as it is.",
        )
    if any(facts.get(name) != value for name, value in base.items()):
        raise ConfigError(
            "model-other",
            f"The run {folder.name} fine-tuned another model than the one in model_dir (weights or settings differ); name the folder it began from.",
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise DataError("weights-missing", f"{WEIGHTS_FILE} is missing from {folder.name}; train again.")
    network = TunedUNet(parts.unet, facts["lora_rank"])
    load_weights(path, network, {"num_classes": str(len(run.classes))}, sha256=run.weights_sha256)
    return network.to(next(parts.vae.parameters()).device).merged()


@dataclass(frozen=True, eq=False)
class StableDiffusionSampler:
    """Images by prompts. The `inferer` of the overlay ``stable_diffusion.yaml``.

    Attributes:
        model: what samples.
        prompts: texts of the classes; an image draws one by its id.
        channels: of the cohort.
        negative_prompt: what guidance leads away from.
        guidance_scale: classifier-free scale; 1 is off.
        num_inference_steps: of the folder's scheduler.
        size: side in pixels at which the model works; the result has the cohort's.
        strength: None makes images from noise; in (0, 1] noise is put on a training image and the share `strength` of the steps is run.
        seed: with the id of an image it decides every draw.

    Raises:
        ConfigError: a value out of range.
    """

    model: TextToImageModel
    prompts: PromptSource
    channels: int
    negative_prompt: str = ""
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    size: int = 512
    strength: float | None = None
    seed: int = 0
    contexts: TextContexts = field(init=False, repr=False)
    pipeline: Any = field(init=False, repr=False)

    fit_groups = ()  # nothing guides it but its own text

    def __post_init__(self) -> None:
        check_size(self.size, self.model.parts)
        _check_values(self.guidance_scale, self.num_inference_steps, self.strength)
        if not isinstance(self.negative_prompt, str):
            raise ConfigError("negative-prompt", f"negative_prompt must be a text, got {self.negative_prompt!r}.")
        check_readable(self.negative_prompt)
        contexts = TextContexts(self.model.parts)
        contexts.check_lengths((*self.prompts.all(), self.negative_prompt))
        object.__setattr__(self, "contexts", contexts)  # the way into a frozen dataclass
        object.__setattr__(self, "pipeline", make_pipeline(self.model.parts, self.strength is not None))

    @property
    def keeps_geometry(self) -> bool:
        """A changed training image lies where it lay."""
        return self.strength is not None

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        parts = self.model.parts
        return {
            **{name: getattr(self, name) for name in (*SAMPLER_SETTINGS, "seed")},
            "scheduler": parts.folder.scheduler,
            "dtype": str(next(parts.unet.parameters()).dtype).removeprefix("torch."),
            "prompts_sha256": storage.sha256_json(sorted(set(self.prompts.all()))),
            **self.model.facts,
        }

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again, but for the folder of the model."""
        settings = {name: getattr(self, name) for name in SAMPLER_SETTINGS}
        texts = [list(choices) for choices in self.prompts.texts]
        return {"stable_diffusion_settings": settings, "prompts": texts, "weights_trusted": True}  # nothing untrusted was loaded

    def prompt(self, label: int, name: str) -> str:
        """The text of the image `name`."""
        return self.prompts.prompt(label, self.seed, "prompt", name)

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        start = {} if self.strength is None else {"strength": self.strength, "variation": planned.variation}
        return {
            "guidance": {"scale": self.guidance_scale},
            "noise": {},
            "prompt": self.prompt(planned.label, planned.id),
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            **start,
            "generator_trusted": True,  # on the user's word: without it nothing was loaded
            "sampler": self.settings(),
        }

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], network: nn.Module | None = None) -> Tensor:
        """Sample one image per entry.

        Args:
            inputs: ``id`` (list of str: keys of noise and prompt), ``label`` (B,), ``shape`` of the result, and for image to image
                ``reference`` (callable i -> (C, H, W) tensor in [-1, 1]).
            network: the pipeline's own U-Net.

        Returns:
            Images (B, C, H, W) in [-1, 1].
        """
        ids = list(inputs["id"])
        texts = [self.prompt(int(label), name) for label, name in zip(inputs["label"], ids, strict=True)]
        options = self._start(inputs, ids) | {
            "prompt_embeds": self.contexts(texts),
            "negative_prompt_embeds": self.contexts([self.negative_prompt] * len(ids)),
            "guidance_scale": float(self.guidance_scale),
            "num_inference_steps": self.num_inference_steps,
            "generator": [torch_generator(self.seed, "steps", name) for name in ids],
            "output_type": "pt",
        }
        unit = self.pipeline(**options).images  # (B, 3, size, size) in [0, 1]
        return from_rgb(unit.float(), self.channels, int(inputs["shape"][0])) * 2 - 1

    def _start(self, inputs: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
        unet: Any = self.model.unet
        weight = next(unet.parameters())
        if self.strength is None:
            side = self.size // self.model.parts.stride
            shape = (unet.config.in_channels, side, side)
            latents = randn_batch(shape, ids, self.seed, "start").to(weight)
            return {"latents": latents, "height": self.size, "width": self.size}
        images = torch.stack([inputs["reference"](i) for i in range(len(ids))])
        return {"image": (to_rgb(images, self.size) + 1) / 2, "strength": self.strength}


SAMPLER_SETTINGS = tuple(
    item.name
    for item in fields(StableDiffusionSampler)
    if item.init and item.name not in ("model", "prompts", "channels", "seed")
)


def make_stable_diffusion_sampler(
    settings: Mapping[str, Any], model: TextToImageModel, prompts: PromptSource, cohort: Cohort, seed: int = 0
) -> StableDiffusionSampler:
    """A `StableDiffusionSampler` from the plain settings of a config; None leaves a default.

    Raises:
        ConfigError: an unknown setting or a value out of range.
    """
    unknown = set(settings) - set(SAMPLER_SETTINGS)
    if unknown:
        raise ConfigError(
            "setting-unknown", f"Unknown Stable Diffusion setting(s) {sorted(unknown)}; known are {sorted(SAMPLER_SETTINGS)}."
        )
    given = {name: value for name, value in settings.items() if value is not None}
    return StableDiffusionSampler(model=model, prompts=prompts, channels=cohort.channels, seed=seed, **given)


def make_pipeline(parts: StableDiffusionParts, from_images: bool) -> Any:
    """diffusers' pipeline over these parts, without the filter that blacks out photographs."""
    diffusers, _ = text_packages()
    pipeline = (diffusers.StableDiffusionImg2ImgPipeline if from_images else diffusers.StableDiffusionPipeline)(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_values(guidance_scale: float, num_inference_steps: int, strength: float | None) -> None:
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float) or not 1 <= guidance_scale < math.inf:
        raise ConfigError("guidance-scale", f"guidance_scale must be a number of at least 1 (1 is off), got {guidance_scale!r}.")
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ConfigError(
            "num-inference-steps", f"num_inference_steps must be a whole number of at least 1, got {num_inference_steps!r}."
        )
    if strength is None:
        return
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ConfigError(
            "strength-range", f"strength must be a number in (0, 1], or null for images from noise, got {strength!r}."
        )
    if int(num_inference_steps * strength) < 1:
        raise ConfigError(
            "strength-empty",
            f"strength {strength:g} leaves none of the {num_inference_steps} steps; use at least {1 / num_inference_steps:.2g}.",
        )
