"""DICOM files built in memory for tests: small, synthetic, with planted identifiers that no message may repeat."""

from __future__ import annotations

import warnings

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian

SECRETS = ("DOE^JANE", "MRN-4711", "ACC-0815", "19700101")


def make_image(pixels, syntax=ExplicitVRLittleEndian, without=(), **elements) -> Dataset:
    """A CT image; `elements` are added or replaced, those in `without` are left out."""
    frames = pixels.ndim == 3 and elements.get("SamplesPerPixel", 1) == 1
    bits = pixels.dtype.itemsize * 8
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    facts = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "PatientName": SECRETS[0],
        "PatientID": SECRETS[1],
        "AccessionNumber": SECRETS[2],
        "PatientBirthDate": SECRETS[3],
        "Modality": "CT",
        "Rows": pixels.shape[1] if frames else pixels.shape[0],
        "Columns": pixels.shape[2] if frames else pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "RescaleSlope": "1",
        "RescaleIntercept": "-1024",
        "PixelSpacing": ["0.75", "0.5"],
    }
    if frames:
        facts["NumberOfFrames"] = len(pixels)
    for keyword, value in (facts | elements).items():
        if keyword not in without:
            setattr(dataset, keyword, value)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


def save(path, dataset):
    """Write a data set, whatever is wrong with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
    return path


def item(**elements) -> Dataset:
    """A sequence item."""
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def slice_pixels(index, size=8) -> np.ndarray:
    """Values that tell the slice."""
    return (np.random.default_rng(index).integers(0, 50, (size, size)) + 100 * index).astype(np.uint16)


def make_slice(index, z=None, series="1.2.3.1", number=None, sop=None, pixels=None, **elements) -> Dataset:
    """Slice `index` of an axial CT series, by default 2.5 mm apart and numbered from the head."""
    facts = {
        "SOPInstanceUID": sop or f"{series}.{index + 1}",
        "SeriesInstanceUID": series,
        "InstanceNumber": 100 - index if number is None else number,
        "ImagePositionPatient": [-10, -20, -50 + 2.5 * index if z is None else z],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "FrameOfReferenceUID": "1.2.9",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    }
    return make_image(slice_pixels(index) if pixels is None else pixels, **(facts | elements))


def make_enhanced(volume, positions, slopes=None, **elements) -> Dataset:
    """Enhanced CT: rescale, window and geometry in functional groups, frames at the given z in mm."""
    groups = []
    for index, z in enumerate(positions):
        group = item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, z])],
            FrameVOILUTSequence=[item(WindowCenter="40", WindowWidth=str(100 + index))],
        )
        if slopes is not None:
            group.PixelValueTransformationSequence = [
                item(RescaleSlope=str(slopes[index]), RescaleIntercept="-1000", RescaleType="HU")
            ]
        groups.append(group)
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=["0.5", "0.25"], SliceThickness="3")],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelValueTransformationSequence=[item(RescaleSlope="1", RescaleIntercept="-1000", RescaleType="HU")],
    )
    return make_image(
        volume,
        without=("RescaleSlope", "RescaleIntercept", "PixelSpacing"),
        SOPClassUID=EnhancedCTImageStorage,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
        **elements,
    )
