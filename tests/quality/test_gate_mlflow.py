"""What the gate leaves in MLflow: read back by its client, and looked at in its own user interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import chromium
from orthanc import free_port, wait_for_port
from test_gate import RECIPE, write_synthetic

from medaug.cohort import Case, Cohort
from medaug.quality.distance_figure import FIGURE_NAME, distance_figure, distances_by_verdict
from medaug.quality.gate import run_gate
from medaug.quality.gate_tracking import reason_rows
from medaug.quality.report import REPORT_NAME
from medaug.quality.verdicts import Verdict
from medaug.tracking import track

WAIT = 120_000  # milliseconds: the server's first answer may take long on a busy machine


@pytest.fixture(scope="module")
def tracked_gate(tmp_path_factory: pytest.TempPathFactory, make_cohort: Callable[..., Cohort]) -> SimpleNamespace:
    """One gate, recorded in a store of its own."""
    folder = tmp_path_factory.mktemp("gate")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    real = make_cohort(folder / "real", per_class=30, cases_per_group=2)
    write_synthetic(folder / "synthetic", real, make_cohort(folder / "others", per_class=10, seed=1))
    with track("gate", name="gate seen", uri=uri) as run:
        result = run_gate(folder / "synthetic", folder / "real", folder / "out", recipe=RECIPE, threshold=0.6, tracking=run)
        run_id = run.run_id
    return SimpleNamespace(uri=uri, run_id=run_id, result=result, folder=folder)


def case(name: str, label: int) -> Case:
    return Case(name, f"{name}.png", label, "g", "0" * 64, name=name)


def test_reasons_are_counted_once_per_image_and_by_class():
    verdicts = [
        Verdict(case("a", 0), "reject", (("wrong", "."), ("wrong", "again.")), {}),
        Verdict(case("b", 1), "reject", (("wrong", "."),), {}),
        Verdict(case("c", 1), "quarantine", (("near-copy", "."), ("wrong", ".")), {}),
        Verdict(case("d", 0), "accept", (), {}),
    ]
    assert reason_rows(verdicts, ["x", "y"]) == [
        {"verdict": "reject", "reason": "wrong", "images": 2, "x": 1, "y": 1},
        {"verdict": "quarantine", "reason": "near-copy", "images": 1, "x": 0, "y": 1},
        {"verdict": "quarantine", "reason": "wrong", "images": 1, "x": 0, "y": 1},
    ]


def test_distances_are_sorted_by_verdict_and_no_copies_check_has_no_figure():
    rows = [
        {"verdict": "accept", "nearest_by_space": {"pixels": {"distance": 0.5}}},
        {"verdict": "quarantine", "nearest_by_space": {"pixels": {"distance": 0.01}}},
        {"verdict": "reject", "nearest_by_space": {"pixels": {"distance": None}}},
        {"verdict": "reject"},
    ]
    summary = {"verdicts": rows, "copy_spaces": {"pixels": {"threshold": 0.1}}}
    assert distances_by_verdict(summary, "pixels") == {"accept": [0.5], "quarantine": [0.01], "reject": []}
    (axis,) = distance_figure(summary).axes
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {
        "accept (1)", "quarantine (1)", "reject (0)", "near-copy below",
    }  # fmt: skip
    assert sum(patch.get_height() > 0 for patch in axis.patches) == 2  # the bins of the two images
    assert distance_figure({"verdicts": rows}) is None


def test_tables_sheets_distances_and_report_are_in_the_store(tracked_gate: SimpleNamespace) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracked_gate.uri)
    names = {entry.path for entry in client.list_artifacts(tracked_gate.run_id)}
    assert {"gate_acceptance.json", "gate_reasons.json", "gate_verdicts.json", "report.html", FIGURE_NAME, "images"} <= names
    table = json.loads(Path(client.download_artifacts(tracked_gate.run_id, "gate_reasons.json")).read_text())
    found = {row[table["columns"].index("reason")]: row[table["columns"].index("images")] for row in table["data"]}
    assert set(found) == set(tracked_gate.result.summary["reasons"]) and found["image-constant"] == found["near-copy"] == 3
    metrics = client.get_run(tracked_gate.run_id).data.metrics
    assert metrics["reasons.image-constant"] == 3 and metrics["accepted"] == len(tracked_gate.result.accepted.training)


@contextmanager
def mlflow_ui(uri: str, folder: Path) -> Iterator[str]:
    """MLflow's server on loopback, one worker; stopped with all it started."""
    port = free_port()
    words = ["server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(folder / "ui.log", "wb") as log:
        command = [sys.executable, "-m", "mlflow", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        try:
            wait_for_port(port, process, seconds=180)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


@pytest.mark.slow
@pytest.mark.integration
def test_the_user_interface_shows_them(tracked_gate: SimpleNamespace) -> None:
    """Run list, tables, sheets, distances and the report, in Chromium. MEDAUG_SCREENSHOTS names a folder for pictures of them."""
    shots = os.environ.get("MEDAUG_SCREENSHOTS")

    def keep(page: Any, name: str) -> None:
        if shots:
            page.screenshot(path=str(Path(shots) / f"{name}.png"))

    with mlflow_ui(tracked_gate.uri, tracked_gate.folder) as address, chromium() as browser:
        page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
        page.set_default_timeout(WAIT)
        page.goto(f"{address}/#/experiments/1/runs")
        page.get_by_text("gate seen").first.wait_for()
        run = f"{address}/#/experiments/1/runs/{tracked_gate.run_id}"
        page.goto(f"{run}/artifacts/gate_reasons.json")
        page.get_by_text("image-constant").first.wait_for()
        keep(page, "reasons")
        page.get_by_text(FIGURE_NAME).first.click()
        page.wait_for_function("Array.from(document.images).some(image => image.complete && image.naturalWidth > 300)")
        keep(page, "distances")
        page.get_by_text(REPORT_NAME).first.click()
        page.frame_locator("iframe").first.get_by_role("heading", name="Acceptance").wait_for()
        keep(page, "report")
        page.goto("about:blank")  # a change behind the hash alone is not followed
        page.goto(f"{run}/model-metrics")
        page.get_by_text("real accepted quarantined rejected").first.wait_for()
        keep(page, "sheets")
