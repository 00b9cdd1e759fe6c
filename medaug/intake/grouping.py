"""Which images belong to one patient or group, and what these are called."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaug import storage
from medaug.intake import duplicates
from medaug.intake.pseudonyms import Pseudonyms
from medaug.intake.records import Record
from medaug.intake.spool import Spool, Thumbnails


@dataclass
class Grouped:
    """How groups were found: for the report.

    Attributes:
        search: number of images grouped automatically, threshold ...
        neighbour_distances: of these images.
        notes: one sentence each.
    """

    search: dict[str, Any]
    neighbour_distances: np.ndarray
    notes: list[str]


def join_known(records: Sequence[Record], sets: duplicates.Union) -> int:
    """Join what certainly belongs together; returns how many pairs of known groups shared an identical image."""
    owners: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        for key in record.group_keys:
            sets.join(owners.setdefault(key, index), index)
    sets.join_equal([record.volume if _is_own_volume(record) else None for record in records])
    _join_studies(records, sets)
    merged = 0
    first: dict[bytes, int] = {}
    for index, record in enumerate(records):
        if record.is_blank:
            continue  # an empty slice says nothing about whose it is
        other = first.setdefault(record.pixels, index)
        if sets.find(other) != sets.find(index):
            merged += int(bool(record.group_keys) and bool(records[other].group_keys))
            sets.join(other, index)
    return merged


def _is_own_volume(record: Record) -> bool:
    return record.volume is not None and record.volume.startswith("file ")


def _join_studies(records: Sequence[Record], sets: duplicates.Union) -> None:
    """Images of one DICOM study without a patient; a study that all of them share is a placeholder."""
    studies = [None if record.group_keys or _is_own_volume(record) else record.volume for record in records]
    if len({study for study in studies if study}) > 1:
        sets.join_equal(studies)


def group(
    ordered: Sequence[Record],
    kept: Sequence[int],
    sets: duplicates.Union,
    keeps_splits: bool,
    pseudonyms: Pseudonyms,
    spool: Spool,
) -> Grouped:
    """Give every kept record its group and its patient's pseudonym.

    A group with patients is named by keyed hash of them, so that it keeps its name in another intake with the same key;
    one without is named after the content of its files. The split goes by `Record.unit`, a name after the content in
    both cases: another key changes names, not which images are for training.

    Where the source's own splits are kept, look-alikes are not joined: they are a guess, and each group that crosses a
    split costs its training images. Near-copies are joined all the same.
    """
    alone = [index for index in kept if not ordered[index].group_keys]
    stack = thumbnails(spool, [ordered[index] for index in alone])
    grouping = duplicates.find_groups(stack, [sets.find(index) for index in alone], near_copies_only=keeps_splits)
    first: dict[int, int] = {}
    for index, number in zip(alone, grouping.labels, strict=True):
        sets.join(first.setdefault(number, index), index)
    members: dict[int, list[Record]] = defaultdict(list)
    for index in kept:
        members[sets.find(index)].append(ordered[index])
    for group in members.values():
        patients = {value for record in group for kind, value in record.group_keys if kind == "patient"}
        unit = ("p" if patients else "g") + _members_sha256(group)
        name = pseudonyms.patient(*patients) if patients else unit
        for record in group:
            record.unit, record.group = unit, name
    _name_patients([ordered[index] for index in kept], pseudonyms)
    notes = [f"{len(alone)} image(s) have no patient and no group: {_how_grouped(len(alone), keeps_splits)}"] if alone else []
    return Grouped(_describe_search(grouping, len(alone)), grouping.neighbour_distances, notes)


def _how_grouped(number: int, keeps_splits: bool) -> str:
    if keeps_splits:
        return "near-copies were grouped; --split divides the source anew by patient-like groups."
    if number > duplicates.MAX_CLUSTERED:
        return f"only near-copies were grouped, for they are more than {duplicates.MAX_CLUSTERED}; give a patient column."
    return "patient-like groups were found from the pixels."


def _members_sha256(records: Sequence[Record]) -> str:
    """Name of a set of images: other members, as another grouping makes them, never share it."""
    return storage.sha256_json(sorted([record.source, record.position] for record in records))[:12]


def _name_patients(records: Sequence[Record], pseudonyms: Pseudonyms) -> None:
    names: dict[tuple[tuple[str, str], ...], str] = {}  # one text for all images of a patient
    for record in records:
        keys = record.group_keys
        if keys not in names:
            names[keys] = min((pseudonyms.patient(value) for kind, value in keys if kind == "patient"), default="")
        record.patient = names[keys]


def describe_groups(records: Sequence[Record]) -> dict[str, Any]:
    """Number and sizes of the groups of the images that stay."""
    sizes = Counter(record.group for record in records)
    origins = Counter(record.group_keys[0][0] if record.group_keys else "automatic" for record in records)
    return {
        "number": len(sizes),
        "largest": max(sizes.values()),
        "alone": sum(size == 1 for size in sizes.values()),
        "images_by_origin": dict(sorted(origins.items())),
    }


def _describe_search(grouping: duplicates.Grouping, automatic: int) -> dict[str, Any]:
    """How the groups of `automatic` images without patient or group were found."""
    return {
        "automatic": automatic,
        "near_copies": grouping.near_copies,
        "threshold": grouping.threshold,
        "largest_allowed": grouping.largest_allowed if automatic else None,
    }


def thumbnails(spool: Spool, records: Sequence[Record]) -> Thumbnails:
    """The thumbnails of records, (N, 32, 32) float16 in [0, 1]."""
    return Thumbnails(spool, [record.place for record in records])
