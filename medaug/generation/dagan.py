"""Images from a trained DAGAN, and the figure on the validation split that decides which of its generators is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator, randn_batch
from medaug.generation.plan import PlannedCase
from medaug.networks.dagan import DaganGenerator
from medaug.quality.fidelity import RandomConvFeatures, features_of, kid
from medaug.quality.images import image_batches
from medaug.training.data import read_case


@dataclass(frozen=True)
class DaganSampler:
    """G(x_i, z) for planned cases, x_i the reference. The `inferer` of the bundle `dagan`.

    Attributes:
        seed: with the id of an image it decides z.
    """

    seed: int = 0

    keeps_geometry = False  # the critic asks for another image of the class, not for one of the same patient
    fit_groups = ()  # nothing guides it

    def settings(self) -> dict[str, Any]:
        """What a lineage records of the sampler."""
        return {"seed": self.seed}

    def knobs(self) -> dict[str, Any]:
        """Values of the config that make it again: the seed, which is the session's."""
        return {}

    def lineage(self, planned: PlannedCase) -> dict[str, Any]:
        """What the lineage of one image says of how it was sampled."""
        return {
            "guidance": {},
            "noise": {"latent": "standard normal"},
            "sampler": self.settings(),
            "variation": planned.variation,
        }

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], network: DaganGenerator) -> Tensor:
        """One image per entry.

        Args:
            inputs: ``id`` (list of str: keys of z) and ``reference`` (callable i -> (C, H, W) tensor in [-1, 1]).
            network: in evaluation mode.

        Returns:
            Images (B, C, H, W) in [-1, 1].
        """
        ids, weight = list(inputs["id"]), next(network.parameters())
        x = torch.stack([inputs["reference"](i) for i in range(len(ids))]).to(weight)
        images: Tensor = network(x, randn_batch((network.latent_dim,), ids, self.seed, "latent").to(weight))
        return images


@dataclass
class ValidationKid:
    """KID between the real validation images and as many generated ones of the same classes, made from training images.

    The features are random convolutions: nothing is fitted. Validation images are compared with; none is a seed. The same seeds and
    latent vectors serve every time, so that two generators differ by themselves alone.

    Attributes:
        cohort: real images.
        max_images: at most so many validation images, chosen by `seed`.
        batch_size: images generated at a time.
        seed: of seeds and latent vectors.
    """

    cohort: Cohort
    max_images: int = 256
    batch_size: int = 64
    seed: int = 0

    def __call__(self, network: DaganGenerator) -> dict[str, float | None]:
        """``validation_kid``: None where the split has fewer than two images of classes that are trained on."""
        real, seeds = self._pairs()
        if len(real) < 2:
            return {"validation_kid": None}
        features = RandomConvFeatures(channels=self.cohort.channels)
        found = features_of(features, self._generated(network, seeds))
        return {"validation_kid": kid(features_of(features, image_batches(self.cohort, real)), found, minimum=2).value}

    def _pairs(self) -> tuple[list[Case], list[Case]]:
        """Validation cases, and for each a training case of its class."""
        draw = numpy_generator(self.seed, "validation-kid")
        of_class: dict[int, list[Case]] = {}
        for case in self.cohort.training:
            of_class.setdefault(case.label, []).append(case)
        usable = [case for case in self.cohort.validation if case.label in of_class]
        real = [usable[int(i)] for i in draw.permutation(len(usable))[: self.max_images]]
        return real, _in_turns(of_class, [case.label for case in real], draw)

    @torch.no_grad()
    def _generated(self, network: DaganGenerator, seeds: Sequence[Case]) -> Iterator[Tensor]:
        weight = next(network.parameters())
        for start in range(0, len(seeds), self.batch_size):
            chosen = seeds[start : start + self.batch_size]
            keys = range(start, start + len(chosen))
            z = randn_batch((network.latent_dim,), keys, self.seed, "validation-kid").to(weight)
            yield network(torch.stack([read_case(self.cohort, case) for case in chosen]).to(weight), z).cpu()


def _in_turns(of_class: Mapping[int, Sequence[Case]], labels: Sequence[int], draw: np.random.Generator) -> list[Case]:
    """One case of each label, every case of a class once before any comes twice."""
    order = {label: draw.permutation(len(cases)) for label, cases in sorted(of_class.items())}
    taken = dict.fromkeys(order, 0)
    chosen = []
    for label in labels:
        chosen.append(of_class[label][int(order[label][taken[label] % len(order[label])])])
        taken[label] += 1
    return chosen
