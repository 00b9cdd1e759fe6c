"""Fetch studies or series from an archive until every image is here; a second run fetches only what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medaug import storage
from medaug.errors import ConfigError, StorageError
from medaug.pacs.association import Lost, Refused
from medaug.pacs.peers import DicomPeer, Patience, WebPeer
from medaug.pacs.query import Archive, Plan, Query, Series, make_plan
from medaug.pacs.quiet import load, quiet
from medaug.pacs.receive import ReceiveOptions, listening, summary
from medaug.pacs.store import Store
from medaug.progress import progress

STATE_NAME = "retrieve.json"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Destination:
    """Where our receiver listens for C-MOVE; the PACS knows it by the calling AE title."""

    host: str = "127.0.0.1"
    port: int = 11112


def retrieve(
    peer: DicomPeer | WebPeer,
    out: Path,
    queries: Sequence[Query],
    *,
    method: str = "get",
    destination: Destination | None = None,
    patience: Patience | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Find what the queries match and store it in `out`.

    Args:
        peer: the PACS, by DICOM's own protocol or DICOMweb.
        out: folder of the files; images in it are not fetched again.
        queries: from `query.parse_queries`.
        method: "get" or "move"; DICOMweb has only one way.
        destination: for "move".
        patience: timeout and retries. The count of failures starts again whenever a try has brought something.
        dry_run: only find and count.

    Returns:
        Summary with `studies`, `series`, `images` found, `present` before, `received`, `missing`, `unmatched_rows`,
        `unconfirmed`, and in a dry run `uids`: study -> series -> number of images. Nothing else of the answers.

    Raises:
        ConfigError: rejected, unsupported, wrong method.  DataError: see `parse_queries`.
        StorageError: `pacs-unreachable`, `retrieve-incomplete`, disk trouble. What has come stays.
    """
    if method not in ("get", "move"):
        raise ConfigError("option-malformed", "--method takes get or move.")
    load("pynetdicom" if isinstance(peer, DicomPeer) else "dicomweb_client")
    patience = patience or Patience()
    with quiet(), _archive(peer, method, patience) as archive:
        if dry_run:
            plan = _planned(archive, queries, patience)
            return _found(plan) | {"dry_run": True, "present": _present(plan, Store(out)), "uids": _uids(plan)}
        with ExitStack() as stack:
            store = stack.enter_context(Store.opened(out))
            plan = _planned(archive, queries, patience)
            present = _present(plan, store)
            if isinstance(peer, DicomPeer) and method == "move":
                stack.enter_context(_receiver(store, peer, destination or Destination(), patience))
            try:
                failure = _fetch_all(archive, plan, store, patience)
            finally:
                _write_state(plan, store)
            result = _found(plan) | {"present": present} | summary(store) | {"missing": len(_missing(plan, store))}
    if result["missing"]:
        reasons = [f"{code} x {number}" for code, number in result["refused"].items()]
        reasons += [failure.message.rstrip(".")] if failure is not None else []
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise StorageError(
            "retrieve-incomplete",
            f"{result['missing']} of {result['images']} images are still missing{why}; run the same command again to go on.",
        )
    return result


@contextmanager
def _archive(peer: DicomPeer | WebPeer, method: str, patience: Patience) -> Iterator[Archive]:
    if isinstance(peer, DicomPeer):
        from medaug.pacs.archive import DicomArchive

        yield DicomArchive(peer, patience.timeout, move=method == "move")
        return
    from medaug.pacs.web import WebArchive

    if method == "move":
        raise ConfigError("option-malformed", "--method move needs --pacs; DICOMweb has no such service.")
    with WebArchive(peer, patience.timeout) as archive:
        yield archive


@contextmanager
def _receiver(store: Store, peer: DicomPeer, destination: Destination, patience: Patience) -> Iterator[None]:
    options = ReceiveOptions(
        destination.host, destination.port, ae_title=peer.calling, allow=(peer.called,), timeout=patience.timeout
    )
    with listening(store, options.checked()):
        yield


class _Patient:
    """An archive whose queries are asked again after a lost connection."""

    def __init__(self, archive: Archive, patience: Patience) -> None:
        self._archive, self._patience = archive, patience

    def find(self, level: str, keys: Any, returned: Sequence[str]) -> list[Any]:
        return _try(lambda: self._archive.find(level, keys, returned), self._patience)

    def fetch(self, series: Series, missing: Sequence[str], store: Store) -> None:
        self._archive.fetch(series, missing, store)


def _try(call: Callable[[], _T], patience: Patience) -> _T:
    for attempt in patience.tries():
        try:
            return call()
        except Lost:
            if attempt == patience.retries:
                raise
    raise AssertionError("unreachable")


def _planned(archive: Archive, queries: Sequence[Query], patience: Patience) -> Plan:
    with progress("querying", len(queries)) as advance:
        return make_plan(_Patient(archive, patience), queries, advance)


def _fetch_all(archive: Archive, plan: Plan, store: Store, patience: Patience) -> StorageError | None:
    """Fetch series by series; the last failure of one that stayed incomplete."""
    failure: StorageError | None = None
    total, done = plan.counts["images"], _present(plan, store)
    with progress("retrieving", total, done) as advance:
        for series in plan.series:
            failure = _fetch_series(archive, series, store, patience, advance) or failure
            if failure is not None and failure.code == "pacs-unreachable":
                break  # nobody there: the other series would wait as long
    return failure


def _fetch_series(
    archive: Archive, series: Series, store: Store, patience: Patience, advance: Callable[[int], None]
) -> StorageError | None:
    """Fetch until nothing is missing, the archive refuses what is, or `retries` tries in a row brought no new image."""
    failure: StorageError | None = None
    failures, missing = 0, _lacking(series, store)
    while missing and failures <= patience.retries:
        if failures:
            patience.wait(failures)
        failure = None
        try:
            archive.fetch(series, missing, store)
        except (Lost, Refused) as error:
            failure = error
        store.raise_fault()
        left = _lacking(series, store)
        advance(len(missing) - len(left))
        failures = failures + 1 if len(left) == len(missing) else int(bool(left))
        missing = left
        if isinstance(failure, Refused):
            break
    return failure if missing else None


def _lacking(series: Series, store: Store) -> list[str]:
    return [sop for sop in series.images if not store.has(sop)]


def _missing(plan: Plan, store: Store) -> list[str]:
    return [sop for series in plan.series for sop in _lacking(series, store)]


def _present(plan: Plan, store: Store) -> int:
    return plan.counts["images"] - len(_missing(plan, store))


def _found(plan: Plan) -> dict[str, Any]:
    return {**plan.counts, "unmatched_rows": plan.unmatched_rows, "unconfirmed": plan.unconfirmed}


def _uids(plan: Plan) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for series in plan.series:
        found.setdefault(series.study, {})[series.series] = len(series.images)
    return found


def _write_state(plan: Plan, store: Store) -> None:
    """Write what is complete, for people and other programs; the next run looks at the files themselves."""
    rows = [
        {"study": entry.study, "series": entry.series, "images": len(entry.images), "missing": len(_lacking(entry, store))}
        for entry in plan.series
    ]
    storage.write_json(store.state / STATE_NAME, {"complete": not any(row["missing"] for row in rows), "series": rows})
    (store.state / STATE_NAME).chmod(0o600)
