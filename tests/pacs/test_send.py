"""Sending to a real Orthanc and to dcmtk's storescp: each file once, real patients never by accident."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orthanc import Orthanc, free_port, medaug, storescp
from pacs_files import PLANTED, image, save
from pydicom import dcmread
from pydicom.uid import UID, JPEGLSLossless, generate_uid

from medaug import __implementation_uid__
from medaug.errors import ConfigError, DataError, MedaugError, StorageError
from medaug.pacs.head import IMPLEMENTATION_NAME, file_meta, read_file_head
from medaug.pacs.outbox import Journal
from medaug.pacs.peers import DicomPeer, Patience, WebPeer
from medaug.pacs.receive import ReceiveOptions, listening
from medaug.pacs.send import send
from medaug.pacs.store import Store
from medaug.pacs.web import first_part

QUICK = Patience(timeout=10, retries=1, delay=0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Orthanc]:
    with Orthanc(tmp_path / "server", {"medaug": ("MEDAUG", free_port())}) as running:
        yield running


def peer_of(pacs: Orthanc, way: str) -> DicomPeer | WebPeer:
    return WebPeer.parse(pacs.web, {}) if way == "web" else DicomPeer("127.0.0.1", pacs.port, "ORTHANC", "MEDAUG")


def held(server: Orthanc, folder: Path) -> dict[str, Any]:
    """SOP Instance UID -> data set of everything the server holds."""
    found = {}
    for identifier in server.rest("/instances"):
        path = folder / f"{identifier}.dcm"
        folder.mkdir(exist_ok=True)
        path.write_bytes(server.rest(f"/instances/{identifier}/file"))
        dataset = dcmread(path)
        found[str(dataset.SOPInstanceUID)] = dataset
    return found


@pytest.mark.integration
@pytest.mark.parametrize("way", ["store", "web"])
def test_images_arrive_as_they_are_and_only_once(
    tmp_path: Path, server: Orthanc, make_files: Callable[..., Path], way: str
) -> None:
    files = make_files(series=2, synthetic=True, size=300)
    packed = image(2, 1, 1, synthetic=True)
    packed.compress(JPEGLSLossless)
    save(packed, files / "sub folder" / "packed")  # no extension
    (files / "manifest.json").write_text("{}")
    result = send(files, peer_of(server, way), patience=QUICK)
    assert result == {"files": 9, "others": 1, "synthetic": 9, "already": 0, "sent": 9, "failed": 0, "codes": {"0x0000": 9}}
    there = held(server, tmp_path / "held")
    assert len(there) == 9
    for path in [*files.glob("*.dcm"), files / "sub folder" / "packed"]:
        source = dcmread(path)
        assert there[source.SOPInstanceUID] == source
        assert there[source.SOPInstanceUID].file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
    again = send(files, peer_of(server, way), patience=QUICK)
    assert (again["already"], again["sent"]) == (9, 0)
    save(image(5, synthetic=True), files / "new.dcm")
    assert send(files, peer_of(server, way), patience=QUICK)["sent"] == 1
    assert server.number_of_instances() == 10


@pytest.mark.integration
def test_real_images_are_refused_before_anything_is_sent(server: Orthanc, make_files: Callable[..., Path]) -> None:
    files = make_files(images=3, synthetic=True)
    save(image(2), files / "real.dcm")
    for options in ({}, {"dry_run": True}):
        with pytest.raises(DataError, match="not-synthetic") as error:
            send(files, peer_of(server, "store"), **options)
        assert "1 of 4" in error.value.message and not any(word in error.value.message for word in PLANTED)
    assert server.number_of_instances() == 0
    assert send(files, peer_of(server, "store"), allow_real=True)["sent"] == 4


@pytest.mark.integration
@pytest.mark.parametrize("way", ["store", "web"])
def test_dry_run_sends_and_writes_nothing(server: Orthanc, make_files: Callable[..., Path], way: str) -> None:
    files = make_files(synthetic=True)
    before = sorted(files.rglob("*"))
    result = send(files, peer_of(server, way), dry_run=True)
    assert (result["to_send"], result["already"]) == (4, 0)
    assert sorted(files.rglob("*")) == before and server.number_of_instances() == 0


@pytest.mark.integration
def test_dcmtk_takes_what_it_gets_in_its_own_transfer_syntax(tmp_path: Path, make_files: Callable[..., Path]) -> None:
    port = free_port()
    with storescp(tmp_path / "in", port, "+xi"):  # only implicit VR little endian: data sets are encoded anew
        assert send(make_files(synthetic=True), DicomPeer("127.0.0.1", port, "STORESCP"), patience=QUICK)["sent"] == 4
    written = [dcmread(path) for path in sorted((tmp_path / "in").iterdir())]
    assert {one.file_meta.TransferSyntaxUID.name for one in written} == {"Implicit VR Little Endian"}
    assert sorted(one.PixelData for one in written) == sorted(image(number=n).PixelData for n in range(1, 5))


@pytest.mark.integration
def test_compressed_images_that_a_peer_does_not_take_are_named_and_the_rest_goes(
    tmp_path: Path, make_files: Callable[..., Path]
) -> None:
    files, port = make_files(synthetic=True), free_port()
    packed = image(2, synthetic=True)
    packed.compress(JPEGLSLossless)
    save(packed, files / "packed.dcm")
    with storescp(tmp_path / "in", port, "+xe"), pytest.raises(StorageError, match="not-accepted x 1"):
        send(files, DicomPeer("127.0.0.1", port, "STORESCP"), patience=QUICK)
    assert len(list((tmp_path / "in").iterdir())) == 4


@pytest.mark.integration
@pytest.mark.parametrize("way", ["store", "web"])
def test_archive_killed_in_mid_transfer_and_started_again(
    server: Orthanc, make_files: Callable[..., Path], way: str, tmp_path: Path
) -> None:
    files = make_files(images=60, synthetic=True, size=256)

    def kill_then_restart() -> None:
        journals = tmp_path / "state"
        while sum(len(path.read_text().splitlines()) for path in journals.glob("*.jsonl")) < 5:
            time.sleep(0.002)
        server.kill()
        time.sleep(0.5)
        server.start()

    saboteur = threading.Thread(target=kill_then_restart)
    saboteur.start()
    patience = Patience(timeout=5, retries=6, delay=0.3)
    result = send(files, peer_of(server, way), state=tmp_path / "state", patience=patience)
    saboteur.join(20)
    assert result["sent"] == 60
    assert server.number_of_instances() >= 55  # Orthanc may lose what it had acknowledged in its last moments
    assert not (files / ".medaug").exists()


@pytest.mark.integration
def test_command_that_was_killed_goes_on(tmp_path: Path, server: Orthanc, make_files: Callable[..., Path]) -> None:
    files = make_files(images=80, synthetic=True, size=256)
    arguments = ["send", str(files), "--pacs", server.address, "--called", "ORTHANC", "--json"]
    with medaug(*arguments) as process:
        while sum(len(path.read_text().splitlines()) for path in files.glob(".medaug/*.jsonl")) < 5:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    with medaug(*arguments) as process:
        out, err = process.communicate(timeout=60)
    result = json.loads(out)
    assert process.returncode == 0 and result["already"] >= 5 and result["already"] + result["sent"] == 80
    assert server.number_of_instances() == 80
    assert not any(word in out + err for word in PLANTED)


@pytest.mark.integration
def test_full_disk_of_the_receiver_is_reported_and_a_second_run_goes_on(
    small_disk: Path, make_files: Callable[..., Path], tmp_path: Path
) -> None:
    files = make_files(images=12, synthetic=True, size=256)  # 128 KB each, on a disk of 1 MB
    with Store.opened(small_disk / "in") as store, listening(store, ReceiveOptions(port=0)) as port:
        peer = DicomPeer("127.0.0.1", port, "MEDAUG", "SENDER")
        with pytest.raises(StorageError, match="0xA700"):
            send(files, peer, patience=QUICK)
        taken = store.number_of_files()
        assert 1 <= taken < 12
        for path in (small_disk / "in").glob("??/*.dcm"):
            path.unlink()
        left = 12 - taken
        if left <= taken:
            assert send(files, peer, patience=QUICK)["sent"] == left


@pytest.mark.integration
def test_unknown_calling_title_is_refused_in_one_sentence(server: Orthanc, make_files: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="--called"):
        send(make_files(synthetic=True), DicomPeer("127.0.0.1", server.port, "WRONG"), patience=QUICK)


def test_nobody_there_is_said_after_the_retries(make_files: Callable[..., Path]) -> None:
    for peer in (DicomPeer("127.0.0.1", free_port(), "X"), WebPeer(f"http://127.0.0.1:{free_port()}/x")):
        with pytest.raises(StorageError, match="pacs-unreachable"):
            send(make_files(synthetic=True), peer, patience=Patience(timeout=2, retries=1, delay=0.05))


@pytest.mark.parametrize(("content", "code"), [(None, "folder-missing"), ({}, "no-dicom"), ({"a.txt": b"x"}, "no-dicom")])
def test_folders_are_refused(tmp_path: Path, content: dict[str, bytes] | None, code: str) -> None:
    folder = tmp_path / "PLANTEDNAME"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(MedaugError) as error:
        send(folder, DicomPeer("127.0.0.1", 1, "X"))
    assert error.value.code == code and "PLANTED" not in error.value.message


def test_truncated_file_is_refused_without_its_name(tmp_path: Path, make_files: Callable[..., Path]) -> None:
    files = make_files(synthetic=True)
    (files / "PLANTEDNAME.dcm").write_bytes(next(files.glob("*.dcm")).read_bytes()[:180])
    with pytest.raises(DataError, match="image-unreadable") as error:
        send(files, DicomPeer("127.0.0.1", 1, "X"))
    assert "PLANTED" not in error.value.message


def test_journal_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"sha256": "a", "status": "sent"}\n{"sha256": "b", "sta')
    with Journal(path) as journal:
        assert journal.status == {"a": "sent"}
        journal.note("c", "sent")
    with Journal(path) as journal:
        assert journal.status == {"a": "sent", "c": "sent"}


def test_head_of_a_file_agrees_with_pydicom(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    for name in ("CT_small.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "JPEG2000.dcm", "rtplan.dcm", "693_J2KI.dcm"):
        path = Path(str(get_testdata_file(name)))
        dataset, head = dcmread(path), read_file_head(path)
        assert (head.sop_class, head.sop) == (dataset.SOPClassUID, dataset.SOPInstanceUID)
        assert head.syntax == dataset.file_meta.TransferSyntaxUID and not head.synthetic
    marked = image(synthetic=True)
    marked.SOPInstanceUID = generate_uid()
    assert read_file_head(save(marked, tmp_path / "x.dcm")).synthetic


@pytest.mark.parametrize("sop", ["1.2", "1.23", "1." + "2" * 62])
def test_file_meta_is_what_pydicom_writes(sop: str) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_file_meta_info

    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.2"), UID(sop)
    meta.TransferSyntaxUID, meta.ImplementationClassUID = JPEGLSLossless, UID(__implementation_uid__)
    meta.ImplementationVersionName = IMPLEMENTATION_NAME
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_file_meta_info(buffer, meta)
    assert file_meta("1.2.840.10008.5.1.4.1.1.2", sop, str(JPEGLSLossless)) == bytes(128) + b"DICM" + buffer.getvalue()


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 64, 10_000])
def test_first_part_does_not_depend_on_how_the_message_is_cut(cut: int) -> None:
    content = b"DICM\r\n--bound\r\n-" + bytes(range(256)) * 3 + b"\r\n--boundar"
    message = b"--boundary\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--boundary--\r\n"
    for preface in (b"", b"ignored preface\r\n"):
        whole = preface + message
        chunks = (whole[start : start + cut] for start in range(0, len(whole), cut))
        assert b"".join(first_part(chunks, b"boundary")) == content


@pytest.mark.parametrize(("message", "code"), [(b"", "retrieve-failed"), (b"--b\r\n\r\nhalf a part", "pacs-lost")])
def test_broken_messages_are_refused(message: bytes, code: str) -> None:
    with pytest.raises(StorageError, match=code):
        list(first_part(iter([message]), b"b"))
