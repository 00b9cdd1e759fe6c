"""One bad file, one bad peer: the others go on, nothing is shown that should not be, and what came is for its owner only."""

from __future__ import annotations

import io
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from orthanc import Orthanc, free_port, medaug, storescu
from pacs_files import image, save
from pydicom import dcmread
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEGLSLossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage

from medaug import __implementation_uid__
from medaug.errors import StorageError
from medaug.pacs.peers import DicomPeer, Patience
from medaug.pacs.query import parse_queries
from medaug.pacs.receive import ReceiveOptions, listening, summary
from medaug.pacs.retrieve import retrieve
from medaug.pacs.send import send
from medaug.pacs.store import Store
from medaug.pacs.whole import pixel_fault

QUICK = Patience(timeout=5, retries=1, delay=0.01)
HERE = "127.0.0.1"


@contextmanager
def hanging_up(on: str) -> Iterator[tuple[DicomPeer, list[str]]]:
    """A storage SCP that aborts the association whenever it gets the instance `on`; yields it and what it has taken."""
    taken: list[str] = []

    def on_store(event: Any) -> int:
        sop = str(event.request.AffectedSOPInstanceUID)
        if sop == on:
            event.assoc.abort()
            return 0xC000
        taken.append(sop)
        return 0x0000

    entity = AE(ae_title="FRAIL")
    entity.add_supported_context(CTImageStorage)
    server = entity.start_server((HERE, 0), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)])
    try:
        yield DicomPeer(HERE, server.socket.getsockname()[1], "FRAIL"), taken
    finally:
        server.shutdown()


def test_a_file_at_which_the_pacs_hangs_up_comes_last_and_fails(make_files: Callable[..., Path]) -> None:
    files = make_files(synthetic=True, images=5)
    bad = str(image(number=1).SOPInstanceUID)  # the first in order of path
    with hanging_up(bad) as (peer, taken):
        with pytest.raises(StorageError, match=r"send-incomplete.*1 of 5 files were not taken \(pacs-lost x 1\)"):
            send(files, peer, patience=QUICK)
        assert len(taken) == 4 and bad not in taken
        save(image(number=6, synthetic=True), files / "z.dcm")
        with pytest.raises(StorageError, match="send-incomplete"):
            send(files, peer, patience=Patience(5, 0))  # not even a second try: what was in vain before is last
        assert len(taken) == 5


@pytest.mark.integration
def test_a_truncated_file_stops_no_other(tmp_path: Path, make_files: Callable[..., Path]) -> None:
    files = make_files(synthetic=True, images=4)
    first = files / "1-1-1.dcm"
    first.write_bytes(first.read_bytes()[:-1000])
    with Orthanc(tmp_path / "server", {"medaug": ("MEDAUG", free_port())}) as server:
        with pytest.raises(StorageError, match=r"1 of 4 files were not taken \(image-truncated x 1\)"):
            send(files, DicomPeer(HERE, server.port, "ORTHANC"), patience=QUICK)
        assert server.number_of_instances() == 3


@pytest.mark.parametrize("syntax", ["explicit", ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_pixels_must_be_as_long_as_the_header_says(tmp_path: Path, syntax: str) -> None:
    whole = image(size=16)
    if syntax != "explicit":
        whole.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            whole["PixelData"].VR = "OW"
            buffer = io.BytesIO()
            whole.save_as(buffer, implicit_vr=False, little_endian=False, enforce_file_format=True)
            (tmp_path / "whole").write_bytes(buffer.getvalue())
    if syntax != ExplicitVRBigEndian:
        save(whole, tmp_path / "whole")
    name, content = str(whole.file_meta.TransferSyntaxUID), (tmp_path / "whole").read_bytes()
    assert pixel_fault(tmp_path / "whole", name) == ""
    for cut, code in ((1, "image-truncated"), (512, "image-truncated"), (512 + 20, "image-truncated")):
        (tmp_path / "cut").write_bytes(content[:-cut])
        assert pixel_fault(tmp_path / "cut", name) == code


def test_a_header_that_declares_more_pixels_is_found(tmp_path: Path) -> None:
    short = image(size=16)
    short.PixelData = short.PixelData[:-2]
    save(short, tmp_path / "short")
    assert pixel_fault(tmp_path / "short", str(short.file_meta.TransferSyntaxUID)) == "image-truncated"
    short.Rows = [16, 16]
    save(short, tmp_path / "odd")
    assert pixel_fault(tmp_path / "odd", str(short.file_meta.TransferSyntaxUID)) == "pixel-format-invalid"
    packed = image(size=16)
    packed.compress(JPEGLSLossless)
    save(packed, tmp_path / "packed")
    assert pixel_fault(tmp_path / "packed", str(JPEGLSLossless)) == ""


def test_files_of_others_pass(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    for name in ("CT_small.dcm", "MR_small_bigendian.dcm", "rtplan.dcm", "SC_rgb.dcm", "color3d_jpeg_baseline.dcm", "liver.dcm"):
        path = get_testdata_file(name, download=False)
        if path is not None:
            assert pixel_fault(Path(str(path)), str(dcmread(path).file_meta.TransferSyntaxUID)) == "", name


@pytest.mark.integration
def test_a_receiver_that_ends_with_silent_connections_shows_no_traceback(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["receive", "--out", str(tmp_path / "out"), "--port", str(port), "--idle", "1", "--timeout", "20"]
    with medaug(*arguments) as process:
        assert process.stderr is not None and "Listening" in process.stderr.readline()
        silent = [socket.create_connection((HERE, port)) for _ in range(6)]
        silent[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
        silent[1].sendall(struct.pack(">BBL", 1, 0, 4) + b"PLAN")
        started = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and time.monotonic() - started < 15
    assert "Traceback" not in out + err and "Error" not in err
    for each in silent:
        each.close()


def test_threads_of_silent_connections_end_with_the_receiver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with Store.opened(tmp_path / "out") as store, listening(store, ReceiveOptions(port=0, timeout=20.0)) as port:
        silent = [socket.create_connection((HERE, port)) for _ in range(3)]
        time.sleep(0.3)
    assert not [each for each in set(threading.enumerate()) - before if type(each).__module__.startswith("pynetdicom")]
    assert "Traceback" not in capsys.readouterr().err
    for each in silent:
        each.close()


def test_a_transfer_that_breaks_off_is_counted(tmp_path: Path) -> None:
    with Store.opened(tmp_path / "out") as store, listening(store, ReceiveOptions(port=0, timeout=5.0)) as port:
        entity = AE()
        entity.add_requested_context(CTImageStorage, image().file_meta.TransferSyntaxUID)
        link = entity.associate(HERE, port, ae_title="MEDAUG")
        original, count = link.dul.socket.send, 0

        def cut(data: bytes) -> None:
            nonlocal count
            count += 1
            original(data) if count < 6 else link.dul.socket.socket.shutdown(socket.SHUT_RDWR)

        link.dul.socket.send = cut
        threading.Thread(target=link.send_c_store, args=(image(size=1024),), daemon=True).start()
        end = time.monotonic() + 10
        while not store.counts and time.monotonic() < end:
            time.sleep(0.02)
    assert summary(store)["refused"] == {"transfer-aborted": 1}
    assert not list(store.incoming.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.integration
def test_what_came_is_for_its_owner_only(tmp_path: Path, pacs: Orthanc, make_files: Callable[..., Path]) -> None:
    retrieve(DicomPeer(HERE, pacs.port, "ORTHANC"), tmp_path / "new" / "out", parse_queries("study", ["PatientID=PLANTEDID1"]))
    with Store.opened(tmp_path / "in") as store, listening(store, ReceiveOptions(port=0)) as port:
        assert storescu(port, make_files(images=1)).returncode == 0
    for folder in (tmp_path / "new" / "out", tmp_path / "in"):
        for path in (folder, *folder.rglob("*")):
            if path.name != ".medaug.lock":  # empty
                assert mode(path) == (0o700 if path.is_dir() else 0o600), path.relative_to(tmp_path)


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    (tmp_path / "out").chmod(0o750)
    with Store.opened(tmp_path / "out"):
        assert mode(tmp_path / "out") == 0o750


def test_the_journal_of_send_is_for_its_owner_only(make_files: Callable[..., Path]) -> None:
    files = make_files(synthetic=True)
    with pytest.raises(StorageError, match="pacs-unreachable"):
        send(files, DicomPeer(HERE, free_port(), "X"), patience=Patience(2, 0))
    assert mode(files / ".medaug") == 0o700


def test_one_implementation_writes_all_files(tmp_path: Path) -> None:
    from medaug.phantom import write_phantom_export

    seen = []
    with Store.opened(tmp_path / "in") as store:

        def on_open(event: Any) -> None:
            seen.append(str(event.assoc.requestor.implementation_class_uid))

        entity = AE(ae_title="OTHER")
        entity.add_supported_context(CTImageStorage)
        handlers = [(evt.EVT_ACCEPTED, on_open), (evt.EVT_C_STORE, lambda _: 0x0000)]
        server = entity.start_server((HERE, 0), block=False, evt_handlers=handlers)
        save(image(synthetic=True), tmp_path / "files" / "1.dcm")
        send(tmp_path / "files", DicomPeer(HERE, server.socket.getsockname()[1], "OTHER"), patience=QUICK)
        server.shutdown()
        with listening(store, ReceiveOptions(port=0)) as port:
            send(tmp_path / "files", DicomPeer(HERE, port, "MEDAUG"), patience=QUICK)
    write_phantom_export(tmp_path / "phantom", num_patients=1, size=32)
    phantom = next(path for path in (tmp_path / "phantom").rglob("*") if path.is_file() and path.suffix != ".csv")
    received = store.path_of(image().SOPInstanceUID)
    seen += [str(dcmread(path).file_meta.ImplementationClassUID) for path in (phantom, received)]
    assert seen == [__implementation_uid__] * 3


@pytest.mark.integration
def test_an_unknown_calling_title_is_hinted_at(tmp_path: Path, pacs: Orthanc) -> None:
    with pytest.raises(StorageError, match="pacs-lost.*--calling"):
        retrieve(
            DicomPeer(HERE, pacs.port, "ORTHANC", "STRANGER"),
            tmp_path / "out",
            parse_queries("study", ["PatientID=PLANTEDID1"]),
            patience=Patience(5, 0),
        )


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "medaug", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip()


def test_numbers_are_spelt_for_one_and_many(tmp_path: Path) -> None:
    from medaug.cli.export import _text
    from medaug.cli.pacs import _received
    from medaug.cli.stages import _short_text

    summary_of = {"storage_class": "ct", "format": "dicom", "notes": []}
    assert "1 synthetic image of 1 synthetic patient as" in _text({**summary_of, "images": 1, "patients": 1}, tmp_path)
    assert "2 synthetic images of 0 synthetic patients as" in _text({**summary_of, "images": 2, "patients": 0}, tmp_path)
    row = {"name": "0", "accepted": 1, "quota": 3}
    assert 'of class "0" passed' in _short_text({"acceptance": [row], "short": ["0"]})
    counted = {"received": 1, "already": 0, "refused": {"transfer-aborted": 2, "uid-mismatch": 1}, "files": 1}
    assert _received(counted) == "1 received, 0 sent twice, 1 refused (uid-mismatch x 1), 2 broken off; 1 files are here."
