"""Synthetic cohorts for grading: drawn discs with a lineage, right or wrong labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medaug import cohort as cohorts
from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator


def disc(label: int, size: int, *key: object) -> np.ndarray:
    """The picture of the root fixture `make_cohort`, drawn anew."""
    draw = numpy_generator("synthetic", label, *key)
    y, x = np.mgrid[:size, :size] / size
    cx, cy = draw.uniform(0.35, 0.65, 2)
    inside = ((x - cx) ** 2 + (y - cy) ** 2) < (0.1 + 0.08 * label) ** 2
    return (0.2 + 0.05 * draw.standard_normal((size, size)) + inside * (0.3 + 0.1 * label)).clip(0, 1).astype(np.float32)


@pytest.fixture
def make_synthetic() -> Callable[..., Cohort]:
    """Accepted synthetic cases for a real cohort; `shift` moves every label, `fit_groups` is what the generator saw."""
    from medaug.io.raster import write_unit_png

    def make(
        real: Cohort, root: Path, per_class: list[int], *, shift: int = 0, fit_groups: list[str] | None = None, name: str = "s"
    ) -> Cohort:
        groups = sorted(real.groups("training")) if fit_groups is None else fit_groups
        fit = cohorts.fit_sha256(groups)
        num_classes, cases = len(real.classes), []
        for label, count in enumerate(per_class):
            references = [case for case in real.training if case.label == label]
            for index in range(count):
                case_id = f"{name}{label}{index:04d}"
                write_unit_png(
                    root / "images" / f"{case_id}.png", disc((label + shift) % num_classes, real.image_size, name, index)
                )
                reference = references[index % len(references)]
                lineage = {"bundle": "drawn", "seed": index, "reference": reference.id, "intended_label": label, "fit_on": fit}
                cases.append(
                    Case(
                        id=case_id,
                        image=f"images/{case_id}.png",
                        label=label,
                        group=reference.group,
                        source=f"{label}{index:063d}",
                        lineage=lineage,
                    )
                )
        made = Cohort(
            name=name, modality="", classes=real.classes, ordinal=real.ordinal, image_size=real.image_size, fit_on={fit: groups}
        )
        return cohorts.write_cohort(made.with_cases(training=cases), root)

    return make
