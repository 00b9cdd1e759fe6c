"""A DICOMweb service on loopback whose every answer a test writes itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydicom.uid import CTImageStorage

JSON = "application/dicom+json"
MULTIPART = 'multipart/related; type="application/dicom"; boundary=b'
PART = b"--b\r\nContent-Type: application/dicom\r\n\r\n"
END = b"\r\n--b--\r\n"


class Request(BaseHTTPRequestHandler):
    """One request; `answer` of the server writes the response."""

    protocol_version = "HTTP/1.1"
    body = b""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.answer(self)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def reply(self, body: bytes, kind: str = JSON, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, pieces: Iterator[bytes], kind: str = JSON, **headers: str) -> None:
        """Without a length, until the client has gone."""
        self.close_connection = True
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(piece)
        except OSError:
            pass


@contextmanager
def web_server(answer: Callable[[Request], None]) -> Iterator[str]:
    """Yields the base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.daemon_threads = True
    server.answer = answer  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/dicom-web"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def uid(value: str) -> dict[str, Any]:
    return {"vr": "UI", "Value": [value]}


def archive(images: dict[str, list[str]], deliver: Callable[[Request, str], None]) -> Callable[[Request], None]:
    """A study 2.25.7.1.1 of PLANTEDID1 with these series and images; `deliver` answers for one image."""
    study = {"0020000D": uid("2.25.7.1.1"), "00100020": {"vr": "LO", "Value": ["PLANTEDID1"]}}

    def answer(request: Request) -> None:
        parts = request.path.partition("?")[0].strip("/").split("/")
        rows: list[dict[str, Any]] = []
        if "instances" in parts and parts[-1] != "instances":
            deliver(request, parts[-1])
            return
        if parts[-1] == "instances":
            for sop in images[parts[parts.index("series") + 1]]:
                rows.append({"00080018": uid(sop), "00080016": uid(str(CTImageStorage))})
        elif parts[-1] == "series":
            rows = [{"0020000E": uid(series)} for series in images]
        else:
            rows = [study]
        request.reply(json.dumps(rows).encode())

    return answer
