"""DICOM files of synthetic images: CT, Digital X-Ray for presentation, CR, or Secondary Capture, one frame each.

Every object says in its header, its descriptions and a private element that it is synthetic. What is not known is left
out, or empty where the standard allows that (type 2); a class that demands an unknown fact is not offered (`lacks`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pydicom.valuerep import DSfloat

from medaug import __implementation_uid__, __version__
from medaug.export.facts import MARK, ImageFacts
from medaug.io import limits

SOP_CLASSES = {
    "ct": CTImageStorage,
    "dx": DigitalXRayImageStorageForPresentation,
    "cr": ComputedRadiographyImageStorage,
    "sc": SecondaryCaptureImageStorage,
}
CLASS_OF_MODALITY = {"CT": "ct", "DX": "dx", "CR": "cr"}
PRIVATE_CREATOR = "MEDAUG SYNTHETIC 1"
PRIVATE_GROUP = 0x0071
DEIDENTIFICATION = "Synthetic pixels; training images searched for burned-in text"  # VR LO: 64 characters


def lacks(storage_class: str, facts: ImageFacts, channels: int) -> str:
    """What a storage class demands and `facts` do not give, in words; "" if the image can be written as that class."""
    if channels == 3:
        return "" if storage_class == "sc" else "grey pixels"
    if storage_class == "ct":
        if facts.hounsfield is None:
            return "Hounsfield units"
        if not facts.geometry.is_placed:
            return "pixel spacing, orientation and position"
    if storage_class == "dx":
        known = facts.geometry.detector_spacing_mm or facts.geometry.spacing_mm
        if known is None or facts.geometry.patient_orientation is None:
            return "pixel spacing and orientation"
        if facts.lossy:  # (0028,2112) is then of type 1C, and nobody knows the ratio
            return "the ratio of the lossy compression"
    return ""


def encode_dicom(stored: np.ndarray, facts: ImageFacts, storage_class: str) -> bytes:
    """The bytes of one DICOM file, explicit VR little endian, preamble of zeros.

    Args:
        stored: (N, N) uint8 or uint16, 0 to the highest value of its type, or (N, N, 3) uint8 for "sc".
        facts: see `ImageFacts`; `lacks` must be "" for the class.
        storage_class: "ct" (PS3.3 A.3), "dx" (A.26), "cr" (A.2) or "sc" (A.8.1).
    """
    elements = _general(facts, storage_class) | _pixels(stored, facts, storage_class) | _provenance(facts)
    elements |= {"ct": _ct, "dx": _projection, "cr": _projection, "sc": _secondary_capture}[storage_class](facts)
    if storage_class == "dx":
        elements |= _digital_x_ray(facts)
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<")).tobytes()
    if len(dataset.PixelData) % 2:  # PS3.5 8.1.1: elements have an even length
        dataset.PixelData += b"\0"
    dataset["PixelData"].VR = "OW" if stored.dtype.itemsize == 2 else "OB"
    block = dataset.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(0x01, "UT", json.dumps(facts.to_json(), sort_keys=True, ensure_ascii=False))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = UID(__implementation_uid__)
    dataset.file_meta.ImplementationVersionName = f"MEDAUG {__version__}"[:16]
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _general(facts: ImageFacts, storage_class: str) -> dict[str, Any]:
    """Patient, study, series, equipment, general image and SOP common modules (PS3.3 C.7.1 to C.7.6.1, C.12.1)."""
    modality = facts.modality or "OT" if storage_class == "sc" else storage_class.upper()
    elements: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY", *{"ct": ["AXIAL"], "dx": [""]}.get(storage_class, [])],
        "SOPClassUID": SOP_CLASSES[storage_class],
        "SOPInstanceUID": facts.sop_uid,
        "SyntheticData": "YES",
        "ContentQualification": "RESEARCH",
        "StudyDate": facts.date,  # type 2: no study of a patient took place, so there is no date to give
        "StudyTime": "",
        "AccessionNumber": "",
        "Modality": modality,
        "Manufacturer": "medaug",
        "ManufacturerModelName": "medaug",
        "SoftwareVersions": __version__,
        "ReferringPhysicianName": "",
        "StudyDescription": MARK,
        "SeriesDescription": MARK,
        "PatientName": f"SYNTHETIC^{facts.patient_id}",
        "PatientID": facts.patient_id,
        "PatientBirthDate": "",
        "PatientSex": "",
        "StudyInstanceUID": facts.study_uid,
        "SeriesInstanceUID": facts.series_uid,
        "StudyID": "1",
        "SeriesNumber": str(facts.series_number),
        "InstanceNumber": str(facts.instance_number),
        "ImageComments": f"{MARK}. {facts.description()}",
    }
    if facts.date:
        elements["SeriesDate"] = facts.date
    if storage_class != "ct":
        elements["PatientOrientation"] = list(facts.geometry.patient_orientation or ("",))  # 2C; 1C of DX (C.8.11.3)
    if storage_class != "dx":
        elements["Laterality"] = ""  # 2C of a series whose body part may be paired (C.7.3.1)
    if facts.pixels_checked:
        elements |= {"BurnedInAnnotation": "NO", "PatientIdentityRemoved": "YES", "DeidentificationMethod": DEIDENTIFICATION}
    if facts.lossy is not None:
        elements["LossyImageCompression"] = "01" if facts.lossy else "00"
    return elements


def _pixels(stored: np.ndarray, facts: ImageFacts, storage_class: str) -> dict[str, Any]:
    """Image pixel, modality LUT and VOI LUT modules (PS3.3 C.7.6.3, C.11.1, C.11.2)."""
    bits = stored.dtype.itemsize * 8
    highest = (1 << bits) - 1
    elements: dict[str, Any] = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
    }
    if stored.ndim == 3:
        return elements | {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    window = (float(highest + 1) / 2, float(highest + 1))  # C.11.2.1.2.1: maps 0 to black and the highest value to white
    if facts.hounsfield is not None and storage_class in ("ct", "sc"):
        lower, upper = facts.hounsfield
        elements |= {"RescaleIntercept": _ds(lower), "RescaleSlope": _ds((upper - lower) / highest), "RescaleType": "HU"}
        window = ((lower + upper) / 2, upper - lower)
    return elements | {"WindowCenter": _ds(window[0]), "WindowWidth": _ds(max(window[1], 1.0))}


def _provenance(facts: ImageFacts) -> dict[str, Any]:
    """Derivation (PS3.3 C.7.6.1.1.3) and contributing equipment (C.12.1.1.5).

    CID 7203 has no code for images out of a generative model; it may be extended, and (123110, DCM, "Artificial
    Intelligence") of PS3.16 is the nearest standard concept. No source image is referenced: its UID is a patient's.
    """
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code("109100", "Synthesizing Equipment")]  # CID 7005
    equipment.Manufacturer = "medaug"
    equipment.ManufacturerModelName = "medaug"
    # A set of weights is a version of the software: VR LO holds the 64 hex digits of its sha256 exactly.
    equipment.SoftwareVersions = [__version__, *([facts.weights_sha256] if facts.weights_sha256 else [])]
    equipment.ContributionDescription = facts.description()[:1024]
    return {
        "DerivationDescription": facts.description()[:1024],
        "DerivationCodeSequence": [_code("123110", "Artificial Intelligence")],
        "ContributingEquipmentSequence": [equipment],
    }


def _ct(facts: ImageFacts) -> dict[str, Any]:
    """Frame of reference, image plane and CT image modules (PS3.3 C.7.4.1, C.7.6.2, C.8.2.1)."""
    geometry = facts.geometry
    assert geometry.spacing_mm and geometry.orientation and geometry.position_mm  # `lacks` was asked
    return {
        "FrameOfReferenceUID": facts.frame_uid,
        "PositionReferenceIndicator": "",
        "PatientPosition": "",  # 2C: how the body lay in a gantry is not known
        "PixelSpacing": _decimals(geometry.spacing_mm),
        "ImageOrientationPatient": _decimals(geometry.orientation),
        "ImagePositionPatient": _decimals(geometry.position_mm),
        "SliceThickness": "" if geometry.thickness_mm is None else _ds(geometry.thickness_mm),
        "KVP": "",
        "AcquisitionNumber": "",
    }


def _projection(facts: ImageFacts) -> dict[str, Any]:
    """CR series and image (PS3.3 C.8.1.1, C.8.1.2), and what DX shares with them."""
    elements: dict[str, Any] = {"BodyPartExamined": "", "ViewPosition": ""}
    geometry = facts.geometry
    detector, image = geometry.detector_spacing_mm or geometry.spacing_mm, geometry.spacing_mm or geometry.detector_spacing_mm
    if detector is not None and image is not None:
        # Where only one is known both are equal: no correction for magnification is claimed (10.7.1.3).
        elements |= {"ImagerPixelSpacing": _decimals(detector), "PixelSpacing": _decimals(image)}
    return elements


def _digital_x_ray(facts: ImageFacts) -> dict[str, Any]:
    """DX series, anatomy, image, detector and acquisition context modules (PS3.3 C.8.11.1 to C.8.11.4, C.7.6.14).

    Values that the class demands without a word for "unknown" are the least that can be claimed: no side (U), no unit
    (US), a display scale that is not linear in the beam (LOG), and text in the pixels unless they were searched.
    """
    return {
        "PresentationIntentType": "FOR PRESENTATION",
        "ImageLaterality": "U",
        "AnatomicRegionSequence": [],
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": -1,  # brighter is less beam
        "RescaleIntercept": "0",
        "RescaleSlope": "1",
        "RescaleType": "US",
        "PresentationLUTShape": "IDENTITY",
        "LossyImageCompression": "00",
        "BurnedInAnnotation": "NO" if facts.pixels_checked else "YES",
        "PositionerType": "",
        "DetectorType": "",
        "AcquisitionContextSequence": [],
    }


def _secondary_capture(facts: ImageFacts) -> dict[str, Any]:
    """SC equipment and image modules (PS3.3 C.8.6.1, C.8.6.2). SYN is the defined term for a synthetic image."""
    elements: dict[str, Any] = {"ConversionType": "SYN"}
    if facts.geometry.spacing_mm is not None:
        elements["PixelSpacing"] = _decimals(facts.geometry.spacing_mm)
    return elements


def _code(value: str, meaning: str) -> Dataset:
    """A code of the DICOM controlled terminology (PS3.3 8.8)."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def _ds(value: float) -> DSfloat:
    """VR DS: at most 16 characters (PS3.5 6.2), rounded where needed."""
    return DSfloat(value, auto_format=True)


def _decimals(values: Sequence[float]) -> list[DSfloat]:
    return [_ds(value) for value in values]


def says_synthetic(data: bytes) -> bool:
    """True if a DICOM file still says in its header that it is synthetic."""
    with limits.decoding("DICOM"):
        header = dcmread(io.BytesIO(data), specific_tags=["SyntheticData", "SeriesDescription", "ImageType"])
        kept = (header.get("SyntheticData"), header.get("SeriesDescription"), list(header.get("ImageType") or [])[:2])
    return kept == ("YES", MARK, ["DERIVED", "SECONDARY"])
