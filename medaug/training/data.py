"""Cases as tensors, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator, torch_generator
from medaug.errors import ConfigError
from medaug.io.raster import read_unit_png
from medaug.training import distributed
from medaug.transforms.prepare import prepare

ReferenceMode = Literal["self", "same_class", "self_augmented"]
REFERENCE_MODES = ("self", "same_class", "self_augmented")


class CaseImages(Dataset[dict[str, Any]]):
    """Images of cohort cases: ``{"image": (C, H, W) in [-1, 1], "label": int, "id": str}``, decoded when asked for."""

    def __init__(self, cohort: Cohort, cases: Sequence[Case]) -> None:
        self.cohort = cohort
        self.cases = list(cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        return {"image": read_case(self.cohort, case), "label": case.label, "id": case.id}


def read_case(cohort: Cohort, case: Case) -> Tensor:
    """The network tensor of a case: (C, H, W), float32 in [-1, 1]."""
    return prepare(read_unit_png(cohort.path(case)))


class ReferencePairs(Dataset[dict[str, Any]]):
    """A training image with the reference image its features come from (methods of the guided DDPM, choice of I_R).

    Indexed by ``(iteration, position, case index)`` as `KeyedBatches` yields them, so that every draw has a key.

    Args:
        cohort: only its training split is used.
        reference: "self" (the image itself, as published: invites copying), "same_class" (another training image of
            the class), "self_augmented" (the image, shifted and scaled a little).
        seed: first part of every key.
        shift: largest shift of the training image, as a share of its side; 0 switches it off.
    """

    def __init__(self, cohort: Cohort, reference: ReferenceMode = "same_class", seed: int = 0, shift: float = 0.0) -> None:
        if reference not in REFERENCE_MODES:
            raise ConfigError("reference-unknown", f"reference must be one of {', '.join(REFERENCE_MODES)}, got {reference!r}.")
        self.cohort = cohort
        self.cases = list(cohort.training)
        self.reference = reference
        self.seed = seed
        self.shift = shift
        self.by_label = {
            label: [i for i, case in enumerate(self.cases) if case.label == label] for label in range(len(cohort.classes))
        }

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        iteration, position, index = key
        draw = numpy_generator(self.seed, "pair", iteration, position)
        case = self.cases[index]
        image = jitter(read_case(self.cohort, case), draw, self.shift)
        return {
            "image": image,
            "label": case.label,
            "id": case.id,
            "reference": self._reference(index, image, draw),
            "iteration": iteration,
            "position": position,
        }

    def _reference(self, index: int, image: Tensor, draw: np.random.Generator) -> Tensor:
        if self.reference == "self":
            return image
        if self.reference == "self_augmented":
            return jitter(image, draw, 0.08, zoom=0.1)
        others = [other for other in self.by_label[self.cases[index].label] if other != index] or [index]
        return read_case(self.cohort, self.cases[others[int(draw.integers(len(others)))]])


def jitter(image: Tensor, draw: np.random.Generator, shift: float, zoom: float = 0.0) -> Tensor:
    """Shift by up to `shift` of the side and zoom by up to `zoom`; never flips (left and right mean something).

    A shift alone goes by whole pixels: interpolation would blur the image, and a generator trained on it would learn
    the blur. Zoomed images are interpolated, so they serve as references only.

    Args:
        image: (C, H, W) in [-1, 1]; borders are filled with their nearest pixel.
    """
    if shift <= 0 and zoom <= 0:
        return image
    dx, dy, scale = draw.uniform(-2 * shift, 2 * shift), draw.uniform(-2 * shift, 2 * shift), 1 + draw.uniform(-zoom, zoom)
    if zoom <= 0:
        return shifted(image, round(dy * image.shape[-2] / 2), round(dx * image.shape[-1] / 2))
    theta = torch.tensor([[[scale, 0.0, dx], [0.0, scale, dy]]], dtype=image.dtype)
    grid = torch.nn.functional.affine_grid(theta, [1, *image.shape], align_corners=False)
    return torch.nn.functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """The image as seen through a frame moved by whole pixels, shape kept; what comes in from outside repeats the border."""
    rows = (torch.arange(image.shape[-2]) + down).clamp(0, image.shape[-2] - 1)
    columns = (torch.arange(image.shape[-1]) + right).clamp(0, image.shape[-1] - 1)
    return image[:, rows][:, :, columns]


class KeyedBatches(Sampler[list[tuple[int, int, int]]]):
    """An endless stream of batches, each fixed by its iteration number alone.

    The flattened order is a chain of permutations of the cases, one per pass over the data. A resumed run sets
    `next_iteration` and meets the very batches it would have met. Of several processes each is handed its share of a batch.

    Args:
        num_cases: size of the data set.
        batch_size: cases per iteration, of all processes together.
        seed: key of the permutations.

    Raises:
        ConfigError: nothing to draw from; a batch that the processes cannot share evenly.
    """

    def __init__(self, num_cases: int, batch_size: int, seed: int = 0) -> None:
        if num_cases < 1 or batch_size < 1:
            raise ConfigError(
                "batch-invalid", f"Training needs at least one case and a batch size of 1, got {num_cases} and {batch_size}."
            )
        distributed.share(range(batch_size))  # refused now, not in the first iteration
        self.num_cases = num_cases
        self.batch_size = batch_size
        self.seed = seed
        self.next_iteration = 1

    def batch(self, iteration: int) -> list[tuple[int, int, int]]:
        """(iteration, position, case index) of every member of a batch; iterations count from 1."""
        start = (iteration - 1) * self.batch_size
        return [(iteration, j, self._case(start + j)) for j in range(self.batch_size)]

    def _case(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_cases)
        return int(permutation((self.seed,), epoch, self.num_cases)[offset])

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        iteration = self.next_iteration
        while True:
            yield list(distributed.share(self.batch(iteration)))
            iteration += 1

    def __len__(self) -> int:
        """Batches that make one pass over the data."""
        return -(-self.num_cases // self.batch_size)


@lru_cache(maxsize=64)
def permutation(key: tuple[int, ...], epoch: int, size: int) -> np.ndarray:
    """The order of `size` cases in one pass over them, (size,) int64, read-only; `key` and `epoch` decide it."""
    order = numpy_generator(*key, "order", epoch).permutation(size)
    order.setflags(write=False)
    return order


def keep_mask(probability: float, keys: Sequence[tuple[object, ...]]) -> Tensor:
    """One Bernoulli draw per key: True with `1 - probability`, shape (len(keys),). The per-sample condition drop."""
    draws = [torch.rand((), generator=torch_generator(*key)) for key in keys]
    return torch.stack(draws) >= probability
