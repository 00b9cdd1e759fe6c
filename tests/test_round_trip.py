"""The whole door: a phantom export goes through a real PACS into medaug, and its synthetic images go back and are read there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from orthanc import Orthanc, free_port, storescu
from typer.testing import CliRunner

from medaug.cli.options import app
from medaug.cohort import read_cohort
from medaug.phantom import write_phantom_export

OVERRIDES = (
    "batch_size=4",
    "max_epochs=1",
    "epoch_length=4",
    "preview_every=0",
    "network_settings#backbone_options#channels=[8,8,8]",
    "synthetic_per_real=0.5",
    "device_name=cpu",
    "augment#gate_threshold=0.0",
    "augment#seeds=1",
    "augment#filter={num_steps: 20, evaluate_every: 10, batch_size: 8}",
)


def medaug(*arguments: str) -> dict[str, Any]:
    """The command; its summary for machines. In this process: nine of its own would import the same for a minute."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output[-2000:]
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.mark.slow
@pytest.mark.integration
def test_from_the_pacs_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_phantom_export(tmp_path / "hospital", num_patients=24, size=64)
    originals = [path for path in (tmp_path / "hospital" / "DICOM").rglob("*") if path.is_file()]
    with Orthanc(tmp_path / "orthanc", {"medaug": ("MEDAUG", free_port())}) as pacs:
        sent = storescu(pacs.port, tmp_path / "hospital" / "DICOM", "+r", called=pacs.aet)
        assert sent.returncode == 0, sent.stderr[-2000:]
        assert pacs.number_of_instances() == len(originals)

        to_pacs = ("--pacs", pacs.address, "--called", pacs.aet)
        query = ("--table", str(table), "--key", "patient", "--key-column", "patient_id")
        fetched = medaug("retrieve", *to_pacs, *query, "--out", "export")
        assert fetched["received"] == len(originals)
        assert medaug("retrieve", *to_pacs, *query, "--out", "export")["received"] == 0

        labels = ("--labels", str(table), "--key", "sop", "--label-column", "grade", "--burned-in", "keep")
        taken = medaug("intake", "export", *labels, "--image-size", "32", "--out", "cohort")
        assert taken["counts"]["used"] == len(originals)

        settings = [part for pair in OVERRIDES for part in ("--set", pair)]
        job = ("--cohort", "cohort", "--out", "job", "--profile", "tiny", "--allow-short")
        made = medaug("augment", "guided_ddpm", *job, *settings)
        assert made["accepted"] > 0

        exported = medaug("export", "job/accepted", "--format", "dicom", "--out", "synthetic")
        assert exported["images"] == made["accepted"]
        medaug("export", "--verify", "synthetic")

        given = medaug("send", "synthetic", *to_pacs)
        assert given["sent"] == made["accepted"]
        assert pacs.number_of_instances() == len(originals) + made["accepted"]

        web = ("--dicomweb", pacs.web, "--query", "PatientName=SYNTHETIC*")
        back = medaug("retrieve", *web, "--out", "back")
        assert back["received"] == made["accepted"]

    accepted = {case.id for case in read_cohort(tmp_path / "job" / "accepted").training}
    ours = {str(d.SOPInstanceUID): d for d in map(pydicom.dcmread, (tmp_path / "synthetic").rglob("*.dcm"))}
    theirs = [pydicom.dcmread(path) for path in (tmp_path / "back").rglob("*.dcm")]
    assert len(ours) == len(accepted) == len(theirs)
    for dataset in theirs:
        own = ours[str(dataset.SOPInstanceUID)]
        assert dataset[0x0008001C].value == "YES"
        assert "SYNTHETIC - NOT FOR CLINICAL USE" in dataset.SeriesDescription
        assert np.array_equal(dataset.pixel_array, own.pixel_array)
        assert (dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")) == (
            own.get("RescaleSlope"),
            own.get("RescaleIntercept"),
        )
