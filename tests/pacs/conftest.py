"""Files to send, and an Orthanc shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from orthanc import Orthanc, free_port
from pacs_files import image, save


@pytest.fixture
def make_files(tmp_path: Path) -> Callable[..., Path]:
    """Write patients x series x images below a folder of the test."""

    def make(
        name: str = "source", patients: int = 1, series: int = 1, images: int = 4, size: int = 32, synthetic: bool = False
    ) -> Path:
        for patient in range(1, patients + 1):
            for one in range(1, series + 1):
                for number in range(1, images + 1):
                    dataset = image(patient, one, number, size=size, synthetic=synthetic)
                    save(dataset, tmp_path / name / f"{patient}-{one}-{number}.dcm")
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def move_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def pacs(tmp_path_factory: pytest.TempPathFactory, move_port: int) -> Iterator[Orthanc]:
    """An Orthanc that holds 3 patients, 2 series each of 4 slices, and knows MEDAUG."""
    folder = tmp_path_factory.mktemp("orthanc")
    for patient in range(1, 4):
        for series in (1, 2):
            for number in range(1, 5):
                save(image(patient, series, number), folder / "files" / f"{patient}-{series}-{number}.dcm")
    with Orthanc(folder / "server", {"medaug": ("MEDAUG", move_port)}) as server:
        server.upload(folder / "files")
        yield server
