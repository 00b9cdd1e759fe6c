"""What `medaug labels` finds of wrong labels planted in real training data, and what it says of the data as they are.

A share of the training labels is changed to another class, any other as likely; nothing else is. The command is run as it is on the
cohort before and after. Labels that it doubts beforehand may be wrong, too, so precision counts from below. Example:

    python benchmarks/planted_labels.py --cohort runs/cxr
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rows import command_of, environment, make_parser, record, settings_of
from scipy.stats import binomtest

from medaug.cohort import Cohort, read_cohort, write_cohort
from medaug.draws import numpy_generator
from medaug.stages import check_labels

NAME = "planted_labels"


def plant(cohort: Cohort, share: float, seed: int, folder: Path) -> tuple[Cohort, set[str]]:
    """Copy the cohort to `folder` with a share of its training labels wrong; it, and the ids of those."""
    shutil.copytree(cohort.root, folder, dirs_exist_ok=True)
    draw, classes = numpy_generator(NAME, seed), len(cohort.classes)
    chosen = {
        cohort.training[index].id for index in draw.permutation(len(cohort.training))[: round(share * len(cohort.training))]
    }
    wrong = [
        replace(case, label=(case.label + int(draw.integers(1, classes))) % classes) if case.id in chosen else case
        for case in cohort.training
    ]
    return write_cohort(replace(cohort.with_cases(training=wrong), root=folder), folder), chosen


def doubted(cohort: Path, out: Path, options: Any) -> tuple[set[str], Mapping[str, Any]]:
    """Ids of training images whose label `medaug labels` doubts, and its summary of that part."""
    found = check_labels(cohort, out, network=options.network, seed=options.seed)
    with open(out / "labels.csv", newline="", encoding="utf-8") as stream:
        return {row["id"] for row in csv.DictReader(stream) if row["reason"]}, found["parts"]["training"]


def rate(count: int, n: int) -> dict[str, Any]:
    """Count, n, rate and its 95 % interval (Clopper-Pearson)."""
    if not n:
        return {"count": 0, "n": 0, "rate": None}
    interval = binomtest(count, n).proportion_ci(method="exact")
    return {"count": count, "n": n, "rate": count / n, "low": float(interval.low), "high": float(interval.high)}


def main() -> None:
    """Measure, print and record a row."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--share", type=float, default=0.1, help="of the training labels")
    parser.add_argument("--network", default="simple_cnn")
    options = parser.parse_args()
    cohort = read_cohort(options.cohort)
    training = {case.id for case in cohort.training}
    with tempfile.TemporaryDirectory() as folder:
        before, as_is = doubted(cohort.root, Path(folder) / "before", options)
        _, wrong = plant(cohort, options.share, options.seed, Path(folder) / "planted")
        after, planted = doubted(Path(folder) / "planted", Path(folder) / "after", options)
    before, after = before & training, after & training
    row: dict[str, Any] = {
        "command": command_of(parser, options),
        "settings": settings_of(options),
        "cohort": cohort.content_sha256,
    }
    row |= {"doubted as it is": rate(len(before), len(training)), "agreement": [as_is["agreement"], planted["agreement"]]}
    row |= {"recall": rate(len(after & wrong), len(wrong)), "precision": rate(len(after & wrong), len(after))}
    row |= {"right labels doubted": rate(len(after - wrong), len(training - wrong))}
    print(*(f"{key}: {value}" for key, value in row.items()), sep="\n")
    if not options.no_record:
        record(row | environment(), NAME)


if __name__ == "__main__":
    main()
