"""De-identified DICOM: the Basic Application Level Confidentiality Profile (PS3.15 E.2), carried out by dicom-anonymizer.

The library knows the profile's table; here it is applied inside sequences too, identifiers are replaced by keyed
pseudonyms, dates are removed (or, where the profile wants a value, become 1 January of year 1), and text elements that neither the table nor a
short list of technical ones knows are emptied. What was done is written down with the codes of PS3.16 CID 7050.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np

from medaug import __version__
from medaug.errors import DataError
from medaug.intake.leftovers import TECHNICAL, TEXT, identifying_values, left_in_dataset, occurs
from medaug.intake.pseudonyms import Pseudonyms

PROFILE = "dicomfields_2026c"  # edition of the table of PS3.15 E.1-1 in dicom-anonymizer
METHOD = "PS3.15 Basic Application Level Confidentiality Profile: identifiers replaced by keyed pseudonyms, dates removed"
CODES = {
    "113100": "Basic Application Confidentiality Profile",
    "113101": "Clean Pixel Data Option",
}
OWN = frozenset({"PatientName", "PatientID", "DeidentificationMethod", "CodeValue", "CodeMeaning", "CodingSchemeDesignator"})
ALWAYS_REMOVED = ("IconImageSequence", "DataSetTrailingPadding", "DigitalSignaturesSequence", "OriginalAttributesSequence")

Box = tuple[int, int, int, int]


def deidentified(dataset: Any, relative: str, patient: str, pseudonyms: Pseudonyms, boxes: Mapping[int, Sequence[Box]]) -> bytes:
    """A DICOM file without its patient.

    Args:
        dataset: the original, with its file meta information; changed in place.
        relative: its path in the source, whose parts are searched for as well.
        patient: pseudonym that becomes PatientID and PatientName.
        pseudonyms: for UIDs.
        boxes: 0-based frame -> places to black out, see `burned_in`.

    Raises:
        DataError: `identity-leftover` if a value of the original is still there, `deidentify-failed`.
    """
    values = identifying_values(dataset, relative)
    if any(boxes.values()):
        _mask(dataset, boxes)
    rules = _rules(pseudonyms)
    _apply(dataset, rules)
    _empty_unknown_text(dataset, set(rules))
    _describe(dataset, patient, masked=any(boxes.values()))
    data = _written(dataset)
    _refuse_leftovers(values, dataset, data)
    return data


def _rules(pseudonyms: Pseudonyms) -> dict[tuple[int, ...], Callable[[Any, Any], None]]:
    """The profile's table as actions; the library's own for what is replaced by dummies, ours for the rest."""
    from dicomanonymizer.simpledicomanonymizer import replace

    def uid(dataset: Any, tag: Any) -> None:
        element = dataset.get(tag)
        if element is not None and element.VR == "UI" and element.value:
            several = not isinstance(element.value, str)
            new = [pseudonyms.uid(str(value)) for value in (element.value if several else [element.value])]
            element.value = new if several else new[0]
        elif element is not None and element.VR != "SQ":  # of references the UIDs were replaced inside
            del dataset[element.tag]

    def remove(dataset: Any, tag: Any) -> None:
        if tag in dataset:
            del dataset[tag]

    def empty(dataset: Any, tag: Any) -> None:
        if tag in dataset:
            dataset[tag].value = [] if dataset[tag].VR == "SQ" else None

    def dummy(dataset: Any, tag: Any) -> None:
        try:
            replace(dataset, tag)
        except NotImplementedError:  # a VR that has no dummy there
            remove(dataset, tag)

    actions = {"D": dummy, "Z": empty, "X": remove, "U": uid, "Z_D": dummy, "X_Z": empty, "X_D": dummy, "X_Z_D": dummy}
    actions["X_Z_U_STAR"] = uid
    return {tag: actions[kind] for kind, tags in _table().items() for tag in tags}


@lru_cache(maxsize=1)
def _table() -> dict[str, list[tuple[int, ...]]]:
    from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector

    table = dicom_anonymization_database_selector(PROFILE)
    return {name.removesuffix("_TAGS"): list(tags) for name, tags in table.items() if name != "ALL_TAGS"}


def _apply(dataset: Any, rules: dict[tuple[int, ...], Callable[[Any, Any], None]]) -> None:
    """The library's pass over a data set, from the innermost sequences outwards: it does not enter them itself."""
    from dicomanonymizer import anonymize_dataset

    for element in list(dataset):
        if element.VR == "SQ":
            for item in element.value or ():
                _apply(item, rules)
    anonymize_dataset(dataset, base_rules_gen=lambda: dict(rules))


def _empty_unknown_text(dataset: Any, known: set[tuple[int, ...]]) -> None:
    for element in dataset.iterall():
        if (str(element.VR) in TEXT | {"PN", "DA", "DT", "TM", "UN"} and element.keyword not in TECHNICAL) and (
            (element.tag.group, element.tag.element) not in known
        ):
            element.value = None


def _describe(dataset: Any, patient: str, *, masked: bool) -> None:
    """Say who this now is and what was done (PS3.3 C.7.1.1 and C.12.1.1)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sequence import Sequence as Items

    for keyword in ALWAYS_REMOVED:
        if keyword in dataset:
            delattr(dataset, keyword)
    dataset.PatientName = dataset.PatientID = patient
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = [METHOD[:64], f"medaug {__version__}, table {PROFILE}"[:64]]
    codes = []
    for value in ["113100", "113101"] if masked else ["113100"]:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", CODES[value]
        codes.append(code)
    dataset.DeidentificationMethodCodeSequence = Items(codes)
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    if masked:
        dataset.BurnedInAnnotation = "NO"
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.ImplementationVersionName = f"MEDAUG {__version__}"[:16]
    dataset.file_meta, dataset.preamble = meta, b"\0" * 128


def _mask(dataset: Any, boxes: Mapping[int, Sequence[Box]]) -> None:
    """Black out places of the stored pixels, which are then written without compression (PS3.15 E.3.1)."""
    from pydicom.uid import ExplicitVRLittleEndian

    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset.decompress(generate_instance_uid=False)
    stored = np.array(dataset.pixel_array)
    frames = stored if int(dataset.get("NumberOfFrames") or 1) > 1 else stored[None]
    inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    for frame, places in boxes.items():
        # Padding where the file has a value for it; else the darkest one.
        dark = dataset.get("PixelPaddingValue")
        if not isinstance(dark, int) or not np.iinfo(stored.dtype).min <= dark <= np.iinfo(stored.dtype).max:
            dark = frames[frame].max() if inverted else frames[frame].min()
        for top, left, bottom, right in places:
            frames[frame][top:bottom, left:right] = dark
    if int(dataset.SamplesPerPixel) == 3:
        dataset.PlanarConfiguration = 0
    data = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset._is_implicit_VR = dataset._is_little_endian = None  # noqa: SLF001 - the encoding goes by the file meta now


def _written(dataset: Any) -> bytes:
    from pydicom import dcmwrite

    buffer = BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _refuse_leftovers(values: set[str], dataset: Any, data: bytes) -> None:
    """Search the written bytes for every value of the original."""
    pixels = dataset.get("PixelData") or b""
    start = data.rfind(pixels) if pixels else len(data)
    header, body = (data[:start] + data[start + len(pixels) :]).lower(), bytes(pixels).lower()
    left = sum(occurs(value, header) or occurs(value, body, in_pixels=True) for value in values)
    if left or left_in_dataset(values, dataset, OWN):
        raise DataError(
            "identity-leftover",
            f"{max(left, 1)} identifying value(s) of the original were still in the de-identified copy, which was not kept; "
            "its image is in the cohort.",
        )
