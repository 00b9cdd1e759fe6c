"""A thread that takes one run's records to MLflow, so that the work never waits for it and never fails with it."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medaug import __version__

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["SAME_WORK", "Call", "Delivery", "Session", "start"]

MAX_FAILURES = 3
QUEUE_SIZE = 256  # records waiting; bounds the memory that images in the queue hold
QUEUE_SECONDS = 1.0  # longest wait of the work for a place in a full queue, once
PATIENCE_SECONDS = 8.0  # at the end of a run: longest wait without any progress
FIRST_USE_SECONDS = 60.0  # the same while MLflow makes the tables of a new database

SAME_WORK = "medaug.same_work"  # tag of a run that is continued when its work is

_VIEW = {"mlflow.experimentKind": "custom_model_development"}  # the kind the user interface knows for model training

_log = logging.getLogger("medaug.tracking")
_live: set[str] = set()  # run ids of this process


@dataclass(frozen=True)
class Session:
    """An open run: where it is and how to reach it."""

    client: MlflowClient
    uri: str
    experiment_id: str
    run_id: str


Call = Callable[[Session], object]


class Delivery(threading.Thread):
    """Delivers the records of one run in order; a daemon, so that a hanging server cannot keep the process alive."""

    def __init__(self, uri: str, experiment: str, name: str, tags: Mapping[str, str]) -> None:
        super().__init__(name=f"medaug-tracking-{name}", daemon=True)
        self.dropped = 0
        self._uri, self._experiment, self._run_name, self._tags = uri, experiment, name, dict(tags)
        self._queue: queue.Queue[tuple[Call, float]] = queue.Queue(QUEUE_SIZE)
        self._session: Session | None = None
        self._tried, self._finished = threading.Event(), threading.Event()
        self._status: str | None = None
        self._failures, self._handled = 0, 0
        self._given_up = self._warned = self._stuck = self._abandoned = False
        database = sqlite_path(uri)
        self._patience = FIRST_USE_SECONDS if database is not None and not database.exists() else PATIENCE_SECONDS

    # Called by the work.

    def put(self, call: Call, patience: float) -> None:
        """Queue a record; waits once for a place in a full queue, then drops until there is one.

        A burst of records at the start, such as the rows of a benchmark that goes on, first waits for the store to be open.
        """
        if self._given_up:
            self.dropped += 1
            return
        if self._queue.full():
            self.session()
        try:
            self._queue.put((call, patience), block=not self._stuck, timeout=QUEUE_SECONDS)
            self._stuck = False
        except queue.Full:
            self._stuck = True
            self.lost(TimeoutError("no answer"))

    def lost(self, error: Exception) -> None:
        """Count a dropped record and warn the first time. The error's text may hold an address, so only its type is told."""
        self.dropped += 1
        if not self._warned:
            self._warned = True
            _log.warning("MLflow cannot record this run (%s); the work goes on without these records.", type(error).__name__)

    def session(self) -> Session | None:
        """The open run; the first time it is asked for, waits a few seconds for it."""
        if not self._tried.wait(0 if self._stuck else self._patience):
            self._stuck = True
        return self._session

    def close(self, status: str) -> None:
        """Let the queue drain while there is progress, then end the run with `status`."""
        self._status = status
        handled, since = self._handled, time.monotonic()
        while not self._finished.wait(0.02):
            now = time.monotonic()
            if self._handled != handled:
                handled, since = self._handled, now
            elif now - since > self._patience:
                self._abandoned = True
                self.dropped += self._queue.qsize()
                self.lost(TimeoutError("no answer"))
                break
        if self.dropped:
            _log.info("%d record(s) did not reach MLflow.", self.dropped)

    # Run by the thread.

    def run(self) -> None:
        """Deliver until the run is closed and the queue is empty, or the work waits no longer; then end the run."""
        self._attempt(lambda session: None)
        while not self._abandoned:
            closing = self._status is not None  # read before the queue: nothing is put after it is set
            try:
                call, self._patience = self._queue.get(timeout=0.05)
            except queue.Empty:
                if closing:
                    break
                continue
            self._attempt(call)
            self._handled += 1
        self._terminate()
        self._finished.set()

    def _attempt(self, call: Call) -> None:
        if self._given_up:
            self.dropped += 1
            return
        try:
            if self._session is None:
                self._session = _open(self._uri, self._experiment, self._run_name, self._tags)
                self._handled, self._patience = self._handled + 1, PATIENCE_SECONDS
            call(self._session)
            self._failures = 0
        except Exception as error:  # noqa: BLE001 - whatever MLflow, SQLAlchemy or the network raises
            self._failures += 1
            self._given_up = self._failures >= MAX_FAILURES
            self.lost(error)
        finally:
            self._tried.set()

    def _terminate(self) -> None:
        if self._session is None:
            return
        try:
            self._session.client.set_terminated(self._session.run_id, self._status or "FAILED")
        except Exception as error:  # noqa: BLE001 - see above
            self.lost(error)
        _live.discard(self._session.run_id)


class _Quiet(logging.Filter):
    """Drops what MLflow and its libraries log in our thread: one warning of our own tells of a failure."""

    def filter(self, record: logging.LogRecord) -> bool:
        # By name too: a handler may be shared with loggers of our own.
        return record.name.startswith("medaug") or not isinstance(threading.current_thread(), Delivery)


_quiet = _Quiet()


def start(stage: str, name: str, experiment: str, uri: str, note: str, same_work: str = "") -> Delivery | None:
    """Start the thread of a run, see `medaug.tracking.track`; None if MLflow cannot be imported."""
    # Set before the import: MLflow reads some of them then. A user's own values win.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    try:
        import mlflow  # noqa: F401 - in the caller's thread, so that two threads never import it at once
    except Exception as error:  # noqa: BLE001 - a broken installation of MLflow must not stop the work
        _log.warning("MLflow cannot be imported (%s); the work goes on without tracking.", type(error).__name__)
        return None
    for handler in (*logging.getLogger("mlflow").handlers, *logging.getLogger("alembic").handlers):
        handler.addFilter(_quiet)
    logging.getLogger("urllib3.connectionpool").addFilter(_quiet)
    tags = {
        "medaug.stage": stage,
        "medaug.version": __version__,
        "medaug.process": f"{_host()}-{os.getpid()}",
        "mlflow.note.content": note or f"medaug {stage}: {name}",
        "mlflow.source.name": "medaug",
        "mlflow.source.type": "LOCAL",
    } | ({SAME_WORK: same_work} if same_work else {})
    delivery = Delivery(uri, experiment, name, tags)
    delivery.start()
    return delivery


def _open(uri: str, experiment: str, name: str, tags: Mapping[str, str]) -> Session:
    from mlflow import MlflowClient

    with _alone(uri):
        client = MlflowClient(tracking_uri=uri)
        experiment_id = _experiment_id(client, experiment, uri)
        _end_dead_runs(client, experiment_id)
        run_id = _continued(client, experiment_id, tags)
    if run_id is None:
        run_id = client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id
    _live.add(run_id)
    return Session(client, uri, experiment_id, run_id)


def _continued(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> str | None:
    """An earlier run of the same work, open again; None if there is none, or another process still writes it."""
    if SAME_WORK not in tags:
        return None
    wanted = f"tags.`{SAME_WORK}` = '{tags[SAME_WORK]}' and attributes.status != 'RUNNING'"
    # The oldest: one that was started beside it, and refused, holds nothing.
    found = client.search_runs([experiment_id], wanted, order_by=["attributes.start_time ASC"])
    if not found:
        return None
    run_id = str(found[0].info.run_id)
    _live.add(run_id)
    client.update_run(run_id, status="RUNNING")
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    if "medaug.error" in found[0].data.tags:
        client.delete_tag(run_id, "medaug.error")
    return run_id


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold a lock file beside a SQLite store: two processes that make its tables at once would break it."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f".{database.name}.lock"), "a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        return str(client.create_experiment(name, artifact_location=location, tags=_VIEW))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _end_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Mark runs FAILED whose process on this machine was killed before it could end them."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=100):
        host, _, pid = run.data.tags.get("medaug.process", "").rpartition("-")
        if host == _host() and pid.isdigit() and run.info.run_id not in _live and not _other_process_lives(int(pid)):
            client.set_terminated(run.info.run_id, "FAILED")


def _other_process_lives(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    """A name for this machine that tells nobody its name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite tracking URI; None for a server or a database in memory."""
    file = uri.removeprefix("sqlite:///").split("?")[0]
    return Path(file).absolute() if uri.startswith("sqlite:///") and file and file != ":memory:" else None
