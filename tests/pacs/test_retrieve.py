"""Retrieving from a real Orthanc by C-GET, C-MOVE and DICOMweb: the right images, once, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orthanc import Orthanc, free_port, medaug
from pacs_files import PLANTED, image, save, sop_uid, sops_in
from pydicom import dcmread
from pydicom.uid import JPEGLSLossless

from medaug.cli.pacs import table_keys
from medaug.errors import ConfigError, DataError, MedaugError, StorageError
from medaug.pacs.peers import DicomPeer, Patience, WebPeer
from medaug.pacs.query import Query, Row, Series, make_plan, parse_queries
from medaug.pacs.retrieve import Destination, retrieve
from medaug.pacs.store import Store

QUICK = Patience(timeout=10, retries=1, delay=0.05)
PATIENT_2 = sorted(sop_uid(2, series, number) for series in (1, 2) for number in range(1, 5))


def accession(*patients: int) -> list[Query]:
    return parse_queries("study", [], "accession", [(number, f"PLANTEDACC{number}") for number in patients])


def peer_of(pacs: Orthanc, way: str) -> DicomPeer | WebPeer:
    return WebPeer.parse(pacs.web, {}) if way == "web" else DicomPeer("127.0.0.1", pacs.port, "ORTHANC", "MEDAUG")


def fetch(pacs: Orthanc, way: str, out: Path, queries: list[Query], port: int = 0, **options: Any) -> dict[str, Any]:
    options = {"patience": QUICK, **options}
    if way == "move":
        options |= {"method": "move", "destination": Destination(port=port)}
    return retrieve(peer_of(pacs, way), out, queries, **options)


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "move", "web"])
def test_study_by_accession_number(tmp_path: Path, pacs: Orthanc, move_port: int, way: str) -> None:
    result = fetch(pacs, way, tmp_path / "out", accession(2), move_port)
    assert sops_in(tmp_path / "out") == PATIENT_2
    assert {key: result[key] for key in ("studies", "series", "images", "received", "missing", "refused")} == {
        **{"studies": 1, "series": 2, "images": 8, "received": 8},
        **{"missing": 0, "refused": {}},
    }
    for series, number in ((1, 1), (2, 4)):
        written = dcmread(Store(tmp_path / "out").path_of(sop_uid(2, series, number)))
        assert written.PixelData == image(2, series, number).PixelData
        assert written.PatientID == "PLANTEDID2"
    state = json.loads((tmp_path / "out" / ".medaug" / "retrieve.json").read_text())
    assert state["complete"] is True and [row["missing"] for row in state["series"]] == [0, 0]


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "web"])
@pytest.mark.parametrize("condition", ["PatientID=PLANTEDID*", "PatientName=PLANTEDNAME*"])
def test_a_wildcard_finds_every_study(tmp_path: Path, pacs: Orthanc, way: str, condition: str) -> None:
    result = fetch(pacs, way, tmp_path / "out", parse_queries("study", [condition], "", []), dry_run=True)
    assert (result["studies"], result["images"]) == (3, 24)


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "move", "web"])
def test_second_run_fetches_only_what_is_missing(tmp_path: Path, pacs: Orthanc, move_port: int, way: str) -> None:
    out = tmp_path / "out"
    fetch(pacs, way, out, accession(2), move_port)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.dcm")}
    for number in (2, 3):
        path = Store(out).path_of(sop_uid(2, 1, number))
        path.unlink()
        del kept[path]
    result = fetch(pacs, way, out, accession(2), move_port)
    assert (result["present"], result["received"], result["already"]) == (6, 2, 0)
    assert sops_in(out) == PATIENT_2
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert fetch(pacs, way, out, accession(2), move_port)["received"] == 0


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "move", "web"])
def test_compressed_images_come_as_the_archive_holds_them(tmp_path: Path, way: str) -> None:
    port, plain, packed = free_port(), image(number=1), image(number=2)
    pixels = packed.pixel_array.copy()
    packed.compress(JPEGLSLossless)
    with Orthanc(tmp_path / "server", {"medaug": ("MEDAUG", port)}) as server:
        for name, dataset in (("plain", plain), ("packed", packed)):
            save(dataset, tmp_path / "files" / f"{name}.dcm")
        server.upload(tmp_path / "files")
        fetch(server, way, tmp_path / "out", accession(1), port)
    written = dcmread(Store(tmp_path / "out").path_of(packed.SOPInstanceUID))
    assert written.file_meta.TransferSyntaxUID == JPEGLSLossless
    assert (written.pixel_array == pixels).all()
    written = dcmread(Store(tmp_path / "out").path_of(plain.SOPInstanceUID))
    assert not written.file_meta.TransferSyntaxUID.is_compressed
    assert written.PixelData == plain.PixelData


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "web"])
def test_series_level_takes_only_the_series_that_match(tmp_path: Path, pacs: Orthanc, way: str) -> None:
    queries = parse_queries("series", ["PatientID=PLANTEDID1", "SeriesNumber=2"])
    result = fetch(pacs, way, tmp_path / "out", queries)
    assert result["series"] == 1
    assert sops_in(tmp_path / "out") == sorted(sop_uid(1, 2, number) for number in range(1, 5))


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "web"])
def test_dry_run_counts_and_writes_nothing(tmp_path: Path, pacs: Orthanc, way: str) -> None:
    result = fetch(pacs, way, tmp_path / "out", parse_queries("study", ["StudyDate=20200101-20200103"]), dry_run=True)
    assert (result["studies"], result["series"], result["images"], result["present"]) == (3, 6, 24, 0)
    assert result["uids"]["2.25.7.1.1"] == {"2.25.7.1.1.1": 4, "2.25.7.1.1.2": 4}
    assert not (tmp_path / "out").exists()
    assert not any(word in json.dumps(result) for word in PLANTED)


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "web"])
def test_rows_without_a_match_are_named_by_number(tmp_path: Path, pacs: Orthanc, way: str) -> None:
    queries = parse_queries("study", [], "patient", [(1, "PLANTEDID1"), (2, "NOBODY"), (3, "PLANTEDID"), (4, "PLANTEDID1")])
    result = fetch(pacs, way, tmp_path / "out", queries)
    assert (result["studies"], result["unmatched_rows"]) == (1, [2, 3])


@pytest.mark.integration
def test_command_with_a_table_says_nothing_of_patients(tmp_path: Path, pacs: Orthanc) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("Accession Number;Grade\nPLANTEDACC1;2\nPLANTEDACC3;0\nPLANTEDACC99;1\n", encoding="utf-8-sig")
    out = tmp_path / "out"
    loud = "import logging; logging.basicConfig(level=1); from pynetdicom import debug_logger; debug_logger()"
    (tmp_path / "sitecustomize.py").write_text(loud)  # every logger as loud as it gets
    for way in (["--pacs", pacs.address, "--called", "ORTHANC"], ["--dicomweb", pacs.web]):
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["retrieve", "--out", str(out), *way, "--table", str(table), "--key", "accession", "--json"]
        with medaug(*arguments, environment={"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "always"}) as process:
            stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        result = json.loads(stdout)
        assert (result["received"], result["unmatched_rows"]) == (16, [3])
        seen = stdout + stderr + " ".join(str(path) for path in out.rglob("*"))
        seen += "".join(path.read_text(errors="replace") for path in out.rglob("*.json*"))
        for word in (*PLANTED, "19300405", "20200102"):
            assert word not in seen


@pytest.mark.integration
@pytest.mark.parametrize(("called", "calling", "text"), [("WRONG", "MEDAUG", "--called"), ("ORTHANC", "STRANGER", "")])
def test_unknown_ae_titles_end_in_one_sentence(tmp_path: Path, pacs: Orthanc, called: str, calling: str, text: str) -> None:
    peer = DicomPeer("127.0.0.1", pacs.port, called, calling)
    with pytest.raises(MedaugError) as error:
        retrieve(peer, tmp_path / "out", accession(1), patience=Patience(5, 0, 0.01))
    assert error.value.code in ("pacs-rejected", "service-unsupported", "query-failed", "pacs-lost")
    assert text in error.value.message


@pytest.mark.integration
def test_move_to_an_unregistered_destination_is_refused(tmp_path: Path) -> None:
    settings = {"DicomAlwaysAllowFind": True, "DicomAlwaysAllowMove": True}
    with Orthanc(tmp_path / "server", {}, **settings) as server:
        save(image(), tmp_path / "files" / "1.dcm")
        server.upload(tmp_path / "files")
        with pytest.raises(MedaugError) as error:
            fetch(server, "move", tmp_path / "out", accession(1), free_port())
    assert error.value.code in ("move-destination-unknown", "retrieve-incomplete")


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "move", "web"])
def test_archive_killed_in_mid_transfer_and_started_again(tmp_path: Path, way: str) -> None:
    port, out, images = free_port(), tmp_path / "out", 60
    with Orthanc(tmp_path / "server", {"medaug": ("MEDAUG", port)}) as server:
        for number in range(1, images + 1):
            save(image(number=number, size=256), tmp_path / "files" / f"{number}.dcm")
        server.upload(tmp_path / "files")
        killed = threading.Event()

        def kill_then_restart() -> None:
            while len(list(out.glob("??/*.dcm"))) < 5:
                time.sleep(0.002)
            server.kill()
            killed.set()
            time.sleep(0.5)
            server.start()

        saboteur = threading.Thread(target=kill_then_restart)
        saboteur.start()
        result = fetch(server, way, out, accession(1), port, patience=Patience(timeout=5, retries=6, delay=0.3))
        saboteur.join(20)
        assert killed.is_set()
    assert result["missing"] == 0 and result["files"] == images
    assert len(sops_in(out)) == len(set(sops_in(out))) == images


@pytest.mark.integration
def test_archive_that_stays_away_leaves_a_folder_to_go_on_with(tmp_path: Path) -> None:
    out, images = tmp_path / "out", 60
    with Orthanc(tmp_path / "server", {"medaug": ("MEDAUG", free_port())}) as server:
        for number in range(1, images + 1):
            save(image(number=number, size=256), tmp_path / "files" / f"{number}.dcm")
        server.upload(tmp_path / "files")

        def kill() -> None:
            while len(list(out.glob("??/*.dcm"))) < 5:
                time.sleep(0.002)
            server.kill()

        saboteur = threading.Thread(target=kill)
        saboteur.start()
        with pytest.raises(StorageError, match="retrieve-incomplete"):
            fetch(server, "get", out, accession(1))
        saboteur.join(10)
        assert json.loads((out / ".medaug" / "retrieve.json").read_text())["complete"] is False
        kept = len(sops_in(out))
        assert 5 <= kept < images
        server.start()
        result = fetch(server, "get", out, accession(1))
        assert (result["present"], result["received"], result["missing"]) == (kept, images - kept, 0)


@pytest.mark.integration
@pytest.mark.parametrize("way", ["get", "move", "web"])
def test_full_disk_ends_with_its_own_code(small_disk: Path, tmp_path: Path, way: str) -> None:
    port = free_port()
    with Orthanc(tmp_path / "server", {"medaug": ("MEDAUG", port)}) as server:
        for number in range(1, 13):
            save(image(number=number, size=256), tmp_path / "files" / f"{number}.dcm")  # 128 KB each
        server.upload(tmp_path / "files")
        with pytest.raises(StorageError) as error:
            fetch(server, way, small_disk / "out", accession(1), port)
    assert error.value.code == "disk-full"
    assert 1 <= len(sops_in(small_disk / "out")) < 12


@pytest.mark.integration
def test_password_and_refusal_without_it(tmp_path: Path) -> None:
    with Orthanc(tmp_path / "server", users={"user": "SECRETWORD"}) as server:
        save(image(), tmp_path / "files" / "1.dcm")
        server.upload(tmp_path / "files")
        good = WebPeer.parse(server.web, {"MEDAUG_DICOMWEB_USER": "user", "MEDAUG_DICOMWEB_PASSWORD": "SECRETWORD"})
        assert "SECRETWORD" not in repr(good)
        assert retrieve(good, tmp_path / "out", accession(1), patience=QUICK)["received"] == 1
        with pytest.raises(ConfigError, match="pacs-rejected"):
            retrieve(WebPeer.parse(server.web, {}), tmp_path / "other", accession(1), patience=QUICK)


def test_nobody_there_is_said_after_the_retries(tmp_path: Path) -> None:
    for peer in (DicomPeer("127.0.0.1", free_port(), "X"), WebPeer(f"http://127.0.0.1:{free_port()}/dicom-web")):
        started = time.monotonic()
        with pytest.raises(StorageError, match="pacs-unreachable"):
            retrieve(peer, tmp_path / "out", accession(1), patience=Patience(timeout=2, retries=2, delay=0.1))
        assert time.monotonic() - started > 0.3  # 0.1 + 0.2 s of pauses


class Careless:
    """An archive that ignores the keys of a question and hands out everything."""

    def find(self, level: str, keys: Any, returned: Any) -> list[Row]:
        if level == "STUDY":
            return [{"StudyInstanceUID": f"1.{n}", "AccessionNumber": f"PLANTEDACC{n}"} for n in range(1, 100)]
        if level == "SERIES":
            return [{"SeriesInstanceUID": f"{keys['StudyInstanceUID']}.1"}]
        return [{"SOPInstanceUID": f"{keys['SeriesInstanceUID']}.1"}, {"SOPInstanceUID": "../../x"}]

    def fetch(self, series: Series, missing: Any, store: Store) -> None:
        raise AssertionError("not part of planning")


def test_answers_that_were_not_asked_for_are_dropped() -> None:
    plan = make_plan(Careless(), accession(5))
    assert [(one.study, list(one.images)) for one in plan.series] == [("1.5", ["1.5.1.1"])]
    assert plan.unconfirmed == 98


@pytest.mark.parametrize(
    ("level", "words", "code"),
    [
        ("study", [], "query-too-wide"),
        ("study", ["PatientID=*"], "query-too-wide"),
        ("study", ["PatientName=??*"], "query-too-wide"),
        ("series", ["Modality=CT"], "query-too-wide"),
        ("study", ["Modality=CT"], "query-key-unknown"),
        ("study", ["PatientAge=1"], "query-key-unknown"),
        ("study", ["PatientID"], "option-malformed"),
        ("study", ["PatientID="], "option-malformed"),
        ("image", ["PatientID=1"], "option-malformed"),
    ],
)
def test_queries_are_refused(level: str, words: list[str], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        parse_queries(level, words)


@pytest.mark.parametrize(("key", "value"), [("accession", "12*"), ("patient", "P?9"), ("accession", "1\\2"), ("study", "1.2.x")])
def test_wildcards_in_a_table_are_refused_without_naming_them(key: str, value: str) -> None:
    with pytest.raises(DataError, match="key-wildcard") as error:
        parse_queries("study", [], key, [(7, value)])
    assert value not in error.value.message and "Row 7" in error.value.message


@pytest.mark.parametrize(
    ("url", "environment", "code"),
    [
        ("http://pacs.example/dicom-web", {"MEDAUG_DICOMWEB_TOKEN": "SECRET"}, "credentials-unprotected"),
        ("http://pacs.example/x", {"MEDAUG_DICOMWEB_USER": "SECRET"}, "credentials-unprotected"),
        ("https://user:SECRET@pacs.example/x", {}, "credentials-on-command-line"),
        ("ftp://pacs.example", {}, "option-malformed"),
        ("pacs.example", {}, "option-malformed"),
        ("https://[::1", {}, "option-malformed"),
    ],
)
def test_urls_are_refused_and_secrets_not_repeated(url: str, environment: dict[str, str], code: str) -> None:
    with pytest.raises(ConfigError, match=code) as error:
        WebPeer.parse(url, environment)
    assert "SECRET" not in error.value.message


@pytest.mark.parametrize("url", ["https://pacs.example/x", "http://127.0.0.1:8042/x", "http://localhost/x", "http://[::1]:80/x"])
def test_urls_that_protect_credentials_are_taken(url: str) -> None:
    assert WebPeer.parse(url, {"MEDAUG_DICOMWEB_TOKEN": "t"}).token == "t"
    assert WebPeer.parse("http://pacs.example/x", {"MEDAUG_DICOMWEB_TOKEN": "t"}, insecure=True).token == "t"


@pytest.mark.parametrize("address", ["pacs", "pacs:", ":1", "pacs:0", "pacs:70000", "pacs:x"])
def test_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="option-malformed"):
        DicomPeer.parse(address, "A", "B")


def test_table_keys_finds_the_column_and_skips_empty_cells(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("﻿Nr;Accession Number;Patient ID\n1;A1;P1\n2;;P2\n3;A3;P1\n", encoding="utf-8")
    assert table_keys(table, "accession") == [(1, "A1"), (3, "A3")]
    assert table_keys(table, "patient") == [(1, "P1"), (2, "P2"), (3, "P1")]
    assert table_keys(table, "accession", "nr") == [(1, "1"), (2, "2"), (3, "3")]
    with pytest.raises(ConfigError, match="column-missing"):
        table_keys(table, "study")


@pytest.fixture(autouse=True)
def loggers_are_put_back() -> Iterator[None]:
    before = [(logging.getLogger(name).level, logging.getLogger(name).propagate) for name in ("pynetdicom", "urllib3")]
    yield
    assert before == [(logging.getLogger(name).level, logging.getLogger(name).propagate) for name in ("pynetdicom", "urllib3")]
