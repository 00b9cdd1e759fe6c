"""The records that the stages left behind, read once, and refused if they are of different data."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.cohort import Case, Cohort, check_against, read_cohort
from medaug.errors import DataError

Record = Mapping[str, Any]
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")  # names of bundles, hashes, numbers

__all__ = ["Record", "Records", "missing", "read_records"]


@dataclass(frozen=True)
class Records:
    """What is known of one set of images.

    Attributes:
        described: the cohort that the papers are about, synthetic or real.
        real: the real cohort behind it, `described` itself if that is real; None if its folder was not given.
        intake: ``report.json`` of the real cohort.
        gate: ``gate.json`` beside `described`.
        run: ``run.json`` of the generator's training run.
        metrics: ``metrics.json`` of that run's evaluation.
        rows: the rows of a benchmark with all they hold, in the order of its ``rows.csv``.
        verdict: ``verdict.json`` of the benchmark, arm -> verdict.
    """

    described: Cohort
    real: Cohort | None = None
    intake: Record | None = None
    gate: Record | None = None
    run: Record | None = None
    metrics: Record | None = None
    rows: tuple[Record, ...] = ()
    verdict: Record | None = None

    @property
    def synthetic(self) -> list[Case]:
        """The generated cases of the described cohort."""
        return [case for case in self.described.cases() if case.is_synthetic]

    @property
    def real_sha256(self) -> str:
        """Content sha256 of the real cohort, from the cohort or else the gate; empty if neither says it."""
        return self.real.content_sha256 if self.real is not None else str((self.gate or {}).get("cohort_sha256", ""))

    def lineages(self, key: str) -> list[str]:
        """The distinct words, hashes or numbers that the lineages hold under `key`, sorted; other texts and None do not count."""
        found = {str(value) for case in self.synthetic if (value := (case.lineage or {}).get(key)) is not None}
        return sorted(text for text in found if _WORD.fullmatch(text))


def read_records(folder: Path, cohort: Path | None = None, run: Path | None = None, benchmark: Path | None = None) -> Records:
    """Read everything that the folders hold.

    Args:
        folder: the cohort to describe, as `medaug gate`, `generate`, `import` or `intake` left it.
        cohort: the real cohort behind a synthetic one.
        run: folder of `medaug train`; ``metrics.json`` of `evaluating` is looked for in it and in its ``evaluation/``.
        benchmark: folder of `medaug grade`.

    Raises:
        DataError: `cohort-missing`, `cohort-changed` and what else `read_cohort` refuses; `cohort-empty`; `run-missing`,
            `benchmark-missing`; `records-differ` where a record is of other images, weights or data than the rest.
        LeakageError: a generator or filter behind the images saw held-out groups of `cohort`.
    """
    described = read_cohort(folder, verify=True, spatial_dims=None)
    if not described.cases():
        raise DataError("cohort-empty", f"{Path(folder).name} holds no images, so there is nothing to describe.")
    any_synthetic = any(case.is_synthetic for case in described.cases())
    own = None if any_synthetic else described
    real = own if cohort is None else read_cohort(cohort, verify=True, spatial_dims=None)
    trained = None if run is None else _needed(run, "run.json", "run-missing", "medaug train")
    verdict = None if benchmark is None else _needed(benchmark, "verdict.json", "benchmark-missing", "medaug grade")
    records = Records(
        described=described,
        real=real,
        intake=None if real is None else _intake_report(real),
        gate=_beside(described.root, "gate.json"),
        run=trained,
        metrics=None if run is None else _beside(run, "metrics.json") or _beside(Path(run) / "evaluation", "metrics.json"),
        rows=() if benchmark is None else _rows(Path(benchmark)),
        verdict=verdict,
    )
    if real is not None:
        if any(case.is_synthetic for case in real.cases()):
            raise DataError("cohort-synthetic", "--cohort takes the real cohort; this one holds synthetic images.")
        if any_synthetic:
            untrusted = all((case.lineage or {}).get("untrusted") for case in described.cases() if case.is_synthetic)
            check_against(described, real, allow_untrusted=untrusted)
        else:
            _same("The cohort of --cohort", real.content_sha256, described.content_sha256)
    _refuse_mixture(records)
    return records


def missing(records: Records) -> list[str]:
    """One phrase for every record that was looked for and is not there."""
    found = {
        "real cohort (--cohort)": records.real,
        "report.json of intake, in the real cohort's folder": records.intake,
        "training run (--run)": records.run,
        "metrics.json of the run's evaluation": records.metrics,
        "benchmark (--benchmark)": records.verdict,
    }
    if records.synthetic:
        found["gate.json, beside the images"] = records.gate
    return [name for name, record in found.items() if record is None]


def _needed(folder: Path, name: str, code: str, command: str) -> Record:
    record = _beside(folder, name)
    if record is None:
        raise DataError(code, f"{Path(folder).name} holds no {name}; give a folder that `{command}` finished.")
    return record


def _beside(folder: Path | None, name: str) -> Record | None:
    """A JSON object in `folder`; None if there is no such file.

    Raises:
        DataError: the file holds something else.
    """
    if folder is None or not (Path(folder) / name).is_file():
        return None
    record = storage.read_json(Path(folder) / name)
    if not isinstance(record, dict):
        raise DataError("record-malformed", f"{name} holds no JSON object; make it again with the command that wrote it.")
    return record


def _intake_report(real: Cohort) -> Record | None:
    """The report of intake; other commands leave a file of that name with other content."""
    report = _beside(real.root, "report.json")
    if report is None or "counts" not in report:
        return None
    _same("report.json", str(report.get("content_sha256", "")), real.content_sha256)
    return report


def _rows(benchmark: Path) -> tuple[Record, ...]:
    """The rows that the verdict rests on, under its names of their arms.

    `rows.csv` says both: the folder may hold rows of earlier gradings, and a row's file does not know at which ratio it was graded.
    """
    if not (benchmark / "rows.csv").is_file():
        raise DataError("benchmark-missing", f"{benchmark.name} holds no rows.csv; run the same `medaug grade` again.")
    with open(benchmark / "rows.csv", encoding="utf-8", newline="") as stream:
        lines = [(Path(str(line.get("sha256"))).name, line.get("arm")) for line in csv.DictReader(stream)]
    rows = []
    for name, arm in lines:
        row = storage.read_json(benchmark / "rows" / f"{name}.json")
        rows.append({**row, "arm": arm or row["arm"]})
    return tuple(sorted(rows, key=lambda row: (row["arm"], row["network"], row["seed"])))


def _refuse_mixture(records: Records) -> None:
    """All records must be of one study: a paper that mixes two is worse than none."""
    gate, run = records.gate or {}, records.run or {}
    trained_on = str(run.get("cohort_sha256", ""))
    _same("gate.json", str(gate.get("cohort_sha256", "")), records.real_sha256)
    _same("run.json", trained_on, records.real_sha256)
    for row in records.rows:
        _same("The benchmark", str(row["key"]["cohort"]), records.real_sha256 or trained_on)
    _same("metrics.json", str((records.metrics or {}).get("weights_sha256", "")), str(run.get("weights_sha256", "")))
    weights = records.lineages("weights_sha256")
    if run and weights and run.get("weights_sha256") not in weights:
        raise DataError("records-differ", "The images were not made with the weights of --run; give the run that made them.")
    if gate:
        accepted = {row["id"] for row in gate.get("verdicts", ()) if row["verdict"] == "accept"}
        if accepted != {case.id for case in records.described.training}:
            raise DataError("records-differ", "gate.json accepts other images than this cohort holds; run the gate again.")


def _same(what: str, found: str, expected: str) -> None:
    """Refuse two different hashes of what should be the same data; one that is not known says nothing.

    Raises:
        DataError: `records-differ`.
    """
    if found and expected and found != expected:
        raise DataError(
            "records-differ",
            f"{what} is of other data than the rest ({found[:12]} against {expected[:12]}); give the records of one study.",
        )
