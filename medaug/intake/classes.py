"""From label texts to ordered classes: spellings of one class are joined, grades are put in order."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from medaug.errors import DataError

ROMAN = {"0": 0, "i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6, "vii": 7, "viii": 8, "ix": 9, "x": 10}
GRADE = re.compile(r"(?:grade)?[\s_-]*(?:([+-]?\d{1,6})(?:[.,]0+)?|([ivx]+))", re.IGNORECASE)
GRADE_NAME = re.compile(r"grade[\s_-]*(\d+)", re.IGNORECASE)
MAX_CLASSES = 1_000
MAX_SHOWN = 40  # letters


@dataclass(frozen=True)
class Classes:
    """Ordered class names, what each label text means, and what was assumed."""

    names: tuple[str, ...]
    ordinal: bool
    index: dict[str, int]
    notes: tuple[str, ...]


def find_classes(labels: Iterable[str], ordinal: bool | None = None, sayable: Container[str] | None = None) -> Classes:
    """Order the classes behind label texts.

    Numbers and grades ("2", "2.0", "II", "grade 2") are one class if all labels can be read so; other texts are one
    class if they differ only in case or blanks. Order: by number, else by name.

    Args:
        labels: one text per image, not blank.
        ordinal: None takes classes as ordered if all are numbers or begin with grade<digit>.
        sayable: class names that an error may repeat besides grades; the others may be patients.

    Raises:
        DataError: fewer than two classes, or so many that the column cannot hold classes.
    """
    counts = Counter(tidy(label) for label in labels)
    notes: list[str] = []
    numbers = {text: number(text) for text in counts}
    if counts and all(value is not None for value in numbers.values()):
        names, meaning = _numbered(counts, {text: int(value) for text, value in numbers.items() if value is not None}, notes)
        ordered = True
    else:
        names, meaning = _named(counts, notes)
        ordered = all(GRADE_NAME.match(name) for name in names)
    _check_number(names, sum(counts.values()), sayable or ())
    if ordinal is None and ordered:
        notes.append("The classes were taken as ordered grades because of their names; --nominal says otherwise.")
    return Classes(tuple(names), ordered if ordinal is None else ordinal, meaning, tuple(notes))


def tidy(label: str) -> str:
    """A label text in one form of Unicode, with single blanks."""
    return " ".join(unicodedata.normalize("NFC", label).split())


def number(text: str) -> int | None:
    """The integer that a label text means ("2.0", "II", "grade 2"), None if it means none."""
    found = GRADE.fullmatch(text)
    if not found:
        return None
    return int(found[1]) if found[1] is not None else ROMAN.get(found[2].casefold())


def _numbered(counts: Counter[str], numbers: dict[str, int], notes: list[str]) -> tuple[list[str], dict[str, int]]:
    spellings: dict[int, list[str]] = defaultdict(list)
    for text in sorted(counts):
        spellings[numbers[text]].append(text)
    values = sorted(spellings)
    keeps_names = all(len(texts) == 1 and GRADE_NAME.match(texts[0]) for texts in spellings.values())
    names = [spellings[value][0] if keeps_names else str(value) for value in values]
    changed = [text for text in counts if not keeps_names and text != str(numbers[text])]
    if changed:
        notes.append(f"{sum(counts[text] for text in changed)} label(s) written as {_quote(changed)} were read as whole numbers.")
    return names, {text: values.index(numbers[text]) for text in counts}


def _named(counts: Counter[str], notes: list[str]) -> tuple[list[str], dict[str, int]]:
    spellings: dict[str, list[str]] = defaultdict(list)
    for text in sorted(counts):
        spellings[text.casefold()].append(text)
    chosen = {folded: max(texts, key=lambda text: counts[text]) for folded, texts in spellings.items()}
    other = [text for text in counts if chosen[text.casefold()] != text]
    if other:
        notes.append(
            f"{sum(counts[text] for text in other)} label(s) written as {_quote(other)} were joined with the same name "
            "in another case."
        )
    names = sorted(chosen.values(), key=_name_order)
    return names, {text: names.index(chosen[text.casefold()]) for text in counts}


def _name_order(name: str) -> tuple[int, str]:
    grade = GRADE_NAME.match(name)
    return (int(grade[1]) if grade else 0), name


def _quote(texts: Iterable[str]) -> str:
    ordered = sorted(texts)
    return ", ".join(shown(text) for text in ordered[:5]) + (" ..." if len(ordered) > 5 else "")


def shown(name: str) -> str:
    """A class name as messages repeat it: in quotes, and cut where it is a whole text."""
    return repr(name) if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]!r} ..."


def is_grade(name: str) -> bool:
    """True for "2", "grade 2", "II": texts that cannot be a patient (but for numbers of more than three digits)."""
    return len(name) <= 12 and sum(letter.isdigit() for letter in name) <= 3 and number(name) is not None


def in_words(names: Sequence[str], rank: int, sayable: Container[str] = ()) -> str:
    """What an error calls a class: its name if it is a grade or among `sayable`, else its place among the classes."""
    name = names[rank]
    return shown(name) if is_grade(name) or name in sayable else f"number {rank + 1} of {len(names)} in order of name"


def _check_number(names: list[str], images: int, sayable: Container[str]) -> None:
    if len(names) < 2:
        found = f" ({in_words(names, 0, sayable)})" if names and (is_grade(names[0]) or names[0] in sayable) else ""
        raise DataError(
            "class-too-small",
            f"At least two classes are needed, got {len(names)}{found}; check the label column or the folders.",
        )
    if len(names) > MAX_CLASSES or (len(names) > 20 and len(names) > images / 2):
        raise DataError(
            "labels-not-classes",
            f"{len(names)} different labels for {images} images are no classes; choose the column that holds the class.",
        )
