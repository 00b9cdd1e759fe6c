"""A PACS over DICOM's own protocol: C-FIND, then C-GET, or C-MOVE to a receiver of ours (PS3.4 C, study root)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medaug.errors import ConfigError, StorageError
from medaug.pacs.association import MAX_PDU, association, gone
from medaug.pacs.peers import DicomPeer
from medaug.pacs.query import Row, Series
from medaug.pacs.quiet import load
from medaug.pacs.receive import on_store
from medaug.pacs.store import Store
from medaug.pacs.syntaxes import COMMON_IMAGES, MAX_CONTEXTS, provider_roles, storage_contexts

FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{number}" for number in (1, 2, 3))
PENDING = (0xFF00, 0xFF01)
DESTINATION_UNKNOWN = 0xA801
MAX_ANSWERS = 1_000_000
UIDS_PER_REQUEST = 100


class DicomArchive:
    """C-FIND with C-GET, or with C-MOVE when `move` is true: the caller has the receiver running then."""

    def __init__(self, peer: DicomPeer, timeout: float, move: bool = False) -> None:
        self.peer = peer
        self.timeout = timeout
        self.move = move

    def find(self, level: str, keys: Mapping[str, str], returned: Sequence[str]) -> list[Row]:
        """One C-FIND; see `query.Archive`.

        Raises:
            StorageError: the PACS is away (`Lost`) or answers with an error (`query-failed`).
            ConfigError: it does not offer C-FIND or rejects us.
        """
        context = load("pynetdicom").build_context(FIND)
        with association(self.peer, [context], self.timeout) as link:
            rows: list[Row] = []
            for status, answer in link.send_c_find(_identifier(level, keys, returned), FIND):
                code = _code(status, "while it was queried")
                if code in PENDING and answer is not None:
                    rows.append({name: _text(answer, name) for name in (*keys, *returned)})
                    if len(rows) > MAX_ANSWERS:
                        raise StorageError("query-too-wide", f"The PACS has more than {MAX_ANSWERS} answers; narrow the query.")
                elif code != 0 and code not in PENDING:
                    raise StorageError("query-failed", f"The PACS answered a query with status 0x{code:04X}.")
        return rows

    def fetch(self, series: Series, missing: Sequence[str], store: Store) -> None:
        """One C-GET or C-MOVE for a whole series, or for its missing images a hundred at a time.

        Raises:
            StorageError, ConfigError: as for `find`; `move-destination-unknown`.
        """
        for keys in _requests(series, missing):
            level = "IMAGE" if "SOPInstanceUID" in keys else "SERIES"
            identifier = _identifier(level, keys, ())
            if self.move:
                self._move(identifier)
            else:
                self._get(identifier, series, store)
            store.raise_fault()

    def _get(self, identifier: Any, series: Series, store: Store) -> None:
        from medaug.pacs.spool import attach

        classes = [uid for uid in dict.fromkeys(series.images.values()) if uid] or list(COMMON_IMAGES)
        if not all(series.images.values()):
            classes = list(dict.fromkeys([*classes, *COMMON_IMAGES]))
        contexts = [load("pynetdicom").build_context(GET), *storage_contexts(classes, MAX_CONTEXTS - 1)]
        handlers = [(load("pynetdicom.events").EVT_C_STORE, on_store, [store])]
        with association(self.peer, contexts, self.timeout, provider_roles(classes), handlers) as link:
            attach(link, store, MAX_PDU, self.timeout)
            try:
                self._drain(link.send_c_get(identifier, GET))
            except ValueError:
                raise _unsupported("C-GET", "; try --method move") from None
            finally:
                link.dimse.forget()

    def _move(self, identifier: Any) -> None:
        with association(self.peer, [load("pynetdicom").build_context(MOVE)], self.timeout) as link:
            try:
                self._drain(link.send_c_move(identifier, self.peer.calling, MOVE))
            except ValueError:
                raise _unsupported("C-MOVE", "") from None

    def _drain(self, answers: Iterator[tuple[Any, Any]]) -> None:
        """Take all answers. Failed images are no error here: the caller looks at what has come and asks again."""
        for status, _ in answers:
            code = _code(status, "in mid-transfer")
            if code == DESTINATION_UNKNOWN:
                raise ConfigError(
                    "move-destination-unknown",
                    f"The PACS knows no address for the AE title {self.peer.calling}; register it there, or use --method get.",
                )


def _requests(series: Series, missing: Sequence[str]) -> Iterator[dict[str, str]]:
    keys = {"StudyInstanceUID": series.study, "SeriesInstanceUID": series.series}
    if len(missing) == len(series.images):
        yield keys
        return
    for start in range(0, len(missing), UIDS_PER_REQUEST):
        yield {**keys, "SOPInstanceUID": "\\".join(missing[start : start + UIDS_PER_REQUEST])}


def _identifier(level: str, keys: Mapping[str, str], returned: Sequence[str]) -> Any:
    from pydicom import Dataset

    identifier = Dataset()
    if not all(value.isascii() for value in keys.values()):
        identifier.SpecificCharacterSet = "ISO_IR 192"
    identifier.QueryRetrieveLevel = level
    for name in returned:
        setattr(identifier, name, "")
    for name, value in keys.items():
        setattr(identifier, name, value.split("\\") if "\\" in value else value)
    return identifier


def _code(status: Any, when: str) -> int:
    """The status code; an empty status means that the connection ended."""
    if "Status" not in status:
        raise gone(when)
    return int(status.Status)


def _text(answer: Any, name: str) -> str:
    value = answer.get(name)
    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, (list, tuple)) or hasattr(value, "append") else str(value)


def _unsupported(service: str, hint: str) -> ConfigError:
    return ConfigError("service-unsupported", f"The PACS does not offer {service}{hint}.")
