"""The report of `medaug labels`: counts, and the most doubtful images of every class, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medaug import __version__, storage
from medaug.cohort import Case, Cohort
from medaug.quality.review_page import page_environment
from medaug.quality.thumbnails import read_image, thumbnail_uri

WORST = 12  # images per class and part
TEXTS = {
    "training": "Training: by networks that never saw the image's group",
    "validation": "Validation: by a network trained on the training images",
    "test": "Test: by a network trained on the training images",
    "synthetic": "Synthetic images: by a network trained on the real training images",
}
Part = tuple[str, Cohort, Sequence[Case], Sequence[Mapping[str, Any]]]

__all__ = ["WORST", "write_label_page"]


def write_label_page(path: Path, parts: Sequence[Part], summary: Mapping[str, Any]) -> None:
    """Write ``report.html``.

    Args:
        path: the file.
        parts: (name, cohort, cases, rows) of each part, its rows the worst first.
        summary: the content of ``labels.json``.
    """
    shown = [
        {"title": TEXTS[name], "classes": _worst(cohort, cases, rows), **summary["parts"][name]}
        for name, cohort, cases, rows in parts
    ]
    template = page_environment().get_template("labels.html.j2")
    storage.write_text(path, template.render(summary=summary, parts=shown, worst=WORST, version=__version__))


def _worst(cohort: Cohort, cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per class the first rows that look wrong, with their pictures."""
    known = {case.id: case for case in cases}
    found = []
    for name in cohort.classes:
        own = [row for row in rows if row["label"] == name and row["reason"]]
        images = [{**row, "picture": _picture(cohort, known[row["id"]])} for row in own[:WORST]]
        found.append({"name": name, "issues": len(own), "images": images})
    return found


def _picture(cohort: Cohort, case: Case) -> str:
    image = read_image(cohort, case)
    return "" if image is None else thumbnail_uri(image)
