"""PNG files of synthetic images, the facts in text chunks."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medaug import __version__
from medaug.export.facts import MARK, ImageFacts
from medaug.io import limits

FACTS_KEY = "medaug"


def encode_png(stored: np.ndarray, facts: ImageFacts) -> bytes:
    """The bytes of one PNG: 8- or 16-bit grey for (N, N), 8-bit RGB for (N, N, 3).

    The international text chunks (PNG specification, section 11.3.4.5) Title, Disclaimer, Description, Software and Source
    are for people; the chunk ``medaug`` holds all facts as JSON. A pixel size goes into pHYs if it is known.
    """
    info = PngInfo()
    texts = {"Title": MARK, "Disclaimer": MARK, "Description": facts.description(), "Source": "synthetic: generated, no patient"}
    texts |= {"Software": f"medaug {__version__}", FACTS_KEY: json.dumps(facts.to_json(), sort_keys=True, ensure_ascii=False)}
    for key, text in texts.items():
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    spacing = facts.geometry.spacing_mm
    options = {} if spacing is None else {"dpi": (25.4 / spacing[1], 25.4 / spacing[0])}
    Image.fromarray(stored).save(buffer, format="PNG", pnginfo=info, **options)
    return buffer.getvalue()


def says_synthetic(data: bytes) -> bool:
    """True if a PNG still says in its text chunks that it is synthetic."""
    with limits.decoding("PNG"), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        text = getattr(image, "text", {})
        return text.get("Title") == MARK and json.loads(text.get(FACTS_KEY, "{}")).get("synthetic") is True
