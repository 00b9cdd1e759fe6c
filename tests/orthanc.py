"""Real peers for tests: Orthanc and dcmtk, started on loopback with ports and folders of their own and stopped again.

Debian: apt-get install orthanc orthanc-dicomweb dcmtk. Where they are missing, tests are skipped, but fail when the
environment says CI=true: there they belong to the job.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

PLUGINS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc/plugins")
PACKAGES = {"Orthanc": "orthanc orthanc-dicomweb", "dciodvfy": "dicom3tools"}  # any other program: dcmtk


def program(name: str) -> str:
    """Path of a program, or the end of the test."""
    own = str(Path(sys.executable).parent)  # pynetdicom installs a storescu, storescp and others of its own there
    places = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place != own]
    found = shutil.which(name, path=os.pathsep.join([*places, "/usr/bin", "/usr/sbin", "/usr/local/sbin"]))
    if found is None:
        message = f"{name} is not installed; apt-get install {PACKAGES.get(name, 'dcmtk')}"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return found


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[Any] | None = None, seconds: float = 30) -> None:
    """Return once something listens on a loopback port; fail when `process` ends or time runs out."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.05)
    pytest.fail(f"nothing listens on port {port}", pytrace=False)


class Orthanc:
    """One Orthanc with DICOMweb, its storage below `folder`; as a context manager it runs inside the block.

    Args:
        folder: for its configuration, storage and log.
        modalities: symbolic name -> (AE title, port) of peers on loopback that may query, get and move.
        users: name -> password; with any, HTTP and DICOMweb ask for them.
        settings: further keys of its configuration.
    """

    aet = "ORTHANC"

    def __init__(
        self,
        folder: Path,
        modalities: dict[str, tuple[str, int]] | None = None,
        users: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.users = users or {}
        self.port, self.http_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        plugins = next((path for path in PLUGINS if Path(path, "libOrthancDicomWeb.so").exists()), PLUGINS[0])
        self.configuration = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [f"{plugins}/libOrthancDicomWeb.so"],
            "HttpPort": self.http_port,
            "DicomPort": self.port,
            "DicomAet": self.aet,
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": bool(self.users),
            "RegisteredUsers": self.users,
            "DicomModalities": {name: [aet, "127.0.0.1", port] for name, (aet, port) in (modalities or {}).items()},
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full"},
            "StableAge": 1,
            **settings,
        }

    @property
    def address(self) -> str:
        """HOST:PORT of its DICOM side."""
        return f"127.0.0.1:{self.port}"

    @property
    def web(self) -> str:
        """Base URL of its DICOMweb side."""
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start, or start again with what was stored before."""
        executable = program("Orthanc")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(self.configuration), encoding="utf-8")
        with open(self.folder / "orthanc.log", "ab") as log:
            self.process = subprocess.Popen([executable, str(path)], stdout=log, stderr=subprocess.STDOUT)
        wait_for_port(self.http_port, self.process)
        wait_for_port(self.port, self.process)

    def stop(self) -> None:
        """End this process, and no other."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def rest(self, path: str, data: bytes | None = None) -> Any:
        """GET, or POST `data`, on its own REST interface; JSON comes back decoded."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=data)
        if self.users:
            from base64 import b64encode

            user, password = next(iter(self.users.items()))
            request.add_header("Authorization", "Basic " + b64encode(f"{user}:{password}".encode()).decode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = answer.read()
        try:
            return json.loads(body)
        except ValueError:
            return body

    def upload(self, folder: Path) -> None:
        """Store every .dcm file of a folder by REST."""
        for path in sorted(folder.rglob("*.dcm")):
            self.rest("/instances", path.read_bytes())

    def number_of_instances(self) -> int:
        """How many images it holds."""
        return int(self.rest("/statistics")["CountInstances"])


@contextmanager
def storescp(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """dcmtk's storage SCP, writing to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [program("storescp"), *options, "-od", str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield process
    finally:
        process.kill()
        process.wait(10)


def storescu(port: int, folder: Path, *options: str, called: str = "MEDAUG", calling: str = "STORESCU") -> Any:
    """dcmtk's storage SCU sending a folder; returns the finished process with its output."""
    command = [program("storescu"), "-v", "+sd", *options, "-aet", calling, "-aec", called, "127.0.0.1", str(port), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@contextmanager
def medaug(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own, for tests that talk to it or stop it; killed at the end of the block."""
    command = [sys.executable, "-c", "from medaug.cli import main; main()", *arguments]
    variables = {**os.environ, **(environment or {})}
    # A test run in the background ignores SIGINT, and so would the command that inherits it.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, preexec_fn=interruptible
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
