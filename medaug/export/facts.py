"""What is said about one exported image, the same in every format, and the identifiers made for it."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medaug import __version__
from medaug.cohort import Case, Cohort
from medaug.export.geometry import Geometry

MARK = "SYNTHETIC - NOT FOR CLINICAL USE"
# What of a lineage leaves the house. Anything else that a cohort made elsewhere may hold stays behind.
LINEAGE_KEYS = (
    "bundle",
    "weights_sha256",
    "config_sha256",
    "seed",
    "reference",
    "intended_label",
    "pseudo_label",
    "confidence",
    "guidance",
    "noise",
    "nearest_training_distance",
    "verdict",
    "fit_on",
)  # fmt: skip
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageFacts:
    """One exported image.

    Attributes:
        case_id, label, label_name: of the synthetic case.
        lineage: how it was made, see `LINEAGE_KEYS`.
        patient_id: of the synthetic patient, made from the group by a hash.
        study_uid, series_uid, frame_uid, sop_uid: new UIDs; the study's may have been given by the user.
        series_number, instance_number: from 1.
        modality: DICOM modality of the source images, "" when unknown.
        hounsfield: HU of the stored 0 and of the highest stored value; None when the values are no HU.
        geometry: as far as it is known.
        lossy: True or False if it is known whether the reference had been compressed with loss.
        pixels_checked: intake searched the cohort's images for burned-in text and kept none that it suspected.
        date: YYYYMMDD given by the user, else "".
    """

    case_id: str
    label: int
    label_name: str
    lineage: Mapping[str, Any]
    patient_id: str
    study_uid: str = ""
    series_uid: str = ""
    frame_uid: str = ""
    sop_uid: str = ""
    series_number: int = 1
    instance_number: int = 1
    modality: str = ""
    hounsfield: tuple[float, float] | None = None
    geometry: Geometry = field(default_factory=Geometry)
    lossy: bool | None = None
    pixels_checked: bool = False
    date: str = ""

    @property
    def weights_sha256(self) -> str:
        """Hex sha256 of the weights, "" when the lineage does not say."""
        value = str(self.lineage.get("weights_sha256", ""))
        return value if _HEX64.fullmatch(value) else ""

    def description(self) -> str:
        """How the image was made, in one sentence for people."""
        parts = [f"bundle {self.lineage.get('bundle', 'unknown')}", f"class {self.label_name!r}"]
        parts += [
            f"{name} {self.lineage[name]}" for name in ("seed", "reference", "verdict") if self.lineage.get(name) is not None
        ]
        parts += [f"weights sha256 {self.weights_sha256}"] if self.weights_sha256 else []
        return f"Image synthesized by medaug {__version__} with a generative diffusion model: {', '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """The facts written into PNG, NIfTI, the private DICOM element and the manifest."""
        geometry = self.geometry
        facts: dict[str, Any] = {
            "synthetic": True,
            "notice": MARK,
            "product": "medaug",
            "product_version": __version__,
            "case": self.case_id,
            "label": self.label,
            "class": self.label_name,
            "patient_id": self.patient_id,
            "modality": self.modality,
            "lineage": dict(self.lineage),
            "pixels_checked_for_text": self.pixels_checked,
            "hounsfield_of_0_and_1": None if self.hounsfield is None else list(self.hounsfield),
            "spacing_mm": None if geometry.spacing_mm is None else list(geometry.spacing_mm),
            "orientation": None if geometry.orientation is None else list(geometry.orientation),
            "position_mm": None if geometry.position_mm is None else list(geometry.position_mm),
        }
        return facts


def new_uid(*key: object) -> str:
    """A UID that depends on `key` alone: 2.25. and a name-based UUID as a decimal number (PS3.5 B.2)."""
    digest = hashlib.sha256(repr(("medaug export", *key)).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def patient_id(*key: object) -> str:
    """Identifier of a synthetic patient: SYN and 12 hex digits of a hash."""
    return "SYN" + hashlib.sha256(repr(("medaug synthetic patient", *key)).encode()).hexdigest()[:12].upper()


def lineage_summary(case: Case) -> dict[str, Any]:
    """The publishable part of a lineage."""
    lineage = case.lineage or {}
    return {key: lineage[key] for key in LINEAGE_KEYS if key in lineage}


def hounsfield_range(cohort: Cohort) -> tuple[float, float] | None:
    """HU that the unit values 0 and 1 stand for, if they stand for the same HU in every image of the cohort."""
    if cohort.intensity.get("kind") != "window_hu" or cohort.channels != 1:
        return None
    lower, upper = cohort.intensity.get("0"), cohort.intensity.get("1")
    return (float(lower), float(upper)) if isinstance(lower, int | float) and isinstance(upper, int | float) else None


def pixels_checked(cohort: Cohort, origin: Cohort | None = None) -> bool:
    """True only if every image that the generator learnt from was searched for burned-in text and no suspect was kept.

    Either the real cohort shows it, each of whose training cases then has ``acquisition["burned_in_text"]`` of "not
    found" or "masked", or a note that travels from it to the synthetic one, ``notes["burned_in"] = {"checked": true,
    "policy": "quarantine" | "mask" | "keep", "suspects": n}``.
    """
    if origin is not None:
        found = [case.acquisition.get("burned_in_text") for case in origin.training]
        if any(word is not None for word in found):
            return all(word in ("not found", "masked") for word in found)
    note = cohort.notes.get("burned_in")
    if not isinstance(note, Mapping) or note.get("checked") is not True:
        return False
    return note.get("policy") in ("quarantine", "mask") or note.get("suspects") == 0


def lossy_of(acquisition: Mapping[str, Any]) -> bool | None:
    """Whether the source image had been compressed with loss; None when nothing is known about the source."""
    if not acquisition:
        return None
    return bool(acquisition.get("lossy")) or acquisition.get("format") == "JPEG"
