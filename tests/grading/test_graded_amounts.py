"""`medaug grade` with several ratios and fractions, end to end: rows, choice, report, and one MLflow run per cell."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from medaug import storage
from medaug.grading.options import GradingOptions
from medaug.grading.tables import METRICS
from medaug.stages import grade_arms

QUICK = {"num_steps": 3, "evaluate_every": 1, "batch_size": 8}
ARMS = ("none", "oversample")


@pytest.fixture
def graded(tmp_path, make_cohort, make_synthetic):
    """A function that grades at the given amounts into one folder and records into one SQLite file."""
    real = make_cohort(tmp_path / "real")
    make_synthetic(real, tmp_path / "s", [12, 12, 12])
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def grade(ratios, fractions, folder="out", uri=uri):
        return grade_arms(
            tmp_path / "real",
            tmp_path / folder,
            [*ARMS, f"a={tmp_path / 's'}"],
            GradingOptions("simple_cnn", 1, "tiny", QUICK, synthetic_per_real=ratios, real_fraction=fractions),
            workers=1,
            tracking={"uri": uri},
        )

    return grade


def runs_of(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("medaug").experiment_id], max_results=1000)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return client, [run for run in runs if run not in children], children


def test_amounts_end_to_end(tmp_path, graded):
    result = graded([0.5, 1.0], [0.5, 1.0])
    points = [f"{ratio}@real{part}" for part in ("0.5", "1") for ratio in ("0.5", "1")]
    names = ["none@real0.5", "none@real1", *(f"{base}@{point}" for base in ("oversample", "a") for point in points)]
    assert sorted(row["arm"] for row in result["rows"]) == sorted(names)
    _check_choice(result)
    _check_files(tmp_path / "out", result)
    _check_runs(tmp_path, result)
    rows = {path.name for path in (tmp_path / "out" / "rows").iterdir()}
    assert graded([0.5, 1.0], [0.5, 1.0]) == result
    _check_runs(tmp_path, result)
    _check_a_single_value_has_the_same_rows(tmp_path, graded, rows)


def _check_choice(result):
    """The verdict is at the largest fraction, at the ratio that is best on validation."""
    verdict = result["verdict"]
    assert [name.partition("@")[0] for name in verdict] == ["oversample", "a"]
    for base in ("oversample", "a"):
        rows = [row for row in result["rows"] if row["base"] == base and row["real_fraction"] == 1]
        best = max(rows, key=lambda row: (row["validation"]["balanced_accuracy"], -row["per_real"]))
        assert best["arm"] in verdict and best["arm"] == verdict[best["arm"]]["choice"]["arm"]
        assert "was chosen on validation among 0.5, 1" in verdict[best["arm"]]["sentence"]
    (a,) = [entry for name, entry in verdict.items() if name.startswith("a@")]
    ratio = f"{a['choice']['per_real']:g}"
    assert a["opponents"] == {"baseline": "none@real1", "control": f"oversample@{ratio}@real1", "views": None}


def _check_files(out, result):
    page = (out / "report.html").read_text()
    for name in ("comparison", "forest", "mixing", "learning", "confusion"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 5
    assert "had no part in the choice" in page and "carry no verdict" in page and "<script" not in page
    curves = list(csv.DictReader((out / "curves.csv").open()))
    assert len(curves) == 10 and sum(line["chosen"] == "True" for line in curves) == 4
    assert "\\toprule" in (out / "table.tex").read_text()
    assert json.loads((out / "verdict.json").read_text()) == result["verdict"]


def _check_runs(folder, result):
    """One finished parent, one finished child per cell with the figures of its row."""
    client, parents, children = runs_of(folder)
    (parent,) = parents
    assert parent.info.status == "FINISHED" and parent.data.params["synthetic_per_real"] == "[0.5, 1.0]"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in children} == {"FINISHED"}
    found = {run.data.params["arm"]: run for run in children}
    assert len(children) == len(found) == len(result["rows"])
    for row in result["rows"]:
        run = found[row["arm"]]
        assert run.data.tags["medaug.content"] == row["sha256"] and run.data.params["recipe.num_steps"] == "3"
        for metric in METRICS:
            assert run.data.metrics.get(f"test/{metric}") == row[metric]
            assert run.data.metrics.get(f"validation/{metric}") == row["validation"][metric]
    history = client.get_metric_history(children[0].info.run_id, "curve/macro_f1")
    assert [point.step for point in history] == [1, 2, 3]
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "rows.json")).read_text())
    assert len(table["data"]) == len(result["rows"])


def _check_a_single_value_has_the_same_rows(folder, graded, rows):
    """Names without an @, the sha256 of before, nothing trained anew, and no picture of curves left over."""
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "rows").iterdir()}
    alone = graded(0.5, 1.0)
    assert [row["arm"] for row in alone["rows"]] == ["none", "oversample", "a"]
    assert {f"{row['sha256']}.json" for row in alone["rows"]} <= rows
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "rows").iterdir()} == before
    stored = storage.read_json(folder / "out" / "rows" / f"{alone['rows'][2]['sha256']}.json")
    assert stored["arm"] == "a" and not {"base", "per_real"} & stored.keys()
    assert not (folder / "out" / "mixing.png").exists() and not (folder / "out" / "curves.csv").exists()
    assert len(runs_of(folder)[1]) == 2  # other settings are other work


def test_a_store_that_is_away_costs_the_grading_nothing(tmp_path, graded):
    (tmp_path / "file").write_text("no folder")
    result = graded(0.5, 1.0, uri=f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    assert len(result["rows"]) == 3 and (tmp_path / "out" / "report.html").is_file()
