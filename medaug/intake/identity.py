"""Whether a text holds the name, an identifier or a date of a patient, however it is spelled, and which names may be written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

PLAIN_DICOM_NAME = re.compile(r"(?:im|img|image|i|mr|ct|cr|dx|sl|slice|file)[-_]?\d{1,6}(?:\.(?:dcm|ima))?", re.IGNORECASE)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# Words that say what a picture is, not whose it is.
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "im img image i mr ct cr dx xr us pet sl slice file frame scan vol volume series pic picture page plane axial coronal "
        "sagittal train training val validation test mask label grade class normal healthy abnormal positive negative pa ap lat "
        "left right l r g a b c d n t x y z",
    )
)
IMAGE_SUFFIX = re.compile(r"(\.nii\.gz|\.nii|\.png|\.jpe?g|\.tiff?|\.bmp|\.gif|\.webp|\.npz|\.dcm|\.dicom|\.ima)$", re.IGNORECASE)
MAX_COUNT_DIGITS = 5  # 6 digits are a date of birth, more are an identifier
PLACEHOLDER_IDS = frozenset(
    {
        "",
        "0",
        "anon",
        "anonym",
        "anonymous",
        "anonymized",
        "anonymised",
        "unknown",
        "none",
        "nan",
        "na",
        "n/a",
        "null",
        "x",
        "xxx",
    }
)
WHOLE = 4  # characters; a shorter identifier or name part is in too many words
# How names with letters that ASCII lacks are typed without them.
_TYPED = {"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "oe", "å": "aa", "ð": "d", "þ": "th", "ł": "l"}
_BARE = {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ð": "d", "þ": "th", "ł": "l", "đ": "d", "ı": "i"}
_MONTHS = (
    ("jan",),
    ("feb",),
    ("mar", "mär", "mrz"),
    ("apr",),
    ("may", "mai"),
    ("jun",),
    ("jul",),
    ("aug",),
    ("sep",),
    ("oct", "okt"),
    ("nov",),
    ("dec", "dez"),
)
_SEPARATORS = re.compile(r"[^0-9A-Za-z\u0080-\uffff]+")


def normal_id(value: str) -> str:
    """An identifier for comparison: no outer blanks, one case, no leading zeros that a spreadsheet may have dropped."""
    text = " ".join(value.replace("\0", " ").split()).casefold()
    text = text[:-2] if re.fullmatch(r"\d+\.0", text) else text
    return (text.lstrip("0") or "0") if text.isdigit() else text


def known_patient(value: str) -> str:
    """`normal_id`, empty for blank identifiers and for placeholders that many patients share."""
    text = normal_id(value)
    return "" if text in PLACEHOLDER_IDS else text


def patient_of(patient: str, name: str, birth_date: str) -> str:
    """What tells a patient apart: the identifier, else name and birth date together, else "".

    Args:
        patient, name, birth_date: as a file gives them, placeholders included.
    """
    if known_patient(patient):
        return patient
    person = " ".join(re.split(r"[\s^=]+", name.replace("\0", " "))).strip()
    date = birth_date.strip()
    return f"{person} {date}" if known_patient(person) and len(next(iter(dates_in(date)), ())) == 3 else ""


def foldings(text: str) -> tuple[str, str]:
    """A text in lower case of ASCII letters, as far as it can be: umlauts as two letters, and all accents stripped."""
    # NFC first: a decomposed ü is an umlaut too; lower() and not casefold(), which would take ß away from the table.
    composed = unicodedata.normalize("NFC", text).lower()
    typed = "".join(_TYPED.get(letter, letter) for letter in composed)
    bare = "".join(_BARE.get(letter, letter) for letter in composed)
    return _stripped(typed), _stripped(bare)


def _stripped(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def name_parts(value: str) -> list[str]:
    """The parts of a person's name, or of an identifier in parts."""
    return [part for part in re.split(r"[\s^=_.,/\\-]+", value.replace("\0", " ")) if part]


def dates_in(text: str) -> Iterator[tuple[int, int, int]]:
    """Every (year, month, day) that a text may spell: any order that is in use, with or without separators and zeros."""
    tokens = [token for token in re.split(r"[^0-9a-zäöü]+|(?<=\d)(?=[a-zäöü])|(?<=[a-zäöü])(?=\d)", text.lower()) if token]
    triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    for token in tokens:
        if token.isdecimal() and len(token) >= 8:
            triples += [(token[:4], token[4:6], token[6:8]), (token[:2], token[2:4], token[4:8])]
        elif token.isdecimal() and len(token) == 6:
            triples.append((token[:2], token[2:4], token[4:]))
    for first, second, third in triples:
        for year, month, day in ((first, second, third), (third, second, first), (third, first, second)):
            found = _date(year, month, day)
            if found is not None:
                yield found


def _date(year: str, month: str, day: str) -> tuple[int, int, int] | None:
    number = next((index for index, names in enumerate(_MONTHS, start=1) if month.startswith(names)), None)
    if number is None:
        number = int(month) if month.isdecimal() and len(month) <= 2 else 0
    if not (year.isdecimal() and len(year) in (2, 4) and day.isdecimal() and len(day) <= 2):
        return None
    valid = 1 <= number <= 12 and 1 <= int(day) <= 31
    # Two digits are a year of any century: -1 for it, which `same_date` compares.
    return (int(year) if len(year) == 4 else -1 - int(year), number, int(day)) if valid else None


def _same_date(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    years = [year % 100 if year >= 0 else -1 - year for year in (first[0], second[0])]
    exact = first[0] == second[0] or min(first[0], second[0]) < 0
    return exact and years[0] == years[1] and first[1:] == second[1:]


def holds_date(text: str, secret: str) -> bool:
    """True if the secret is a date (YYYYMMDD or as people write it) and the text spells it."""
    own = re.fullmatch(r"\d{8}|\d{4}\D\d{1,2}\D\d{1,2}|\d{1,2}\D\d{1,2}\D\d{4}", secret.strip())
    if own is None:
        return False
    return any(_same_date(found, wanted) for wanted in set(dates_in(secret)) for found in dates_in(text))


def names_patient(text: str, secret: str) -> bool:
    """True if a text certainly names a patient: two or more parts of the name, the full identifier, or the date.

    Args:
        text: a class name.
        secret: an identifier, a person's name (PS3.5 6.2.1.1) or a date of the patient.
    """
    if not known_patient(secret):
        return False
    if holds_date(text, secret):
        return True
    for label, wanted in zip(foldings(text), foldings(secret), strict=True):
        written = set(_SEPARATORS.split(label))
        tokens = {normal_id(token) for token in written}
        bare = normal_id(wanted)
        if len(wanted.strip()) >= WHOLE and wanted.strip() in written:
            return True
        if len(bare) >= WHOLE and (bare in tokens or _within(bare, label)):  # grade 3 is not study 0003
            return True
        if sum(_has_part(part, label, tokens) for part in {normal_id(part): part for part in name_parts(wanted)}.values()) >= 2:
            return True
    return False


def _has_part(part: str, label: str, tokens: set[str]) -> bool:
    if part.isdecimal():
        return len(part) >= 3 and normal_id(part) in tokens  # the 1 of P-1 is in every list of grades
    return len(part) >= 2 and (part in tokens or (len(part) >= WHOLE and part in label))


def _within(wanted: str, text: str) -> bool:
    """True if the text holds it and no digit or letter of the same kind goes on beside it."""
    kind = {True: r"\d", False: r"[^\W\d_]"}
    before, after = kind[wanted[0].isdecimal()], kind[wanted[-1].isdecimal()]
    return re.search(rf"(?<!{before}){re.escape(wanted)}(?!{after})", text) is not None


def reveals(name: str, secret: str) -> bool:
    """True if the name may hold the identifier, the date, or for a name in parts any part of 3 letters or more."""
    if not known_patient(secret):
        return False
    if holds_date(name, secret):
        return True
    for text, folded in zip(foldings(name), foldings(secret), strict=True):
        wanted = normal_id(folded)
        tokens = {normal_id(token) for token in _SEPARATORS.split(text)}
        parts = [part for part in [wanted, *name_parts(wanted)] if len(part) >= 3]
        if wanted in tokens or any(part in text for part in parts):
            return True
    return False


def may_name_patient(label: str, secret: str) -> bool:
    """`reveals` for a class name: a secret that is short without its leading zeros is in too many of them."""
    return len(secret.strip()) >= WHOLE and len(normal_id(secret)) >= WHOLE and reveals(label, secret)  # grade 3, study 0003


def is_counting_name(base: str) -> bool:
    """True for file names that only count: common words and numbers of at most `MAX_COUNT_DIGITS` digits altogether.

    Identifiers and dates are numbers too, longer ones; words that are not in the list may be names.
    """
    stem = IMAGE_SUFFIX.sub("", base)
    if not stem or not stem.isascii():
        return False
    words = re.findall(r"[A-Za-z]+", stem)
    digits = re.findall(r"\d+", stem)
    plain = re.fullmatch(r"[A-Za-z0-9 _.()-]+", stem) is not None
    few = sum(map(len, digits)) <= MAX_COUNT_DIGITS and len(digits) <= 3 and len(words) <= 4
    return plain and few and bool(digits) and all(word.lower() in COMMON_WORDS for word in words)


def may_write_name(path: Path, kind: str, secrets: Iterable[str], *, keep: bool) -> bool:
    """Whether the base name of an image file may be written.

    Args:
        path: of the file.
        kind: "dicom" or another; a DICOM suffix counts like DICOM.
        secrets: what is known of the patient: no name that `reveals` one of them is written.
        keep: the user vouches that file names hold no identity; for DICOM names this is never believed.
    """
    base = path.name
    if not base.isprintable():  # bytes that are no UTF-8, newlines, control characters
        return False
    is_dicom = kind == "dicom" or base.lower().endswith(DICOM_SUFFIXES)
    # 6 digits after IM are believed of DICOM alone, whose header says what they must not be.
    plain = PLAIN_DICOM_NAME.fullmatch(base) is not None if is_dicom else keep or is_counting_name(base)
    return plain and not any(reveals(base, secret) for secret in secrets)
