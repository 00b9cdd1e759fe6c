"""A sheet of samples beside the references they were made from, drawn while training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from medaug.cohort import Cohort
from medaug.generation.generate import PlanBatches, tile
from medaug.generation.plan import make_plan
from medaug.io.raster import read_unit_png
from medaug.transforms.prepare import restore


@dataclass
class PreviewSheet:
    """Draws, per class, one row of references and one row of samples; the same references and noise every time.

    Attributes:
        cohort: real cohort (training split only).
        sampler: how to sample, a dataclass as every sampler of the bundles.
        per_class: images per class.
        seed: of references and noise.
    """

    cohort: Cohort
    sampler: Any
    per_class: int = 8
    seed: int = 0

    def __call__(self, network: Any) -> np.ndarray:
        """The sheet as a unit image: (2 * classes * size, per_class * size[, 3])."""
        sampler: Callable[[Mapping[str, Any], Any], Tensor] = replace(
            self.sampler
        )  # remembers nothing: the network has learnt since
        present = {case.label for case in self.cohort.training if not case.is_synthetic}
        counts = [self.per_class if label in present else 0 for label in range(len(self.cohort.classes))]
        plan = make_plan(self.cohort, counts, self.seed, "preview")
        rows = []
        for batch in PlanBatches(self.cohort, plan, self.per_class):
            samples = sampler(batch, network)
            rows.append([read_unit_png(self.cohort.path(case.reference)) for case in batch["cases"]])
            rows.append([restore(image) for image in samples])
        return tile(rows)
