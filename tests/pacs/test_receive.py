"""The storage SCP against dcmtk's and pynetdicom's senders: whole files, once each, and an answer for every fault."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from orthanc import free_port, medaug, program, storescu
from pacs_files import PLANTED, image, save, sop_uid, sops_in
from pydicom import dcmread
from pydicom.uid import UID, CTImageStorage, DeflatedExplicitVRLittleEndian, JPEGLSLossless, MRImageStorage
from pynetdicom import AE

from medaug import storage
from medaug.errors import ConfigError, StorageError
from medaug.pacs import receive as module
from medaug.pacs.receive import ReceiveOptions, receive, summary
from medaug.pacs.store import Store

HERE = "127.0.0.1"


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[tuple[Store, int]]:
    settings = ReceiveOptions(**{"port": 0, "timeout": 5.0, **options}).checked()
    with Store.opened(folder) as store, module.listening(store, settings) as port:
        yield store, port


def send(port: int, *datasets: Any, called: str = "MEDAUG", calling: str = "TEST") -> list[int]:
    """Status codes of pynetdicom's own SCU, the data sets encoded by pydicom."""
    entity = AE(ae_title=calling)
    for pair in {(each.SOPClassUID, each.file_meta.TransferSyntaxUID) for each in datasets}:
        entity.add_requested_context(*pair)
    link = entity.associate(HERE, port, ae_title=called)
    assert link.is_established
    codes = [link.send_c_store(each).Status for each in datasets]
    link.release()
    return codes


def test_received_data_set_has_the_bytes_that_were_sent(tmp_path: Path) -> None:
    source = image(size=300)  # several PDUs
    with running(tmp_path / "out") as (store, port):
        assert send(port, source) == [0x0000]
    path = store.path_of(source.SOPInstanceUID)
    written = dcmread(path)
    assert written == source
    assert written.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
    assert path.read_bytes()[:132] == bytes(128) + b"DICM"
    assert path.stat().st_mode & 0o777 == 0o600


def test_compressed_data_set_is_stored_as_it_was_encoded(tmp_path: Path) -> None:
    source = image()
    pixels = source.pixel_array.copy()
    source.compress(JPEGLSLossless)
    with running(tmp_path / "out") as (store, port):
        assert send(port, source) == [0x0000]
    written = dcmread(store.path_of(source.SOPInstanceUID))
    assert written.file_meta.TransferSyntaxUID == JPEGLSLossless
    assert (written.pixel_array == pixels).all()


def test_deflated_data_set_is_stored(tmp_path: Path) -> None:
    source = image()
    source.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with running(tmp_path / "out") as (store, port):
        assert send(port, source) == [0x0000]
    assert dcmread(store.path_of(source.SOPInstanceUID)).PixelData == source.PixelData


def test_same_image_twice_is_one_file_and_other_bytes_are_refused(tmp_path: Path) -> None:
    first, other = image(), image()
    other.PixelData = bytes(len(first.PixelData))
    with running(tmp_path / "out") as (store, port):
        assert send(port, first, first, other) == [0x0000, 0x0000, module.CONFLICT]
        assert send(port, first) == [0x0000]
    assert dcmread(store.path_of(first.SOPInstanceUID)).PixelData == first.PixelData
    assert summary(store) == {"received": 1, "already": 2, "refused": {"sop-conflict": 1}, "files": 1}
    assert not list((tmp_path / "out").rglob("*.tmp"))


def lie(port: int, dataset: Any, sop_class: str, sop: str) -> int:
    """Status code for a C-STORE command that names other UIDs than its data set."""
    from io import BytesIO

    from pynetdicom.dimse_primitives import C_STORE
    from pynetdicom.dsutils import encode

    entity = AE(ae_title="LIAR")
    entity.add_requested_context(CTImageStorage, dataset.file_meta.TransferSyntaxUID)
    entity.add_requested_context(MRImageStorage, dataset.file_meta.TransferSyntaxUID)
    link = entity.associate(HERE, port, ae_title="MEDAUG")
    assert link.is_established
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request._affected_sop_class_uid = UID(sop_class)
    request._affected_sop_instance_uid = UID(sop)
    request.DataSet = BytesIO(encode(dataset, False, True))
    link._reactor_checkpoint.clear()
    while not link._is_paused:
        time.sleep(0.001)
    context = next(one.context_id for one in link.accepted_contexts if one.abstract_syntax == sop_class)
    link.dimse.send_msg(request, context)
    _, answer = link.dimse.get_msg(block=True)
    link._reactor_checkpoint.set()
    link.abort()
    return int(answer.Status)


def test_command_that_names_another_instance_or_class_is_refused(tmp_path: Path) -> None:
    dataset = image()
    with running(tmp_path / "out") as (store, port):
        assert lie(port, dataset, CTImageStorage, "1.2.3") == module.DOES_NOT_MATCH
        assert lie(port, dataset, MRImageStorage, dataset.SOPInstanceUID) == module.DOES_NOT_MATCH
    assert summary(store)["refused"] == {"uid-mismatch": 2}
    assert summary(store)["files"] == 0


@pytest.mark.parametrize("uid", ["../../../etc/passwd", "1.2/../../x", "1..2", "1.2.x"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_uid_that_is_none_never_becomes_a_path(tmp_path: Path, uid: str) -> None:
    dataset = image()
    dataset.SOPInstanceUID = UID(uid, validation_mode=0)
    before = sorted(tmp_path.rglob("*"))
    with running(tmp_path / "out") as (store, port):
        assert lie(port, dataset, CTImageStorage, uid) == module.INVALID_INSTANCE
    assert summary(store)["refused"] == {"invalid-uid": 1}
    assert store.number_of_files() == 0
    assert {path.parent.name for path in set(tmp_path.rglob("*")) - set(before)} <= {tmp_path.name, "out", ".medaug"}


def test_garbage_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = image()
    monkeypatch.setattr("pynetdicom.dsutils.encode", lambda *_: b"\xff" * 5000)  # what the sender puts on the wire
    with running(tmp_path / "out") as (store, port):
        code = lie(port, dataset, CTImageStorage, dataset.SOPInstanceUID)
    assert code in (module.CANNOT_UNDERSTAND, module.DOES_NOT_MATCH)
    assert store.number_of_files() == 0


@pytest.mark.parametrize(("called", "calling"), [("WRONG", "GOOD"), ("MEDAUG", "BAD")])
def test_other_ae_titles_are_rejected(tmp_path: Path, called: str, calling: str) -> None:
    with running(tmp_path / "out", allow=("GOOD",)) as (store, port):
        entity = AE(ae_title=calling)
        entity.add_requested_context(CTImageStorage)
        assert entity.associate(HERE, port, ae_title=called).is_rejected
        assert send(port, image(), calling="GOOD") == [0x0000]
    assert store.number_of_files() == 1


def test_echo_is_answered(tmp_path: Path) -> None:
    with running(tmp_path / "out") as (_, port):
        entity = AE()
        entity.add_requested_context("1.2.840.10008.1.1")
        link = entity.associate(HERE, port, ae_title="MEDAUG")
        assert link.send_c_echo().Status == 0x0000
        link.release()


def test_full_disk_is_answered_with_out_of_resources_and_leaves_no_part(small_disk: Path) -> None:
    small, large = image(number=1), image(number=2, size=1024)  # 2 MB on a disk of 1 MB
    with running(small_disk / "out") as (store, port):
        assert send(port, small, large) == [0x0000, module.OUT_OF_RESOURCES]
        assert send(port, image(number=3)) == [0x0000]  # there is room again
    assert summary(store) == {"received": 2, "already": 0, "refused": {"disk-full": 1}, "files": 2}
    assert not list(store.incoming.iterdir())


def test_sender_that_dies_in_mid_transfer_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "out", timeout=2.0) as (store, port):
        entity = AE()
        entity.add_requested_context(CTImageStorage, image().file_meta.TransferSyntaxUID)
        link = entity.associate(HERE, port, ae_title="MEDAUG")
        real = link.dul.socket.socket

        def send_half(*_: Any) -> None:
            real.shutdown(socket.SHUT_RDWR)

        count = 0
        original = link.dul.socket.send

        def cut(data: bytes) -> None:
            nonlocal count
            count += 1
            original(data) if count < 10 else send_half()

        link.dul.socket.send = cut
        sender = threading.Thread(target=link.send_c_store, args=(image(size=1024),), daemon=True)
        sender.start()
        end = time.monotonic() + 10
        while (count < 10 or list(store.incoming.iterdir())) and time.monotonic() < end:
            time.sleep(0.05)
        assert count >= 10
        assert not list(store.incoming.iterdir())
        assert send(port, image()) == [0x0000]  # the receiver lives
    assert store.number_of_files() == 1


def test_sender_that_stalls_in_the_middle_of_a_pdu_is_dropped(tmp_path: Path) -> None:
    with running(tmp_path / "out", timeout=1.0) as (store, port):
        entity = AE()
        entity.add_requested_context(CTImageStorage, image().file_meta.TransferSyntaxUID)
        link = entity.associate(HERE, port, ae_title="MEDAUG")
        link.dul.socket.socket.sendall(struct.pack(">BBL", 0x04, 0, 1000) + b"x" * 10)
        end = time.monotonic() + 8
        while not (link.is_aborted or not link.dul.is_alive()) and time.monotonic() < end:
            time.sleep(0.05)
        assert link.is_aborted or not link.dul.is_alive()
        assert send(port, image()) == [0x0000]
    assert not list(store.incoming.iterdir())


def test_oversized_pdu_ends_the_association_without_memory(tmp_path: Path) -> None:
    with running(tmp_path / "out", timeout=5.0) as (_, port), socket.create_connection((HERE, port), timeout=5) as peer:
        peer.sendall(struct.pack(">BBL", 0x04, 0, 0xFFFFFFF0) + b"x" * 1000)
        assert peer.recv(100) == b""  # closed
        assert send(port, image()) == [0x0000]


def test_limit_stops_the_receiver_and_a_second_run_goes_on(tmp_path: Path) -> None:
    results: list[dict[str, Any]] = []

    def run(limit: int, datasets: list[Any]) -> list[int]:
        codes: list[int] = []
        sender: list[threading.Thread] = []

        def on_ready(port: int) -> None:
            sender.append(threading.Thread(target=lambda: codes.extend(send(port, *datasets))))
            sender[0].start()

        results.append(receive(tmp_path / "out", ReceiveOptions(port=0, limit=limit), on_ready=on_ready))
        sender[0].join(10)
        return codes

    assert run(2, [image(number=number) for number in (1, 2)]) == [0, 0]
    assert run(1, [image(number=number) for number in (1, 2, 3)]) == [0, 0, 0]
    assert [(one["received"], one["already"], one["files"]) for one in results] == [(2, 0, 2), (1, 2, 3)]


def test_idle_time_stops_the_receiver(tmp_path: Path) -> None:
    started = time.monotonic()
    result = receive(tmp_path / "out", ReceiveOptions(port=0, idle=0.5))
    assert result["received"] == 0
    assert time.monotonic() - started < 5


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "out" / ".medaug" / "incoming" / "7.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    receive(tmp_path / "out", ReceiveOptions(port=0, idle=0.2))
    assert not left.exists()


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    result = receive(tmp_path / "out", ReceiveOptions(port=0, allow=("A",)), dry_run=True)
    assert result["dry_run"] and result["allow"] == ["A"] and result["files"] == 0
    assert not (tmp_path / "out").exists()


def test_two_receivers_in_one_folder_are_refused(tmp_path: Path) -> None:
    with storage.locked(tmp_path / "out"), pytest.raises(StorageError, match="folder-in-use"):
        receive(tmp_path / "out", ReceiveOptions(port=0, idle=0.2))


def test_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HERE, 0))
        taken.listen()
        with pytest.raises(StorageError, match="port-in-use"):
            receive(tmp_path / "out", ReceiveOptions(port=taken.getsockname()[1], idle=0.2))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"host": "0.0.0.0"}, "allow-list-missing"),
        ({"ae_title": "A" * 17}, "option-malformed"),
        ({"ae_title": "A\\B"}, "option-malformed"),
        ({"allow": ("",)}, "option-malformed"),
        ({"max_pdu": 0}, "option-malformed"),
        ({"limit": 0}, "option-malformed"),
        ({"idle": 0}, "option-malformed"),
        ({"port": 70000}, "option-malformed"),
    ],
)
def test_options_are_refused(tmp_path: Path, options: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        receive(tmp_path / "out", ReceiveOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_dcmtk_sends_twice_and_out_of_order(tmp_path: Path, make_files: Callable[..., Path]) -> None:
    files = make_files(images=6)
    wanted = sorted(sop_uid(1, 1, number) for number in range(1, 7))
    backwards = tmp_path / "backwards"
    for number in range(6, 0, -1):
        save(image(number=number), backwards / f"{10 - number}.dcm")
    with running(tmp_path / "out") as (store, port):
        for folder in (files, backwards):
            done = storescu(port, folder)
            assert done.returncode == 0, done.stderr
    assert sops_in(tmp_path / "out") == wanted
    assert summary(store) | {"refused": {}} == {"received": 6, "already": 6, "refused": {}, "files": 6}


@pytest.mark.integration
def test_dcmtk_is_told_of_wrong_titles(tmp_path: Path, make_files: Callable[..., Path]) -> None:
    files = make_files(images=1)
    with running(tmp_path / "out", allow=("GOOD",)) as (store, port):
        assert "Called AE Title Not Recognized" in storescu(port, files, called="WRONG", calling="GOOD").stderr
        assert "Calling AE Title Not Recognized" in storescu(port, files, calling="BAD").stderr
        assert storescu(port, files, calling="GOOD").returncode == 0
    assert store.number_of_files() == 1


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_stops_cleanly_at_a_signal_and_says_nothing_of_patients(
    tmp_path: Path, make_files: Callable[..., Path], number: int
) -> None:
    program("storescu")
    port = free_port()
    arguments = ["receive", "--out", str(tmp_path / "out"), "--port", str(port), "--json"]
    with medaug(*arguments, environment={"PYTHONWARNINGS": "always"}) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "Listening" in line, line
        assert storescu(port, make_files(images=3)).returncode == 0
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert (result["received"], result["interrupted"]) == (3, True)
    assert sorted(os.listdir(tmp_path / "out" / ".medaug" / "incoming")) == []
    names = " ".join(str(path) for path in (tmp_path / "out").rglob("*"))
    for word in (*PLANTED, "2.25.7", "19300405"):
        assert word not in out + err + names


@pytest.mark.integration
def test_killed_receiver_goes_on_in_a_second_run(tmp_path: Path, make_files: Callable[..., Path]) -> None:
    files, port = make_files(images=40, size=256), free_port()
    arguments = ["receive", "--out", str(tmp_path / "out"), "--port", str(port), "--json"]
    with medaug(*arguments) as process:
        assert process.stderr is not None and "Listening" in process.stderr.readline()
        sender = threading.Thread(target=storescu, args=(port, files))
        sender.start()
        while len(list((tmp_path / "out").glob("??/*.dcm"))) < 5:
            time.sleep(0.01)
        process.kill()
        sender.join()
    kept = len(sops_in(tmp_path / "out"))  # every one of them opens
    assert 5 <= kept < 40
    with running(tmp_path / "out") as (store, port):
        assert storescu(port, files).returncode == 0
    assert summary(store) == {"received": 40 - kept, "already": kept, "refused": {}, "files": 40}
