"""Pictures of a cohort inside an HTML file: bounded in size, 8 bits, whatever the cohort stores."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from medaug.cohort import Case, Cohort
from medaug.errors import DataError
from medaug.io.raster import read_unit_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 256  # pixels; a larger image is made smaller

__all__ = ["SIDE", "figure_uri", "png_uri", "read_image", "thumbnail_uri"]


def read_image(cohort: Cohort, case: Case) -> np.ndarray | None:
    """The unit image (H, W) or (H, W, 3) of a case; None if it cannot be read or has other channels than its cohort."""
    try:
        image = read_unit_png(cohort.path(case))
    except DataError:
        return None
    return image if image.ndim == (3 if cohort.channels == 3 else 2) else None


def png_uri(image: np.ndarray, scale: int = 1) -> str:
    """A unit image as a ``data:`` address for HTML, 8 bits, each pixel enlarged `scale` times."""
    picture = _eight_bits(image)
    return _uri(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST))


def thumbnail_uri(image: np.ndarray, side: int = SIDE) -> str:
    """A unit image as a ``data:`` address, 8 bits, no side longer than `side` pixels: the same encoding for every image."""
    picture = _eight_bits(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _uri(picture)


def figure_uri(figure: Figure) -> str:
    """A matplotlib figure as a ``data:`` address for HTML; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return _address(buffer)


def _eight_bits(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(image.clip(0, 1) * 255).astype(np.uint8))


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return _address(buffer)


def _address(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
