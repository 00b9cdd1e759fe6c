"""The embedded default data: drawn slices that look like chest CT, written as a hospital would export them.

A phantom, no patient: every shape comes from a formula and a keyed draw. Grade 0 to 3 is the burden of lung nodules
(how many, how large) together with their spiculation; everything else differs per patient whatever the grade.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medaug import __implementation_uid__, __version__, storage
from medaug.draws import numpy_generator
from medaug.errors import ConfigError
from medaug.phantom_drawing import LOWEST_HU, NUM_GRADES, Grid, cut_nodules, draw_anatomy, draw_nodules, draw_slice

if TYPE_CHECKING:
    from pydicom import Dataset

TABLE_COLUMNS = ("sop", "patient_id", "grade")
_IMAGE_ELEMENTS = {
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 12,
    "HighBit": 11,
    "PixelRepresentation": 0,
    "BurnedInAnnotation": "NO",
    "WindowCenter": "-600",
    "WindowWidth": "1500",
    "RescaleIntercept": str(LOWEST_HU),
    "RescaleSlope": "1",
    "RescaleType": "HU",
}


@dataclass(frozen=True, eq=False)
class PhantomSlice:
    """One drawn slice.

    Attributes:
        patient: number from 1.
        index: number of the slice within the patient, from 1.
        grade: 0 to 3.
        hounsfield: (size, size) float32 in Hounsfield units, at least -1024.
        spacing_mm: distance of pixel centres.
        position_mm: place of the slice along the body.
    """

    patient: int
    index: int
    grade: int
    hounsfield: np.ndarray
    spacing_mm: float
    position_mm: float


def draw_cohort(num_patients: int = 120, size: int = 128, seed: int = 0) -> Iterator[PhantomSlice]:
    """Draw all slices of a phantom cohort, patient by patient; grades are balanced over the patients.

    Args:
        num_patients: at least 1; about half of them have two or three slices.
        size: side of a slice in pixels, at least 32.
        seed: decides every draw; a patient depends on (seed, number) and its grade alone.

    Raises:
        ConfigError: a number is too small.
    """
    if num_patients < 1 or size < 32:
        raise ConfigError(
            "phantom-invalid", f"A phantom cohort needs at least 1 patient and 32 pixels, got {num_patients} and {size}."
        )
    grades = numpy_generator("phantom grades", seed).permutation(np.arange(num_patients) % NUM_GRADES)
    for patient, grade in enumerate(grades, start=1):
        yield from draw_patient(patient, int(grade), size, seed)


def draw_patient(patient: int, grade: int, size: int, seed: int) -> Iterator[PhantomSlice]:
    """Draw the one to three slices of one patient: the same anatomy a few millimetres apart."""
    key = ("phantom", seed, patient)
    random = numpy_generator(*key, "slices")
    anatomy = draw_anatomy(key)
    grid = Grid(size, anatomy.warp)
    nodules = draw_nodules(anatomy, grade)
    steps = [0, *random.choice([-2, -1, 1, 2], size=2, replace=False)][: int(random.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))]
    for index, step in enumerate(sorted(steps), start=1):
        moved = replace(anatomy, level=float(np.clip(anatomy.level + 0.03 * step, 0.0, 1.0)))
        hounsfield = draw_slice(moved, cut_nodules(nodules, int(step)), grid, int(step))
        yield PhantomSlice(patient, index, grade, hounsfield, anatomy.field_mm / size, round(-250 * moved.level, 1))


def write_phantom_export(folder: Path, *, num_patients: int = 120, size: int = 128, seed: int = 0) -> Path:
    """Write a phantom cohort as a PACS export: ``DICOM/PA000001/ST000001/IM000001`` ... and ``labels.csv`` beside it.

    Args:
        folder: made if it is not there.
        num_patients, size, seed: as in `draw_cohort`. The same numbers give the same bytes.

    Returns:
        Path of the table, with columns sop (SOPInstanceUID), patient_id and grade.

    Raises:
        ConfigError: see `draw_cohort`.  StorageError: disk full, no permission.
    """
    folder = Path(folder)
    rows = []
    for drawn in draw_cohort(num_patients, size, seed):
        dataset = _dataset(drawn, seed)
        place = folder / "DICOM" / f"PA{drawn.patient:06d}" / "ST000001" / f"IM{drawn.index:06d}"
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        storage.write_bytes(place, buffer.getvalue())
        rows.append(dict(zip(TABLE_COLUMNS, (dataset.SOPInstanceUID, dataset.PatientID, drawn.grade), strict=True)))
    storage.write_csv(folder / "labels.csv", rows, TABLE_COLUMNS)
    return folder / "labels.csv"


def _uid(*key: object) -> str:
    """A UID made from a key: 2.25. and 128 bits as a decimal number (PS3.5 B.2)."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(('medaug phantom', *key)).encode()).digest()[:16], 'big')}"


def _dataset(drawn: PhantomSlice, seed: int) -> Dataset:
    """A CT Image Storage object (PS3.3 A.3) that says in several places that it is a phantom."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

    number, size = f"{drawn.patient:04d}", drawn.hounsfield.shape[0]
    corner = round(-drawn.spacing_mm * (size - 1) / 2, 4)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = UID(__implementation_uid__)
    dataset.file_meta.ImplementationVersionName = f"MEDAUG {__version__}"[:16]
    elements: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": _uid("sop", seed, drawn.patient, drawn.index, size),
        "SyntheticData": "YES",
        "StudyDate": "",
        "StudyTime": "",
        "AccessionNumber": f"PHANTOM{number}",
        "Modality": "CT",
        "Manufacturer": "medaug",
        "ReferringPhysicianName": "",
        "SeriesDescription": "PHANTOM drawn chest slices, not a patient",
        "PatientName": f"PHANTOM^{number}",
        "PatientID": f"PHANTOM{number}",
        "PatientBirthDate": "",
        "PatientSex": "",
        "SliceThickness": "5",
        "KVP": "",
        "PatientPosition": "HFS",
        "StudyInstanceUID": _uid("study", seed, drawn.patient, size),
        "SeriesInstanceUID": _uid("series", seed, drawn.patient, size),
        "StudyID": number,
        "SeriesNumber": "1",
        "AcquisitionNumber": "1",
        "InstanceNumber": str(drawn.index),
        "ImagePositionPatient": [corner, corner, drawn.position_mm],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "FrameOfReferenceUID": _uid("frame", seed, drawn.patient, size),
        "PositionReferenceIndicator": "",
        "ImageComments": "PHANTOM: drawn by medaug, no human anatomy, not for diagnosis",
        "Rows": size,
        "Columns": size,
        "PixelSpacing": [round(drawn.spacing_mm, 5)] * 2,
    }
    for keyword, value in (elements | _IMAGE_ELEMENTS).items():
        setattr(dataset, keyword, value)
    stored = np.clip(np.rint(drawn.hounsfield - LOWEST_HU), 0, 4095).astype("<u2")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset
