"""Scores of readers: worked by hand, and against scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, recall_score, roc_auc_score

from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.quality.reader_score import agreement, areas, bootstrap_interval, kappas, reader_metrics, score_readers

TRUTH = np.array([True] * 10 + [False] * 10)


def test_a_worked_example() -> None:
    called = np.array([True] * 8 + [False] * 2 + [False] * 5 + [True] * 5)
    found = reader_metrics(TRUTH, called, np.full(20, 3))
    assert (found["sensitivity"]["value"], found["specificity"]["value"], found["accuracy"]["value"]) == (0.8, 0.5, 0.65)
    # Two levels of rating: the ROC curve is two lines and the area (sensitivity + specificity) / 2.
    assert found["auc"]["value"] == pytest.approx(0.65)
    # Wilson 1927: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), for p = 0.8, n = 10.
    z = 1.959963985
    centre, half = 0.8 + z**2 / 20, z * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    expected = [(centre - half) / (1 + z**2 / 10), (centre + half) / (1 + z**2 / 10)]
    assert [found["sensitivity"]["low"], found["sensitivity"]["high"]] == pytest.approx(expected, abs=1e-6)
    # 13 of 20 right: 2 (C(20,13) + ... + C(20,20)) / 2^20.
    assert found["accuracy"]["p_value"] == pytest.approx(2 * sum(math.comb(20, k) for k in range(13, 21)) / 2**20)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    random = numpy_generator("reader metrics", seed)
    truth, called = random.random(60) < 0.4, random.random(60) < 0.5
    confidence = random.integers(1, 6, 60)
    found = reader_metrics(truth, called, confidence)
    assert found["sensitivity"]["value"] == pytest.approx(recall_score(truth, called))
    assert found["specificity"]["value"] == pytest.approx(recall_score(~truth, ~called))
    rating = np.where(called, confidence, -confidence)
    pairs = np.sign(rating[truth][:, None] - rating[~truth][None, :])  # area = P(higher) + P(equal) / 2
    assert found["auc"]["value"] == pytest.approx(((pairs + 1) / 2).mean())
    assert found["auc"]["low"] < found["auc"]["value"] < found["auc"]["high"]
    other = random.random(60) < 0.5
    kappa = agreement(called, other)
    assert kappa["value"] == pytest.approx(cohen_kappa_score(called, other)) and kappa["low"] < kappa["value"] < kappa["high"]


def test_a_bootstrap_of_a_mean_has_its_standard_error() -> None:
    values = numpy_generator("values").standard_normal(400)
    low, high = bootstrap_interval(lambda rows: values[rows].mean(1), [np.arange(400)], "mean")
    assert low is not None and high is not None
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_many_resamples_at_once_are_those_of_scikit_learn_one_by_one() -> None:
    random = numpy_generator("resamples")
    ratings, calls = random.integers(-5, 6, (20, 30)), random.random((2, 20, 30)) < 0.3
    truth = np.arange(30) < 12
    assert areas(ratings, 12) == pytest.approx([roc_auc_score(truth, row) for row in ratings])
    assert kappas(*calls) == pytest.approx([cohen_kappa_score(one, other) for one, other in zip(*calls, strict=True)])


def test_what_does_not_vary_has_no_interval() -> None:
    found = reader_metrics(TRUTH, TRUTH, np.full(20, 5))
    assert found["auc"] == {"value": 1.0, "low": None, "high": None, "n": 20}
    assert found["sensitivity"]["low"] > 0.6 and found["sensitivity"]["high"] == 1
    assert agreement(TRUTH | True, TRUTH | True)["value"] is None  # all called one thing: chance agreement is complete


def test_answers_on_one_kind_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        reader_metrics(np.ones(3, bool), np.ones(3, bool), np.ones(3))
    assert caught.value.code == "answers-one-kind"


def write_key(folder: Path) -> None:
    cases = [{"id": f"t{index}", "source": "synthetic" if index < 4 else "real"} for index in range(8)]
    (folder / "key.json").write_text(json.dumps({"format": 1, "cases": cases}))


def answers(path: Path, reader: str, calls: str, confidence: str) -> Path:
    names = {"s": "synthetic", "r": "real"}
    rows = [f"t{index},{names[call]},{sure},{reader}" for index, (call, sure) in enumerate(zip(calls, confidence, strict=True))]
    path.write_text("\n".join(["id,answer,confidence,reader", *rows]) + "\n")
    return path


def test_two_readers_from_their_files(tmp_path: Path) -> None:
    write_key(tmp_path)
    ann = answers(tmp_path / "a.csv", "ann", "sssrrrrs", "54315421")
    bob = answers(tmp_path / "b.csv", "bob", "ssssrrr", "5555555")
    found = score_readers(tmp_path, [bob, ann])
    assert list(found["readers"]) == ["ann", "bob"] and found["n_images"] == 8
    assert (found["readers"]["ann"]["sensitivity"]["value"], found["readers"]["ann"]["specificity"]["value"]) == (0.75, 0.75)
    assert (found["readers"]["bob"]["missing"], found["readers"]["ann"]["missing"]) == (1, 0)
    (kappa,) = found["kappa"]
    # Seven common images: 6 alike, expected (3 * 4 + 4 * 3) / 49.
    assert kappa["readers"] == ["ann", "bob"] and kappa["value"] == pytest.approx((6 / 7 - 24 / 49) / (1 - 24 / 49))
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert score_readers(tmp_path, [ann, bob]) == found


def test_answers_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    write_key(tmp_path)
    ann = answers(tmp_path / "a.csv", "ann", "sssrrrrs", "54315421")
    with pytest.raises(DataError) as caught:
        score_readers(tmp_path, [ann, answers(tmp_path / "c.csv", "ann", "s", "1")])
    assert caught.value.code == "answers-twice"
    with pytest.raises(DataError) as caught:
        score_readers(tmp_path, [answers(tmp_path / "d.csv", "dan", "s", "6")])
    assert caught.value.code == "reader-csv-value"
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(DataError) as caught:
        score_readers(tmp_path, [ann])
    assert caught.value.code == "key-malformed"
