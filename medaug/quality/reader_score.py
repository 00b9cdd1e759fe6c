"""How well readers tell synthetic images from real ones: pure functions of answers.

Positive is "synthetic": sensitivity is the share of synthetic images called synthetic, specificity the share of real ones called
real. A rating runs from -5 (surely real) to 5 (surely synthetic): the confidence 1 to 5 with the sign of the call, so the AUC
uses both. Readers who cannot tell them apart have an AUC of 0.5 and an accuracy of 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, rankdata
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from medaug import storage
from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.quality.reader_csv import read_reader_csv
from medaug.quality.reader_test import CONFIDENCES, FORMAT, KEY, REAL, SYNTHETIC

NUM_RESAMPLES = 2000
LEVEL = 0.95
SCORES = "scores.json"

__all__ = ["NUM_RESAMPLES", "SCORES", "agreement", "areas", "bootstrap_interval", "kappas", "reader_metrics", "score_readers"]

Interval = tuple[float | None, float | None]


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], strata: Sequence[np.ndarray], *key: object, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """95 % percentile interval of a statistic of rows, resampled within each stratum.

    Args:
        statistic: of row numbers (R, N), one value (R,) for each resample; NaN where it is undefined.
        strata: row numbers of each stratum; a resample holds as many of each, in this order.
        key: of the draws.

    Returns:
        low and high; None and None where resamples do not vary or are undefined, since there the percentiles say nothing.
    """
    random = numpy_generator("reader bootstrap", *key)
    drawn = [np.asarray(rows)[random.integers(0, len(rows), (num_resamples, len(rows)))] for rows in strata]
    values = statistic(np.concatenate(drawn, axis=1))
    values = values[np.isfinite(values)]
    if not len(values) or np.ptp(values) < 1e-12:
        return None, None
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def areas(ratings: np.ndarray, num_positive: int) -> np.ndarray:
    """AUC (R,) of ratings (R, N) whose first `num_positive` columns are the positives: the Mann-Whitney statistic."""
    ranks = rankdata(ratings, axis=1)[:, :num_positive].sum(1)
    return (ranks - num_positive * (num_positive + 1) / 2) / (num_positive * (ratings.shape[1] - num_positive))


def kappas(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cohen's kappa (R,) of calls (R, N) bool; NaN where chance agreement is complete (Cohen 1960)."""
    share, of_other = one.mean(1), other.mean(1)
    chance = share * of_other + (1 - share) * (1 - of_other)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(chance < 1, ((one == other).mean(1) - chance) / (1 - chance), np.nan)
    return found


def reader_metrics(synthetic: np.ndarray, called: np.ndarray, confidence: np.ndarray) -> dict[str, Any]:
    """Metrics of one reader, each as ``{"value", "low", "high", "n"}``.

    Args:
        synthetic: (N,) bool, the truth.  called: (N,) bool, True for "synthetic".  confidence: (N,) 1 to 5.

    Returns:
        sensitivity, specificity, accuracy (Wilson intervals; accuracy with the two-sided binomial `p_value` against a half) and
        auc (bootstrap over images, within either kind).

    Raises:
        DataError: no real or no synthetic image was answered (code `answers-one-kind`).
    """
    synthetic, called = np.asarray(synthetic, dtype=bool), np.asarray(called, dtype=bool)
    if synthetic.all() or not synthetic.any():
        raise DataError("answers-one-kind", "A score needs answers on real and on synthetic images; these are on one kind only.")
    rating = np.where(called, 1, -1) * np.asarray(confidence)
    hits = called == synthetic
    strata = [np.flatnonzero(synthetic), np.flatnonzero(~synthetic)]
    low, high = bootstrap_interval(lambda rows: areas(rating[rows], len(strata[0])), strata, "auc")
    chance = binomtest(int(hits.sum()), len(hits), 0.5).pvalue
    return {
        "sensitivity": _share(hits[synthetic]),
        "specificity": _share(hits[~synthetic]),
        "accuracy": _share(hits) | {"p_value": float(chance)},
        "auc": {"value": float(roc_auc_score(synthetic, rating)), "low": low, "high": high, "n": len(hits)},
    }


def _share(hits: np.ndarray) -> dict[str, Any]:
    test = binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci(confidence_level=LEVEL, method="wilson")
    return {"value": float(hits.mean()), "low": float(interval.low), "high": float(interval.high), "n": len(hits)}


def agreement(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Cohen's kappa of two readers' calls (N,) on the same images, with a bootstrap interval over the images.

    The value is None where it is undefined: both call everything the same one thing.
    """
    one, other = np.asarray(one, dtype=bool), np.asarray(other, dtype=bool)
    low, high = bootstrap_interval(lambda rows: kappas(one[rows], other[rows]), [np.arange(len(one))], "kappa")
    alike = bool((one.all() and other.all()) or not (one.any() or other.any()))
    value = None if alike else float(cohen_kappa_score(one, other))
    return {"value": value, "low": low, "high": high, "n": len(one)}


def score_readers(folder: Path, answers: Sequence[Path]) -> dict[str, Any]:
    """Score every reader of a reader test and write ``scores.json``.

    Args:
        folder: made by `make_reader_test`, with its ``key.json``.
        answers: CSV files with the columns id, answer, confidence, reader; a file may hold several readers' rows only if no image
            occurs twice in it.

    Returns:
        ``{"readers": {name: metrics and "answered", "missing"}, "kappa": [{"readers", "value", ...}], "n_images"}``.

    Raises:
        DataError: see `read_reader_csv`; a reader in two files (code `answers-twice`); no key, or one of another format.
    """
    truth = _truth(Path(folder))
    calls: dict[str, dict[str, tuple[bool, int]]] = {}
    choices = {"answer": (REAL, SYNTHETIC), "confidence": CONFIDENCES}
    for path in answers:
        found: dict[str, dict[str, tuple[bool, int]]] = {}
        for token, row in read_reader_csv(path, choices, truth, "reader test").rows.items():
            found.setdefault(row["reader"], {})[token] = (row["answer"] == SYNTHETIC, int(row["confidence"]))
        twice = sorted(set(found) & set(calls))
        if twice:
            raise DataError("answers-twice", f"Reader {twice[0]} has two files of answers; give one file for each reader.")
        calls |= found
    readers = {name: _score(truth, calls[name]) for name in sorted(calls)}
    kappa = [_pair(calls, first, second) for first, second in combinations(sorted(calls), 2)]
    result = {"readers": readers, "kappa": kappa, "n_images": len(truth)}
    storage.write_json(Path(folder) / SCORES, result)
    return result


def _truth(folder: Path) -> dict[str, bool]:
    """Token -> whether the image is synthetic."""
    key = storage.read_json(folder / KEY)
    if not isinstance(key, dict) or key.get("format") != FORMAT or not isinstance(key.get("cases"), list):
        raise DataError("key-malformed", f"{KEY} is not the key of a reader test of this version; make the test again.")
    return {row["id"]: row["source"] == SYNTHETIC for row in key["cases"]}


def _score(truth: Mapping[str, bool], calls: Mapping[str, tuple[bool, int]]) -> dict[str, Any]:
    tokens = sorted(calls)
    columns = np.array([(truth[token], *calls[token]) for token in tokens])
    metrics = reader_metrics(columns[:, 0], columns[:, 1], columns[:, 2])
    return metrics | {"answered": len(tokens), "missing": len(truth) - len(tokens)}


def _pair(calls: Mapping[str, Mapping[str, tuple[bool, int]]], first: str, second: str) -> dict[str, Any]:
    both = sorted(set(calls[first]) & set(calls[second]))
    if not both:
        return {"readers": [first, second], "value": None, "low": None, "high": None, "n": 0}
    one, other = (np.array([calls[name][token][0] for token in both]) for name in (first, second))
    return {"readers": [first, second], **agreement(one, other)}
