"""From noise to an image of a prompt: a context per image, classifier-free guidance away from the null context or a negative prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from medaug import storage
from medaug.errors import ConfigError
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.generation.guides import check_scale
from medaug.generation.plan import PlannedCase
from medaug.generation.sampler import GuidedSampler, check_settings
from medaug.networks.conditioning import ClassToken
from medaug.networks.guided_unet import GuidedUNet
from medaug.prompts import Prompts, check_readable, make_prompts
from medaug.training.diffusion import NoiseObjective
from medaug.training.run_folder import RunRecord


@dataclass
class PromptedSampler(GuidedSampler):
    """Images of prompts. The `inferer` of the bundle `text_to_image`; what it does not name is as for `GuidedSampler`.

    Attributes:
        guidance_scale: classifier-free scale w on the prompt, e = e_u + w (e_c - e_u), both passes in one batch; 1 leaves out the one without.
        prompts: of each class; an image's is drawn by (seed, its id). A network with class tokens reads the class and none of them.
        negative_prompt: what the pass without the prompt reads; None is the null context.

    Raises:
        ConfigError: as for `GuidedSampler`; a negative prompt that is empty, or at w = 1, where no pass would read it.
    """

    bottleneck_scale: float = 0.0
    prompts: Prompts = field(default_factory=lambda: Prompts(()))
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.guidance_scale, "guidance_scale")
        if self.negative_prompt is not None:
            if not isinstance(self.negative_prompt, str) or not self.negative_prompt.strip():
                raise ConfigError(
                    "prompt-empty", "The negative prompt is empty or no text; leave it out to lead away from the null context."
                )
            check_readable(self.negative_prompt)
        if self.negative_prompt is not None and self.guidance_scale == 1:
            raise ConfigError(
                "negative-prompt-unread",
                "At guidance_scale 1 nothing leads away from a negative prompt; raise the scale or leave it out.",
            )

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler; of the prompts their sha256."""
        found = {name: value for name, value in super().settings().items() if not name.startswith("bottleneck_")}
        return found | {"negative_prompt": self.negative_prompt, "prompts_sha256": storage.sha256_json(self.prompts.texts)}

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again; what names a file of prompts is replaced by the prompts."""
        texts = [list(choices) for choices in self.prompts.texts]
        return super().knobs() | {"negative_prompt": self.negative_prompt, "prompts": texts}

    def prompt(self, label: int, name: str) -> str:
        """The prompt of the image `name` of class index `label`."""
        return self.prompts.prompt(label, self.seed, name)

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        return {
            "guidance": {"scale": self.guidance_scale},
            "noise": {},
            "prompt": self.prompt(planned.label, planned.id),
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "sampler": self.settings(),
        }

    def conditional(self, inputs: Mapping[str, Any], network: GuidedUNet) -> ConditionalDenoiser:
        """The network with the contexts of a batch's prompts, or of its classes if it reads those.

        Raises:
            ConfigError: a network without condition encoder; a negative prompt for one that reads no texts.
        """
        labels = torch.as_tensor(inputs["label"])
        conditions: Sequence[str] | torch.Tensor = labels
        if network.takes_text:
            conditions = [self.prompt(int(label), name) for label, name in zip(labels, inputs["id"], strict=True)]
        elif self.negative_prompt is not None:
            raise ConfigError("negative-prompt-unread", "A network with class tokens reads no negative prompt; leave it out.")
        negative = None if self.negative_prompt is None else network.context([self.negative_prompt] * len(labels))
        return replace(super().conditional(inputs, network), context=network.context(conditions), negative_context=negative)


def make_prompted_sampler(
    objective: NoiseObjective | Mapping[str, Any],
    settings: Mapping[str, Any],
    prompts: Prompts,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
) -> PromptedSampler:
    """A `PromptedSampler` from the plain settings of a config.

    Args:
        objective, prompts, negative_prompt, seed: as there.
        settings: other fields; those of the bottleneck, which a profile holds for other bundles, are passed over.
        guidance_scale: takes the place of the one in the settings; None leaves it.

    Raises:
        ConfigError: an unknown setting, or what `PromptedSampler` refuses.
    """
    given = {name: value for name, value in settings.items() if not name.startswith("bottleneck_")}
    check_settings(
        given, {item.name for item in fields(GuidedSampler) if not item.name.startswith("bottleneck_")} - {"objective", "seed"}
    )
    if guidance_scale is not None:
        given["guidance_scale"] = guidance_scale
    return PromptedSampler(objective=objective, prompts=prompts, negative_prompt=negative_prompt, seed=seed, **given)


def run_prompts(record: RunRecord, classes: Sequence[str], settings: Mapping[str, Any] | None = None) -> Prompts:
    """The prompts to generate with: those of `settings`, else those the run was trained with.

    Where the network reads class tokens and no text, each class has its own name for a prompt, so that the lineage says what was asked for.

    Args:
        record: of the run.
        classes: class names, in order.
        settings: see `prompts_from`, or None.

    Raises:
        ConfigError: what `prompts_from` refuses; a run without a condition encoder or prompts (code `prompts-missing`), or one whose network
            would not read them (`prompts-unread`).
    """
    conditioning = (record.settings.get("network") or {}).get("conditioning")
    if conditioning is None:
        raise ConfigError("prompts-missing", "The network of this run reads no prompt; train the bundle text_to_image.")
    if conditioning.get("encoder") == ClassToken.name:
        if settings is not None:
            raise ConfigError(
                "prompts-unread", "This run was trained with class tokens, which read no prompt; leave prompt_settings out."
            )
        return Prompts(tuple((name,) for name in classes))
    if settings is not None:
        return prompts_from(classes, settings)
    texts = record.settings.get("prompts") or ()
    if len(texts) != len(classes):
        raise ConfigError("prompts-missing", "The record of this run holds no prompts; give prompt_settings.")
    return Prompts(tuple(tuple(choices) for choices in texts))


def prompts_from(classes: Sequence[str], settings: Mapping[str, Any]) -> Prompts:
    """`make_prompts` from the plain settings of a config.

    Raises:
        ConfigError: what `make_prompts` refuses, or an unknown setting.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError("setting-unknown", f"The prompt settings must be names and values, got {type(settings).__name__}.")
    given = {name: value for name, value in settings.items() if value is not None}
    known = ("templates", "labels", "styles", "file")
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ConfigError("setting-unknown", f"Unknown prompt setting(s) {unknown}; known are {list(known)}.")
    return make_prompts(classes, **given)
