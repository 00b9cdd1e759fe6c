"""Accepted synthetic cohorts with their real cohorts, small, drawn, and with the facts that intake and the gate leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medaug import cohort as cohorts
from medaug.cohort import Case, Cohort, fit_sha256
from medaug.draws import numpy_generator
from medaug.io.raster import write_unit_png

WINDOW = {"kind": "window_hu", "0": -1350.0, "1": 150.0}
WEIGHTS = "0123456789abcdef" * 4
CHECKED = {"burned_in": {"checked": True, "policy": "quarantine", "suspects": 0}}
# A source slice of 20 x 32 pixels, padded to 32 x 32 by intake; oblique in the patient.
PLACED: dict[str, Any] = {
    "original_size": [20, 32],
    "padding": [6, 6, 0, 0],
    "spacing_mm": [0.8, 0.7],
    "orientation": [0.8, 0.6, 0.0, -0.6, 0.8, 0.0],
    "slice_thickness_mm": 2.5,
    "slice_spacing_mm": 2.0,
    "series": "0011223344556677",
    "format": "DICOM",
    "photometric": "MONOCHROME2",
}


def placed(index: int) -> dict[str, Any]:
    """Facts of the slice number `index` of one series, 2 mm apart."""
    return PLACED | {"position_mm": [-10.5, 20.25, 100.0 + 2.0 * index], "slice_index": index}


def real_cohort(root: Path, *, size: int = 16, channels: int = 1, modality: str = "CT", geometry: bool = True) -> Cohort:
    """Four patients with two slices each: three in training, one in test."""
    cases: dict[str, list[Case]] = {"training": [], "test": []}
    for patient in range(4):
        for index in range(2):
            name = f"r{patient}{index}"
            write_unit_png(root / "images" / f"{name}.png", drawn(size, channels, name))
            case = Case(name, f"images/{name}.png", patient % 2, f"p{patient}", source=f"{patient}{index}" * 32)
            case = replace(case, acquisition=placed(index) if geometry else {})
            cases["training" if patient < 3 else "test"].append(case)
    made = Cohort("drawn", modality, ("low", "high"), True, size, channels, notes=CHECKED)
    kind: dict[str, Any] = WINDOW if modality == "CT" and channels == 1 else {"kind": "uint8", "0": 0.0, "1": 255.0}
    made = replace(made, intensity=kind, created_by=cohorts.created_by("test", {}, 0))
    return cohorts.write_cohort(made.with_cases(**cases), root)


def drawn(size: int, channels: int, *key: object) -> np.ndarray:
    """Noise in [0, 1] with both ends in it."""
    image = numpy_generator("export", *key).random((size, size, channels)).astype(np.float32)
    image[0, 0], image[0, 1] = 0.0, 1.0
    return image if channels == 3 else image[..., 0]


def accepted_cohort(real: Cohort, root: Path, *, per_reference: int = 2, **changes: Any) -> Cohort:
    """As `medaug gate` leaves it: `per_reference` images from each training case. `changes` go to the header."""
    fit = sorted(real.groups("training"))
    cases = []
    for reference in real.training:
        for copy in range(per_reference):
            name = f"s{reference.id}{copy}"
            write_unit_png(root / "images" / f"{name}.png", drawn(real.image_size, real.channels, name))
            lineage = {
                "bundle": "guided_ddpm",
                "weights_sha256": WEIGHTS,
                "config_sha256": "c" * 64,
                "seed": 7,
                "reference": reference.id,
                "intended_label": reference.label,
                "pseudo_label": reference.label,
                "confidence": 0.93,
                "guidance": {"scale": 1.5},
                "noise": {"bottleneck_scale": 0.1},
                "nearest_training_distance": 3.25,
                "verdict": "accept",
                "reasons": [],
                "fit_on": fit_sha256(fit),
                "private_remark": "PLANTED^REMARK",
            }
            cases.append(Case(name, f"images/{name}.png", reference.label, reference.group, WEIGHTS, name=name, lineage=lineage))
    made = replace(real, name="accepted", training=tuple(cases), validation=(), test=(), fit_on={fit_sha256(fit): fit})
    return cohorts.write_cohort(replace(made, **changes), root)
