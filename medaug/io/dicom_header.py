"""The facts of a DICOM file that grouping needs, read without its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.multival import MultiValue

from medaug.io import limits
from medaug.io.dicom_elements import code, codes, double, has, items, quiet, tag_of, text, texts
from medaug.io.dicom_file import frame_count, open_header
from medaug.io.dicom_frames import frame_order, frame_views, is_enhanced, orientation_of, phase_of, position_of, spacing_of

IDENTIFIERS = {
    "patient": "PatientID",
    "patient_name": "PatientName",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "sop": "SOPInstanceUID",
    "accession": "AccessionNumber",
    "birth_date": "PatientBirthDate",
    "study_date": "StudyDate",
    "study_id": "StudyID",
    "other_names": "OtherPatientNames",
    "other_patients": "OtherPatientIDs",
}
# What leads to a patient and must not show in the name of a file or class; UIDs are no names.
SECRET = ("patient", "patient_name", "accession", "birth_date", "study_date", "study_id", "other_names", "other_patients")
SEPARATOR = "\\"  # between the values of one element (PS3.5 6.2)


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """What says which series an image belongs to and where in it. A fact that is absent or invalid is None, 0 or "".

    The identifiers are for joins in memory only.

    Attributes:
        sop, series, study, frame_of_reference, sop_class: UIDs as in the file.
        patient, accession: as in the file.
        patient_name, birth_date: as in the file.
        identifiers: as `identifiers_of` gives them.
        secrets: all values that lead to the patient, see `secrets_of`.
        frames: number of frames.
        rows, columns: size in pixels.
        orientation: ImageOrientationPatient, two unit vectors; of the first frame of a multi-frame file.
        position: ImagePositionPatient in mm; of the first frame.
        spacing: [between rows, between columns] in mm.
        image_type: for example ("ORIGINAL", "PRIMARY", "LOCALIZER").
        instance_number: InstanceNumber.
        temporal: what may tell 4-D phases apart, see `dicom_frames.phase_of`; "" for a multi-frame file.
        modality: "CT" ...
        declared: what it says about text in its pixels: `burned_in` (value of (0028,0301)), `sop_class`, `image_type`.
        frame_positions: of a multi-frame file whose frames have positions, in `frame_order`.
        frame_indices: the frames in that order, 0-based.
    """

    sop: str = ""
    series: str = ""
    study: str = ""
    patient: str = ""
    accession: str = ""
    patient_name: str = field(default="", repr=False)
    birth_date: str = field(default="", repr=False)
    identifiers: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    frames: int = 1
    rows: int = 0
    columns: int = 0
    orientation: tuple[float, ...] | None = None
    position: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None
    image_type: tuple[str, ...] = ()
    instance_number: int | None = None
    temporal: str = ""
    modality: str = ""
    frame_of_reference: str = ""
    sop_class: str = ""
    declared: dict[str, Any] = field(default_factory=dict)
    frame_positions: tuple[tuple[float, ...], ...] | None = None
    frame_indices: tuple[int, ...] | None = None


def read_header(path: Path) -> DicomHeader:
    """Read the header of a DICOM file up to its pixels.

    Raises:
        DataError: `file-missing`, `image-empty`, `image-too-large`, `image-unreadable`, `image-truncated`,
            `pixel-format-invalid` (NumberOfFrames).
    """
    with limits.decoding("DICOM"), quiet():
        return _header(open_header(Path(path)))


def _header(dataset: Dataset) -> DicomHeader:
    frames = frame_count(dataset)
    limits.check_shape((frames,), limits.MAX_VOXELS)
    view, positions, order = dataset, None, None
    if is_enhanced(dataset):
        views = frame_views(dataset, min(frames, limits.MAX_FRAMES))
        view = views[0]
        found = [position_of(other) for other in views]
        order = frame_order(views)
        if frames > 1 and None not in found:
            positions = tuple(found[index] for index in order)
    rows, columns = (double(dataset, keyword) or 0 for keyword in ("Rows", "Columns"))
    number = double(dataset, "InstanceNumber")
    identifiers = identifiers_of(dataset)
    return DicomHeader(
        sop=text(dataset, "SOPInstanceUID"),
        series=text(dataset, "SeriesInstanceUID"),
        study=text(dataset, "StudyInstanceUID"),
        patient=identifier(dataset, "PatientID"),
        accession=identifier(dataset, "AccessionNumber"),
        patient_name=identifier(dataset, "PatientName"),
        birth_date=identifier(dataset, "PatientBirthDate"),
        identifiers=identifiers,
        secrets=secrets_of(identifiers),
        frames=frames,
        rows=int(rows),
        columns=int(columns),
        orientation=orientation_of(view),
        position=position_of(view),
        spacing=spacing_of(view),
        image_type=codes(view, "FrameType") or codes(view, "ImageType"),
        instance_number=None if number is None else int(number),
        temporal="" if frames > 1 else phase_of(view),
        modality=code(dataset, "Modality"),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
        sop_class=text(dataset, "SOPClassUID"),
        declared={
            "burned_in": code(dataset, "BurnedInAnnotation"),
            "sop_class": text(dataset, "SOPClassUID"),
            "image_type": texts(dataset, "ImageType"),
        },
        frame_positions=positions,  # type: ignore[arg-type]
        frame_indices=None if order is None else tuple(order),
    )


def identifier(dataset: Dataset, keyword: str) -> str:
    """An identifying element as text, "" if absent; undecoded where its character set is broken."""
    if not has(dataset, keyword):
        return ""
    try:
        value = dataset[tag_of(keyword)[0]].value
        parts: list[Any] = list(value) if isinstance(value, (list, MultiValue)) else [value or ""]
        return SEPARATOR.join(str(part).strip(" \0") for part in parts)
    except (ValueError, LookupError, TypeError, AttributeError):  # a broken character set
        return SEPARATOR.join(texts(dataset, keyword))


def identifiers_of(dataset: Dataset) -> dict[str, str]:
    """The elements of `IDENTIFIERS`, as far as the file gives them; several values are joined with `SEPARATOR`."""
    found = {name: identifier(dataset, keyword) for name, keyword in IDENTIFIERS.items()}
    others = [found["other_patients"], *(identifier(item, "PatientID") for item in items(dataset, "OtherPatientIDsSequence"))]
    found["other_patients"] = SEPARATOR.join(value for value in others if value)
    return {name: value for name, value in found.items() if value}


def secrets_of(identifiers: Mapping[str, str]) -> tuple[str, ...]:
    """Every single value among `identifiers` that leads to the patient."""
    values = (part for name in SECRET for part in identifiers.get(name, "").split(SEPARATOR))
    return tuple(dict.fromkeys(value for part in values if (value := part.strip())))
