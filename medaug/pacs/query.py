"""What is asked of an archive: keys and values, checked before they are sent and again when the answers come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from medaug.errors import ConfigError, DataError
from medaug.pacs.head import is_uid
from medaug.pacs.store import Store

# Keys by the level they belong to (PS3.4 C.6.2.1, study root).
STUDY_KEYS = (
    *("StudyInstanceUID", "AccessionNumber", "PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "StudyDescription", "ModalitiesInStudy", "ReferringPhysicianName"),
)
SERIES_KEYS = (
    *("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription", "BodyPartExamined", "ProtocolName"),
    *("SeriesDate", "SeriesTime"),
)
TABLE_KEYS = {"accession": "AccessionNumber", "patient": "PatientID", "study": "StudyInstanceUID"}
UNIVERSAL = "*?\\"  # matching by wildcard, and by list (PS3.4 C.2.2.2)
_NOT_COMPARED = ("PatientName", "ReferringPhysicianName", "StudyTime", "SeriesTime")  # several spellings of one value
Row = Mapping[str, str]


@dataclass(frozen=True)
class Query:
    """Keys and values of one request; `row` is the row of the label table it comes from, 1 below the header."""

    study: Mapping[str, str]
    series: Mapping[str, str] = field(default_factory=dict)
    row: int | None = None


@dataclass(frozen=True)
class Series:
    """One series and its images: SOP Instance UID -> SOP Class UID, empty where the archive does not say."""

    study: str
    series: str
    images: Mapping[str, str]


@dataclass
class Plan:
    """What the archive has of what was asked.

    Attributes:
        series: in the order of the queries, each once.
        unmatched_rows: rows of the label table for which the archive has nothing.
        unconfirmed: answers that did not hold what was asked for, and were dropped.
    """

    series: list[Series] = field(default_factory=list)
    unmatched_rows: list[int] = field(default_factory=list)
    unconfirmed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Studies, series and images."""
        studies = {entry.study for entry in self.series}
        return {"studies": len(studies), "series": len(self.series), "images": sum(len(entry.images) for entry in self.series)}


class Archive(Protocol):
    """A PACS, whatever the protocol."""

    def find(self, level: str, keys: Mapping[str, str], returned: Sequence[str]) -> list[Row]:
        """Answers at "STUDY", "SERIES" or "IMAGE" level: keyword -> value, several values joined by a backslash."""
        ...

    def fetch(self, series: Series, missing: Sequence[str], store: Store) -> None:
        """Bring the missing images of a series into the store; may end early, or raise `Lost`."""
        ...


def parse_queries(level: str, words: Sequence[str], key: str = "", values: Sequence[tuple[int, str]] = ()) -> list[Query]:
    """Queries from KEY=VALUE words, or one for each value of a table's key column with the words as further conditions.

    Args:
        level: "study" or "series".
        words: as typed.
        key: "accession", "patient" or "study" with `values`.
        values: row number and value.

    Raises:
        ConfigError: `option-malformed`, `query-key-unknown`, `query-too-wide`.
        DataError: `key-wildcard`: a value of the table would match more than itself.
    """
    if level not in ("study", "series"):
        raise ConfigError("option-malformed", "--level takes study or series.")
    study: dict[str, str] = {}
    series: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not value or not name:
            raise ConfigError("option-malformed", "--query takes KEY=VALUE, for example ModalitiesInStudy=CT.")
        if name in SERIES_KEYS and level == "series":
            series[name] = value
        elif name in STUDY_KEYS:
            study[name] = value
        else:
            hint = "; --level series has more" if level == "study" else ""
            known = STUDY_KEYS if level == "study" else STUDY_KEYS + SERIES_KEYS
            raise ConfigError("query-key-unknown", f"--query knows the keys {', '.join(known)}{hint}.")
    if not key:
        _refuse_everything(study)
        return [Query(study, series)]
    if key not in TABLE_KEYS:
        raise ConfigError("option-malformed", f"--key takes {', '.join(TABLE_KEYS)}.")
    return [Query({**study, TABLE_KEYS[key]: value}, series, row) for row, value in _distinct(key, values)]


def _refuse_everything(study: Mapping[str, str]) -> None:
    if not any(value.strip("*?") for value in study.values()):
        raise ConfigError(
            "query-too-wide",
            "The query would match every study of the PACS; give at least one study key with a value, or --table.",
        )


def _distinct(key: str, values: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    seen = set()
    for row, value in values:
        if any(character in value for character in UNIVERSAL) or (key == "study" and not is_uid(value)):
            raise DataError(
                "key-wildcard",
                f"Row {row} of the label table holds a key with one of {' '.join(UNIVERSAL)} or no valid UID; correct the table.",
            )
        if value not in seen:
            seen.add(value)
            yield row, value


def make_plan(archive: Archive, queries: Sequence[Query], advance: Any = None) -> Plan:
    """Ask the archive level by level: studies, their series, their images.

    Answers are compared with the question, because an archive may ignore a key that it does not support and would
    then hand out every patient it has (PS3.4 C.2.2.1.3 lets optional keys be ignored).

    Raises:
        StorageError: the archive cannot be reached.
    """
    plan = Plan()
    seen: set[str] = set()
    for query in queries:
        found = False
        for study in _confirmed(archive, "STUDY", query.study, "StudyInstanceUID", plan):
            for series in _confirmed(archive, "SERIES", {**query.series}, "SeriesInstanceUID", plan, StudyInstanceUID=study):
                found = True
                if series not in seen:
                    seen.add(series)
                    plan.series.append(Series(study, series, _images(archive, study, series)))
        if not found and query.row is not None:
            plan.unmatched_rows.append(query.row)
        if advance is not None:
            advance(1)
    return plan


def _confirmed(archive: Archive, level: str, keys: dict[str, str] | Row, unique: str, plan: Plan, **parents: str) -> list[str]:
    rows = archive.find(level, {**keys, **parents}, (unique,))
    uids = []
    for row in rows:
        uid = row.get(unique, "")
        if is_uid(uid) and all(_agrees(row, name, value) for name, value in keys.items()):
            uids.append(uid)
        else:
            plan.unconfirmed += 1
    return list(dict.fromkeys(uids))


def _agrees(row: Row, name: str, wanted: str) -> bool:
    """True if an answer holds the value asked for; wildcards, lists and ranges are left to the archive."""
    if name in _NOT_COMPARED or any(character in wanted for character in UNIVERSAL):
        return True
    if name.endswith("Date") and "-" in wanted:
        return True
    values = [value.strip() for value in row.get(name, "").split("\\")]
    return wanted.strip() in values


def _images(archive: Archive, study: str, series: str) -> dict[str, str]:
    keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
    rows = archive.find("IMAGE", keys, ("SOPInstanceUID", "SOPClassUID"))
    return {row["SOPInstanceUID"]: row.get("SOPClassUID", "") for row in rows if is_uid(row.get("SOPInstanceUID", ""))}
