"""An archive over DICOMweb (PS3.18): QIDO-RS to find, WADO-RS to fetch, STOW-RS to store.

dicomweb-client asks the questions; images are streamed here, between socket and disk, in the bytes that the server sent.
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from medaug.errors import ConfigError, DataError, StorageError
from medaug.io.limits import MAX_FILE_BYTES
from medaug.pacs import store as stores
from medaug.pacs import stow
from medaug.pacs.archive import MAX_ANSWERS
from medaug.pacs.association import Lost, Refused
from medaug.pacs.head import PREAMBLE, read_file_head
from medaug.pacs.peers import WebPeer
from medaug.pacs.query import Row, Series
from medaug.pacs.quiet import load
from medaug.pacs.store import Incoming, Store

PAGE = 500  # answers asked for at a time
CHUNK = 1 << 18
QUERY = "The DICOMweb service did not answer a query"
IMAGE = "The DICOMweb service did not deliver an image"
FILE = "The DICOMweb service did not take an image"
MAX_PART_HEADER = 1 << 14
BOUNDARY = "medaug-5f1f4d0f2b7e4d6c9c3b"
BUSY = (408, 425, 429, 503)
BROKEN = (500, 502, 504)  # perhaps by what was asked of it


class WebArchive:
    """A DICOMweb service as a context manager, with one connection kept open."""

    def __init__(self, peer: WebPeer, timeout: float) -> None:
        requests = load("requests")
        from medaug.pacs import transport

        self.peer = peer
        self.timeout = timeout
        self.deadline = transport.Deadline(timeout * transport.DEADLINE_FACTOR)
        self._losses: Counter[str] = Counter()
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, transport.Bounded(self.deadline))
        self.session.auth = _authenticate(peer)
        self.client = load("dicomweb_client").DICOMwebClient(peer.url, session=self.session, timeout=timeout)
        self.client.set_http_retry_params(retry=False)  # the caller is patient, not the client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.session.close()

    def find(self, level: str, keys: Mapping[str, str], returned: Sequence[str]) -> list[Row]:
        """QIDO-RS in pages; see `query.Archive`.

        Raises:
            StorageError: `Lost`, `query-failed`, `answer-too-large`, `query-too-wide`.  ConfigError: `pacs-rejected`.
        """
        study, series = keys.get("StudyInstanceUID"), keys.get("SeriesInstanceUID")
        if level == "STUDY":
            search, unique = self.client.search_for_studies, "StudyInstanceUID"
            filters = dict(keys)
            parents: tuple[str, ...] = ()
        elif level == "SERIES":
            search, unique, parents = self.client.search_for_series, "SeriesInstanceUID", (str(study),)
            filters = {name: value for name, value in keys.items() if name != "StudyInstanceUID"}
        else:
            search, unique, parents = self.client.search_for_instances, "SOPInstanceUID", (str(study), str(series))
            filters = {}
        fields = [name for name in (*keys, *returned) if name not in ("StudyInstanceUID",) or level == "STUDY"]
        rows: list[Row] = []
        seen: set[str] = set()
        while True:
            with self._request("query-failed", QUERY), _dicom_json():
                page = search(*parents, fields=fields, search_filters=filters, limit=PAGE, offset=len(rows))
                found = [{name: _value(answer, name) for name in (*keys, *returned)} for answer in page]
            new = [row for row in found if row[unique] not in seen]
            seen.update(row[unique] for row in new)
            rows += new
            if len(rows) > MAX_ANSWERS:
                raise StorageError("query-too-wide", f"The PACS has more than {MAX_ANSWERS} answers; narrow the query.")
            if not new or len(found) < PAGE:  # a server that ignores `offset` sends the same page again
                return rows

    def fetch(self, series: Series, missing: Sequence[str], store: Store) -> None:
        """WADO-RS, image by image; one that is not delivered is counted, and one at which the connection was lost comes last.

        Raises:
            Refused: some were not delivered, all others have been tried.
            StorageError: `Lost` or a fault of the disk.  ConfigError: `pacs-rejected`.
        """
        refused: Refused | None = None
        for sop in sorted(missing, key=lambda sop: self._losses[sop]):
            try:
                self._fetch_one(series, sop, store)
            except Lost:
                self._losses[sop] += 1
                raise
            except Refused as error:
                store.count(error.code)
                refused = error
        if refused is not None:
            raise refused

    def _fetch_one(self, series: Series, sop: str, store: Store) -> None:
        url = f"{self.peer.url}/studies/{series.study}/series/{series.series}/instances/{sop}"
        headers = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
        with (
            self._request("retrieve-failed", IMAGE),
            self.session.get(url, headers=headers, stream=True, timeout=self.timeout) as answer,
        ):
            answer.raise_for_status()
            _keep(_image_bytes(answer, self._chunks(answer)), sop, store)

    def _chunks(self, answer: Any) -> Iterator[bytes]:
        """The content of an answer; one that the deadline has cut is no whole one."""
        yield from answer.iter_content(CHUNK)
        self.deadline.check(IMAGE)

    def store(self, path: Path, sop: str) -> tuple[str, str]:
        """STOW-RS of one file.

        Args:
            path: the file.
            sop: its SOP Instance UID, by which the answer must name it.

        Returns:
            ("sent", "") or ("failed", code).

        Raises:
            Lost: the service is away or overloaded.  ConfigError: `pacs-rejected`.
            Refused: `send-failed`, `answer-too-large`: the service says nothing of the file.
        """
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={BOUNDARY}',
            "Accept": "application/dicom+json",
        }
        with open(path, "rb") as stream, self._request("send-failed", FILE):
            body = _Body(stream, path.stat().st_size)
            answer = self.session.post(f"{self.peer.url}/studies", data=body, headers=headers, timeout=self.timeout)
            if answer.status_code not in (200, 202, 409):
                answer.raise_for_status()
                raise Refused("send-failed", f"{FILE} (HTTP {answer.status_code}); check the URL given with --dicomweb.")
        return stow.outcome(answer.content, answer.status_code, sop)

    @contextlib.contextmanager
    def _request(self, code: str, what: str) -> Iterator[None]:
        """One request: faults as coded errors, and no more time than the deadline leaves."""
        with self.deadline.running():
            try:
                with _http(code, what):
                    yield
            except StorageError:
                self.deadline.check(what)
                raise
            self.deadline.check(what)


def _authenticate(peer: WebPeer) -> Any:
    """What adds the credentials; a function also keeps `requests` from taking others out of ~/.netrc."""

    def add(request: Any) -> Any:
        if peer.token:
            request.headers["Authorization"] = f"Bearer {peer.token}"
        elif peer.user:
            load("requests.auth").HTTPBasicAuth(peer.user, peer.password)(request)
        return request

    return add


@contextlib.contextmanager
def _http(code: str, what: str) -> Iterator[None]:
    """Turn what `requests` raises into coded errors; its own texts hold URLs, and URLs hold identifiers."""
    requests = load("requests")
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ConfigError(
                "pacs-rejected",
                f"The DICOMweb service refused the credentials (HTTP {status}); set MEDAUG_DICOMWEB_TOKEN, or "
                "MEDAUG_DICOMWEB_USER and MEDAUG_DICOMWEB_PASSWORD.",
            ) from None
        if status in BUSY + BROKEN:
            kind = "pacs-busy" if status in BUSY else "pacs-broken"
            raise Lost(kind, f"{what} (HTTP {status}); run the same command again later.") from None
        if status == 404:
            raise Refused(code, f"{what} (HTTP 404); check the URL given with --dicomweb.") from None
        raise Refused(code, f"{what} (HTTP {status}).") from None
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        raise ConfigError(
            "pacs-unreachable",
            f"{what}: no trusted connection ({type(error).__name__}); name the hospital's certificates in REQUESTS_CA_BUNDLE.",
        ) from None
    except (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError) as error:
        if _never_reached(error):
            raise Lost("pacs-unreachable", f"{what} ({type(error).__name__}); check that it is up.") from None
        raise Lost("pacs-lost", f"{what} ({type(error).__name__}); run the same command again to go on.") from None
    except requests.exceptions.ChunkedEncodingError:
        raise Lost("pacs-lost", f"{what} to the end; run the same command again to go on.") from None
    except requests.RequestException as error:
        raise Refused(code, f"{what} ({type(error).__name__}); check the URL given with --dicomweb.") from None


def _never_reached(error: Exception) -> bool:
    """True if there was no connection to lose."""
    failures = load("urllib3.exceptions")
    requests = load("requests")
    reason = getattr(error.args[0], "reason", None) if error.args else None
    refused = isinstance(reason, failures.NewConnectionError)
    return refused or isinstance(error, (requests.ConnectTimeout, requests.exceptions.ProxyError))


@contextlib.contextmanager
def _dicom_json() -> Iterator[None]:
    """Refuse an answer that is no DICOM JSON, whatever its depth and numbers do to a reader."""
    requests = load("requests")
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        if isinstance(error, requests.RequestException) and not isinstance(error, requests.exceptions.JSONDecodeError):
            raise
        raise StorageError("query-failed", f"{QUERY} in DICOM JSON; check the URL given with --dicomweb.") from None


def _value(answer: Mapping[str, Any], name: str) -> str:
    """A value of a DICOM JSON answer (PS3.18 F.2) as text.

    Raises:
        TypeError: the answer has another form.
    """
    from pydicom.datadict import tag_for_keyword

    element = answer.get(f"{tag_for_keyword(name):08X}", {})
    values = element.get("Value", [])
    if not isinstance(values, list):
        raise TypeError("a list of values was expected")
    texts = [str(value.get("Alphabetic", "")) if isinstance(value, dict) else str(value) for value in values]
    return "\\".join(texts)


def _image_bytes(answer: Any, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The DICOM file of a WADO-RS answer: the first part of a multipart message (RFC 2387), or a plain one."""
    from email.message import Message

    header = Message()
    header["Content-Type"] = answer.headers.get("Content-Type", "")
    if header.get_content_type() == "application/dicom":
        return chunks
    boundary = header.get_param("boundary")
    if header.get_content_maintype() != "multipart" or not isinstance(boundary, str):
        raise Refused("retrieve-failed", "The DICOMweb service sent something else than DICOM; check the URL of --dicomweb.")
    return first_part(chunks, boundary.encode())


def first_part(chunks: Iterator[bytes], boundary: bytes) -> Iterator[bytes]:
    """The content of the first part of a multipart message, in pieces, however the message is cut into chunks.

    Raises:
        Lost: the message ends before the part does.
        Refused: `retrieve-failed`: no part, or a part header without end.
    """
    delimiter = b"\r\n--" + boundary
    data = b"\r\n"  # so that the first delimiter is like the others
    inside = False
    for chunk in chunks:
        data += chunk
        if not inside:
            start = data.find(delimiter)
            end = data.find(b"\r\n\r\n", start + len(delimiter)) if start >= 0 else -1
            if end < 0:
                if len(data) > MAX_PART_HEADER + CHUNK:
                    break
                continue
            data, inside = data[end + 4 :], True
        stop = data.find(delimiter)
        if stop >= 0:
            yield data[:stop]
            return
        keep = len(delimiter) - 1  # a delimiter may be cut
        if len(data) > keep:
            yield data[:-keep]
            data = data[-keep:]
    if inside:
        raise Lost("pacs-lost", "The DICOMweb service went away in mid-transfer; run the same command again to go on.")
    raise Refused("retrieve-failed", "The DICOMweb service sent a multipart message without a DICOM part.")


def _keep(pieces: Iterator[bytes], sop: str, store: Store) -> None:
    """Write a file with its preamble zeroed, check that it is the image asked for, and give it its name."""
    incoming = Incoming(store)
    try:
        head = b""
        for piece in pieces:
            if len(head) < len(PREAMBLE):
                head += piece
                if len(head) >= len(PREAMBLE):
                    incoming.write(PREAMBLE + head[len(PREAMBLE) :])
            else:
                incoming.write(piece)
            if incoming.fault is not None:
                break
        incoming.finish()
        if incoming.fault is not None and incoming.fault.errno == errno.EFBIG:
            raise Refused("image-too-large", f"The DICOMweb service sent an image of more than {MAX_FILE_BYTES} bytes.")
        store.fault = incoming.fault
        if incoming.fault is None:
            if head[128 : len(PREAMBLE)] != b"DICM" or read_file_head(incoming.path).sop != sop:
                store.count("uid-mismatch")
                return
            outcome = store.commit(incoming, sop)
            store.count("sop-conflict" if outcome == stores.CONFLICT else outcome)
    except DataError as error:
        store.count(error.code)
    finally:
        incoming.discard()
    store.raise_fault()


class _Body(io.RawIOBase):
    """A multipart message with one file, read in pieces; its length is known, so that servers without chunked uploads do."""

    def __init__(self, stream: Any, size: int) -> None:
        head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"\r\n--{BOUNDARY}--\r\n".encode()
        self._parts = [io.BytesIO(head), stream, io.BytesIO(tail)]
        self._length = len(head) + size + len(tail)
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def tell(self) -> int:
        """How much was read; without it `requests` does not believe the length and sends in chunks."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next piece."""
        while self._parts:
            data = self._parts[0].read(min(size, CHUNK) if size >= 0 else CHUNK)
            if data:
                self._position += len(data)
                return bytes(data)
            self._parts.pop(0)
        return b""
