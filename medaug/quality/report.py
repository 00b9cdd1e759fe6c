"""The gate's report: what was accepted, quarantined and rejected, per class beside real images, and the nearest pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from medaug import __version__, storage
from medaug.cohort import Case, Cohort
from medaug.quality.distance_figure import distance_figure
from medaug.quality.thumbnails import figure_uri, png_uri, read_image

REPORT_NAME = "report.html"
PER_ROW = 12
PAIRS = 12
ROWS = ("real", "accept", "quarantine", "reject")
_GAP = 2

__all__ = ["REPORT_NAME", "class_sheets", "contact_sheet", "write_report"]


def contact_sheet(rows: Sequence[Sequence[np.ndarray | None]], columns: int, size: int, channels: int = 1) -> np.ndarray:
    """Images in rows on a white ground: unit image (H, W) or (H, W, 3).

    Args:
        rows: unit images of side `size`; None and missing ones stay white.
        columns: per row; rows are cut there.
        size: side of an image in pixels.
        channels: 1 or 3.
    """
    side = size + _GAP
    shape = (max(len(rows), 1) * side + _GAP, columns * side + _GAP) + ((3,) if channels == 3 else ())
    sheet = np.ones(shape, dtype=np.float32)
    for y, row in enumerate(rows):
        for x, image in enumerate(row[:columns]):
            if image is not None and image.shape[:2] == (size, size):
                top, left = y * side + _GAP, x * side + _GAP
                sheet[top : top + size, left : left + size] = image
    return sheet


def class_sheets(real: Cohort, synthetic: Cohort, verdicts: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """One contact sheet per class; its rows are real, accepted, quarantined and rejected images."""
    cases = {case.id: case for case in synthetic.training}
    sheets = []
    for label in range(len(real.classes)):
        own = [row for row in verdicts if cases[row["id"]].label == label]
        rows = [_images(real, [case for case in real.training if case.label == label and not case.is_synthetic])]
        rows += [_images(synthetic, [cases[row["id"]] for row in own if row["verdict"] == verdict]) for verdict in ROWS[1:]]
        sheets.append(contact_sheet(rows, PER_ROW, real.image_size, real.channels))
    return sheets


def _images(cohort: Cohort, cases: Sequence[Case]) -> list[np.ndarray | None]:
    """Up to `PER_ROW` images spread evenly over the cases; None for one that cannot be read."""
    step = max(1, -(-len(cases) // PER_ROW))
    return [read_image(cohort, case) for case in cases[::step][:PER_ROW]]


def nearest_pairs(
    real: Cohort, synthetic: Cohort, verdicts: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, list[Mapping[str, Any]]] | None:
    """The synthetic images nearest to a training image, above it: sheet and their verdicts; None without distances."""
    measured = [row for row in verdicts if "nearest_training_distance" in row]
    ranked = sorted(measured, key=lambda row: row["nearest_training_distance"])
    if not ranked:
        return None
    ranked = ranked[:PAIRS]
    made, known = {case.id: case for case in synthetic.training}, {case.id: case for case in real.training}
    top = [read_image(synthetic, made[row["id"]]) for row in ranked]
    bottom = [read_image(real, known[row["nearest_training_case"]]) for row in ranked]
    return contact_sheet([top, bottom], PAIRS, real.image_size, real.channels), ranked


def write_report(path: Path, real: Cohort, synthetic: Cohort, summary: Mapping[str, Any]) -> None:
    """Write ``report.html``, one file with its pictures inside.

    Args:
        path: the file.
        real: the real cohort.  synthetic: the judged one.
        summary: the content of ``gate.json``.
    """
    scale = max(1, 64 // real.image_size)
    sheets = [png_uri(sheet, scale) for sheet in class_sheets(real, synthetic, summary["verdicts"])]
    pairs = nearest_pairs(real, synthetic, summary["verdicts"])
    distances = distance_figure(summary)
    environment = Environment(loader=PackageLoader("medaug.quality", "."), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("gate.html.j2").render(
        summary=summary,
        classes=real.classes,
        name=synthetic.name,
        version=__version__,
        distances=None if distances is None else figure_uri(distances),
        sheets=list(zip(real.classes, sheets, strict=True)),
        pairs=None if pairs is None else {"sheet": png_uri(pairs[0], scale), "rows": pairs[1]},
    )
    storage.write_text(path, text)
