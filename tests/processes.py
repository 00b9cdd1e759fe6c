"""Processes that train together by gloo on the CPU, as torchrun would start them; forked, so that nothing is imported again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from medaug.training import distributed


def together(work: Callable[[int], Any], size: int = 2, seconds: float = 300) -> list[int]:
    """Call ``work(rank)`` in every one of `size` processes of one group. Returns their exit codes: 0, 1 for an exception, -9 for killed.

    Unlike torchrun it leaves the others alone when one fails. Who is not done in `seconds` is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(work, rank, size, port) for rank in range(size)]
    codes: dict[int, int] = {}
    limit = time.monotonic() + seconds
    while len(codes) < size:
        for child in [child for child in children if child not in codes]:
            if time.monotonic() > limit:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[child] for child in children]


def _fork(work: Callable[[int], Any], rank: int, size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        distributed.start(torch.device("cpu"))
        work(rank)
        distributed.stop()
        code = 0
    except BaseException:  # noqa: BLE001 - the child must never reach pytest
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)
