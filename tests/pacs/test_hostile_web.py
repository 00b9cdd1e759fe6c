"""DICOMweb services that are none, lie, send bombs, or never end: one coded sentence, in time and in little memory."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from orthanc import medaug
from pacs_files import PLANTED, image, sop_uid, sops_in
from pydicom import Dataset
from web_server import END, MULTIPART, PART, Request, archive, uid, web_server

from medaug.errors import StorageError
from medaug.pacs.peers import Patience, WebPeer
from medaug.pacs.query import parse_queries
from medaug.pacs.retrieve import retrieve
from medaug.pacs.send import send
from medaug.pacs.transport import DEADLINE_FACTOR

QUICK = Patience(timeout=5, retries=1, delay=0.01)
NEXT = b"\x08\x00\x1c\x00"  # the element after SOPInstanceUID in a synthetic image
ONE_PATIENT = ("PatientID=PLANTEDID1",)


def fetch(url: str, out: Path, patience: Patience = QUICK) -> dict[str, Any]:
    return retrieve(WebPeer(url), out, parse_queries("study", ONE_PATIENT), patience=patience)


def encoded(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def store_response(request: Request, *, xml: bool = False, stored: bool = True, named: bool = True) -> None:
    """A Store Instances Response Module for what was sent, as PS3.18 I.2 has it."""
    from pydicom import dcmread

    content = request.body.partition(b"\r\n\r\n")[2]
    head = dcmread(io.BytesIO(content), stop_before_pixels=True)
    sop = str(head.SOPInstanceUID) if named else "2.25.1"
    sequence = "00081199" if stored else "00081198"
    if xml:
        body = (
            '<?xml version="1.0" encoding="utf-8"?><NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM">'
            f'<DicomAttribute tag="{sequence}" vr="SQ"><Item number="1"><DicomAttribute tag="00081155" vr="UI">'
            f'<Value number="1">{sop}</Value></DicomAttribute><DicomAttribute tag="00081197" vr="US"><Value number="1">272</Value>'
            "</DicomAttribute></Item></DicomAttribute></NativeDicomModel>"
        )
        request.reply(body.encode(), "application/dicom+xml")
        return
    item = {"00081155": uid(sop)} | ({} if stored else {"00081197": {"vr": "US", "Value": [272]}})
    request.reply(json.dumps({sequence: {"vr": "SQ", "Value": [item]}}).encode())


NO_RESPONSES: dict[str, tuple[bytes, str]] = {
    "login page": (b"<!DOCTYPE html><html><body>PLANTEDNAME</body></html>", "text/html"),
    "well-formed page": (b"<html><body>PLANTEDNAME</body></html>", "text/html"),
    "random": (bytes(range(256)) * 10, "application/dicom+json"),
    "other json": (b'{"a": 1}', "application/dicom+json"),
    "null": (b"null", "application/dicom+json"),
    "empty": (b"", "application/dicom+json"),
    "deep": (b'{"00081199":' * 50_000, "application/dicom+json"),
    "deep xml": (b"<a>" * 100_000, "application/dicom+xml"),
    "long number": (b'{"00081199": {"Value": [' + b"9" * 6000 + b"]}}", "application/dicom+json"),
    "sequence of numbers": (b'{"00081199": {"Value": [7, null]}}', "application/dicom+json"),
    "entity": (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "application/dicom+xml"),
    "endless": (b" " * 3_000_000, "application/dicom+json"),
}


@pytest.mark.parametrize("name", NO_RESPONSES)
def test_only_a_store_response_counts_as_sent(make_files: Callable[..., Path], name: str) -> None:
    files = make_files(synthetic=True, images=2)
    answers: list[Callable[[Request], None]] = [lambda request: request.reply(*NO_RESPONSES[name])]
    with web_server(lambda request: answers[-1](request)) as url:
        with pytest.raises(StorageError) as error:
            send(files, WebPeer(url), patience=QUICK)
        assert error.value.code == ("answer-too-large" if name == "endless" else "send-failed")
        assert not any(word in error.value.message for word in PLANTED)
        answers.append(store_response)
        again = send(files, WebPeer(url), patience=QUICK)
    assert (again["already"], again["sent"]) == (0, 2)


@pytest.mark.parametrize("xml", [False, True])
def test_store_response_in_json_and_xml(make_files: Callable[..., Path], xml: bool) -> None:
    files = make_files(synthetic=True, images=2)
    with web_server(lambda request: store_response(request, xml=xml)) as url:
        assert send(files, WebPeer(url), patience=QUICK)["sent"] == 2
    for options, code in (({"stored": False}, "0x0110 x 2"), ({"named": False}, "not-confirmed x 2")):
        with (
            web_server(lambda request, options=options: store_response(request, xml=xml, **options)) as url,  # type: ignore[misc]
            pytest.raises(StorageError, match=f"send-incomplete.*{code}"),
        ):
            send(files, WebPeer(url), patience=QUICK)


def test_a_service_that_stores_nothing_is_left_after_a_few_files(make_files: Callable[..., Path]) -> None:
    seen = []

    def answer(request: Request) -> None:
        seen.append(request.path)
        request.reply(b"", status=404)

    with web_server(answer) as url, pytest.raises(StorageError, match="send-failed.*404"):
        send(make_files(synthetic=True, images=9), WebPeer(url), patience=QUICK)
    assert len(seen) == 5


def test_one_file_that_is_refused_or_breaks_the_service_stops_no_other(make_files: Callable[..., Path]) -> None:
    files = make_files(synthetic=True, images=6)

    def answer(request: Request) -> None:
        if sop_uid(1, 1, 1).encode() + NEXT in request.body:
            request.reply(b"", status=413)
        elif sop_uid(1, 1, 2).encode() + NEXT in request.body:
            request.reply(b"", status=500)
        else:
            store_response(request)

    with web_server(answer) as url, pytest.raises(StorageError, match="2 of 6") as error:
        send(files, WebPeer(url), patience=QUICK)
    assert error.value.code == "send-incomplete"
    assert "send-failed x 1" in error.value.message and "pacs-broken x 1" in error.value.message


SERIES = {f"2.25.7.1.1.{series}": [sop_uid(1, series, number) for number in (1, 2)] for series in (1, 2, 3)}


def deliver(request: Request, sop: str) -> None:
    series, number = (int(part) for part in sop.split(".")[-2:])
    request.reply(PART + encoded(image(1, series, number)) + END, MULTIPART)


@pytest.mark.parametrize("fault", ["missing", "large"])
def test_one_image_that_cannot_be_had_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr("medaug.pacs.store.MAX_FILE_BYTES", 100_000)

    def answer(request: Request, sop: str) -> None:
        if sop != SERIES["2.25.7.1.1.1"][0]:
            deliver(request, sop)
        elif fault == "missing":
            request.reply(b"", status=404)
        else:
            request.stream((PART if number == 0 else bytes(50_000) for number in range(20)), MULTIPART)

    code = "retrieve-failed" if fault == "missing" else "image-too-large"
    with (
        web_server(archive(SERIES, answer)) as url,
        pytest.raises(StorageError, match=f"retrieve-incomplete.*1 of 6.*{code} x 1"),
    ):
        fetch(url, tmp_path / "out")
    assert sops_in(tmp_path / "out") == sorted(sop for images in SERIES.values() for sop in images)[1:]
    state = json.loads((tmp_path / "out" / ".medaug" / "retrieve.json").read_text())
    assert [row["missing"] for row in state["series"]] == [1, 0, 0]


def test_one_image_that_breaks_the_service_comes_last(tmp_path: Path) -> None:
    def answer(request: Request, sop: str) -> None:
        if sop == SERIES["2.25.7.1.1.1"][0]:
            request.reply(b"", status=500)
        else:
            deliver(request, sop)

    with web_server(archive(SERIES, answer)) as url, pytest.raises(StorageError, match="retrieve-incomplete.*1 of 6"):
        fetch(url, tmp_path / "out")
    assert len(sops_in(tmp_path / "out")) == 5


STUDY = {"vr": "UI"}
NO_ANSWERS: dict[str, bytes] = {
    "null": b"null",
    "number": b"7",
    "text": b'"PLANTEDNAME"',
    "list of other things": b"[1, 2, null]",
    "value null": json.dumps([{"0020000D": STUDY | {"Value": None}}]).encode(),
    "value number": json.dumps([{"0020000D": STUDY | {"Value": 7}}]).encode(),
    "element number": b'[{"0020000D": 7}]',
    "deep": b"[" * 200_000,
    "long number": b"[" + b"9" * 6000 + b"]",
    "no utf-8": b'["\xff\xfe"]',
    "page": b"<html>PLANTEDNAME</html>",
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_an_answer_that_is_no_dicom_json_is_refused(tmp_path: Path, name: str) -> None:
    with web_server(lambda request: request.reply(NO_ANSWERS[name])) as url, pytest.raises(StorageError) as error:
        fetch(url, tmp_path / "out")
    assert error.value.code == "query-failed"
    assert not any(word in error.value.message for word in PLANTED)


def test_an_answer_without_values_matches_nothing(tmp_path: Path) -> None:
    for body in (b"[]", b'[{"0020000D": {"vr": "UI"}}]'):
        with web_server(lambda request, body=body: request.reply(body)) as url:  # type: ignore[misc]
            assert fetch(url, tmp_path / "out")["studies"] == 0


@cache
def bomb(megabytes: int) -> tuple[bytes, ...]:
    return tuple(pieces_of_bomb(megabytes))


def pieces_of_bomb(megabytes: int) -> Iterator[bytes]:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    for _ in range(megabytes):
        yield packer.compress(b" " * (1 << 20))
    yield packer.flush()


HUGE: dict[str, Callable[[Request], None]] = {
    "plain": lambda request: request.stream(b'{"0020000D":{"vr":"UI","Value":["1.2.3"]}},' * 25_000 for _ in range(1000)),
    "gzip": lambda request: request.stream(iter(bomb(400)), Content_Encoding="gzip"),
    "gzip of a redirect": lambda request: request.reply(b"".join(bomb(400)), status=302, Location="x", Content_Encoding="gzip"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_is_refused_before_it_takes_memory(tmp_path: Path, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with web_server(HUGE[name]) as url, pytest.raises(StorageError) as error:
        fetch(url, tmp_path / "out")
    assert error.value.code == ("query-failed" if "redirect" in name else "answer-too-large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * (1024 if sys.platform != "darwin" else 1 << 20)


def drip(request: Request) -> None:
    request.stream(
        iter(lambda: time.sleep(0.1) or b" ", None), MULTIPART if "/instances/" in request.path else "application/json"
    )


def drip_in_header(request: Request) -> None:
    request.close_connection = True
    try:
        for _ in range(600):
            request.wfile.write(b"H")
            time.sleep(0.1)
    except OSError:
        pass


@pytest.mark.parametrize("answer", [drip, drip_in_header])
@pytest.mark.parametrize("what", ["query", "image", "store"])
def test_a_service_that_sends_a_byte_at_a_time_is_left_in_time(
    tmp_path: Path, make_files: Callable[..., Path], what: str, answer: Callable[[Request], None]
) -> None:
    patience = Patience(timeout=0.3, retries=0)
    files = make_files(synthetic=True, images=1)
    first = next(iter(SERIES))
    slow = archive({first: SERIES[first][:1]}, lambda request, _: answer(request)) if what == "image" else answer
    started = time.monotonic()
    with web_server(slow) as url, pytest.raises(StorageError, match=r"1\.5 seconds in all, 5 times --timeout") as error:
        if what == "store":
            send(files, WebPeer(url), patience=patience)
        else:
            fetch(url, tmp_path / "out", patience)
    assert error.value.code == {"query": "pacs-slow", "image": "retrieve-incomplete", "store": "send-incomplete"}[what]
    assert time.monotonic() - started < 0.3 * DEADLINE_FACTOR + 2
    assert not sops_in(tmp_path / "out")


def test_a_connection_kept_open_has_a_deadline_for_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images come through one connection, in more time than one request may take."""

    def answer(request: Request, sop: str) -> None:
        time.sleep(0.25)
        deliver(request, sop)

    monkeypatch.setattr("medaug.pacs.transport.DEADLINE_FACTOR", 1)
    with web_server(archive(SERIES, answer)) as url:
        assert fetch(url, tmp_path / "out", Patience(timeout=1.0, retries=0))["received"] == 6


@pytest.mark.parametrize("cut", ["header", "body"])
def test_an_image_cut_by_the_deadline_is_not_stored(tmp_path: Path, cut: str) -> None:
    """An answer without a length ends where the connection does, and so would one that was cut."""
    content = encoded(image(1, 1, 1))

    def answer(request: Request, _: str) -> None:
        start = 200 if cut == "header" else len(content) - 50
        request.stream(
            (content[:start] if number == 0 else time.sleep(0.1) or b"\0" for number in range(100)), "application/dicom"
        )

    first = next(iter(SERIES))
    with web_server(archive({first: SERIES[first][:1]}, answer)) as url, pytest.raises(StorageError, match="retrieve-incomplete"):
        fetch(url, tmp_path / "out", Patience(timeout=0.2, retries=0))
    assert not sops_in(tmp_path / "out")


@pytest.mark.integration
def test_command_has_no_traceback_for_hostile_answers(tmp_path: Path) -> None:
    for body in (NO_ANSWERS["deep"], NO_ANSWERS["null"]):
        with web_server(lambda request, body=body: request.reply(body)) as url:  # type: ignore[misc]
            arguments = ["retrieve", "--dicomweb", url, "--query", *ONE_PATIENT, "--out", str(tmp_path / "out")]
            with medaug(*arguments, environment={**os.environ}) as process:
                out, err = process.communicate(timeout=60)
        assert process.returncode == 5 and "[query-failed]" in err
        assert "Traceback" not in out + err and not any(word in out + err for word in PLANTED)
