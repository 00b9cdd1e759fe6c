"""One 2-D image as a file holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

UNITS = ("hu", "uint8", "uint16", "stored")


@dataclass(frozen=True, eq=False)
class Picture:
    """One 2-D image as read; a fact the file does not give is absent, never a default.

    Attributes:
        pixels: (H, W) grey or (H, W, 3) colour, float32, in `unit`.
        unit: "hu" (CT rescaled to Hounsfield units), "uint8" (0 to 255), "uint16" (0 to 65535) or "stored" (other).
        modality: DICOM modality such as "CT", "CR", "DX"; "" when unknown.
        acquisition: facts without patient data: original_size [rows, columns], bits, photometric, spacing_mm
            [between rows, between columns], window_center and window_width as found, slice_index ...
        identifiers: patient, study, series, sop, accession, patient_name, as far as the file gives them. For joins
            during intake only; never written anywhere.
        source: sha256 of the file; of the array bytes for one image of an .npz archive.
    """

    pixels: np.ndarray
    unit: str
    modality: str = ""
    acquisition: dict[str, Any] = field(default_factory=dict)
    identifiers: dict[str, str] = field(default_factory=dict, repr=False)
    source: str = ""

    @property
    def is_colour(self) -> bool:
        """True for (H, W, 3) pixels."""
        return self.pixels.ndim == 3
