"""Training the classifier of noisy images, in the session that trains the generator too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader

from medaug import storage
from medaug.cohort import Cohort
from medaug.diffusion import make_schedule
from medaug.draws import randn_batch
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.training.checkpoint import TrainingState
from medaug.training.data import KeyedBatches, read_case
from medaug.training.diffusion import build_objective, make_learning_rate_schedule
from medaug.training.ema import ExponentialMovingAverage
from medaug.training.run_folder import RUN_FILE, WEIGHTS_FILE, RunRecord, new_record, write_run
from medaug.training.session import EpochMeans, TrainingSession
from medaug.training.time_classifier import (
    LabelledCases,
    NoisyClassifierIteration,
    draw_timesteps,
    load_time_classifier,
    new_time_classifier,
    quartile_accuracy,
)

SETTINGS: dict[str, Any] = {"channels": [8, 16], "norm_num_groups": 4, "patch": 2, "dropout": 0.2}
DIFFUSION = {"parameterisation": "epsilon", "schedule": "linear_beta", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    torch.set_num_threads(1)
    return make_cohort(tmp_path_factory.mktemp("cohort"), per_class=20, num_classes=2)


def make_session(
    cohort: Cohort, out: Path, *, epochs: int = 3, length: int = 2, batch_size: int = 4, lr: float = 3e-3
) -> TrainingSession:
    """What the overlay of a bundle wires, with the generator's session, batches, average, rate and checkpoint."""
    network = new_time_classifier(SETTINGS, cohort, 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    scheduler = make_learning_rate_schedule("constant", optimizer, epochs * length, 1)
    ema = ExponentialMovingAverage(network, 0.99)
    dataset = LabelledCases(cohort, shift=0.05)
    batches = KeyedBatches(len(dataset), batch_size)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        epoch_length=length,
        train_data_loader=DataLoader(dataset, batch_sampler=batches),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.functional.cross_entropy,
        inferer=build_objective(DIFFUSION),
        iteration_update=NoisyClassifierIteration(ema, scheduler),
    )
    return TrainingSession(
        trainer=trainer,
        state=TrainingState(network, ema, optimizer, scheduler),
        batches=batches,
        cohort=cohort,
        output_dir=out,
        bundle="uncertainty_guidance",
        settings={"classifier": SETTINGS, "diffusion": DIFFUSION},
        tracking={"enabled": False},
    )


# --- the kill law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [2, 5])
def test_interrupted_run_ends_with_the_same_bytes(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    whole = make_session(cohort, tmp_path / "whole").run()
    step = NoisyClassifierIteration.__call__

    def failing(self: NoisyClassifierIteration, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        if int(batch["iteration"][0]) == iteration:
            raise KeyboardInterrupt
        return step(self, engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(NoisyClassifierIteration, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            make_session(cohort, tmp_path / "killed").run()
    assert not (tmp_path / "killed" / RUN_FILE).exists()
    torch.manual_seed(99)  # nothing reads the global generator
    assert make_session(cohort, tmp_path / "killed").run() == whole
    assert storage.sha256_file(tmp_path / "killed" / WEIGHTS_FILE) == whole.weights_sha256


def test_weights_come_back_for_the_cohort_they_were_trained_on(cohort: Cohort, tmp_path: Path) -> None:
    session = make_session(cohort, tmp_path / "run")
    record = session.run()
    network = load_time_classifier(tmp_path / "run", record, cohort)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    averaged = session.state.ema.network.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in network.state_dict().items())
    fresh = new_time_classifier(SETTINGS, cohort, 0)
    assert not torch.equal(network.stem.weight, fresh.stem.weight)


# --- one step ---------------------------------------------------------------------------------------------------------


class Spy(torch.nn.Module):
    """Remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        self.asked.append((x, time))
        return self.bias.expand(len(x), 2)


def test_a_step_shows_noisy_images_at_original_timesteps(cohort: Cohort) -> None:
    network, objective = Spy(), build_objective(DIFFUSION)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = make_learning_rate_schedule("constant", optimizer, 4, 1)
    step = NoisyClassifierIteration(ExponentialMovingAverage(network), scheduler, seed=5)
    engine = SimpleNamespace(
        network=network,
        optimizer=optimizer,
        inferer=objective,
        loss_function=torch.nn.functional.cross_entropy,
        state=SimpleNamespace(device="cpu"),
    )
    dataset, keys = LabelledCases(cohort), [(7, j) for j in range(8)]
    items = [dataset[(i, j, j)] for i, j in keys]
    batch = {name: torch.as_tensor([item[name] for item in items]) for name in ("label", "iteration", "position")}
    batch["image"] = torch.stack([item["image"] for item in items])
    values = step(engine, batch)
    x_t, time = network.asked[0]
    t = draw_timesteps(objective.schedule, keys, 5, "level")
    assert torch.equal(time, t.float()) and len(set(t.tolist())) > 4
    noise, abar = randn_batch((1, 16, 16), keys, 5, "noise"), objective.schedule.abar(t).float().reshape(-1, 1, 1, 1)
    clean = torch.stack([read_case(cohort, cohort.training[j]) for _, j in keys])
    torch.testing.assert_close(x_t, abar.sqrt() * clean + (1 - abar).sqrt() * noise)
    labels = batch["label"]
    assert values["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert values["accuracy"] == pytest.approx(float((labels == 0).float().mean()))
    gradient = (0.5 - torch.nn.functional.one_hot(labels, 2).float()).mean(dim=0)  # of the cross-entropy at equal logits
    torch.testing.assert_close(network.bias.detach(), -0.1 * gradient)


def test_timesteps_are_uniform_over_the_whole_training_schedule() -> None:
    t = draw_timesteps(make_schedule("linear_beta", 1000), [(i, 0) for i in range(4000)], 0, "level")
    counts = torch.bincount(t * 4 // 1000, minlength=4)
    assert int(t.min()) < 5 and int(t.max()) > 994 and counts.min() > 900 and counts.max() < 1100
    assert len(set(t.tolist())) > 900  # all of them, not those of a respaced grid


def test_accuracy_by_quartile_of_t() -> None:
    logits = torch.tensor([[2.0, 0], [2, 0], [0, 2], [2, 0], [0, 2]])
    found = quartile_accuracy(logits, torch.tensor([0, 1, 1, 1, 1]), torch.tensor([0, 249, 250, 750, 999]), 1000)
    assert found == {"accuracy": pytest.approx(0.6), "accuracy_q1": 0.5, "accuracy_q2": 1.0, "accuracy_q4": 0.5}


def test_an_absent_quartile_leaves_the_epoch_mean_alone() -> None:
    means = EpochMeans()
    means.add({"loss": 1.0, "accuracy_q1": 0.5})
    means.add({"loss": 3.0})
    means.add({"loss": 2.0, "accuracy_q1": 1.0, "accuracy_q2": 0.25})
    assert means.take() == {"loss": 2.0, "accuracy_q1": 0.75, "accuracy_q2": 0.25}


@pytest.mark.slow
def test_accuracy_falls_with_the_noise(cohort: Cohort, tmp_path: Path) -> None:
    session = make_session(cohort, tmp_path / "run", epochs=1, length=300, batch_size=16)
    session.run()
    network, schedule = session.state.ema.network, build_objective(DIFFUSION).schedule
    images = torch.stack([read_case(cohort, case) for case in cohort.test] * 64)
    labels = torch.tensor([case.label for case in cohort.test] * 64)
    keys = [(0, j) for j in range(len(images))]
    t = draw_timesteps(schedule, keys, "check")
    abar = schedule.abar(t).float().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        logits = network(abar.sqrt() * images + (1 - abar).sqrt() * randn_batch((1, 16, 16), keys, "check"), t.float())
    found = quartile_accuracy(logits, labels, t, 1000)
    assert found["accuracy_q1"] > 0.9 > found["accuracy_q3"] and found["accuracy_q4"] == pytest.approx(0.5, abs=0.1)


# --- leakage and refusals ---------------------------------------------------------------------------------------------


def test_only_training_cases_are_seen(cohort: Cohort) -> None:
    assert [case.id for case in LabelledCases(cohort).cases] == [case.id for case in cohort.training]
    for split in ("validation", "test"):
        with pytest.raises(LeakageError, match="fit-on-held-out"):
            LabelledCases(cohort, [*cohort.training, cohort.split(split)[0]])
    with pytest.raises(DataError, match="training-empty"):
        LabelledCases(cohort, [])


def test_a_classifier_that_saw_a_held_out_group_may_not_guide(cohort: Cohort, tmp_path: Path) -> None:
    record = make_session(cohort, tmp_path / "run", epochs=1).run()
    leaked = replace(record, fit_groups=(*record.fit_groups, cohort.test[0].group))
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        load_time_classifier(tmp_path / "run", leaked, cohort)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"classes": ("a", "b", "c")}, "class-mismatch"),
        ({"image_size": 32}, "class-mismatch.*32 px"),
        ({"channels": 3}, "class-mismatch"),
        ({"settings": {"network": {}}}, "run-malformed"),
        ({"weights_sha256": "0" * 64}, "weights-changed"),
    ],
)
def test_another_classifier_is_refused(cohort: Cohort, tmp_path: Path, change: dict[str, Any], code: str) -> None:
    record = new_record("uncertainty_guidance", cohort, {"classifier": SETTINGS}, 0)
    record = write_run(tmp_path, record, new_time_classifier(SETTINGS, cohort, 0), 1)
    assert isinstance(record, RunRecord) and load_time_classifier(tmp_path, record, cohort).num_classes == 2
    with pytest.raises(ConfigError, match=code):
        load_time_classifier(tmp_path, replace(record, **change), cohort)


def test_missing_weights_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    record = new_record("uncertainty_guidance", cohort, {"classifier": SETTINGS}, 0)
    with pytest.raises(DataError, match="weights-missing"):
        load_time_classifier(tmp_path, record, cohort)


def test_diverged_training_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training-diverged"):
        make_session(cohort, tmp_path / "run", lr=1e30).run()
