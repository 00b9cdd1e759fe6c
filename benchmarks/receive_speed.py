"""Receiving over loopback: `medaug receive` against dcmtk's storescp, both fed by dcmtk's storescu with the same files.

The receivers take turns within one run, each into an empty folder, and only the sending is timed. storescp is measured twice: as
it comes (`storescp`), and tuned (`storescp_tuned`) with the largest PDU it knows and TCP_NODELAY=1, without which its answers wait
for delayed acknowledgements of about 40 ms. The bar is for storescp as it comes; the tuned one says what the machine could do. It
writes without fsync; ours answers after the fsync, whose time on this disk is in the row. The resident set of our receiver is read from /proc while it
works: flat means that the last quarter of the files needs no more than the first. Linux only. Example:

    python benchmarks/receive_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rows import WORK, command_of, environment, record, settings_of

from medaug.draws import numpy_generator

NAME = "receive_speed"
LARGEST_PDU = 131072  # of dcmtk 3.6
OURS, THEIRS, TUNED = "medaug", "storescp", "storescp_tuned"
ORDER = (OURS, THEIRS, TUNED)


def write_files(folder: Path, number: int, size: int, seed: int) -> None:
    """CT files of `size` x `size` 16-bit pixels, each with its own UIDs and pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True)
    for index in range(number):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, f"2.25.{seed + 1}.{index + 1}"
        dataset.Modality, dataset.PatientID = "CT", "BENCHMARK"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"2.25.{seed + 1}", f"2.25.{seed + 1}.0"
        dataset.Rows = dataset.Columns = size
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        pixels = numpy_generator("receive-speed", seed, index).integers(0, 4096, (size, size), dtype=np.uint16)
        dataset.PixelData = pixels.tobytes()
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)


def dcmtk(name: str) -> str | None:
    """Path of a program of dcmtk; pynetdicom installs others of the same names beside Python."""
    own = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join(place for place in os.environ["PATH"].split(os.pathsep) if place != own))


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def receiver(which: str, out: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """One of the receivers, ready for connections."""
    if which == OURS:
        call = "from medaug.cli import main; main()"
        command = [sys.executable, "-c", call, "receive", "--out", str(out), "--port", str(port), "--ae-title", "BENCH"]
    else:
        out.mkdir(parents=True)
        pdu = ["-pdu", str(LARGEST_PDU)] if which == TUNED else []
        command = [str(dcmtk("storescp")), "-aet", "BENCH", *pdu, "-od", str(out), str(port)]
    tuning = {"TCP_NODELAY": "1"} if which == TUNED else {}
    process = subprocess.Popen(command, env={**os.environ, **tuning}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGTERM if which == OURS else signal.SIGKILL)
        process.wait(60)


def resident_bytes(pid: int) -> int:
    """Resident set of a process now; 0 when it has gone."""
    with suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def one_turn(which: str, files: Path, out: Path, number: int) -> dict[str, Any]:
    """Seconds that storescu takes for all files, and the resident set of the receiver over that time."""
    shutil.rmtree(out, ignore_errors=True)
    port = free_port()
    with receiver(which, out, port) as process:
        time.sleep(0.5)
        samples: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.1):
                samples.append(resident_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        command = [str(dcmtk("storescu")), "+sd", "-aec", "BENCH", "127.0.0.1", str(port), str(files)]
        done = subprocess.run(command, env={**os.environ, "TCP_NODELAY": "1"}, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        stop.set()
        watcher.join()
    came = sum(1 for path in out.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts[-2:]))
    if done.returncode or came != number:
        raise SystemExit(f"{which}: storescu ended with {done.returncode}, {came} of {number} files came.\n{done.stderr[-500:]}")
    shutil.rmtree(out)
    quarter = max(len(samples) // 4, 1)
    return {
        "receiver": which,
        "seconds": round(seconds, 3),
        "rss_first_quarter": max(samples[:quarter], default=0),
        "rss_last_quarter": max(samples[-quarter:], default=0),
        "rss_peak": max(samples, default=0),
    }


def fsync_milliseconds(folder: Path, size: int) -> float:
    """Median time of an fsync after writing a file of `size` bytes."""
    times = []
    for _ in range(30):
        with open(folder / "fsync.tmp", "wb") as stream:
            stream.write(os.urandom(size))
            stream.flush()
            start = time.perf_counter()
            os.fsync(stream.fileno())
            times.append(1000 * (time.perf_counter() - start))
        (folder / "fsync.tmp").unlink()
    return round(statistics.median(times), 3)


def main() -> None:
    """Measure, print and record one row."""
    parser = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--files", type=int, default=2000, help="files in each turn")
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--turns", type=int, default=3, help="turns of each receiver")
    parser.add_argument("--work", type=Path, default=WORK / NAME, help="folder for the files; removed at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()
    for program in ("storescp", "storescu"):
        if dcmtk(program) is None:
            raise SystemExit(f"{program} is not installed; apt-get install dcmtk")
    shutil.rmtree(options.work, ignore_errors=True)
    write_files(options.work / "files", options.files, options.size, options.seed)
    fsync_ms = fsync_milliseconds(options.work, 2 * options.size**2)
    turns: list[dict[str, Any]] = []
    for turn in range(options.turns):
        for which in ORDER[turn % 3 :] + ORDER[: turn % 3]:
            turns.append(one_turn(which, options.work / "files", options.work / "out", options.files))
            print(json.dumps(turns[-1]), file=sys.stderr)
    shutil.rmtree(options.work)
    medians = {which: statistics.median(one["seconds"] for one in turns if one["receiver"] == which) for which in ORDER}
    ours = [one for one in turns if one["receiver"] == OURS]
    row = {
        "benchmark": NAME,
        "command": command_of(parser, options),
        "settings": settings_of(options),
        "ratio": round(medians[OURS] / medians[THEIRS], 3),
        "ratio_to_tuned": round(medians[OURS] / medians[TUNED], 3),
        "fsync_ms": fsync_ms,
        "bar": 1.5,
        "median_seconds": medians,
        "files_per_second": {which: round(options.files / seconds, 1) for which, seconds in medians.items()},
        "rss_growth_bytes": max(one["rss_last_quarter"] - one["rss_first_quarter"] for one in ours),
        "rss_peak_bytes": max(one["rss_peak"] for one in ours),
        "turns": turns,
        **environment(),
    }
    print(json.dumps(row, indent=2))
    if not options.no_record:
        record(row, NAME)


if __name__ == "__main__":
    main()
