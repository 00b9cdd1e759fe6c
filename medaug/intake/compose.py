"""The cohort of the images that stay: its header, its cases, and what 0 and 1 mean in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medaug.cohort import SPLITS, Case, Cohort, created_by
from medaug.intake.assemble import Assembly
from medaug.intake.processes import image_path
from medaug.intake.pseudonyms import Pseudonyms
from medaug.intake.records import IntakeOptions, Record
from medaug.intake.spool import Facts, plain
from medaug.io import raster


def compose(options: IntakeOptions, source: str, assembly: Assembly, folder: Path | None, pseudonyms: Pseudonyms) -> Cohort:
    """The cohort of an assembly; writes nothing but, in a folder, images that change between grey and colour."""
    records = assembly.records
    intensity = _intensity(records)
    channels = 3 if 2 * sum(record.is_colour for record in records) >= len(records) else 1
    changed = [record for record in records if record.is_colour != (channels == 3)]
    if changed:
        kind = "grey images became colour" if channels == 3 else "colour images became grey (ITU-R BT.601 luma)"
        assembly.notes.append(f"{len(changed)} {kind}, like most of the cohort.")
    if folder is not None:
        for record in changed:
            change_channels(folder / image_path(record), channels)
    splits = {split: tuple(_case(record, intensity) for record in records if record.split == split) for split in SPLITS}
    cohort = Cohort(
        name=options.name or options.out.name,
        modality=_modality(records, options, assembly.notes),
        classes=assembly.classes.names,
        ordinal=assembly.classes.ordinal,
        image_size=_side(records, options),
        spatial_dims=options.dimensions,
        channels=channels,
        intensity=intensity,
        created_by=created_by("intake", options.config(), options.seed),
        source=f"sha256:{source}",
        notes={"leak": assembly.leak, "intake": assembly.notes, "groups": assembly.groups, "drawn_splits": assembly.drawn_splits}
        | _key_note(records, pseudonyms)
        | text_note(records, options),
    )
    return cohort.with_cases(**splits)


def _side(records: Sequence[Record], options: IntakeOptions) -> int:
    """Side of the squares; volumes keep their grid, so that of the largest one counts."""
    if options.dimensions == 2:
        return options.image_size
    return max(max(record.acquisition["original_size"][1:]) for record in records)


def _key_note(records: Sequence[Record], pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Which key the pseudonyms are of, as a fingerprint; nothing if there are none."""
    named = any(record.patient or record.item.series for record in records)
    return {"pseudonym_key": pseudonyms.fingerprint} if named else {}


def text_note(records: Sequence[Record], options: IntakeOptions) -> dict[str, Any]:
    """Whether every kept image was searched for burned-in text; the note travels to the images made from them."""
    found = [record.burned_in for record in records]
    return {"burned_in": {"checked": all(found), "policy": options.burned_in, "suspects": found.count("kept")}}


def _case(record: Record, intensity: dict[str, Any]) -> Case:
    acquisition = record.acquisition
    if intensity["kind"] == "mixed" and record.intensity["kind"] != "percentile":  # those have it
        assert isinstance(acquisition, Facts)
        acquisition = acquisition.extended(intensity=record.intensity)
    return Case(
        id=record.case_id,
        image=image_path(record),
        label=record.label,
        group=record.group,
        source=record.source,
        patient=record.patient,
        name=record.name or record.case_id,
        acquisition=acquisition,
    )


def _intensity(records: Sequence[Record]) -> dict[str, Any]:
    """What 0 and 1 mean in every image; where that differs, each case says it in its acquisition."""
    first = records[0].intensity
    if first["kind"] != "percentile" and all(record.intensity == first for record in records):
        return plain(first)
    kinds = sorted({record.intensity["kind"] for record in records})
    kind = "percentile" if kinds == ["percentile"] else "mixed"
    return {
        "kind": kind,
        "kinds": kinds,
        "0": "differs per image: acquisition.intensity",
        "1": "differs per image: acquisition.intensity",
    }


def _modality(records: Sequence[Record], options: IntakeOptions, notes: list[str]) -> str:
    counts = Counter(record.modality for record in records if record.modality)
    if not counts:
        return options.modality
    if len(counts) > 1:
        found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        notes.append(f"The images are of several modalities ({found}); a network can mistake that for the class.")
    return max(sorted(counts), key=lambda name: counts[name])


def change_channels(path: Path, channels: int) -> None:
    """Make a written image grey (1 channel) or colour (3), if it is not."""
    image = raster.read_unit_png(path)
    if channels == 3 and image.ndim == 2:
        raster.write_unit_png(path, np.repeat(image[..., None], 3, axis=-1))
    elif channels == 1 and image.ndim == 3:
        raster.write_unit_png(path, np.clip(image @ np.array([0.299, 0.587, 0.114], np.float32), 0.0, 1.0))
