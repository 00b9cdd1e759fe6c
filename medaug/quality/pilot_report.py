"""The pilot's report: the decision, each check, what the full generation costs, and the images, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medaug import __version__, storage
from medaug.cohort import Cohort
from medaug.quality.report import class_sheets
from medaug.quality.thumbnails import png_uri

__all__ = ["write_pilot_report"]


def write_pilot_report(
    path: Path, real: Cohort, synthetic: Cohort, result: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``report.html``, one file with its pictures inside.

    Args:
        path: the file.
        real: the real cohort.  synthetic: the images of the pilot.
        result: the content of ``pilot.json``.
        verdicts: of the gate, as in ``gate.json``.
    """
    scale = max(1, 64 // real.image_size)
    sheets = [png_uri(sheet, scale) for sheet in class_sheets(real, synthetic, verdicts)]
    environment = Environment(loader=PackageLoader("medaug.quality", "."), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("pilot.html.j2").render(
        result=result, name=real.name, version=__version__, sheets=list(zip(real.classes, sheets, strict=True))
    )
    storage.write_text(path, text)
