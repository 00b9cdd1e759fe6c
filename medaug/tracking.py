"""One named MLflow run per stage; MLflow's own trouble never stops or delays the work.

Every record is handed to a thread of the run (`medaug.delivery`), which talks to MLflow through `MlflowClient`. There is
no global active run, so two runs at the same time never mix, and a server that is away or a database that is locked
costs the work nothing: the first failure is warned of once, records that cannot be delivered are counted and dropped,
and after three failures in a row the thread stops trying.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medaug import __version__, delivery
from medaug.delivery import Call, Delivery, Session
from medaug.errors import MedaugError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from medaug.cohort import Cohort

__all__ = ["Run", "tracking_uri", "track"]

EXPERIMENT = "medaug"
SHOWN_SIDE = 768  # pixels of the longer side
UPLOAD_SECONDS = 60.0  # at the end of a run: longest wait for one file


def tracking_uri(uri: str | None = None) -> str:
    """The argument, else MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working directory."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


@contextmanager
def track(
    stage: str,
    *,
    name: str,
    experiment: str = EXPERIMENT,
    uri: str | None = None,
    params: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    note: str = "",
    same_work: str = "",
    enabled: bool = True,
) -> Iterator[Run]:
    """Record the block as one MLflow run: FINISHED, FAILED on an exception, KILLED on Ctrl-C. Never raises by itself.

    Args:
        stage: "intake", "training", "generation", "gate", "grading" ...: the tag `medaug.stage`.
        name: the run's name; runs are never anonymous.
        experiment: MLflow experiment.
        uri: see `tracking_uri`. Artifacts of a SQLite store go to ``mlartifacts`` beside its file.
        params: knobs; nested mappings are joined by dots. Of a path only the last part is kept.
        config: the resolved configuration, stored as ``config.yaml``.
        note: the run's description in the user interface.
        same_work: a sha256 that says what is done and where: an ended run with the same one is continued in the place of a new one.
        enabled: False records nothing.
    """
    run = Run(delivery.start(stage, name, experiment, tracking_uri(uri), note, same_work) if enabled else None)
    run.log_params(params or {})
    if config:
        run.log_dict(config, "config.yaml")
    try:
        yield run
    except KeyboardInterrupt:
        run._finish("KILLED")
        raise
    except BaseException as error:
        done = isinstance(error, SystemExit) and error.code in (None, 0)
        if not done:
            run._tag("medaug.error", error.code if isinstance(error, MedaugError) else type(error).__name__)
        run._finish("FINISHED" if done else "FAILED")
        raise
    else:
        run._finish("FINISHED")


class Run:
    """What a stage records. Every method returns at once and never raises; without MLflow they do nothing."""

    def __init__(self, delivery: Delivery | None) -> None:
        self._delivery = delivery

    @property
    def run_id(self) -> str | None:
        """MLflow's id; waits a few seconds for it, None while MLflow is away or tracking is off."""
        session = self._delivery.session() if self._delivery else None
        return session.run_id if session else None

    @property
    def url(self) -> str | None:
        """Page of the run on an HTTP server, None for a database store."""
        session = self._delivery.session() if self._delivery else None
        if session is None or not session.uri.startswith(("http://", "https://")):
            return None
        return f"{session.uri.rstrip('/')}/#/experiments/{session.experiment_id}/runs/{session.run_id}"

    @property
    def dropped(self) -> int:
        """Records that could not be delivered so far."""
        return self._delivery.dropped if self._delivery else 0

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Knobs of the stage, nested mappings joined by dots; a value is written once per run."""

        def prepare() -> Call:
            rows = [(_key(key), str(value)[:6000]) for key, value in _flatten(_plain(params))]
            return lambda session: _log_params(session, rows)

        if params:
            self._send(prepare)

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Numbers at a step; None is left out."""
        now = int(time.time() * 1000)

        def prepare() -> Call:
            rows = [(_key(key), float(value), now, int(step)) for key, value in metrics.items() if value is not None]
            return lambda session: _log_metrics(session, rows)

        self._send(prepare)

    def log_image(self, image: np.ndarray, key: str, step: int = 0) -> None:
        """A unit image, (H, W) or (H, W, 3) in [0, 1], shown by step in the run's image grid.

        Small ones are enlarged by a whole number to `SHOWN_SIDE` pixels or less: the user interface shows them pixel by pixel.
        """

        def prepare() -> Call:
            import numpy as np

            pixels = np.rint(np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(0, 1) * 255).astype(np.uint8)
            times = max(1, SHOWN_SIDE // max(pixels.shape[:2]))
            pixels = pixels.repeat(times, axis=0).repeat(times, axis=1)
            return lambda session: session.client.log_image(session.run_id, pixels, key=_key(key, colon=False), step=int(step))

        self._send(prepare)

    def log_table(self, rows: Iterable[Mapping[str, Any]], name: str) -> None:
        """Rows of a table, shown as one by the user interface; ``.json`` is added to the name."""

        def prepare() -> Call:
            table = [_plain(row) for row in rows]
            file = name if name.endswith(".json") else f"{name}.json"
            return lambda session: _log_table(session, table, file)

        self._send(prepare)

    def log_dict(self, value: Mapping[str, Any], name: str) -> None:
        """A mapping as JSON or YAML, by the name's suffix."""

        def prepare() -> Call:
            plain = _plain(value)
            return lambda session: session.client.log_dict(session.run_id, plain, name)

        self._send(prepare)

    def log_text(self, text: str, name: str) -> None:
        """A text file."""
        self._send(lambda: lambda session: session.client.log_text(session.run_id, text, name))

    def log_figure(self, figure: Figure, name: str) -> None:
        """A matplotlib figure, drawn now; the suffix of `name` is the format."""

        def prepare() -> Call:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=PurePath(name).suffix[1:] or "png", bbox_inches="tight")
            return lambda session: _log_bytes(session, buffer.getvalue(), name)

        self._send(prepare)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file or folder, read when its turn comes: it has to stay until the run ends."""
        self._send(lambda: lambda session: _log_path(session, Path(path), folder), patience=UPLOAD_SECONDS)

    def log_cohort(self, cohort: Cohort, context: str) -> None:
        """A cohort as data set: name, content hash as digest, counts; no image and no path.

        Args:
            cohort: as read or written, with its `content_sha256`.
            context: what it was used for: "training", "reference", "synthetic", "accepted" ...
        """

        def prepare() -> Call:
            name, facts = cohort.name or "cohort", _cohort_facts(cohort)
            return lambda session: _log_dataset(session, name, facts, context)

        self._send(prepare)

    def log_child(
        self,
        name: str,
        content: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        curve: Sequence[tuple[int, Mapping[str, float]]] = (),
    ) -> None:
        """A finished run nested under this one. If it is there with the same content, nothing is done.

        Args:
            name: of the child, the only one of this name under the run; an older one with other content goes to MLflow's trash.
            content: sha256 of what it stands for.
            params, metrics: its knobs and its final figures.  curve: (step, figures) in the course of it.
        """
        now = int(time.time() * 1000)

        def prepare() -> Call:
            knobs = [(_key(key), str(value)[:6000]) for key, value in _flatten(_plain(params))]
            points = [*curve, (0, metrics)]
            rows = [(_key(key), float(value), now, int(step)) for step, values in points for key, value in values.items()]
            return lambda session: _log_child(session, name, content, knobs, rows)

        self._send(prepare)

    def log_model(self, weights_path: Path, name: str, params: Mapping[str, Any] | None = None) -> None:
        """Weights as artifact under ``model/``, and a logged model that names their sha256."""

        def prepare() -> Call:
            rows = {_key(key): str(value)[:250] for key, value in _flatten(_plain(params or {}))}
            return lambda session: _log_model(session, Path(weights_path), name, rows)

        self._send(prepare, patience=UPLOAD_SECONDS)

    def _tag(self, key: str, value: str) -> None:
        self._send(lambda: lambda session: session.client.set_tag(session.run_id, key, value))

    def _send(self, prepare: Callable[[], Call], patience: float = delivery.PATIENCE_SECONDS) -> None:
        """Prepare a record now, so that later changes of the caller's data do not reach it, and queue it."""
        if self._delivery is None:
            return
        try:
            self._delivery.put(prepare(), patience)
        except Exception as error:  # noqa: BLE001 - a record that cannot be made is MLflow's trouble, not the work's
            self._delivery.lost(error)

    def _finish(self, status: str) -> None:
        if self._delivery is not None:
            self._delivery.close(status)


def _key(key: object, *, colon: bool = True) -> str:
    """A name MLflow takes: letters, digits, and ``_-./`` and space."""
    return re.sub(r"[^\w\-. /:]" if colon else r"[^a-zA-Z0-9_\-. /]", "_", str(key))[:250] or "_"


def _plain(value: Any) -> Any:
    """`value` as JSON types, copied; of an absolute path only its last part, since a path can name a patient."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, str):
        return PurePath(value).name if value.startswith(("/", "~/")) and len(value) > 1 else value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    item = getattr(value, "item", None)
    return item() if item is not None and getattr(value, "size", 0) == 1 else str(value)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _log_params(session: Session, rows: Sequence[tuple[str, str]]) -> None:
    from mlflow.entities import Param

    for start in range(0, len(rows), 100):  # MLflow's limit per call
        session.client.log_batch(session.run_id, params=[Param(key, value) for key, value in rows[start : start + 100]])


def _log_metrics(session: Session, rows: Sequence[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    for start in range(0, len(rows), 1000):  # MLflow's limit per call
        session.client.log_batch(session.run_id, metrics=[Metric(*row) for row in rows[start : start + 1000]])


def _log_child(
    session: Session, name: str, content: str, knobs: Sequence[tuple[str, str]], rows: Sequence[tuple[str, float, int, int]]
) -> None:
    kind = name.replace("'", "")  # a quotation mark would end the text of the query
    wanted = f"tags.`mlflow.parentRunId` = '{session.run_id}' and tags.`medaug.child` = '{kind}'"
    for found in session.client.search_runs([session.experiment_id], wanted):
        if found.info.status == "FINISHED" and found.data.tags.get("medaug.content") == content:
            return
        session.client.delete_run(found.info.run_id)  # of other content, or cut off while it was written
    tags = {"mlflow.parentRunId": session.run_id, "medaug.child": kind, "medaug.content": content}
    tags |= {"medaug.version": __version__, "mlflow.source.name": "medaug", "mlflow.source.type": "LOCAL"}
    run = session.client.create_run(session.experiment_id, run_name=name, tags=tags)
    child = replace(session, run_id=run.info.run_id)
    _log_params(child, knobs)
    _log_metrics(child, rows)
    session.client.set_terminated(child.run_id, "FINISHED")


def _log_table(session: Session, table: list[dict[str, Any]], file: str) -> None:
    import pandas as pd

    frame = pd.DataFrame(table)
    if any(entry.path == file for entry in session.client.list_artifacts(session.run_id)):
        # `log_table` would add the rows to those that the run holds from before it was continued.
        session.client.log_text(session.run_id, frame.to_json(orient="split", index=False), file)
    else:
        session.client.log_table(session.run_id, frame, file)


def _log_bytes(session: Session, data: bytes, name: str) -> None:
    folder, file = os.path.split(name)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / file
        path.write_bytes(data)
        session.client.log_artifact(session.run_id, str(path), folder or None)


def _log_path(session: Session, path: Path, folder: str | None) -> None:
    send = session.client.log_artifacts if path.is_dir() else session.client.log_artifact
    send(session.run_id, str(path), folder)


def _cohort_facts(cohort: Cohort) -> dict[str, Any]:
    splits = ("training", "validation", "test")
    return {
        "content_sha256": cohort.content_sha256,
        "classes": list(cohort.classes),
        "counts": {split: cohort.class_counts(split) for split in splits},
        "groups": {split: len(cohort.groups(split)) for split in splits},
        "image_size": cohort.image_size,
        "channels": cohort.channels,
        "num_rows": len(cohort.cases()),
    }


def _log_dataset(session: Session, name: str, facts: Mapping[str, Any], context: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = facts["content_sha256"][:36] or "unwritten"  # MLflow's limit
    source = json.dumps({"content_sha256": facts["content_sha256"]})
    dataset = Dataset(name, digest, source_type="medaug_cohort", source=source, profile=json.dumps(facts))
    entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
    session.client.log_inputs(session.run_id, [entry])


def _log_model(session: Session, weights: Path, name: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import LoggedModelOutput

    from medaug.storage import sha256_file

    session.client.log_artifact(session.run_id, str(weights), "model")
    # Marked external, as MLflow marks a model that it cannot load by itself: no flavour pickles anything.
    model = session.client.create_logged_model(
        session.experiment_id,
        re.sub(r"[^\w\-]", "_", name),
        source_run_id=session.run_id,
        tags={"mlflow.model.isExternal": "true"},
        params={"weights_sha256": sha256_file(weights), "artifact": f"model/{weights.name}", **params},
        model_type="medaug",
    )
    session.client.finalize_logged_model(model.model_id, "READY")
    session.client.log_outputs(session.run_id, [LoggedModelOutput(model.model_id, step=0)])
