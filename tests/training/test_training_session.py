from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import NO_REFERENCE, train

from medaug import storage
from medaug.cohort import Cohort
from medaug.errors import ConfigError, StorageError
from medaug.io.raster import read_unit_png
from medaug.training.checkpoint import FILE_NAME
from medaug.training.diffusion import GuidedIteration
from medaug.training.run_folder import RUN_FILE, WEIGHTS_FILE
from medaug.training.session import EpochMeans, choose_device, flatten, new_network


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    torch.set_num_threads(1)
    return make_cohort(tmp_path_factory.mktemp("cohort"), per_class=10)


def sha(folder: Path) -> str:
    return storage.sha256_file(folder / WEIGHTS_FILE)


def stop_at(monkeypatch: pytest.MonkeyPatch, iteration: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Make training fail right before an iteration, in the middle of an epoch if it is even."""
    step = GuidedIteration.__call__

    def failing(self: GuidedIteration, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
        if int(batch["iteration"][0]) == iteration:
            raise error
        return step(self, engine, batch)

    monkeypatch.setattr(GuidedIteration, "__call__", failing)


# --- the kill law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [2, 3, 6])
def test_interrupted_run_ends_with_the_same_bytes(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    whole = train(cohort, tmp_path / "whole", more=NO_REFERENCE)
    with monkeypatch.context() as patch:
        stop_at(patch, iteration)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, tmp_path / "killed", more=NO_REFERENCE)
    assert not (tmp_path / "killed" / RUN_FILE).exists()
    resumed = train(cohort, tmp_path / "killed", more=NO_REFERENCE)
    assert resumed == whole
    assert resumed.iterations == 6
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole") == whole.weights_sha256


def test_rare_checkpoints_and_sample_sheets_change_nothing(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cohort, tmp_path / "whole", more=NO_REFERENCE)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, tmp_path / "killed", checkpoint_every=2, preview_every=1, more=NO_REFERENCE)
    train(cohort, tmp_path / "killed", checkpoint_every=0, preview_every=3, more=NO_REFERENCE)
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "killed" / "samples").iterdir())
    assert names == [f"epoch_{epoch:04d}.png" for epoch in range(4)]  # the first before training, and not again when it goes on
    sheet = read_unit_png(tmp_path / "killed" / "samples" / "epoch_0003.png")
    assert sheet.shape == (3 * 2 * 16, 8 * 16)  # per class references and samples


def fork_training(cohort: Cohort, out: Path, kill_after: float | None) -> int:
    """Train in a child process; returns its exit code, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            train(cohort, out, max_epochs=6)
            code = 0
        except BaseException:  # noqa: BLE001 - the child must never reach pytest
            traceback.print_exc(file=sys.__stdout__)
        finally:
            os._exit(code)
    limit = time.monotonic() + (60 if kill_after is None else kill_after)
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_run_killed_five_times_ends_with_the_same_bytes(cohort: Cohort, tmp_path: Path) -> None:
    # Everything is imported: a child is ready at once, and a kill costs no second import of monai.
    start = time.monotonic()
    assert fork_training(cohort, tmp_path / "whole", None) == 0
    duration = time.monotonic() - start
    moments, kills = random.Random(0), 0
    checkpoint = tmp_path / "killed" / "checkpoint" / FILE_NAME
    for _ in range(40):
        if kills >= 5 and checkpoint.is_file():  # the last start goes on, it does not begin
            break
        killed = fork_training(cohort, tmp_path / "killed", moments.uniform(0.1, 0.8) * duration)
        assert killed in (-9, 0)
        if killed == 0:  # finished between two kills: begin once more, the law holds for each
            assert sha(tmp_path / "killed") == sha(tmp_path / "whole")
            for path in (tmp_path / "killed").rglob("*"):
                if path.is_file():
                    path.unlink()
        kills += killed == -9
    assert kills >= 5 and checkpoint.is_file()
    assert fork_training(cohort, tmp_path / "killed", None) == 0
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole")
    assert (tmp_path / "killed" / RUN_FILE).read_bytes() == (tmp_path / "whole" / RUN_FILE).read_bytes()


# --- other laws -------------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_workers_or_on_global_draws(cohort: Cohort, tmp_path: Path) -> None:
    one = train(cohort, tmp_path / "one", max_epochs=1, more=NO_REFERENCE)
    torch.manual_seed(99)
    two = train(cohort, tmp_path / "two", max_epochs=1, num_workers=1, more=NO_REFERENCE)
    assert one == two
    assert one.weights_sha256 != train(cohort, tmp_path / "three", max_epochs=1, seed=1, more=NO_REFERENCE).weights_sha256


def test_finished_run_returns_at_once(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(cohort, tmp_path / "run", max_epochs=1, more=NO_REFERENCE)
    written = (tmp_path / "run" / WEIGHTS_FILE).stat().st_mtime_ns
    stop_at(monkeypatch, 1)
    assert train(cohort, tmp_path / "run", max_epochs=1, more=NO_REFERENCE) == first
    assert (tmp_path / "run" / WEIGHTS_FILE).stat().st_mtime_ns == written


def test_lost_weights_come_back_from_the_checkpoint(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(cohort, tmp_path / "run", max_epochs=1, more=NO_REFERENCE)
    (tmp_path / "run" / WEIGHTS_FILE).write_bytes(b"damaged")
    stop_at(monkeypatch, 1)  # not a single iteration is needed
    assert train(cohort, tmp_path / "run", max_epochs=1, more=NO_REFERENCE) == first
    assert sha(tmp_path / "run") == first.weights_sha256


def test_joint_loss_trains_encoder_and_network(cohort: Cohort, tmp_path: Path) -> None:
    record = train(cohort, tmp_path / "run", max_epochs=1)
    from medaug.training.run_folder import load_network

    trained = load_network(tmp_path / "run", record)
    fresh = new_network(record.settings["network"], cohort, 0)
    moved = {
        name.split(".")[0] for name, value in trained.named_parameters() if not torch.equal(value, fresh.get_parameter(name))
    }
    assert moved >= {"unet", "reference_encoder", "fusion"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_folder_of_another_config_is_refused(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, tmp_path / "run", more=NO_REFERENCE)
    with pytest.raises(ConfigError, match="checkpoint-other-config"):
        train(cohort, tmp_path / "run", learning_rate=0.5, more=NO_REFERENCE)
    train(cohort, tmp_path / "run", more=NO_REFERENCE)
    with pytest.raises(ConfigError, match="run-other-config"):
        train(cohort, tmp_path / "run", seed=1, more=NO_REFERENCE)


def test_folder_in_use_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    with storage.locked(tmp_path / "run"), pytest.raises(StorageError, match="folder-in-use") as caught:
        train(cohort, tmp_path / "run", more=NO_REFERENCE)
    assert caught.value.exit_code == 5


def test_full_disk_stops_training_and_freed_space_lets_it_go_on(cohort: Cohort, tmp_path: Path, small_disk: Path) -> None:
    storage.write_bytes(small_disk / "ballast", bytes(1_000_000))
    with pytest.raises(StorageError, match="disk-full") as caught:
        train(cohort, small_disk / "run", more=NO_REFERENCE)
    assert caught.value.exit_code == 5
    assert not [path.name for path in (small_disk / "run").rglob("*") if path.is_file() and path.name != storage.LOCK_NAME]
    (small_disk / "ballast").unlink()
    again = train(cohort, tmp_path / "whole", max_epochs=1, more=NO_REFERENCE)
    assert train(cohort, small_disk / "run", max_epochs=1, more=NO_REFERENCE) == again


def test_diverged_training_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training-diverged.*learning_rate"):
        train(cohort, tmp_path / "run", learning_rate=1e30, warmup_steps=1, more=NO_REFERENCE)
    assert not (tmp_path / "run" / WEIGHTS_FILE).exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"reference": "none"}, "reference-unknown"),
        ({"learning_rate_schedule": "step"}, "learning-rate-schedule-unknown"),
        ({"device_name": "abacus"}, "device-unknown"),
        ({"batch_size": 0}, "batch-invalid"),
        ({"diffusion_settings": {"weights": 1}}, "setting-unknown"),
        ({"diffusion_settings": {"parameterisation": "noise"}}, "parameterisation-unknown"),
        ({"diffusion_settings": {"schedule": "linear"}}, "schedule"),
        ({"network_settings": {"backbone": "large"}}, "backbone-unknown"),
        ({"network_settings": {"backbone": "lean", "backbone_options": {"width": 1}}}, "setting-unknown"),
        ({"preview_sampler": {"steps": 1}}, "setting-unknown"),
        ({"ema_decay": 1.5}, "ema-decay"),
    ],
)
def test_unknown_setting_is_refused(cohort: Cohort, tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        train(cohort, tmp_path / "run", more=NO_REFERENCE if "network_settings" not in changes else {}, **changes)
    assert not (tmp_path / "run").exists()


def test_flatten_and_means() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}
    means = EpochMeans()
    assert means.take() == {}
    means.add({"loss": 1.0})
    means.add({"loss": 3.0})
    assert means.take() == {"loss": 2.0}
    assert means.take() == {}


def test_device_names() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="device-unknown"):
        choose_device("abacus")
