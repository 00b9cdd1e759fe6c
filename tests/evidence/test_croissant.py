"""croissant.json: valid for the format's own library, iterated with it from a local folder, and true of the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study import Study, make_study

from medaug import cohort as cohorts
from medaug import storage
from medaug.evidence.croissant import FIELDS, FOR_AUTHORS
from medaug.evidence.evidence import write_evidence

mlcroissant = pytest.importorskip("mlcroissant")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path / "study")


def records(dataset: object, name: str) -> list[dict[str, object]]:
    """Records with plain names and texts."""
    found = dataset.records(name)  # type: ignore[attr-defined]
    plain = lambda value: value.decode() if isinstance(value, bytes) else value  # noqa: E731
    return [{key.removeprefix(f"{name}/"): plain(value) for key, value in record.items()} for record in found]


@pytest.mark.parametrize("kind", ["cohort", "accepted"])
def test_the_library_accepts_it_and_reads_every_case(study: Study, kind: str) -> None:
    folder = getattr(study, kind)
    write_evidence(folder, folder, cohort=study.cohort)
    dataset = mlcroissant.Dataset(str(folder / "croissant.json"))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert all(any(f'/{name}" is recommended' in warning for name in FOR_AUTHORS) for warning in issues.warnings)
    data, found = cohorts.read_cohort(folder), records(dataset, "cases")
    expected = [(case, split) for split in cohorts.SPLITS for case in data.split(split)]
    assert len(found) == len(expected) == (20 if kind == "cohort" else 6)
    for record, (case, split) in zip(found, expected, strict=True):
        assert record == {
            "id": case.id,
            "image": case.image,
            "sha256": storage.sha256_file(folder / case.image),
            "label": data.classes[case.label],
            "rank": case.label,
            "split": split,
            "synthetic": kind == "accepted",
        }
    assert records(dataset, "classes") == [{"name": "low", "rank": 0}, {"name": "high", "rank": 1}]


def test_only_the_public_fields_of_a_case_are_there(study: Study, tmp_path: Path) -> None:
    write_evidence(study.cohort, tmp_path)
    cases = json.loads((tmp_path / "cases.json").read_text())["cases"]
    assert {key for case in cases for key in case} == set(FIELDS)


def test_a_changed_list_of_cases_is_noticed(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path, cohort=study.cohort)
    path = tmp_path / "cases.json"
    path.write_text(path.read_text().replace('"low"', '"high"'))
    with pytest.raises(mlcroissant.GenerationError) as caught:
        list(mlcroissant.Dataset(str(tmp_path / "croissant.json")).records("cases"))
    assert "not identical with the reference" in str(caught.value.__cause__)


@pytest.mark.parametrize("name", ["None", "NA", "1e3", "007"])
def test_class_names_that_look_like_numbers_or_nothing_stay_texts(study: Study, name: str) -> None:
    path = study.cohort / "cohort.json"
    path.write_text(path.read_text().replace('"low"', f'"{name}"'))
    write_evidence(study.cohort, study.cohort)
    found = records(mlcroissant.Dataset(str(study.cohort / "croissant.json")), "cases")
    assert {record["label"] for record in found} == {name, "high"}


def test_responsible_ai_fields_come_from_records(study: Study, tmp_path: Path) -> None:
    write_evidence(study.accepted, tmp_path / "all", **study.options)
    write_evidence(study.accepted, tmp_path / "less")
    metadata = mlcroissant.Dataset(str(tmp_path / "all" / "croissant.json")).metadata
    assert "6 of 6 images are synthetic" in metadata.data_collection and "guided_ddpm" in metadata.data_collection
    assert metadata.data_collection_missing_data.startswith("20 images taken in from 23 files")
    assert "simple_cnn" in metadata.machine_annotation_tools[0] and "1 suspect" in metadata.personal_sensitive_information[0]
    assert "Not for diagnosis" in metadata.data_use_cases[0]
    less = json.loads((tmp_path / "less" / "croissant.json").read_text())
    assert "rai:dataCollectionMissingData" not in less and "rai:dataAnnotationAnalysis" not in less
    assert not any(key.endswith(FOR_AUTHORS) for key in less)
