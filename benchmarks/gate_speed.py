"""Time and memory of the gate's comparisons once features are there: neighbours, copies, closeness, fidelity.

Pictures and features are drawn: their content does not matter to the time. Neighbours are held against scikit-learn's brute force in
the same process, turn by turn; the whole is one process's wall time and peak memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import command_of, environment, record, settings_of
from sklearn.neighbors import NearestNeighbors

from medaug.draws import numpy_generator
from medaug.quality.alignment import PixelIndex, working_images
from medaug.quality.copy_ruler import near_in
from medaug.quality.copy_statistics import closeness
from medaug.quality.fidelity import kid, neighbourhood_metrics
from medaug.quality.images import BATCH_SIZE
from medaug.quality.mmd import gaussian_mmd
from medaug.quality.neighbours import nearest
from medaug.quality.outliers import METHODS

NAME = "gate_speed"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def turns(x: np.ndarray, y: np.ndarray, rounds: int) -> dict[str, Any]:
    """Best of `rounds` for ours and scikit-learn's, and whether they agree."""
    ours, theirs = [], []
    reference = NearestNeighbors(n_neighbors=1, algorithm="brute")
    for _ in range(rounds):
        seconds, (distances, indices) = timed(lambda: nearest(x, y))
        ours.append(seconds)
        seconds, (expected, places) = timed(lambda: reference.fit(y).kneighbors(x))
        theirs.append(seconds)
    agree = float((indices == places).mean())
    worst = float(np.abs(distances - expected).max())
    return {"ours": min(ours), "scikit_learn": min(theirs), "ratio": min(ours) / min(theirs), "agree": agree, "worst": worst}


def peak_mb() -> float:
    """Largest resident memory since the last call of `forget_peak`, in MB of 2^20 bytes (Linux)."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) / 1024


def forget_peak() -> None:
    """Let the next `peak_mb` start from what is resident now (Linux, proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def stages(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each comparison."""
    draw = numpy_generator(NAME, options.seed)
    synthetic, real, held = (
        draw.standard_normal((n, options.features)) for n in (options.synthetic, options.real, max(50, options.real // 10))
    )
    labels = np.arange(options.real) % 4
    groups = [str(index) for index in range(options.real)]
    pictures = [
        torch.from_numpy(draw.uniform(-1, 1, (n, 1, options.size, options.size))).float()
        for n in (options.synthetic, options.real)
    ]
    index = PixelIndex(working_images(pictures[1].split(BATCH_SIZE)), np.arange(options.real))
    work: dict[str, Callable[[], Any]] = {
        "copies, features": lambda: near_in(real, groups, synthetic),
        "copies, pixels": lambda: index.match(working_images(pictures[0].split(BATCH_SIZE))),
        "closeness": lambda: closeness(synthetic, real, held),
        "KID": lambda: kid(real, synthetic),
        "precision, recall, density, coverage": lambda: neighbourhood_metrics(real, synthetic),
        "MMD": lambda: gaussian_mmd(real, synthetic),
        "Mahalanobis": lambda: METHODS["mahalanobis"](real, labels)(synthetic),
        "k-NN": lambda: METHODS["knn"](real, labels)(synthetic),
    }
    found = {}
    for name, function in work.items():
        forget_peak()
        found[name] = {"seconds": timed(function)[0], "peak_mb": peak_mb()}
        print(f"{name:<40}{found[name]['seconds']:8.1f} s{found[name]['peak_mb']:8.0f} MB", flush=True)
    return found


def main() -> None:
    """Measure, print and record a row."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=int, default=10_000)
    parser.add_argument("--real", type=int, default=5_000)
    parser.add_argument("--features", type=int, default=1088, help="of random_conv")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the neighbours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()
    parts = stages(options)
    seconds, memory = sum(part["seconds"] for part in parts.values()), max(part["peak_mb"] for part in parts.values())
    draw = numpy_generator(NAME, options.seed, "neighbours")
    x, y = (draw.standard_normal((n, options.features)) for n in (options.synthetic, options.real))
    found = turns(x, y, options.rounds)
    print(f"all {seconds:.1f} s, peak {memory:.0f} MB; neighbours: {found}")
    facts = {"command": command_of(parser, options), "settings": settings_of(options)}
    row = facts | {"parts": parts, "total": seconds, "peak_mb": memory, "neighbours": found} | environment()
    if not options.no_record:
        record(row | {"torch_threads": torch.get_num_threads()}, NAME)


if __name__ == "__main__":
    main()
