"""The frozen training recipes of a comparison: one per network and profile, the same for every arm.

Tuned once on validation with real images only; an arm must never get a recipe of its own. What an arm changes is its
training set and its classic augmentation, never the number of optimiser steps.

cpu32 was set on four-class chest CT at 32 px (552 real training images of an earlier intake of the pictures, two seeds, macro-F1 on
validation): simple_cnn 0.80 at 500 steps with rate 1e-3 or 3e-3, 0.77 at 200 steps with 3e-3; resnet18 0.95 at 150 steps, 0.94 at 250,
so high that this split probably leaked, and that pictures of today's test split were among those it was chosen on. The others by
`benchmarks/tune_recipes.py` on the source's own split of the same pictures (489 training, 63 validation images, one seed; rows in
benchmarks/results): rate 1e-3 for all but the transformers, which fail at it, and 400 steps where 150 were far too few (mobilenetv2_100
0.34 to 0.41, efficientnet_b0 0.39 to 0.55, vit_small 0.33 to 0.67, swin_tiny 0.41 to 0.70).

cpu64 by the same script on the same split at 64 px, three seeds: simple_cnn 0.49 at 600 steps with 1e-3, 0.59 at 1500, 0.53 and 0.65 with
3e-3, the largest tried; resnet18 0.66 at 300 steps, 0.60 at 600. Networks that want 400 steps at 32 px get them here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from medaug.errors import ConfigError
from medaug.training.classifier import ClassifierRecipe

DEFAULT = "default"
# Transformers, and ConvNeXt, which is trained like them, want a smaller step and a stronger decay (Touvron et al. 2021, table 9; Liu
# et al. 2022, table 5).
_TRANSFORMER = {"learning_rate": 3e-4, "weight_decay": 0.05}
_TRANSFORMERS = dict.fromkeys(
    ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_tiny"), _TRANSFORMER
)

# Autocast to bfloat16 makes these slower on a CPU (`benchmarks/grading_step.py`): their depthwise convolutions have no fast kernels of 16 bits.
_FLOAT32_ONLY = ("mobilenetv2_100", "efficientnet_b0")

# Far from done where the others are; see above.
_SLOW: dict[str, dict[str, Any]] = dict.fromkeys(("mobilenetv2_100", "efficientnet_b0"), {"num_steps": 400, "evaluate_every": 40})
_SLOW |= dict.fromkeys(_TRANSFORMERS, _TRANSFORMER | {"num_steps": 400, "evaluate_every": 40})

_PRETRAINED_RATE = 1e-4  # ten times below that of a network from scratch

# profile -> network (or "default") -> fields of ClassifierRecipe that differ from the profile's default.
GRADING_PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {DEFAULT: {"num_steps": 12, "batch_size": 16, "evaluate_every": 6, "learning_rate": 3e-3}},
    "quickstart": {
        DEFAULT: {"num_steps": 100, "evaluate_every": 25},
        "simple_cnn": {"num_steps": 200, "batch_size": 32, "evaluate_every": 40, "learning_rate": 3e-3},
    },
    "cpu32": {
        DEFAULT: {"num_steps": 250, "evaluate_every": 25},
        "simple_cnn": {"num_steps": 500, "evaluate_every": 50},
        "resnet18": {"num_steps": 200, "evaluate_every": 25},
        **_SLOW,
    },
    "cpu64": {
        DEFAULT: {"num_steps": 300, "evaluate_every": 30},
        "simple_cnn": {"num_steps": 1500, "evaluate_every": 150, "learning_rate": 3e-3},
        **_SLOW,
    },
    "paper": {
        DEFAULT: {"num_steps": 6000, "evaluate_every": 200},
        **_TRANSFORMERS,
    },
}

__all__ = ["GRADING_PROFILES", "grading_recipe"]


def grading_recipe(
    profile: str, network: str, overrides: Mapping[str, Any] | None = None, *, pretrained: bool = False
) -> ClassifierRecipe:
    """The recipe of a network in a profile.

    Args:
        profile: a key of `GRADING_PROFILES`.
        network: networks without an entry of their own take the profile's default.
        overrides: fields to change, for every arm alike; `precision` leaves networks that gain nothing from 16 bits at float32.
        pretrained: the network begins from a checkpoint and takes smaller steps, at a rate of at most 1e-4.

    Raises:
        ConfigError: unknown profile or field, or a value out of range.
    """
    if profile not in GRADING_PROFILES:
        raise ConfigError("profile-unknown", f"A grading profile must be one of {', '.join(GRADING_PROFILES)}, got {profile!r}.")
    entries = GRADING_PROFILES[profile]
    recipe = ClassifierRecipe(**(entries[DEFAULT] | entries.get(network, {})))
    known = {field.name for field in fields(ClassifierRecipe)}
    unknown = set(overrides or {}) - known
    if unknown:
        raise ConfigError(
            "recipe-unknown-key",
            f"A classifier recipe has the fields {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}.",
        )
    if pretrained:
        recipe = replace(recipe, learning_rate=min(recipe.learning_rate, _PRETRAINED_RATE))
    recipe = replace(recipe, **(overrides or {}))
    return replace(recipe, precision="float32") if network in _FLOAT32_ONLY else recipe


def recipe_content(recipe: ClassifierRecipe) -> dict[str, Any]:
    """The recipe as plain values, for content addressing and reports."""
    return asdict(recipe)
