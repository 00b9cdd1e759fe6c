"""The rule of the calibration by hand, and the pilot on discs whose class is their size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_run import DIFFUSION
from test_variations import new_network

from medaug.cohort import Cohort, write_cohort
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.generation.calibration import Calibration, PilotRow, calibrated, choose_scale, make_calibration, pilot_counts
from medaug.generation.variations import make_variation_sampler
from medaug.training.run_folder import RunRecord, new_record, write_run


def rows(*entries: tuple[float, float, float]) -> list[PilotRow]:
    return [PilotRow(*entry, 0.0) for entry in entries]


def test_the_largest_scale_that_keeps_labels_and_moves_the_image() -> None:
    curve = rows((0, 0.8, 0.0), (0.1, 0.8, 0.1), (0.25, 0.75, 0.3), (0.5, 0.72, 0.5), (1.0, 0.71, 0.9))
    assert choose_scale(curve, 0.2) == 0.5  # 1.0 keeps 0.71, 0.72 is needed
    assert choose_scale(curve, 0.4) == 0.5
    assert choose_scale(curve, 0.2, least_agreement=0.5) == 1.0
    assert choose_scale(curve, 0.2, least_agreement=0.93) == 0.25


def test_a_curve_that_comes_back_is_taken_at_its_largest_scale() -> None:
    assert choose_scale(rows((0, 1, 0), (0.1, 0.5, 1), (0.5, 0.95, 1), (1, 0.2, 1)), 0.2) == 0.5


def test_every_scale_destroys_the_labels() -> None:
    with pytest.raises(DataError, match=r"calibration-labels-destroyed.*0\.80.*0\.30 \(scale 0\.25\).*0\.72") as caught:
        choose_scale(rows((0, 0.8, 0), (0.1, 0.2, 1), (0.25, 0.3, 1)), 0.2)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="calibration-labels-destroyed"):  # a judge that agrees with nothing proves nothing
        choose_scale(rows((0, 0.0, 0), (0.1, 0.0, 1)), 0.2)


def test_what_keeps_the_labels_changes_too_little() -> None:
    with pytest.raises(DataError, match=r"calibration-too-weak.*0\.100 \(scale 0\.25\).*0\.200"):
        choose_scale(rows((0, 0.8, 0), (0.1, 0.8, 0.05), (0.25, 0.8, 0.1), (1, 0.1, 3)), 0.2)


@pytest.mark.parametrize("curve", [[], [(0, 1, 0)], [(0.1, 1, 1)], [(0, 1, 0), (0, 1, 0), (0.1, 1, 1)]])
def test_a_curve_without_yardstick_is_refused(curve: list[tuple[float, float, float]]) -> None:
    with pytest.raises(ConfigError, match="calibration-scales"):
        choose_scale(rows(*curve), 0.1)


def test_seed_images_are_stratified_and_every_class_is_there(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path, per_class=20, num_classes=2)
    there = cohort.class_counts("training")
    lopsided = cohort.with_cases(
        training=[c for c in cohort.training if c.label == 0] + [c for c in cohort.training if c.label][:2]
    )
    assert pilot_counts(cohort, 10) == [5, 5]
    assert pilot_counts(cohort, 1000) == there
    assert pilot_counts(lopsided, 8) == [7, 1]
    assert pilot_counts(lopsided, 1000) == [there[0], 2]
    with pytest.raises(DataError, match="training-empty"):
        pilot_counts(cohort.with_cases(training=[]), 4)


# --- the pilot itself -------------------------------------------------------------------------------------------------


def pilot(cohort: Cohort, record: RunRecord, network: Any, out: Path, **changes: Any) -> Calibration:
    grid = {"num_inference_steps": 6, "spacing": "karras", "sigma_max": 80.0, "sigma_min": 0.02}
    sampler = make_variation_sampler(DIFFUSION, grid | changes.pop("variation", {}))
    recipe = {"num_steps": 150, "evaluate_every": 50, "batch_size": 16}
    settings = {"scales": [0.02, 3.0], "num_seeds": 12, "recipe": recipe} | changes
    return make_calibration(
        settings, cohort=cohort, record=record, network=network, sampler=sampler, output_dir=out, tracking={"enabled": False}
    )


@pytest.fixture(scope="module")
def trained(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, RunRecord, Any]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pilot")
    cohort = make_cohort(root / "cohort", per_class=20, num_classes=2)
    network = new_network(dtype=torch.float32)
    record = new_record("bottleneck_perturbation", cohort, {"network": {}, "diffusion": DIFFUSION}, 0)
    return cohort, write_run(root / "run", record, network, 1), network


def test_p3_4_the_pilot_measures_the_curve_and_keeps_it(trained: tuple[Cohort, RunRecord, Any], tmp_path: Path) -> None:
    calibration = pilot(*trained, tmp_path, least_agreement=0.0)
    result = calibration.run()
    kept = json.loads((tmp_path / "calibration.json").read_text())
    assert kept == result and result["seed_images"] == 12
    assert [row["scale"] for row in result["rows"]] == [0.0, 0.02, 3.0]
    calm, little, much = result["rows"]
    assert calm["distance"] < 1e-3 and calm["agreement"] >= 0.75  # scale 0 reconstructs, and the judge knows its images
    assert calm["distance"] <= little["distance"] < much["distance"]
    assert calm["copy_rate"] >= much["copy_rate"]
    evaluator = SimpleNamespace(inferer=calibration.sampler)
    assert result["scale"] == 3.0 == calibration.apply(evaluator) == evaluator.inferer.scale
    assert evaluator.inferer.settings() == calibration.sampler.settings() | {"scale": 3.0}
    assert 0 < result["reconstruction_error"]["mean"] <= result["reconstruction_error"]["max"] < 1e-2  # float32
    steps = [entry["t"] for entry in result["bottleneck_std"]]
    assert steps == sorted(calibration.sampler.timesteps, reverse=True) and all(e["std"] > 0 for e in result["bottleneck_std"])
    from medaug.io.raster import read_unit_png

    assert read_unit_png(tmp_path / "strips.png").shape == (8 * 16, 4 * 16)
    assert (tmp_path / "calibration.png").stat().st_size > 1000


def test_a_repeated_pilot_reads_its_result_and_another_setting_does_not(
    trained: tuple[Cohort, RunRecord, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pilot(*trained, tmp_path, num_seeds=4, least_agreement=0.0).run()
    runs = []
    original = Calibration._pilot
    monkeypatch.setattr(Calibration, "_pilot", lambda self, *a: (runs.append(1), original(self, *a))[1])
    again = pilot(*trained, tmp_path, num_seeds=4, least_agreement=0.0)
    again.sampler = replace(again.sampler, scale=0.7)  # what is to be chosen decides nothing
    assert again.run() == first and not runs
    assert pilot(*trained, tmp_path, num_seeds=6, least_agreement=0.0).run()["seed_images"] == 6 and len(runs) == 1


def test_scales_that_destroy_every_label_stop_it_and_leave_the_curve(
    trained: tuple[Cohort, RunRecord, Any], tmp_path: Path
) -> None:
    calibration = pilot(*trained, tmp_path, scales=[50.0], variation={"location": "x0"})  # noise that buries the image
    evaluator = SimpleNamespace(inferer=calibration.sampler)
    for _ in range(2):  # read again, the curve still says no
        with pytest.raises(DataError, match="calibration-labels-destroyed"):
            calibration.apply(evaluator)
    assert json.loads((tmp_path / "calibration.json").read_text())["scale"] is None
    assert (tmp_path / "calibration.png").is_file() and evaluator.inferer is calibration.sampler
    assert calibrated(calibration.sampler, tmp_path, trained[1]) is calibration.sampler  # none was chosen


def test_the_chosen_scale_serves_the_run_it_was_chosen_for(
    trained: tuple[Cohort, RunRecord, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = pilot(*trained, tmp_path / "c", num_seeds=4, least_agreement=0.0, scales=[3.0])
    sampler, record = calibration.sampler, trained[1]
    assert calibrated(sampler, tmp_path / "c", record) is sampler  # nothing was calibrated yet
    calibration.run()
    assert calibrated(sampler, tmp_path / "c", record).settings() == sampler.settings() | {"scale": 3.0}
    assert calibrated(replace(sampler, seed=5), tmp_path / "c", record).scale == 3.0
    assert not [record for record in caplog.records if record.name.startswith("medaug")]  # other tests may have made ignite talk
    elsewhere, other = replace(sampler, location="xt"), replace(record, weights_sha256="0" * 64)
    assert calibrated(elsewhere, tmp_path / "c", record) is elsewhere and "location" in caplog.text
    caplog.clear()
    assert calibrated(sampler, tmp_path / "c", other) is sampler and "other weights" in caplog.text


def test_p3_13_a_run_that_saw_a_held_out_group_is_not_piloted(trained: tuple[Cohort, RunRecord, Any], tmp_path: Path) -> None:
    cohort, record, network = trained
    seen = replace(record, fit_groups=(*record.fit_groups, next(iter(cohort.groups("test")))))
    with pytest.raises(LeakageError, match="fit-on-held-out") as caught:
        pilot(cohort, seen, network, tmp_path / "c").run()
    assert caught.value.exit_code == 4 and not (tmp_path / "c").exists()


def test_classes_with_two_images_are_piloted(make_cohort: Callable[..., Cohort], tmp_path: Path, trained: Any) -> None:
    whole = make_cohort(tmp_path / "cohort", num_classes=2, per_class=20)
    few = [case for label in range(2) for case in [c for c in whole.training if c.label == label][::6][:2]]
    cohort = write_cohort(whole.with_cases(training=few), whole.root or tmp_path)
    record = new_record("bottleneck_perturbation", cohort, {"network": {}, "diffusion": DIFFUSION}, 0)
    result = pilot(cohort, record, trained[2], tmp_path / "c", least_agreement=0.0, scales=[3.0])
    assert result.run()["seed_images"] == 4


@pytest.mark.parametrize("changes", [{"scales": []}, {"scales": [0.0]}, {"scales": [0.1, -1]}, {"num_seeds": 0}, {"rounds": 3}])
def test_refusals(trained: tuple[Cohort, RunRecord, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="calibration-scales|setting-unknown"):
        pilot(*trained, tmp_path, **changes)
    with pytest.raises(ConfigError, match="recipe-unknown-key"):
        pilot(*trained, tmp_path, recipe={"steps": 3}).run()
