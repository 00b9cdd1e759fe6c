"""How much of the arms' differences a threshold brings: every run of a grading of two classes cut where validation scores best, too.

The threshold of each run is the one with the best balanced accuracy on its own validation probabilities (of equals the middle), and the odds are
moved so that it lies at one half. Nothing is chosen on test images. Example:

    python benchmarks/threshold_gain.py --cohort runs/mixing_matrix/cohort --benchmark runs/mixing_matrix/benchmark
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rows import command_of, environment, make_parser, record, settings_of

from medaug.cohort import read_cohort
from medaug.errors import DataError
from medaug.grading.record import read_record, recorded_rows
from medaug.grading.rows import predictions_of
from medaug.grading.scores import score_cells
from medaug.grading.statistics import PairedDifference
from medaug.grading.verdict import BASELINE, CONTROL, primary_metric

NAME = "threshold_gain"
TUNED = ", cut on validation"
LEAST = 5e-7  # rows hold six decimals


def best_threshold(target: np.ndarray, scores: np.ndarray) -> float:
    """The cut of scores (N,) with the best balanced accuracy, halfway to the next score; of equals the one in the middle."""
    order = np.unique(scores)
    cuts = np.concatenate([[order[0] - 1], (order[1:] + order[:-1]) / 2, [order[-1] + 1]])
    above = scores[None, :] > cuts[:, None]
    balanced = (above[:, target == 1].mean(1) + (~above[:, target == 0]).mean(1)) / 2
    best = cuts[balanced == balanced.max()]
    return float(best[len(best) // 2])


def log_odds(probs: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...)."""
    kept = np.maximum(probs, LEAST)
    return np.log(kept[..., 1] / kept[..., 0])


def moved(row: dict[str, Any], labels: dict[str, int]) -> dict[str, Any]:
    """A row as an arm of its own whose test probabilities are cut where validation says."""
    target = np.array([labels[name] for name in row["validation"]["ids"]])
    threshold = best_threshold(target, log_odds(np.array(row["validation"]["probs"])))
    ill = 1 / (1 + np.exp(threshold - log_odds(np.array(row["test"]["probs"]))))
    test = row["test"] | {"probs": np.stack([1 - ill, ill], axis=-1).tolist()}
    return row | {"arm": row["arm"] + TUNED, "test": test}


def plain(result: PairedDifference) -> list[float]:
    """Difference and interval."""
    return [round(value, 4) for value in (result.difference, result.low, result.high)]


def main() -> None:
    """Measure, print and record a row."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--benchmark", type=Path, required=True, help="folder of `medaug grade`, or benchmark/ of an experiment")
    options = parser.parse_args()
    cohort, grading = read_cohort(options.cohort), read_record(options.benchmark)
    if len(cohort.classes) != 2 or grading.data.content_sha256 != cohort.content_sha256:
        raise DataError("threshold-cohort", "Give the cohort that was graded; it must have two classes.")
    labels = {case.id: case.label for case in cohort.validation}
    rows = list(recorded_rows(options.benchmark, grading))
    predictions = predictions_of(grading.data, [*rows, *(moved(row, labels) for row in rows)])
    scores = score_cells(predictions, primary_metric(ordinal=False), num_resamples=grading.num_resamples)
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        arms[arm] = {"as it is": round(scores.interval(arm)[0], 4), "cut": round(scores.interval(arm + TUNED)[0], 4)}
        if arm != BASELINE:
            arms[arm] |= {
                "as it is against none": plain(scores.compare(arm, BASELINE)),
                "as it is against none cut": plain(scores.compare(arm, BASELINE + TUNED)),
                "cut against none cut": plain(scores.compare(arm + TUNED, BASELINE + TUNED)),
                "cut against oversample cut": plain(scores.compare(arm + TUNED, CONTROL + TUNED)),
            }
        else:
            arms[arm] |= {"cut against as it is": plain(scores.compare(arm + TUNED, arm))}
        print(arm, arms[arm])
    result = {"command": command_of(parser, options), "settings": settings_of(options), "cohort": cohort.content_sha256}
    if not options.no_record:
        record(result | {"arms": arms} | environment(), NAME)


if __name__ == "__main__":
    main()
