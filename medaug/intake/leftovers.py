"""The search for what de-identification left behind: every value of a source that could name its patient, in every byte.

It knows nothing of how files are de-identified: it takes the values from the original and looks for them in the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from medaug.intake.identity import PLACEHOLDER_IDS, PLAIN_DICOM_NAME

TEXT = frozenset({"LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE"})
SHORT = 4  # letters or digits; shorter values are compared with whole elements, for any file holds them somewhere
SURE = 8  # characters that pixels do not spell by accident
# Text that is about the device or the method, or comes from the standard's own lists.
TECHNICAL = frozenset(
    {
        "Manufacturer",
        "ManufacturerModelName",
        "SoftwareVersions",
        "ConvolutionKernel",
        "FilterType",
        "CodeValue",
        "LongCodeValue",
        "CodeMeaning",
        "CodingSchemeDesignator",
        "CodingSchemeVersion",
        "SequenceName",
        "PulseSequenceName",
        "ReceiveCoilName",
        "TransmitCoilName",
        "ImagedNucleus",
        "RescaleType",
        "ModalityLUTType",
        "TransducerData",
        "ImplementationVersionName",
        "DeidentificationMethod",
        "ResonantNucleus",
        "ProcessingFunction",
        "VolumetricProperties",
    }
)
REGISTERED = "1.2.840.10008."  # UIDs of the standard itself
NO_INSTANCE = ("ClassUID", "SyntaxUID", "CreatorUID")  # UIDs of kinds, programs and encodings, not of things


def identifying_values(dataset: Any, relative: str = "") -> set[str]:
    """Texts of a data set (and of its path) that could lead to the patient.

    Names and their parts, dates in the usual spellings, UIDs of instances, every text that is not technical, and
    what private elements hold as text. Placeholders ("anonymous", "0") are left out.

    Args:
        dataset: pydicom data set with its file meta information.
        relative: path of the file inside the source; folder and file names that are not mere counters count too.
    """
    found: set[str] = set()
    for part in (getattr(dataset, "file_meta", None), dataset):
        for element in part.iterall() if part is not None else ():
            found.update(_of_element(element))
    for part in PurePosixPath(relative).parts:
        if not PLAIN_DICOM_NAME.fullmatch(part):
            found.update((part, PurePosixPath(part).stem))
    return {value for value in found if len(value) >= 2 and value.casefold() not in PLACEHOLDER_IDS and set(value) - set("0.- ")}


def _of_element(element: Any) -> Iterator[str]:
    vr = str(element.VR)
    if element.tag.is_private and vr in ("UN", "OB"):
        yield from _printable(element.value)
        return
    if vr == "SQ" or (not element.tag.is_private and element.keyword in TECHNICAL):
        return
    for value in _values(element):
        if vr == "PN":
            yield value
            yield from (word for word in re.split(r"[\s^=,.]+", value) if len(word) >= 3)
        elif vr == "UI":
            if not value.startswith(REGISTERED) and not element.keyword.endswith(NO_INSTANCE):
                yield value
        elif vr in ("DA", "DT"):
            yield from spellings_of_date(value)
        elif vr in TEXT or element.tag.is_private:
            yield value
            yield from (line.strip() for line in value.splitlines() if len(line.strip()) >= SHORT)
            # A number inside a text: telephone, case, room.
            yield from re.findall(r"[A-Za-z]*\d[\w/-]{4,}", value)


def _values(element: Any) -> list[str]:
    value = element.value
    parts = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
    return [text for part in parts if part is not None and not isinstance(part, bytes) and (text := str(part).strip(" \0"))]


def _printable(value: Any) -> Iterator[str]:
    """Runs of five or more printable characters in bytes of unknown kind."""
    if isinstance(value, bytes):
        yield from (run.decode("latin-1").strip() for run in re.findall(rb"[\x20-\x7e\xa0-\xff]{5,}", value[:65536]))


def spellings_of_date(value: str) -> Iterator[str]:
    """A DICOM date (YYYYMMDD, or a date with time) as people and programs write it; nothing for 1 January of year 1."""
    found = re.match(r"(\d{4})[.-]?(\d{2})[.-]?(\d{2})", value)
    if not found or found[0].startswith("0001"):
        return
    year, month, day = found.groups()
    yield from (year + month + day, f"{year}-{month}-{day}", f"{year}.{month}.{day}", f"{year}/{month}/{day}")
    yield from (f"{day}.{month}.{year}", f"{day}/{month}/{year}", f"{month}/{day}/{year}", f"{day}-{month}-{year}")


def occurs(value: str, data: bytes, *, in_pixels: bool = False) -> bool:
    """True if the bytes hold the value in UTF-8, Latin-1 or UTF-16, in any case of ASCII letters, as a word of its own.

    "4711" is in "ID4711" and "004711" but not in "94711", and "Ann" not in "annotation".

    Args:
        value: at least `SHORT` characters, else False.
        data: to search, lower-cased (`bytes.lower`).
        in_pixels: numbers that happen to spell short or monotonous texts do not count.
    """
    if len(value) < SHORT or (in_pixels and (len(value) < SURE or len(set(value)) < 4)):
        return False
    for encoding, width in (("utf-8", 1), ("latin-1", 1), ("utf-16-le", 2), ("utf-16-be", 2)):
        try:
            wanted = value.encode(encoding).lower()
        except UnicodeEncodeError:
            continue
        start = data.find(wanted)
        while start >= 0:
            end = start + len(wanted)
            before = data[start - width : start].strip(b"\0") if start >= width else b""
            after = data[end : end + width].strip(b"\0")
            if not _continues(value[0], before, leading=True) and not _continues(value[-1], after, leading=False):
                return True
            start = data.find(wanted, start + 1)
    return False


def _continues(character: str, neighbour: bytes, *, leading: bool) -> bool:
    """True if a letter stands beside a letter or a digit beside a digit: the value is part of a longer one."""
    if character.isdigit():
        return neighbour in ((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9") + (() if leading else (b"0",)))
    return character.isalpha() and neighbour.isalpha()


def left_in_dataset(values: Iterable[str], dataset: Any, own: frozenset[str]) -> bool:
    """True if a short value is, alone, an element of the data set.

    Args:
        values: as `identifying_values` gives them; longer ones are found in the bytes.
        dataset: as it was written.
        own: keywords that were written anew and hold our own text.
    """
    short = {value.casefold() for value in values if len(value) < SHORT}
    kinds, known = TEXT | {"PN", "UI"}, own | TECHNICAL
    for element in dataset.iterall() if short else ():
        foreign = str(element.VR) in kinds and element.keyword not in known
        if foreign and any(value.casefold() in short for value in _values(element)):
            return True
    return False
