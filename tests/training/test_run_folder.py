from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import BACKBONE, randomised

from medaug import storage
from medaug.cohort import Cohort, fit_sha256
from medaug.errors import ConfigError, DataError
from medaug.networks.build import build_guided_unet
from medaug.networks.weights import read_metadata
from medaug.training.run_folder import RUN_FILE, WEIGHTS_FILE, RunRecord, load_network, new_record, read_run, write_run

SETTINGS: dict[str, Any] = {
    "network": {"backbone": "lean", "backbone_options": BACKBONE, "reference": None},
    "diffusion": {"schedule": "karras"},
}


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def run(cohort: Cohort, tmp_path: Path) -> tuple[Path, RunRecord, torch.nn.Module]:
    network = randomised(build_guided_unet(SETTINGS["network"], 1, 3))
    return tmp_path, write_run(tmp_path, new_record("b", cohort, SETTINGS, 5), network, 12), network


def test_run_round_trip(cohort: Cohort, run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, record, network = run
    assert read_run(folder) == record
    assert record.weights_sha256 == storage.sha256_file(folder / WEIGHTS_FILE)
    assert (record.iterations, record.seed, record.bundle, record.classes) == (12, 5, "b", cohort.classes)
    assert json.loads(read_metadata(folder / WEIGHTS_FILE)["fit_groups"]) == list(record.fit_groups)
    loaded = load_network(folder, record, cohort.classes)
    assert not loaded.training
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_record_names_the_training_groups_only(cohort: Cohort) -> None:
    record = new_record("b", cohort, SETTINGS, 0)
    assert set(record.fit_groups) == cohort.groups("training")
    assert record.fit_on == fit_sha256(record.fit_groups)
    assert not set(record.fit_groups) & (cohort.groups("test") | cohort.groups("validation"))


def test_record_takes_over_what_synthetic_training_cases_had_seen(cohort: Cohort) -> None:
    groups = [*cohort.groups("training"), "elsewhere"]
    mixed = replace(cohort, fit_on={fit_sha256(groups): groups})
    assert "elsewhere" in new_record("b", mixed, SETTINGS, 0).fit_groups


def test_config_sha_changes_with_every_part(cohort: Cohort) -> None:
    base = new_record("b", cohort, SETTINGS, 0)
    others = [
        new_record("c", cohort, SETTINGS, 0),
        new_record("b", replace(cohort, content_sha256="x"), SETTINGS, 0),
        new_record("b", cohort, SETTINGS | {"diffusion": {}}, 0),
        new_record("b", cohort, SETTINGS, 1),
    ]
    assert new_record("b", cohort, SETTINGS, 0) == base
    assert len({base.config_sha256, *(other.config_sha256 for other in others)}) == 5


def test_start_weights_are_not_needed_again(cohort: Cohort, tmp_path: Path) -> None:
    reference = {"feature": "blocks", "pretrained_path": None}
    network = build_guided_unet(SETTINGS["network"] | {"reference": reference}, 1, 3)
    settings = {"network": SETTINGS["network"] | {"reference": reference | {"pretrained_path": "gone.safetensors"}}}
    record = write_run(tmp_path, new_record("b", cohort, settings, 0), network, 1)
    assert load_network(tmp_path, record).reference_encoder is not None


def test_unfinished_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run-missing"):
        read_run(tmp_path)
    for content in ({"bundle": "b"}, [1], {"extra": 1}):
        storage.write_json(tmp_path / RUN_FILE, content)
        with pytest.raises(ConfigError, match="run-malformed"):
            read_run(tmp_path)


def test_other_classes_are_refused(run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, record, _ = run
    with pytest.raises(ConfigError, match="class-mismatch"):
        load_network(folder, record, ("a", "b"))


def test_missing_weights_are_refused(run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, record, _ = run
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(DataError, match="weights-missing"):
        load_network(folder, record)


def test_exchanged_weights_are_refused(cohort: Cohort, run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, record, network = run
    write_run(folder, new_record("b", cohort, SETTINGS, 5), randomised(network), 12)
    with pytest.raises(ConfigError, match="weights-changed"):
        load_network(folder, record)


def test_truncated_weights_are_refused(run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, record, _ = run
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="weights-unreadable"):
        load_network(folder, record)


def test_nan_weights_are_refused_and_no_record_is_written(cohort: Cohort, tmp_path: Path) -> None:
    network = build_guided_unet(SETTINGS["network"], 1, 3)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="weights-not-finite"):
        write_run(tmp_path, new_record("b", cohort, SETTINGS, 0), network, 1)
    assert not (tmp_path / RUN_FILE).exists()


def test_record_holds_no_path(run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, _, _ = run
    assert str(folder) not in json.dumps(json.loads((folder / RUN_FILE).read_text()))


def test_record_without_network_settings_is_refused(run: tuple[Path, RunRecord, torch.nn.Module]) -> None:
    folder, record, _ = run
    with pytest.raises(ConfigError, match="run-malformed"):
        load_network(folder, replace(record, settings={}))
