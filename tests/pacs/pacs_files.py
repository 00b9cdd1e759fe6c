"""Small DICOM files with planted identity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from medaug.draws import numpy_generator

PLANTED = ("PLANTEDNAME", "PLANTEDGIVEN", "PLANTEDID", "PLANTEDACC")  # must never be seen outside the files
ROOT = "2.25.7"


def sop_uid(patient: int, series: int, number: int) -> str:
    return f"{ROOT}.{patient}.1.{series}.{number}"


def image(patient: int = 1, series: int = 1, number: int = 1, *, size: int = 32, synthetic: bool = False) -> Dataset:
    """A CT slice of a drawn patient; the same arguments give the same bytes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = sop_uid(patient, series, number)
    if synthetic:
        dataset.add_new(0x0008001C, "CS", "YES")
    dataset.StudyDate = "20200102"
    dataset.AccessionNumber = f"PLANTEDACC{patient}"
    dataset.Modality = "CT"
    dataset.PatientName = f"PLANTEDNAME^PLANTEDGIVEN{patient}"
    dataset.PatientID = f"PLANTEDID{patient}"
    dataset.PatientBirthDate = "19300405"
    dataset.StudyInstanceUID = f"{ROOT}.{patient}.1"
    dataset.SeriesInstanceUID = f"{ROOT}.{patient}.1.{series}"
    dataset.SeriesNumber = str(series)
    dataset.InstanceNumber = str(number)
    dataset.Rows = dataset.Columns = size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    draw = numpy_generator("pacs-image", patient, series, number)
    dataset.PixelData = draw.integers(0, 4096, (size, size), dtype=np.uint16).tobytes()
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def sops_in(folder: Path) -> list[str]:
    """SOP Instance UIDs of the visible files of a folder, one for each file."""
    from pydicom import dcmread

    files = [path for path in folder.rglob("*.dcm") if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(str(UID(dcmread(path).SOPInstanceUID)) for path in files)
