"""``grading.json``: what a comparison is about, written before its first cell and again after its last.

With the rows it is all that verdict and report are made of, so both can be made again without the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.cohort import Cohort
from medaug.errors import DataError, well_formed
from medaug.grading.arm import Arm, Variant
from medaug.grading.benchmark import ROWS_FOLDER, Cell
from medaug.grading.graded_data import GradedData
from medaug.grading.rows import Row, named
from medaug.grading.verdict import Opponents
from medaug.sessions import Sessions

RECORD_NAME = "grading.json"
RECORD_FORMAT = 1

__all__ = [
    "RECORD_NAME",
    "CellName",
    "GradingRecord",
    "RecordKeeper",
    "acceptance_of",
    "read_record",
    "record_from_json",
    "record_to_json",
    "recorded_rows",
]


@dataclass(frozen=True)
class CellName:
    """A planned training run: the arm's name in this comparison, and the name of its row."""

    arm: str
    network: str
    seed: int
    sha256: str


@dataclass(frozen=True)
class GradingRecord:
    """What rows need beside them to become a verdict.

    Attributes:
        data: the real images.
        arms: name and variant of each; the images are not known here.
        opponents: of every arm but the baselines.
        cells: planned, in the order of the rows.
        notes: warnings, repeated in every verdict.
        failed: arm, network, seed, code and reason of cells that have no row because their network or recipe failed.
        acceptance: arm -> source -> what the gate accepted per class, of all sets together, where the folders of the images say so.
        image_sets: arm -> number of sets of images, one for each seed; an arm that has one set for all seeds is not among them.
        command, profile: as the report shows them.
        num_resamples: of the bootstrap.
        finished: False until the last cell is there.
    """

    data: GradedData
    arms: tuple[Arm, ...]
    opponents: Mapping[str, Opponents]
    cells: tuple[CellName, ...] = ()
    notes: tuple[str, ...] = ()
    failed: tuple[Row, ...] = ()
    acceptance: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]] | None = None
    image_sets: Mapping[str, int] = field(default_factory=dict)
    command: str = ""
    profile: str = ""
    num_resamples: int = 10_000
    finished: bool = False

    def missing(self, rows: Sequence[Row]) -> list[CellName]:
        """Planned cells without a row that did not fail either."""
        there = {(row["arm"], row["network"], row["seed"]) for row in (*rows, *self.failed)}
        return [cell for cell in self.cells if (cell.arm, cell.network, cell.seed) not in there]


def record_to_json(record: GradingRecord) -> dict[str, Any]:
    """Plain values for a file."""
    arms = [
        {"name": arm.name}
        | asdict(arm.variant)
        | {"opponents": asdict(record.opponents[arm.name]) if arm.name in record.opponents else None}
        for arm in record.arms
    ]
    rest = {name: getattr(record, name) for name in ("command", "profile", "num_resamples", "finished")}
    return {
        "format": RECORD_FORMAT,
        **rest,
        "data": record.data.to_json(),
        "arms": arms,
        "notes": list(record.notes),
        "failed": [dict(row) for row in record.failed],
        "acceptance": {arm: dict(sources) for arm, sources in (record.acceptance or {}).items()},
        "cells": [[cell.arm, cell.network, cell.seed, cell.sha256] for cell in record.cells],
    } | ({"image_sets": dict(record.image_sets)} if record.image_sets else {})


def record_from_json(content: Any) -> GradingRecord:
    """The record of `record_to_json`.

    Raises:
        DataError: `record-format` for another version, `record-malformed` where a field is missing or contradicts another.
    """
    with well_formed("record-malformed", "The record of a grading", "grade again with this medaug, finished rows are kept"):
        if content["format"] != RECORD_FORMAT:
            raise DataError(
                "record-format",
                f"The record of a grading has format {content['format']!r}, this medaug reads {RECORD_FORMAT}; use the matching release.",
            )
        arms = tuple(
            Arm(str(entry["name"]), variant=Variant(entry["base"], entry["per_real"], entry["real_fraction"]))
            for entry in content["arms"]
        )
        names = {arm.name for arm in arms}
        opponents = {entry["name"]: Opponents(**entry["opponents"]) for entry in content["arms"] if entry["opponents"]}
        cells = tuple(CellName(*entry) for entry in content["cells"])
        if len(names) != len(arms) or not {cell.arm for cell in cells} <= names:
            raise ValueError("arms")
        return GradingRecord(
            data=GradedData.from_json(content["data"]),
            arms=arms,
            opponents=opponents,
            cells=cells,
            notes=tuple(map(str, content["notes"])),
            failed=tuple(dict(row) for row in content["failed"]),
            acceptance=content["acceptance"],
            image_sets={str(arm): int(count) for arm, count in content.get("image_sets", {}).items()},
            command=str(content["command"]),
            profile=str(content["profile"]),
            num_resamples=int(content["num_resamples"]),
            finished=bool(content["finished"]),
        )


def read_record(folder: Path) -> GradingRecord:
    """The record in a folder of `medaug grade`.

    Raises:
        DataError: `record-missing` for a folder of an earlier medaug; see `record_from_json`.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise DataError(
            "record-missing",
            f"{Path(folder).name} holds no {RECORD_NAME}, so an earlier medaug graded it; run the same command again, finished rows are kept.",
        )
    return record_from_json(storage.read_json(path))


def recorded_rows(folder: Path, record: GradingRecord) -> list[Row]:
    """The rows of a folder that are there, in the order of the cells and under their names.

    Raises:
        DataError: `row-malformed`.
    """
    arms = {arm.name: arm for arm in record.arms}
    rows = []
    for cell in record.cells:
        path = Path(folder) / ROWS_FOLDER / f"{Path(cell.sha256).name}.json"
        if not path.is_file():
            continue
        row = storage.read_json(path)
        expected = {"sha256": cell.sha256, "arm": arms[cell.arm].base, "network": cell.network, "seed": cell.seed}
        if not isinstance(row, dict) or any(row.get(name) != value for name, value in expected.items()):
            raise DataError("row-malformed", f"{path.name} is not the row its name says; delete it and grade again.")
        rows.append(named(row, arms[cell.arm]))
    return rows


def acceptance_of(arms: Sequence[Arm], real: Cohort) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Per arm and source what the gate let through, from ``gate.json`` beside the images; without one there is nothing to say."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm in {arm.base: arm for arm in arms}.values():
        for source in arm.all_added():
            path = None if source.cohort.root is None else source.cohort.root / "gate.json"
            gate = storage.read_json(path) if path is not None and path.is_file() else None
            if isinstance(gate, dict) and gate.get("cohort_sha256") == real.content_sha256:
                of_arm = found.setdefault(arm.base, {})
                of_arm[source.name] = _summed(of_arm.get(source.name, []), gate.get("acceptance", ()))
    return found


def _summed(before: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Generated and accepted images class by class, with those of the sets before."""
    known = {row["name"]: row for row in before}
    return [
        {"name": row["name"]} | {key: row[key] + known.get(row["name"], {}).get(key, 0) for key in ("generated", "accepted")}
        for row in rows
    ]


class RecordKeeper:
    """Keeps the record and the time of the work beside the rows while a benchmark fills them in; use it in a ``with``.

    Args:
        out: folder of the benchmark.
        record: without cells.
        on_row: called with every row, too.
    """

    def __init__(self, out: Path, record: GradingRecord, on_row: Callable[[Row], None] | None = None) -> None:
        self.record = record
        self._out, self._on_row = Path(out), on_row
        self._stack = ExitStack()
        self._save_time: Callable[[], None] = lambda: None

    def __enter__(self) -> RecordKeeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def planned(self, cells: Sequence[Cell], missing: int) -> None:
        """Write the plan; the clock runs if anything is left to do.

        Raises:
            DataError: `results-of-another-cohort`.
        """
        self._refuse_another_cohort()
        names = tuple(CellName(cell.arm.name, cell.network, cell.seed, cell.sha256) for cell in cells)
        self.record = replace(self.record, cells=names)
        self._write()
        if missing:
            self._save_time = self._stack.enter_context(Sessions(self._out).stage("grading"))

    def _refuse_another_cohort(self) -> None:
        """Leave a report of other images alone; their rows would stay, but nothing would say whose they are."""
        try:
            before, now = read_record(self._out).data, self.record.data
        except DataError:
            return  # none is there, or none that could be read: rows alone are found by their content
        if before.content_sha256 != now.content_sha256:
            raise DataError(
                "results-of-another-cohort",
                f"{self._out.name} holds the results of cohort {before.name} ({before.content_sha256[:12]}), not of {now.name} "
                f"({now.content_sha256[:12]}); choose another --out.",
            )

    def row(self, row: Row) -> None:
        """Take note of a row that is there."""
        self._save_time()
        if self._on_row is not None:
            self._on_row(row)

    def finish(self, notes: Sequence[str], failed: Sequence[Row]) -> GradingRecord:
        """Write what only the rows could tell. Returns the whole record."""
        self.record = replace(self.record, notes=tuple(notes), failed=tuple(failed), finished=True)
        self._write()
        return self.record

    def _write(self) -> None:
        storage.write_json(self._out / RECORD_NAME, record_to_json(self.record))
