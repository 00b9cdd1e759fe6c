"""Without the packages of the extra `pacs`, the commands say what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medaug.errors import MissingDependencyError
from medaug.pacs.peers import DicomPeer, WebPeer
from medaug.pacs.query import Query
from medaug.pacs.receive import ReceiveOptions, receive
from medaug.pacs.retrieve import retrieve
from medaug.pacs.send import send


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pynetdicom", "dicomweb_client"):
        monkeypatch.setitem(sys.modules, name, None)


def test_each_command_names_the_extra(tmp_path: Path) -> None:
    dicom, web = DicomPeer("127.0.0.1", 1, "A"), WebPeer("http://127.0.0.1:1/x")
    query = [Query({"PatientID": "1"})]
    calls = [lambda: receive(tmp_path / "out", ReceiveOptions())]
    calls += [lambda peer=peer: retrieve(peer, tmp_path / "out", query) for peer in (dicom, web)]  # type: ignore[misc]
    calls += [lambda peer=peer: send(tmp_path, peer) for peer in (dicom, web)]  # type: ignore[misc]
    for call in calls:
        with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[pacs\]'"):
            call()
    assert not (tmp_path / "out").exists()
