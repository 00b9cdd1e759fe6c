"""A storage SCP (PS3.4 B): takes in what a PACS sends, whole files only, and answers for each what became of it."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaug.errors import ConfigError, DataError, StorageError
from medaug.pacs import store as stores
from medaug.pacs.association import identify
from medaug.pacs.head import read_head
from medaug.pacs.peers import ae_title, is_loopback
from medaug.pacs.quiet import load, quiet
from medaug.pacs.store import Store
from medaug.pacs.syntaxes import readable_syntaxes, storage_classes

# Answers to C-STORE (PS3.4 B.2.3, PS3.7 C).
SUCCESS = 0x0000
INVALID_INSTANCE = 0x0117
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
CONFLICT = 0xC111  # of the range 0xCxxx: another image with this SOP Instance UID is here, the first one stays
MAX_ASSOCIATIONS = 10
WITHOUT_ASSOCIATION = ("Sta1", "Sta2", "Sta13")  # before the request, and after the end (PS3.8 9.2.1)
MAX_HANG_UP = 3.0  # seconds
VERIFICATION = "1.2.840.10008.1.1"


@dataclass(frozen=True)
class ReceiveOptions:
    """Where to listen, whom to answer, when to stop.

    Attributes:
        host: address to listen on; another machine reaches only what is not loopback.
        port: TCP port; 0 takes a free one.
        ae_title: our AE title; a request for another one is rejected.
        allow: calling AE titles that may send; empty means any, and is refused when `host` is not loopback.
        max_pdu: largest PDU in bytes that a peer may send (PS3.8 D.1).
        limit: stop after this many new files.
        idle: stop after this many seconds without a file.
        timeout: seconds after which a silent connection is closed.
    """

    host: str = "127.0.0.1"
    port: int = 11112
    ae_title: str = "MEDAUG"
    allow: tuple[str, ...] = ()
    max_pdu: int = 1 << 18
    limit: int | None = None
    idle: float | None = None
    timeout: float = 60.0

    def checked(self) -> ReceiveOptions:
        """The options with tidy AE titles.

        Raises:
            ConfigError: `option-malformed`, `allow-list-missing`.
        """
        if not is_loopback(self.host) and not self.allow:
            raise ConfigError(
                "allow-list-missing",
                "Listening beyond this machine needs --allow AE for every AE title that may send; name the one of your PACS.",
            )
        if not 4096 <= self.max_pdu <= 1 << 24:
            raise ConfigError("option-malformed", "--max-pdu takes 4096 to 16777216 bytes.")
        if not 0 <= self.port < 65536:
            raise ConfigError("option-malformed", "--port takes 1 to 65535.")
        if (self.limit is not None and self.limit < 1) or (self.idle is not None and self.idle <= 0) or self.timeout <= 0:
            raise ConfigError("option-malformed", "--limit, --idle and --timeout take numbers above 0.")
        own = ae_title(self.ae_title, "--ae-title")
        allow = tuple(ae_title(title, "--allow") for title in self.allow)
        return ReceiveOptions(self.host, self.port, own, allow, self.max_pdu, self.limit, self.idle, self.timeout)


def receive(out: Path, options: ReceiveOptions, *, dry_run: bool = False, on_ready: Any = None) -> dict[str, Any]:
    """Listen until the limit, the idle time or an interrupt, and store what comes.

    Args:
        out: folder of the files; what is in it already counts, so that a second run goes on.
        options: see `ReceiveOptions`.
        dry_run: only check that the folder and the port can be had.
        on_ready: called with the port once peers can connect.

    Returns:
        Summary: `received`, `already` (sent twice, same bytes), `refused` (code -> number), `files` in the folder,
        `port`, `interrupted`.

    Raises:
        ConfigError, MissingDependencyError: see `ReceiveOptions.checked`.
        StorageError: `port-in-use`, or the folder cannot be used.
    """
    load("pynetdicom")
    options = options.checked()
    if dry_run:
        return _rehearse(out, options)
    with Store.opened(out) as store, listening(store, options) as port:
        if on_ready is not None:
            on_ready(port)
        interrupted = False
        try:
            _wait(store, options)
        except KeyboardInterrupt:
            interrupted = True
    return summary(store) | {"port": port, "interrupted": interrupted}


def summary(store: Store) -> dict[str, Any]:
    """Counts of a store, refusals by code."""
    refused = {code: number for code, number in sorted(store.counts.items()) if code not in (stores.RECEIVED, stores.ALREADY)}
    return {
        "received": store.counts[stores.RECEIVED],
        "already": store.counts[stores.ALREADY],
        "refused": refused,
        "files": store.number_of_files(),
    }


@contextmanager
def listening(store: Store, options: ReceiveOptions) -> Iterator[int]:
    """A storage and verification SCP in threads of its own; yields its port. Ends associations at the end of the block.

    Raises:
        StorageError: `port-in-use`, `address-unusable`.
    """
    from medaug.pacs.spool import attach

    pynetdicom, events = load("pynetdicom"), load("pynetdicom.events")

    def on_open(event: Any) -> None:
        attach(event.assoc, store, options.max_pdu, options.timeout)

    def on_close(event: Any) -> None:
        event.assoc.dimse.forget()

    with quiet():
        entity = pynetdicom.AE(ae_title=options.ae_title)
        identify(entity)
        entity.maximum_pdu_size = options.max_pdu
        entity.maximum_associations = MAX_ASSOCIATIONS
        entity.network_timeout = entity.acse_timeout = entity.dimse_timeout = options.timeout
        entity.require_called_aet = True
        entity.require_calling_aet = list(options.allow)
        entity.add_supported_context(VERIFICATION)
        syntaxes = readable_syntaxes()
        for sop_class in storage_classes():
            entity.add_supported_context(sop_class, syntaxes)
        handlers = [
            (events.EVT_CONN_OPEN, on_open),
            (events.EVT_CONN_CLOSE, on_close),
            (events.EVT_C_STORE, on_store, [store, options.limit]),
        ]
        try:
            server = entity.start_server((options.host, options.port), block=False, evt_handlers=handlers)
        except OSError as error:
            raise _unusable(error, options) from None
        server.handle_error = lambda *_: None  # socketserver prints a traceback
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            _hang_up(entity)
            entity.shutdown()


def _hang_up(entity: Any) -> None:
    """Close the connections that have no association, which pynetdicom cannot abort (PS3.8 9.2.3), and wait for their threads."""
    silent = [each for each in entity.active_associations if each.dul.state_machine.current_state in WITHOUT_ASSOCIATION]
    for each in silent:
        with contextlib.suppress(OSError, AttributeError):  # closed at this moment
            each.dul.socket.socket.shutdown(socket.SHUT_RDWR)
        each.dul.to_user_queue.put(None)  # no request will come
    end = time.monotonic() + MAX_HANG_UP
    for each in silent:
        each.join(max(end - time.monotonic(), 0))


def on_store(event: Any, store: Store, limit: int | None = None) -> int:
    """Answer one C-STORE request: the status code, after the file has its name or is gone."""
    spool = event.request.DataSet
    incoming = getattr(spool, "incoming", None)
    if incoming is None:
        store.count("invalid-uid")
        return INVALID_INSTANCE
    sop_class, sop = str(event.request.AffectedSOPClassUID), str(event.request.AffectedSOPInstanceUID)
    code, status = "", SUCCESS
    if limit is not None and store.counts[stores.RECEIVED] >= limit and not store.has(sop):
        code, status = "limit-reached", OUT_OF_RESOURCES
    elif incoming.fault is None:
        try:
            head = read_head(spool.head, str(event.context.transfer_syntax))
            if (head.sop_class, head.sop) != (sop_class, sop):
                code, status = "uid-mismatch", DOES_NOT_MATCH
        except DataError as error:
            code, status = error.code, CANNOT_UNDERSTAND
    if code:
        incoming.discard()
        store.count(code)
        return status
    return _commit(store, incoming, sop)


def _commit(store: Store, incoming: stores.Incoming, sop: str) -> int:
    try:
        outcome = store.commit(incoming, sop)
    except StorageError as error:
        too_large = incoming.fault is not None and incoming.fault.errno == errno.EFBIG
        store.count("image-too-large" if too_large else error.code)
        return OUT_OF_RESOURCES
    store.count("sop-conflict" if outcome == stores.CONFLICT else outcome)
    return CONFLICT if outcome == stores.CONFLICT else SUCCESS


def _wait(store: Store, options: ReceiveOptions) -> None:
    last = time.monotonic()
    while options.limit is None or store.counts[stores.RECEIVED] < options.limit:
        if store.changed.wait(0.2):
            store.changed.clear()
            last = time.monotonic()
        elif options.idle is not None and time.monotonic() - last >= options.idle:
            return
    time.sleep(0.5)  # let the peer of the last file take its answer and release


def _rehearse(out: Path, options: ReceiveOptions) -> dict[str, Any]:
    """Check the folder and the port without leaving anything behind."""
    import os

    parent = next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise StorageError("not-writable", "The output folder cannot be written; choose one you may write to.")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.host, options.port))
            port = probe.getsockname()[1]
    except OSError as error:
        raise _unusable(error, options) from None
    return {
        "dry_run": True,
        "host": options.host,
        "port": port,
        "ae_title": options.ae_title,
        "allow": list(options.allow),
        "sop_classes": len(storage_classes()),
        "transfer_syntaxes": readable_syntaxes(),
        "files": Store(out).number_of_files(),
    }


def _unusable(error: OSError, options: ReceiveOptions) -> StorageError:
    if error.errno == errno.EADDRINUSE:
        return StorageError("port-in-use", f"Port {options.port} is taken by another process; choose another --port.")
    return StorageError(
        "address-unusable", f"Listening on {options.host} port {options.port} is not possible ({error.strerror or error})."
    )
