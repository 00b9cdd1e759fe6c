"""From records to a cohort: conflicts and duplicates out, groups found, splits made, and every choice noted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medaug.cohort import SPLITS
from medaug.errors import ConfigError, DataError
from medaug.intake import duplicates
from medaug.intake.classes import Classes, find_classes, in_words, shown, tidy
from medaug.intake.grouping import describe_groups, group, join_known, thumbnails
from medaug.intake.identity import may_name_patient, names_patient
from medaug.intake.join import SPLIT_RANK
from medaug.intake.leak import leak_indicator
from medaug.intake.pseudonyms import Pseudonyms
from medaug.intake.read import Quarantine
from medaug.intake.readers import agreement, describe, settle
from medaug.intake.records import IntakeOptions, Record
from medaug.intake.spool import Spool
from medaug.splits import grouped_split, stratified_part

DEFAULT_RATIOS = (0.7, 0.1, 0.2)


@dataclass
class Assembly:
    """What becomes the cohort, and what the report says about how.

    Attributes:
        records: the images that stay, each with label, group, patient and split.
        classes: ordered class names.
        leak: see `leak.leak_indicator`.
        drawn_splits: the splits that were drawn here; the others are the source's own.
        groups: how groups were found: number, origin, largest, threshold ...
        neighbour_distances: of the images that were grouped automatically.
        agreement: between readers, see `readers.agreement`.
        notes: one sentence each.
    """

    records: list[Record]
    classes: Classes
    leak: dict[str, Any] = field(default_factory=dict)
    drawn_splits: list[str] = field(default_factory=list)
    groups: dict[str, Any] = field(default_factory=dict)
    neighbour_distances: np.ndarray = field(default_factory=lambda: np.zeros(0))
    agreement: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def assemble(
    records: Sequence[Record],
    options: IntakeOptions,
    has_splits: bool,
    quarantine: Quarantine,
    names: dict[str, str],
    pseudonyms: Pseudonyms,
    spool: Spool,
) -> Assembly:
    """Decide on labels, duplicates, groups and splits of all records.

    Args:
        records: with at least one label each.
        options: as given.
        has_splits: the source says which split every image is in; kept unless `options.split` is given.
        quarantine: receives what is left out.
        names: class names for integer labels.
        pseudonyms: what names patients.
        spool: holds the thumbnails.

    Raises:
        ConfigError: `class-unknown`, a class asked for that no image has.
        DataError: `label-identifies`, `no-usable-image`, `class-too-small`, `labels-not-classes`, `split-impossible`, `split-missing`.
    """
    if not records:
        raise no_usable_image(quarantine)
    ordered = sorted(records, key=Record.order)
    for record in ordered if names else ():
        record.labels = tuple(sorted({names.get(label, label) for label in record.labels}))
        record.votes = tuple((row, reader, names.get(label, label)) for row, reader, label in record.votes)
    sayable = refuse_names(ordered)
    classes = find_classes([label for record in ordered for label in record.labels], options.ordinal, sayable)
    if odd := [name for name in options.classes or () if name not in classes.names]:
        raise ConfigError("class-unknown", f"--classes names {', '.join(odd)}, and no image has that label.")
    found = _agreement(ordered, classes)
    single = _labelled(ordered, classes, options, quarantine)
    sets = duplicates.Union(len(ordered))
    merged = join_known(ordered, sets)
    kept = _without_duplicates(ordered, single, sets, quarantine)
    if not kept:
        raise no_usable_image(quarantine)
    classes = _without_unused(ordered, kept, classes, sayable)
    result = Assembly([ordered[index] for index in kept], classes, agreement=found, notes=list(classes.notes))
    if found["read_twice"]:
        result.notes.append(describe(found, options.conflicts))
    if merged:
        result.notes.append(f"{merged} pair(s) of patients or groups hold identical images and were joined to one group.")
    keeps_splits = has_splits and options.split is None
    grouped = group(ordered, kept, sets, keeps_splits, pseudonyms, spool)
    result.neighbour_distances = grouped.neighbour_distances
    result.notes.extend(grouped.notes)
    _refuse_small_classes(result.records, classes.names, sayable)
    _split(result, options, keeps_splits, quarantine, sayable)
    _keep_training(result, options)
    result.groups = describe_groups(result.records) | grouped.search
    result.leak = _leak(result.records, spool, options.seed)
    return result


def no_usable_image(quarantine: Quarantine) -> DataError:
    """The error for a source of which nothing remains."""
    codes = ", ".join(f"{count} {code}" for code, count in quarantine.by_code().items()) or "no image file was found"
    return DataError(
        "no-usable-image", f"The source holds no usable labelled image ({codes}); check the source and the label table."
    )


def refuse_names(records: Sequence[Record]) -> frozenset[str]:
    """Refuse labels that name patients: a folder per patient, or the wrong column.

    One image is enough where its label holds two parts of a name, an identifier or a date of its patient; a single part,
    which may be a word by chance, has to fit half of the images.

    Returns:
        The labels that errors may repeat: every one of their images says whose it is, and the label holds none of it.

    Raises:
        DataError: `label-identifies`.
    """
    images: Counter[str] = Counter()
    certain: set[str] = set()
    likely: Counter[str] = Counter()
    unknown: set[str] = set()
    seen: dict[tuple[str, tuple[str, ...]], tuple[bool, bool]] = {}
    for record in records:
        for label in record.labels:
            images[label] += 1
            pair = (label, record.secrets)
            if pair not in seen:
                names = any(names_patient(label, secret) for secret in record.secrets)
                may_name = any(may_name_patient(label, secret) for secret in record.secrets)
                seen[pair] = names, may_name
            if seen[pair][0]:
                certain.add(label)
            likely[label] += seen[pair][1]
            if not record.secrets:
                unknown.add(label)
    refused = certain | {label for label, count in likely.items() if 2 * count >= images[label]}
    if refused:
        raise DataError(
            "label-identifies",
            f"{len(refused)} label(s) hold the name, an identifier or a date of a patient whose images they label; "
            "choose the column that holds the class, or sort the images into folders by class.",
        )
    checked = set(images) - unknown - {label for label, count in likely.items() if count}
    return frozenset(tidy(label) for label in checked)


def _agreement(records: Sequence[Record], classes: Classes) -> dict[str, Any]:
    """Between the readers, once for each set of rows: a patient's 200 slices were not read 200 times."""
    units = {tuple(row for row, _, _ in record.votes): record.votes for record in records if len(record.votes) > 1}
    index = {label: classes.index[tidy(label)] for votes in units.values() for _, _, label in votes}
    return agreement([units[rows] for rows in sorted(units)], index, len(classes.names), classes.ordinal)


def _labelled(records: Sequence[Record], classes: Classes, options: IntakeOptions, quarantine: Quarantine) -> list[int]:
    """Indices of records with one label, given or settled between readers, of a class asked for; the others are left out."""
    single = []
    index = {label: classes.index[tidy(label)] for record in records for label in record.labels}
    for number, record in enumerate(records):
        votes = record.votes or tuple((0, "", label) for label in record.labels)
        rank = settle(votes, index, policy=options.conflicts, senior=options.senior, ordinal=classes.ordinal)
        if rank is None:
            quarantine.leave_out(record, "conflicting-label", "The label table gives this image several classes.")
        elif options.classes is not None and classes.names[rank] not in options.classes:
            quarantine.leave_out(record, "class-not-chosen", "Its class is not among those that were asked for.")
        else:
            record.label = rank
            single.append(number)
    return single


def _without_unused(records: Sequence[Record], kept: Sequence[int], classes: Classes, sayable: Container[str]) -> Classes:
    """The classes without those of which no image remains: only outvoted readers saw them, or all their images are left out."""
    used = sorted({records[index].label for index in kept})
    if len(used) == len(classes.names):
        return classes
    left = [rank for rank in range(len(classes.names)) if rank not in used]
    if len(used) < 2:
        raise DataError(
            "class-too-small", "Fewer than two classes have images that remain; look at the label conflicts and at --conflicts."
        )
    for index in kept:
        records[index].label = used.index(records[index].label)
    meaning = {text: used.index(rank) for text, rank in classes.index.items() if rank in used}
    named = ", ".join(in_words(classes.names, rank, sayable) for rank in left[:20]) + (" ..." if len(left) > 20 else "")
    note = f"{len(left)} class(es) were dropped, because no image of them remains: {named}."
    return Classes(tuple(classes.names[rank] for rank in used), classes.ordinal, meaning, (*classes.notes, note))


def _without_duplicates(
    records: Sequence[Record], labelled: Sequence[int], sets: duplicates.Union, quarantine: Quarantine
) -> list[int]:
    """Indices that stay: one of each set of identical images, none where their labels differ."""
    same = duplicates.Union(len(records))
    usable = set(labelled)
    same.join_equal([record.pixels if index in usable else None for index, record in enumerate(records)])
    same.join_equal([record.case_id if index in usable else None for index, record in enumerate(records)])
    members: dict[int, list[int]] = defaultdict(list)
    for index in labelled:
        members[same.find(index)].append(index)
    kept = []
    for copies in members.values():
        if len({records[index].label for index in copies}) > 1:
            for index in copies:
                quarantine.leave_out(records[index], "conflicting-label", "Identical images have different labels.")
            continue
        # The copy in the most held-out split stays, so that fixed test sets keep their images.
        best, *others = sorted(copies, key=lambda index: (SPLIT_RANK[records[index].split], index))
        kept.append(best)
        for index in others:
            code = records[best].case_id
            quarantine.leave_out(records[index], "duplicate-image", f"The image is identical to case {code}, which stays.")
    return sorted(kept)


def _refuse_small_classes(records: Sequence[Record], names: Sequence[str], sayable: Container[str]) -> None:
    for label in range(len(names)):
        cases = sum(record.label == label for record in records)
        groups = len({record.group for record in records if record.label == label})
        if cases < 2 or groups < 2:
            raise DataError(
                "class-too-small",
                f"Class {in_words(names, label, sayable)} has {cases} usable image(s) in {groups} group(s) or patient(s), at least 2 of each are needed; "
                "add images, join it with another class or leave it out.",
            )


def _split(result: Assembly, options: IntakeOptions, keeps_splits: bool, quarantine: Quarantine, sayable: Container[str]) -> None:
    if keeps_splits:
        _keep_splits(result, options.seed, quarantine)
    else:
        _assign(result.records, options.split or DEFAULT_RATIOS, options.seed)
        result.drawn_splits.extend(SPLITS)
    for label, name in enumerate(result.classes.names):
        present = {record.split for record in result.records if record.label == label}
        if "training" not in present:
            raise DataError(
                "class-too-small",
                f"Class {in_words(result.classes.names, label, sayable)} has no usable image in the training split; "
                "use --split to divide the source anew.",
            )
        result.notes.extend(
            f"Class {shown(name)} has no image in the {split} split." for split in SPLITS[1:] if split not in present
        )


def _assign(records: Sequence[Record], ratios: Sequence[float], seed: int) -> None:
    names = grouped_split([record.label for record in records], [record.unit for record in records], ratios, seed)
    for record, name in zip(records, names, strict=True):
        record.split = name


def _keep_splits(result: Assembly, seed: int, quarantine: Quarantine) -> None:
    """The source's own splits; a group in several of them stays in the most held-out one only."""
    home: dict[str, str | None] = {}
    for record in result.records:
        home[record.group] = min(home.get(record.group, record.split), record.split, key=lambda name: SPLIT_RANK[name])
    kept = []
    for record in result.records:
        if record.split is None:
            quarantine.leave_out(record, "split-unknown", "The source has splits but gives none that is known for this image.")
        elif record.split != home[record.group]:
            reason = f"Its group is also in the {home[record.group]} split; this {record.split} image would leak it."
            quarantine.leave_out(record, "group-crosses-splits", reason)
        else:
            kept.append(record)
    result.records = kept
    present = {record.split for record in kept}
    if "training" not in present:
        raise DataError(
            "split-missing", "The source's own splits leave no training image; use --split to divide the source anew."
        )
    for missing, ratios in (("validation", (0.875, 0.125, 0.0)), ("test", (0.8, 0.0, 0.2))):
        if missing not in present:
            _assign([record for record in kept if record.split == "training"], ratios, seed)
            result.drawn_splits.append(missing)
            result.notes.append(
                f"The source has no {missing} split: {ratios[1] + ratios[2]:.1%} of its training groups were taken for it."
            )
    crossing = quarantine.by_code().get("group-crosses-splits", 0)
    if crossing:
        result.notes.append(
            f"The source's own splits share patients or look-alike groups: {crossing} image(s) were left out "
            "of training or validation."
        )


def _keep_training(result: Assembly, options: IntakeOptions) -> None:
    """Only so many training images, as if there were no more; validation and test stay as they are."""
    if options.training_images is None:
        return
    training = [record for record in result.records if record.split == "training"]
    labels, names = [record.label for record in training], [record.case_id for record in training]
    chosen = dict(zip(names, stratified_part(labels, names, options.training_images, options.seed), strict=True))
    result.records = [record for record in result.records if record.split != "training" or chosen[record.case_id]]
    result.notes.append(f"{options.training_images} of {len(training)} training images were kept, chosen by class and seed.")


def _leak(records: Sequence[Record], spool: Spool, seed: int) -> dict[str, Any]:
    sides = [[record for record in records if record.split == split] for split in ("training", "test")]
    if not all(sides):
        text = "No test split: the leak indicator cannot be computed."
        return {"level": "unknown", "verdict": text, "warning": None, "n": 0}
    (train, train_labels), (test, test_labels) = ((thumbnails(spool, side), [record.label for record in side]) for side in sides)
    return leak_indicator(train, train_labels, test, test_labels, seed=seed)
