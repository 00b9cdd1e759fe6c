"""HTTP with bounds: a request ends in time whatever the service does, and an answer is read no further than its cap."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from medaug.errors import StorageError
from medaug.pacs.association import Lost

DEADLINE_FACTOR = 5  # a request as a whole may take this many times the longest silence, `--timeout`
MAX_PAGE_BYTES = 1 << 23  # of a page of 500 answers to a query, decoded: 16 KiB for each
MAX_RECEIPT_BYTES = 1 << 20  # of the answer to a file that was stored
CHUNK = 1 << 16


class Deadline:
    """Ends the connections of a request that takes too long: timeouts alone never stop a peer that sends a byte a second.

    Attributes:
        seconds: for one request.
        expired: true from the moment on at which a running request was cut off.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expired = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the request in this block."""
        self.expired = False
        timer = threading.Timer(self.seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            with self._lock:
                for each in self._sockets:
                    each.close()
                self._sockets.clear()

    def watch(self, connected: Any) -> Any:
        """Take charge of a socket, whatever wraps it later, by a descriptor of our own; returns it."""
        with self._lock:
            self._sockets.append(socket.socket(fileno=os.dup(connected.fileno())))
        if self.expired:
            self._cut()
        return connected

    def check(self, what: str) -> None:
        """Refuse what came of a request that was cut off.

        Raises:
            Lost: `pacs-slow`.
        """
        if self.expired:
            raise Lost(
                "pacs-slow",
                f"{what} within {self.seconds:g} seconds in all, {DEADLINE_FACTOR} times --timeout; run the same command again "
                "later or with a larger one.",
            )

    def _expire(self) -> None:
        self.expired = True
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


def _pools(deadline: Deadline) -> dict[str, Any]:
    """Connection pools whose every connection the deadline watches, from before TLS on."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> Any:
            return deadline.watch(super()._new_conn())

        def request(self, *arguments: Any, **options: Any) -> None:
            if self.sock is not None:  # kept open since an earlier request
                deadline.watch(self.sock)
            super().request(*arguments, **options)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> Any:
            return deadline.watch(super()._new_conn())

        def request(self, *arguments: Any, **options: Any) -> None:
            if self.sock is not None:
                deadline.watch(self.sock)
            super().request(*arguments, **options)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class Bounded(HTTPAdapter):
    """The transport of a session: watched connections, capped answers, and the wildcard of QIDO-RS written as ``*``.

    Orthanc does not take ``%2A`` for a wildcard. An answer asked for with `stream` is left to the caller.
    """

    def __init__(self, deadline: Deadline) -> None:
        self._pools = _pools(deadline)
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """As `HTTPAdapter`, with our pools."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        """As `HTTPAdapter`, with our pools."""
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def send(self, request: Any, stream: bool = False, *arguments: Any, **options: Any) -> Any:
        """Send, and read the answer if it is wanted as a whole.

        Raises:
            StorageError: `answer-too-large`.
        """
        address, mark, query = request.url.partition("?")
        request.url = address + mark + query.replace("%2A", "*")
        answer = super().send(request, True, *arguments, **options)
        if answer.status_code >= 300 and answer.status_code != 409:  # what it says beside its status is of no use
            _set(answer, b"")
            answer.raw.close()
        elif not stream:
            _set(answer, _read(answer, MAX_PAGE_BYTES if request.method == "GET" else MAX_RECEIPT_BYTES))
        return answer


def _read(answer: Any, cap: int) -> bytes:
    data = bytearray()
    for piece in answer.iter_content(CHUNK):  # decompressed
        data += piece
        if len(data) > cap:
            answer.raw.close()
            raise StorageError(
                "answer-too-large",
                f"The DICOMweb service sent an answer of more than {cap} bytes; check the URL of --dicomweb, or narrow the query.",
            )
    return bytes(data)


def _set(answer: Any, content: bytes) -> None:
    answer._content, answer._content_consumed = content, True
