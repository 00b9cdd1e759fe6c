"""Executors: every task once, whatever dies; the same rows from all of them; nothing left running."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from executor_tasks import dies_once, fails, one_always_dies, square
from orthanc import free_port, wait_for_port
from typer.testing import CliRunner

from medaug.cli.options import app
from medaug.errors import ConfigError, StorageError
from medaug.grading.arms import Arm
from medaug.grading.benchmark import run_benchmark
from medaug.grading.executors import EXECUTORS, Failure, check_executor, usable_cores
from medaug.grading.recipe import grading_recipe
from medaug.networks.grading import TEN_NETWORKS
from medaug.phantom import write_phantom_export
from medaug.training.steps import one_thread

# A test run in the background ignores SIGINT, and so would the command that inherits it.
INTERRUPTIBLE = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
LINUX = sys.platform == "linux"
CORES = len(usable_cores())


def run(task, numbers, workers=1, executor="local"):
    steps = {}

    def advance(number, more):
        steps[number] = steps.get(number, 0) + more

    return dict(EXECUTORS[executor](task, numbers, workers=workers, advance=advance)), steps


def test_one_worker_runs_here_and_goes_on_after_a_refusal():
    outcomes, steps = run(square, [1, 3, 4])
    assert outcomes == {1: (1, CORES), 3: Failure("three", "Three does not suit."), 4: (16, CORES)}
    assert steps == {1: 1, 3: 3, 4: 4}
    with pytest.raises(StorageError, match="disk-full"):
        run(fails, [0])


def out_of_memory(number, advance):
    """Task 1 asks PyTorch for more memory than any machine has."""
    return torch.zeros(10**16 if number == 1 else 1).item()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_does_not_fit_into_memory_is_named_and_the_others_go_on(workers):
    outcomes, _ = run(out_of_memory, [0, 1, 2], workers)
    assert outcomes[0] == outcomes[2] == 0
    assert outcomes[1].code == "memory-exhausted" and "smaller batch" in outcomes[1].reason


def test_one_thread_comes_back():
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(torch_threads)


def test_refusals():
    with pytest.raises(ConfigError, match="local, ray"):
        check_executor("slurm", 1)
    with pytest.raises(ConfigError, match="at least 1"):
        check_executor("local", 0)
    for name, workers in (("local", None), ("ray", 2)):
        with pytest.raises(ConfigError, match="option-conflict.*--executor ray"):
            check_executor(name, workers, "10.0.0.1:6379")
    assert check_executor("ray", None, "10.0.0.1:6379") is EXECUTORS["ray"]


def test_workers_do_every_task_once_each_on_its_core(tmp_path):
    outcomes, steps = run(square, [1, 3, 4], workers=2)
    cores = 1 if LINUX and CORES >= 2 else CORES
    assert outcomes == {1: (1, cores), 3: Failure("three", "Three does not suit."), 4: (16, cores)}
    assert steps == {1: 1, 3: 3, 4: 4}


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_the_task_of_a_killed_worker_is_done_again(tmp_path, executor, monkeypatch):
    if executor == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    outcomes, steps = run(partial(dies_once, str(tmp_path)), [0, 1, 2, 3], 2, executor)
    assert (tmp_path / "1").exists()
    assert outcomes == {number: number for number in range(4)}
    assert steps == dict.fromkeys(range(4), 10)  # the steps of the lost attempt are taken back


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_task_that_kills_every_worker_is_given_up_and_the_others_go_on(executor, monkeypatch):
    if executor == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    outcomes, _ = run(one_always_dies, [0, 1, 2], 2, executor)
    assert outcomes[0] == 0 and outcomes[2] == 2
    assert outcomes[1].code == "worker-lost" and "fewer --workers" in outcomes[1].reason


def test_what_fails_stops_everything():
    with pytest.raises(StorageError, match="disk-full"):
        run(fails, [0, 1], workers=2)


DRIVER = """
import sys
from functools import partial
from executor_tasks import sleeps
from medaug.grading.executors import EXECUTORS
if __name__ == "__main__":
    list(EXECUTORS["local"](partial(sleeps, sys.argv[1]), [0, 1], workers=2, advance=lambda number, steps: None))
"""


RAY_DRIVER = """
import sys
from executor_tasks import square
from medaug.errors import StorageError
from medaug.grading.executors import EXECUTORS
if __name__ == "__main__":
    try:
        done = EXECUTORS["ray"](square, [1, 4], workers=2, advance=lambda *_: None, ray_address=sys.argv[1] if sys.argv[1:] else None)
        print({number: outcome[0] for number, outcome in sorted(done)})
    except StorageError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.integration
def test_ray_opens_to_a_token_alone_and_leaves_none_in_the_home_folder(tmp_path):
    pytest.importorskip("ray")
    script, home = tmp_path / "driver.py", tmp_path / "home"
    script.write_text(RAY_DRIVER)
    home.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}

    def drive(*words, **variables):
        return subprocess.run(
            [sys.executable, str(script), *words], env=clean | variables, capture_output=True, text=True, timeout=300, check=True
        ).stdout

    assert drive() == "{1: 1, 4: 16}\n"
    assert not list(home.rglob("*"))
    assert drive(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "nowhere")).startswith("[ray-unreachable]")
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}  # as scripts/grade.slurm
    port = free_port()
    words = [
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--block",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        env=clean | known | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as head:
        try:
            wait_for_port(port, head, 120)
            for wrong in ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "2" * 64}):
                assert drive(f"127.0.0.1:{port}", **wrong).startswith("[ray-unreachable]")
            assert drive(f"127.0.0.1:{port}", **known) == "{1: 1, 4: 16}\n"
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                head.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
    _until(lambda: not _members(head.pid), 30)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_their_driver(tmp_path, blow):
    script, started = tmp_path / "driver.py", tmp_path / "started"
    script.write_text(DRIVER)
    started.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    words = [sys.executable, str(script), str(started)]
    driver = subprocess.Popen(
        words,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        preexec_fn=INTERRUPTIBLE,
    )
    _until(lambda: len(list(started.iterdir())) == 2 or driver.poll() is not None)
    assert driver.poll() is None, driver.stderr.read()
    if blow == signal.SIGINT:
        os.killpg(driver.pid, blow)  # as the terminal does
    else:
        driver.send_signal(blow)
    _, message = driver.communicate(timeout=60)
    _until(lambda: not _members(driver.pid), 60)
    if blow == signal.SIGINT:
        assert message.count(b"Traceback") == 1 and b"KeyboardInterrupt" in message  # the driver's alone


def grid(cohort, out, executor="local", workers=1, steps=6, on_row=None):
    recipes = {
        name: grading_recipe("tiny", name, {"num_steps": steps, "evaluate_every": 3}) for name in ("simple_cnn", "test_resnet")
    }
    arms = [Arm("none"), Arm("cutmix", policy="cutmix")]
    return run_benchmark(cohort, arms, list(recipes), [0, 1], recipes, out, executor=executor, workers=workers, on_row=on_row)


def row_bytes(out):
    return {path.name: path.read_bytes() for path in (out / "rows").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_rows_do_not_depend_on_the_executor(tmp_path, make_cohort, executor):
    if importlib.util.find_spec("ray") is None and executor == "ray":
        pytest.skip("ray is not installed")
    cohort = make_cohort(tmp_path / "real", size=32)
    rows = grid(cohort, tmp_path / "one")
    assert grid(cohort, tmp_path / "two", executor, workers=2) == rows
    assert row_bytes(tmp_path / "two") == row_bytes(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.integration
def test_ten_networks_on_the_phantom_have_the_same_rows_from_both_executors(tmp_path):
    """As a user would: the phantom's DICOM export taken in, all ten networks, the tiny profile."""
    pytest.importorskip("ray")
    export, cohort = tmp_path / "export", tmp_path / "cohort"
    table = write_phantom_export(export, num_patients=32, size=48)
    words = ["intake", export, "--labels", table, "--key", "sop", "--label-column", "grade", "--group-column", "patient_id"]
    _medaug([*words, "--image-size", "32", "--ordinal", "--burned-in", "keep", "--out", cohort])
    summaries = {}
    for executor in ("local", "ray"):
        words = ["grade", "--cohort", cohort, "--out", tmp_path / executor, "--arm", "none", "--networks", "all", "--seeds", "1"]
        summaries[executor] = _medaug([*words, "--profile", "tiny", "--workers", "2", "--executor", executor, "--json"])
    assert summaries["local"]["failed"] == summaries["ray"]["failed"] == []
    assert {row["network"] for row in summaries["local"]["rows"]} == {"simple_cnn", *TEN_NETWORKS}
    assert row_bytes(tmp_path / "local") == row_bytes(tmp_path / "ray")
    assert len(row_bytes(tmp_path / "ray")) == 11


def _medaug(words):
    """Run the command in this process; its summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{words[words.index('--out') + 1]}.db")
        done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output[-2000:]
    return json.loads(done.stdout) if "--json" in words else None


def _stopped_grid(cohort, out, workers):
    words = ["grade", "--cohort", cohort, "--out", out, "--arm", "none", "--arm", "cutmix", "--networks", "simple_cnn"]
    return [*words, "--seeds", "6", "--profile", "tiny", "--workers", str(workers)]


def _start(cohort, out, workers):
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{out}.db"}
    command = [sys.executable, "-m", "medaug", *map(str, _stopped_grid(cohort, out, workers))]
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=INTERRUPTIBLE,
    )


def _members(session):
    """Processes of a session that are alive, by /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_grid_whose_worker_is_killed_has_the_same_rows(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "real", size=32)
    rows = grid(cohort, tmp_path / "whole", steps=30)
    killed = []

    def kill_one(row):
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    assert grid(cohort, tmp_path / "out", workers=2, steps=30, on_row=kill_one) == rows
    assert killed and row_bytes(tmp_path / "out") == row_bytes(tmp_path / "whole")


@pytest.fixture(scope="module")
def whole_grid(tmp_path_factory, make_cohort):
    """A folder with a cohort, `real`, and its grid that ran through, `whole`."""
    folder = tmp_path_factory.mktemp("grid")
    make_cohort(folder / "real", size=32)
    _medaug(_stopped_grid(folder / "real", folder / "whole", 1))
    return folder


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_grid_goes_on_to_the_same_rows_and_leaves_no_process(tmp_path, whole_grid, blow):
    real, out = whole_grid / "real", tmp_path / "out"
    running = _start(real, out, 2)
    _until(lambda: len(list(out.glob("rows/*.json"))) >= 1 or running.poll() is not None)
    if blow == signal.SIGINT:
        os.killpg(running.pid, signal.SIGINT)  # as the terminal does
    else:
        running.kill()
    _, message = running.communicate(timeout=240)
    assert running.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL), message.decode()
    _until(lambda: not _members(running.pid), 30)
    if blow == signal.SIGINT:
        assert b"run the same command again" in message and b"Traceback" not in message
    assert not list((out / "rows").glob(".*")) and len(row_bytes(out)) < 12
    _medaug(_stopped_grid(real, out, 2))
    assert row_bytes(out) == row_bytes(whole_grid / "whole")
