"""Peak memory: training at 64 px, and generating many images against generating few from the same run.

Each part is one stage of the bundle in a process of its own, which reports its peak resident set when it ends: previews,
checkpoints, tracking and the finished cohort included. Started again after a kill it goes on with the part it had reached;
a part itself starts afresh, because half a part has another peak. Example:

    python benchmarks/memory.py --cohort runs/ct64
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from rows import command_of, environment, make_parser, open_work, settings_of

from medaug.cohort import read_cohort
from medaug.storage import read_json, write_json
from medaug.workflow import load_config, run_stage

NAME = "memory"
BUNDLE = "guided_ddpm"
EPOCH_LENGTH = 50


def peak_bytes() -> int:
    """Peak resident set of this process; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run_child(task: Mapping[str, Any], report: Path) -> None:
    """One stage in this process; writes its peak, before it and after it, and its seconds."""
    import torch  # counts as part of the start, as it does for every stage

    before, start = peak_bytes(), perf_counter()
    run_stage(BUNDLE, task["stage"], task["profile"], task["overrides"])
    row = {"peak_bytes": peak_bytes(), "before_bytes": before, "seconds": perf_counter() - start}
    write_json(report, row | {"torch_threads": torch.get_num_threads()})


def measure(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`run_child` in a fresh process.

    The parent imports neither torch nor MONAI: Linux hands the peak of the process that forks on to the one it starts.
    """
    output = Path(task["overrides"]["output_dir"])
    shutil.rmtree(output, ignore_errors=True)
    report = folder / "report.tmp"
    report.unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(task), str(report)], check=True, cwd=folder
    )
    part = {**read_json(report), "parent_peak_bytes": peak_bytes()}
    report.unlink()
    if task["stage"] == "generating":
        shutil.rmtree(output)
    return part


def even_counts(total: int, num_classes: int) -> list[int]:
    """`total` images spread over the classes."""
    return [total // num_classes + (label < total % num_classes) for label in range(num_classes)]


def tasks(options: Any, num_classes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> stage, profile and overrides of every part, in the order they must run."""
    tracking = {"enabled": not options.no_tracking, "uri": f"sqlite:///{folder / 'mlflow.db'}", "experiment": NAME}
    common = {"dataset_dir": str(options.cohort.resolve()), "seed": options.seed, "tracking": tracking, "device_name": "cpu"}
    length = min(EPOCH_LENGTH, options.iterations)
    training = common | {"epoch_length": length, "max_epochs": -(-options.iterations // length)}
    training |= {"output_dir": str(folder / "run")}
    parts = {"training": {"stage": "training", "profile": options.profile, "overrides": training}}
    # Both sizes use the same batch: else the small plan would have smaller ones, and less memory for that reason alone.
    batch = min(load_config(BUNDLE, "generating", options.profile)["generation_batch_size"], options.few // num_classes)
    for name, total in (("generating_few", options.few), ("generating_many", options.many)):
        chosen = {
            "run_dir": str(folder / "run"),
            "output_dir": str(folder / name),
            "counts": even_counts(total, num_classes),
            "generation_batch_size": max(1, batch),
            "sampler_settings#num_inference_steps": options.num_inference_steps,
        }
        parts[name] = {"stage": "generating", "profile": options.profile, "overrides": common | chosen}
    return parts


def main() -> None:
    """Measure, write a row to benchmarks/results/memory.json, and print it."""
    if sys.argv[1:2] == ["--child"]:
        run_child(json.loads(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--profile", default="cpu64")
    parser.add_argument("--iterations", type=int, default=300, help="training iterations, in epochs of 50")
    parser.add_argument("--few", type=int, default=100, help="images of the small plan")
    parser.add_argument("--many", type=int, default=10000, help="images of the large plan")
    parser.add_argument("--num-inference-steps", type=int, default=5, help="memory does not depend on them, time does")
    parser.add_argument("--no-tracking", action="store_true", help="leave MLflow out")
    options = parser.parse_args()

    cohort = read_cohort(options.cohort)
    around = environment()
    facts = {"cohort": cohort.name, "cohort_sha256": cohort.content_sha256, "image_size": cohort.image_size}
    work = open_work(options, facts, around)
    parts = {}
    for name, task in tasks(options, len(cohort.classes), work.folder).items():
        parts[name] = work.read(name) or measure(task, work.folder)
        work.write(name, parts[name])
        print(f"{name}: peak {parts[name]['peak_bytes'] / 1e9:.3f} GB in {parts[name]['seconds']:.0f} s", flush=True)
    ratio = parts["generating_many"]["peak_bytes"] / parts["generating_few"]["peak_bytes"]
    row = {
        "command": command_of(parser, options),
        "settings": settings_of(options),
        **facts,
        "training_peak_gb": parts["training"]["peak_bytes"] / 1e9,
        "ratio_many_to_few": ratio,
        "parts": parts,
        **around,
    }
    work.finish(row, NAME, not options.no_record)
    print(f"training {row['training_peak_gb']:.2f} GB; {options.many} images take {ratio:.3f} times the memory of {options.few}")


if __name__ == "__main__":
    main()
