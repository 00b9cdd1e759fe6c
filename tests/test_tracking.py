"""MLflow through a real SQLite store: what is recorded, how runs end, and that its trouble never becomes the work's."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medaug import delivery
from medaug.errors import DataError
from medaug.tracking import Run, track, tracking_uri


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: MLflow takes seconds to make its tables."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    with track("setup", name="first", uri=uri):
        pass
    return uri


@pytest.fixture
def client(store: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """A thread that still waits for a lock would delay the next test."""
    yield
    for thread in threading.enumerate():
        if isinstance(thread, delivery.Delivery):
            thread.join(60)


def files_of(client, run_id: str, folder: str = "") -> list[str]:
    return [entry.path for entry in client.list_artifacts(run_id, folder or None)]


def test_first_run_ends_finished_beside_its_artifacts(store, client):
    (run,) = [run for run in client.search_runs(["1"]) if run.info.run_name == "first"]
    assert run.info.status == "FINISHED"
    assert client.get_experiment_by_name("medaug").artifact_location == (Path(store[10:]).parent / "mlartifacts").as_uri()


def test_records_reach_the_run(store, client, make_cohort, tmp_path):
    cohort = make_cohort(tmp_path / "cohort", per_class=6, size=8)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    params = {"a": {"b": 1}, "out": Path("/secret/name")}
    with track("gate", name="everything", uri=store, params=params, config={"dir": "/home/x/y"}) as run:
        run.log_metrics({"loss": 2.0, "skipped": None}, step=1)
        run.log_metrics({"loss": 1.0, "rate (%)": np.float32(0.5)}, step=2)
        run.log_image(np.linspace(0, 1, 64).reshape(8, 8), "samples/class 0", step=3)
        run.log_image(np.zeros((8, 8, 3), np.float32), "colour", step=3)
        run.log_table([{"class": "a", "n": 1}, {"class": "b", "n": 2}], "acceptance")
        run.log_text("hello", "note.txt")
        run.log_cohort(cohort, "reference")
        run.log_model(weights, "guided_ddpm", {"seed": 3})
        run_id = run.run_id
    assert run.dropped == 0
    data = client.get_run(run_id)
    assert data.info.status == "FINISHED"
    assert data.data.params == {"a.b": "1", "out": "name"}
    assert data.data.metrics == {"loss": 1.0, "rate ___": 0.5}
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert data.data.tags["medaug.stage"] == "gate" and "everything" in data.data.tags["mlflow.note.content"]
    assert {"acceptance.json", "config.yaml", "note.txt", "images", "model"} <= set(files_of(client, run_id))
    images = files_of(client, run_id, "images")
    shown, *_ = [path for path in images if path.startswith("images/samples~class 0+step+3+") and path.endswith(".png")]
    with Image.open(client.download_artifacts(run_id, shown)) as opened:  # enlarged without new grey levels
        pixels = np.asarray(opened)
    assert pixels.shape == (768, 768) and np.array_equal(pixels[::96, ::96], pixels[48::96, 48::96])
    assert pixels[0, 0] == 0 and pixels[-1, -1] == 255 and len(np.unique(pixels)) == 64
    assert "/home" not in Path(client.download_artifacts(run_id, "config.yaml")).read_text()
    (entry,) = data.inputs.dataset_inputs
    assert entry.dataset.digest == cohort.content_sha256[:36]
    assert json.loads(entry.dataset.profile)["counts"]["training"] == cohort.class_counts("training")
    assert [tag.value for tag in entry.tags] == ["reference"]
    (output,) = data.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.status == "READY" and model.params["seed"] == "3" and len(model.params["weights_sha256"]) == 64


def test_figure_is_drawn_when_it_is_logged(store, client):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1])
    with track("grading", name="figure", uri=store) as run:
        run.log_figure(figure, "plots/metrics.png")
        run_id = run.run_id
    path = Path(client.download_artifacts(run_id, "plots/metrics.png"))
    assert path.read_bytes().startswith(b"\x89PNG")


ENDS = [(DataError("image-unreadable", "No."), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(0), "FINISHED")]


@pytest.mark.parametrize(("error", "status"), ENDS)
def test_the_end_of_the_block_is_the_status(store, client, error, status):
    with pytest.raises(type(error)), track("training", name="ends", uri=store) as run:
        run_id = run.run_id
        raise error
    ended = client.get_run(run_id)
    assert ended.info.status == status
    if status == "FAILED":
        assert ended.data.tags["medaug.error"] == "image-unreadable"


def test_two_runs_at_once_do_not_mix(store, client):
    with track("training", name="outer", uri=store) as outer:
        with track("gate", name="inner", uri=store) as inner:
            for step in range(3):
                outer.log_metrics({"outer": step}, step)
                inner.log_metrics({"inner": step}, step)
        outer.log_params({"after": "inner"})
        ids = outer.run_id, inner.run_id
    first, second = (client.get_run(run_id) for run_id in ids)
    assert (set(first.data.metrics), set(second.data.metrics)) == ({"outer"}, {"inner"})
    assert (first.data.params, second.data.params) == ({"after": "inner"}, {})
    assert {first.info.status, second.info.status} == {"FINISHED"}
    assert (first.info.run_name, second.info.run_name) == ("outer", "inner")


def test_a_run_whose_process_was_killed_ends_failed(store, client):
    tags = {"medaug.process": f"{delivery._host()}-{2**22 + 1}"}  # above the largest pid Linux gives
    dead = client.create_run("1", run_name="killed", tags=tags).info.run_id
    elsewhere = client.create_run("1", run_name="elsewhere", tags={"medaug.process": "other-1"}).info.run_id
    with track("training", name="next", uri=store):
        pass
    assert client.get_run(dead).info.status == "FAILED"
    assert client.get_run(elsewhere).info.status == "RUNNING"


def test_a_bad_record_does_not_end_tracking(store, client, caplog):
    caplog.set_level(logging.WARNING, "medaug.tracking")
    with track("intake", name="bad record", uri=store, params={"seed": 0}) as run:
        run.log_params({"seed": 1})  # MLflow refuses to change a parameter
        run.log_metrics({"loss": "many"})
        run.log_metrics({"loss": 1.0})
        run_id = run.run_id
    assert run.dropped == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}
    assert client.get_run(run_id).info.status == "FINISHED"


def work(run: Run) -> float:
    """A stage with a few records of each kind; seconds it took."""
    start = time.monotonic()
    for step in range(20):
        run.log_metrics({"loss": 1.0}, step)
        run.log_image(np.zeros((4, 4)), "grid", step)
    run.log_table([{"a": 1}], "table")
    return time.monotonic() - start


def test_a_burst_of_records_waits_for_a_new_store(tmp_path, monkeypatch):
    """A benchmark that goes on hands over its finished rows at once, while MLflow still makes the tables of a new database."""
    monkeypatch.setattr(delivery, "QUEUE_SIZE", 8)
    monkeypatch.setattr(delivery, "QUEUE_SECONDS", 10.0)  # for one record, however busy the machine is
    wait, make, waiting = delivery.Delivery.session, delivery._open, threading.Event()

    def session(self):
        waiting.set()
        return wait(self)

    def slow(*args):
        waiting.wait(20)  # the tables are there when the work waits for them, and not within `QUEUE_SECONDS` if it does not
        return make(*args)

    monkeypatch.setattr(delivery.Delivery, "session", session)
    monkeypatch.setattr(delivery, "_open", slow)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with track("benchmark", name="resumed", uri=uri) as run:
        for cell in range(24):
            run.log_child(f"cell {cell}", f"sha{cell}", params={}, metrics={"test/auc": 0.5})
    assert run.dropped == 0


def test_locked_database_neither_stops_nor_delays(store, caplog, monkeypatch):
    monkeypatch.setattr(delivery, "PATIENCE_SECONDS", 1.5)
    caplog.set_level(logging.WARNING)
    lock = sqlite3.connect(store[10:], isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    try:
        with track("training", name="locked", uri=store) as run:
            seconds = work(run)
        total = time.monotonic() - start
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert seconds < 1 and total < 6
    assert run.dropped > 0
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["medaug.tracking"]


def test_unreachable_server_neither_stops_nor_delays(caplog):
    caplog.set_level(logging.WARNING)
    start = time.monotonic()
    with track("training", name="away", uri="http://127.0.0.1:9") as run:
        seconds = work(run)
        assert run.url is None and run.run_id is None
    assert seconds < 1 and time.monotonic() - start < 15
    assert run.dropped > 0
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["medaug.tracking"]


def test_refused_store_does_not_raise(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "medaug.tracking")
    with track("intake", name="file store", uri=(tmp_path / "mlruns").as_uri()) as run:
        run.log_metrics({"loss": 1.0})
    assert run.dropped > 0 and "the work goes on" in caplog.text


def test_disabled_run_takes_everything_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with track("intake", name="off", enabled=False, params={"a": 1}, same_work="w") as run:
        work(run)
        run.log_child("cell", "sha", params={}, metrics={})
        run.log_artifact(tmp_path / "missing")
    assert (run.run_id, run.url, run.dropped) == (None, None, 0)
    assert not any(tmp_path.iterdir())


def test_uri_argument_then_environment_then_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri() == "http://server:5000"
    assert tracking_uri("sqlite:///x.db") == "sqlite:///x.db"


def children_of(client, run_id: str):
    return client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{run_id}'")


def test_a_child_is_written_once_and_again_only_for_other_content(store, client):
    def log(run, content, score):
        curve = [(step, {"curve/loss": 1 / step}) for step in (1, 2)]
        run.log_child(
            "arm's net seed 0", content, params={"recipe": {"rate": 0.1}}, metrics={"test/accuracy": score}, curve=curve
        )

    with track("grading", name="parent", uri=store) as run:
        log(run, "a", 0.5)
        log(run, "a", 0.9)  # the same content: nothing is done
        run_id = run.run_id
    (child,) = children_of(client, run_id)
    assert (child.info.status, child.data.params, child.data.metrics["test/accuracy"]) == (
        "FINISHED",
        {"recipe.rate": "0.1"},
        0.5,
    )
    assert [point.step for point in client.get_metric_history(child.info.run_id, "curve/loss")] == [1, 2]
    client.update_run(child.info.run_id, status="RUNNING")  # as if the process was killed while it was written
    with track("grading", name="parent", uri=store) as other:
        log(other, "a", 0.5)
    assert len(children_of(client, run_id)) == 1  # another parent has its own
    client.set_tag(run_id, "medaug.same_work", "w")
    with track("grading", name="parent", uri=store, same_work="w") as run:
        log(run, "a", 0.6)
        log(run, "b", 0.7)
        assert run.run_id == run_id
    (child,) = children_of(client, run_id)
    assert child.data.metrics["test/accuracy"] == 0.7 and child.data.tags["medaug.content"] == "b"


def test_the_same_work_goes_on_in_the_run_that_holds_it_not_in_one_refused_beside_it(store, client):
    with track("grading", name="first", uri=store, same_work="t" * 64) as run:
        run_id = run.run_id
        with pytest.raises(DataError), track("grading", name="beside it", uri=store, same_work="t" * 64) as other:
            assert other.run_id != run_id
            raise DataError("folder-in-use", "No.")
    with track("grading", name="third", uri=store, same_work="t" * 64) as run:
        assert run.run_id == run_id


def test_the_same_work_continues_its_run_and_its_tables(store, client):
    with pytest.raises(DataError), track("grading", name="first try", uri=store, same_work="s" * 64) as run:
        run.log_table([{"n": 1}], "rows")
        run_id = run.run_id
        raise DataError("image-unreadable", "No.")
    assert client.get_run(run_id).data.tags["medaug.error"] == "image-unreadable"
    with track("grading", name="second try", uri=store, same_work="s" * 64) as run:
        run.log_table([{"n": 1}, {"n": 2}], "rows")
        assert run.run_id == run_id  # waits until it is open
        with track("grading", name="at the same time", uri=store, same_work="s" * 64) as other:
            assert other.run_id not in (run_id, None)  # a run that is still written is left alone
    again = client.get_run(run_id)
    assert again.info.status == "FINISHED" and "medaug.error" not in again.data.tags
    assert json.loads(Path(client.download_artifacts(run_id, "rows.json")).read_text())["data"] == [[1], [2]]
