"""What decides a comparison besides its cohort and its arms; light to import, so that the command line and the stages share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL_NETWORKS = "all"

__all__ = ["ALL_NETWORKS", "GradingOptions"]


@dataclass(frozen=True)
class GradingOptions:
    """The settings that every arm of a comparison shares.

    Attributes:
        networks: names, as a list or with commas between, or "all" for the ten and simple_cnn; any further model of timm by its name.
        seeds: how many, or which.
        profile: a key of `medaug.grading.recipe.GRADING_PROFILES`.
        overrides: fields of its recipes to change, for every arm alike.
        synthetic_per_real, allocation: how many synthetic images per real one, and of which classes; None takes all. Of several
            ratios one is chosen on validation, see `medaug.grading.variants`.
        real_fraction: of the real training images that every arm keeps which does not say its own, `none` too. Of several the
            verdict is that of the largest.
        sources: "NAME=FOLDER" of synthetic images that cells and mixed arms call by their name; ``{seed}`` as in arms.
        amst: fields of `AmstRecipe` to change, for all arms that train by it.
        allow_untrusted: accept images whose maker's training data are unknown; the verdict says so.
        pretrained: network -> safetensors file that its weights but the head's come from; the report says so.
    """

    networks: str | Sequence[str] = ("simple_cnn", "resnet18")
    seeds: int | Sequence[int] = 3
    profile: str = "cpu32"
    overrides: Mapping[str, Any] | None = None
    synthetic_per_real: float | Sequence[float] | None = None
    allocation: str = "as_generated"
    real_fraction: float | Sequence[float] = 1.0
    sources: Sequence[str] = ()
    amst: Mapping[str, Any] | None = None
    allow_untrusted: bool = False
    pretrained: Mapping[str, Path] | None = None

    @property
    def listed_networks(self) -> list[str]:
        """The networks as they were asked for: names, or ``["all"]``."""
        return [name.strip() for name in self.networks.split(",")] if isinstance(self.networks, str) else list(self.networks)

    @property
    def listed_seeds(self) -> list[int]:
        """The seeds, in the order in which they are trained."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)
