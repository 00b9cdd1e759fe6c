"""An export that was sent is still an export: the journal of `medaug send` is known by name and content, nothing else is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from pydicom import dcmread

from medaug.errors import DataError, StorageError
from medaug.export.dicom import MARK
from medaug.export.manifest import FILE_NAME, header, verify_export, write
from medaug.pacs.outbox import Journal
from medaug.pacs.peers import DicomPeer, Patience
from medaug.pacs.receive import ReceiveOptions, listening, receive
from medaug.pacs.send import send
from medaug.pacs.store import Store
from medaug.storage import sha256_file


@pytest.fixture
def exported(make_files) -> Path:
    """Four synthetic images with the manifest of an export."""
    pytest.importorskip("pynetdicom")
    folder = make_files(synthetic=True)
    for path in folder.iterdir():
        dataset = dcmread(path)
        dataset.ImageType, dataset.SeriesDescription = ["DERIVED", "SECONDARY"], MARK
        dataset.save_as(path)
    rows = [
        {"path": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size, "kind": "image"}
        for path in sorted(folder.iterdir())
    ]
    settings = {"format": "dicom"}
    assert header(settings)["product"] == "medaug"
    write(folder, settings, {}, rows)
    return folder


def deliver(folder: Path, inbox: Path) -> int:
    with Store.opened(inbox) as store, listening(store, ReceiveOptions(port=0)) as port:
        return send(folder, DicomPeer("127.0.0.1", port, "MEDAUG", "MEDAUG"), patience=Patience(10, 1))["sent"]


def test_a_sent_export_verifies(exported: Path, tmp_path: Path) -> None:
    before = verify_export(exported)
    assert deliver(exported, tmp_path / "inbox") == 4
    (journal,) = (exported / ".medaug").glob("sent-*.jsonl")
    assert verify_export(exported) == before
    with journal.open("a") as stream:
        stream.write('{"sha256": "0011')  # what a crash leaves
    assert verify_export(exported) == before
    with Journal(journal) as opened:
        opened.note("0" * 64, "failed", "0xA900")
    assert verify_export(exported) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".medaug/notes.txt", b""),
        (".medaug/sent-0123456789abcdef.jsonl", b"QUORRA^ZEPHYRINE\n"),
        (".medaug/sent-0123456789abcdef.jsonl", b'{"sha256": "0", "patient": "QUORRA"}\n'),
        (".medaug/sent-0123456789abcdeX.jsonl", b""),
        (".medaug/.medaug.lock", b"x"),
        (".medaug/deep/sent-0123456789abcdef.jsonl", b""),
        ("sub/.medaug/sent-0123456789abcdef.jsonl", b""),
    ],
)
def test_what_looks_like_the_journal_is_extra(exported: Path, name: str, content: bytes) -> None:
    (exported / name).parent.mkdir(parents=True, exist_ok=True)
    (exported / name).write_bytes(content)
    with pytest.raises(DataError, match="export-file-extra"):
        verify_export(exported)


def test_a_link_is_no_journal(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (exported / ".medaug").mkdir()
    (exported / ".medaug" / "sent-0123456789abcdef.jsonl").symlink_to(tmp_path / "empty")
    with pytest.raises(DataError, match="export-file-extra"):
        verify_export(exported)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_manifest_has_its_own_code(exported: Path, damage: bytes) -> None:
    (exported / FILE_NAME).write_bytes(damage)
    with pytest.raises(DataError) as caught:
        verify_export(exported)
    assert caught.value.code in ("export-manifest-malformed", "image-empty")


def test_a_folder_that_cannot_be_made_has_a_way_out() -> None:
    pytest.importorskip("pynetdicom")
    assert threading.active_count() >= 1
    with pytest.raises(StorageError, match="choose another"):
        receive(Path("/proc/medaug-inbox"), ReceiveOptions(port=0, idle=0.1))
