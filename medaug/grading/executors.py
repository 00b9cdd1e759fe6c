"""Where the cells of a comparison are computed: in this process, in several of this machine, or on a Ray cluster.

All give the same outcomes if a task depends on nothing but its number. No torch here: what a process has to load is the task's affair.

An executor is a generator of (number of the task, outcome) in the order of completion. It does a task again whose worker died, up
to `MAX_RETRIES` times, and leaves no process behind however it ends: closed, failed, interrupted, or killed itself.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from medaug.errors import ConfigError, MedaugError, MissingDependencyError, StorageError

MAX_RETRIES = 2
_OBJECT_STORE_BYTES = 100 * 2**20

Advance = Callable[[int, int], None]  # (number of the task, optimiser steps); negative when a lost task begins anew

__all__ = ["EXECUTORS", "MAX_RETRIES", "Executor", "Failure", "Outcome", "Task", "check_executor", "usable_cores"]


@dataclass(frozen=True)
class Failure:
    """A task that cannot be done, while others can.

    Attributes:
        code, reason: of the refusal.
    """

    code: str
    reason: str


Outcome = Any  # what the task gives, or a Failure
Task = Callable[[int, Callable[[int], None]], Any]  # (number, advance) -> outcome; can be pickled
Executor = Callable[..., Iterator[tuple[int, Outcome]]]


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _attempt(task: Task, number: int, advance: Callable[[int], None]) -> Outcome:
    """The outcome of one task; a setting that does not suit it, or too little memory, is a `Failure`, everything else stops all."""
    try:
        return task(number, advance)
    except ConfigError as error:
        return Failure(error.code, error.message)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        return Failure(
            "memory-exhausted", "there is not enough memory to train it; give it a smaller batch, or run fewer --workers."
        )


def _lacks_memory(error: Exception) -> bool:
    """True for what Python, and PyTorch on CPU ("can't allocate memory") and GPU ("CUDA out of memory"), raise."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("not enough memory", "allocate memory", "out of memory")
    )


def run_local(task: Task, numbers: Sequence[int], *, workers: int, advance: Advance, **_: Any) -> Iterator[tuple[int, Outcome]]:
    """In this process for one worker, else in `workers` processes, each bound to a core of its own as far as there are any."""
    workers = min(workers, len(numbers))
    if workers > 1:
        yield from _run_processes(task, numbers, workers, advance)
        return
    for number in numbers:
        yield number, _attempt(task, number, lambda steps, number=number: advance(number, steps))  # type: ignore[misc]


@dataclass
class _Worker:
    """One process, its end of the pipe, and what it is doing."""

    process: BaseProcess
    pipe: connection.Connection
    core: int | None
    number: int | None = None
    reached: int = 0


@dataclass
class _Queue:
    """Tasks to do, and how often each was lost."""

    waiting: deque[int]
    lost: dict[int, int] = field(default_factory=dict)

    def give_back(self, number: int) -> Failure | None:
        """Put a lost task in front; one that was lost too often is given up, so that the others go on."""
        self.lost[number] = self.lost.get(number, 0) + 1
        if self.lost[number] > MAX_RETRIES:
            return _lost_for_good()
        self.waiting.appendleft(number)
        return None


def _lost_for_good() -> Failure:
    return Failure(
        "worker-lost",
        f"its worker process died {MAX_RETRIES + 1} times, perhaps for lack of memory; run the same command again with fewer --workers.",
    )


def _run_processes(task: Task, numbers: Sequence[int], workers: int, advance: Advance) -> Iterator[tuple[int, Outcome]]:
    cores = usable_cores()
    queue = _Queue(deque(numbers))
    team: list[_Worker] = []
    try:
        for place in range(workers):
            team.append(_start(task, cores[place % len(cores)] if workers <= len(cores) else None))
        for worker in team:
            _give(worker, queue)
        while any(worker.number is not None for worker in team) or queue.waiting:
            ready = connection.wait([worker.pipe for worker in team])
            for worker in [worker for worker in team if worker.pipe in ready]:
                yield from _listen(worker, queue, advance)
                if worker.pipe.closed:
                    team.remove(worker)
                    if not queue.waiting:
                        continue
                    worker = _start(task, worker.core)
                    team.append(worker)
                if worker.number is None:
                    _give(worker, queue)
    finally:
        for worker in team:
            worker.process.kill()
        for worker in team:
            worker.process.join()
            worker.pipe.close()


def _start(task: Task, core: int | None) -> _Worker:
    """A new process. It inherits a mask that blocks Ctrl-C: the terminal sends that to the whole group, and only we answer it."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # now: the first start of a process would start it, and take the block off
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, task, core), daemon=True)
    with _interrupts_held():
        process.start()
    theirs.close()
    return _Worker(process, ours, core)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give(worker: _Worker, queue: _Queue) -> None:
    if queue.waiting:
        worker.number, worker.reached = queue.waiting.popleft(), 0
        with suppress(OSError):  # it died before its first task; `_listen` will find out
            worker.pipe.send(worker.number)


def _listen(worker: _Worker, queue: _Queue, advance: Advance) -> Iterator[tuple[int, Outcome]]:
    """One message of a worker: steps done, an outcome, or its death.

    Raises:
        MedaugError: the worker met what stops the comparison.
    """
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        worker.pipe.close()
        if worker.number is not None:
            advance(worker.number, -worker.reached)
            failure = queue.give_back(worker.number)
            if failure is not None:
                yield worker.number, failure
        return
    number = worker.number
    assert number is not None
    if kind == "steps":
        worker.reached += value
        advance(number, value)
    elif kind == "error":
        raise value
    else:
        worker.number = None
        yield number, value


def _work(pipe: connection.Connection, task: Task, core: int | None) -> None:
    """What a process does: task after task until the pipe or its parent ends."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    while True:
        try:
            number = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            message = "outcome", _attempt(task, number, lambda steps: pipe.send(("steps", steps)))
        except MedaugError as error:
            message = "error", error
        except Exception:  # noqa: BLE001 - raised again by the one who waits for it
            message = "error", RuntimeError(f"A worker process failed:\n{traceback.format_exc()}")
        pipe.send(message)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def run_ray(
    task: Task, numbers: Sequence[int], *, workers: int, advance: Advance, ray_address: str | None = None, **_: Any
) -> Iterator[tuple[int, Outcome]]:
    """On a Ray cluster: the one at `ray_address`, or one of `workers` cores on this machine alone.

    The machines of a cluster must see the cohorts and the output folder under the same paths and have the same medaug.

    Raises:
        MissingDependencyError: Ray is not installed.  StorageError: the cluster does not answer or loses tasks.
    """
    ray = _connect_ray(workers, ray_address)
    try:
        shared = ray.put(task)
        remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_ray_task)
        pending = {remote.remote(shared, number): number for number in numbers}
        while pending:
            (done, *_), _rest = ray.wait(list(pending), num_returns=1)
            number = pending.pop(done)
            try:
                outcome, steps = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, MedaugError) else error from None
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                yield number, _lost_for_good()
                continue
            except ray.exceptions.RayError as error:
                raise StorageError(
                    "worker-lost",
                    f"Ray lost a training run {MAX_RETRIES + 1} times ({type(error).__name__}); run the command again.",
                ) from error
            advance(number, steps)
            yield number, outcome
    finally:
        ray.shutdown()


def _connect_ray(workers: int, address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules and not any(map(os.environ.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(
            32
        )  # else Ray leaves one in the home folder, where other clusters take it up
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "ray-missing", "The executor ray needs the package ray; run `pip install -e '.[ray]'` where medaug was checked out."
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise StorageError(
            "ray-unreachable",
            f"The Ray cluster does not answer ({type(error).__name__}); check --ray-address and, where it asks "
            "for a token, RAY_AUTH_MODE with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
        ) from error
    return ray


def _ray_task(task: Task, number: int) -> tuple[Outcome, int]:
    """One task in a Ray worker, and the steps it took."""
    steps = 0

    def count(more: int) -> None:
        nonlocal steps
        steps += more

    return _attempt(task, number, count), steps


EXECUTORS: dict[str, Executor] = {"local": run_local, "ray": run_ray}


def check_executor(name: str, workers: int | None = None, ray_address: str | None = None) -> Executor:
    """The executor of this name.

    Raises:
        ConfigError: there is none, fewer than one worker, or a cluster is named and not used or told its size (`option-conflict`).
    """
    if name not in EXECUTORS:
        raise ConfigError("executor-unknown", f"The executor must be one of {', '.join(EXECUTORS)}, got {name!r}.")
    if ray_address is not None and (name != "ray" or workers is not None):
        raise ConfigError(
            "option-conflict",
            "The Ray cluster at --ray-address works only with --executor ray, and its size decides how many runs go side by side, "
            "not --workers.",
        )
    if workers is not None and workers < 1:
        raise ConfigError("workers-invalid", f"The number of workers must be at least 1, got {workers}.")
    return EXECUTORS[name]
