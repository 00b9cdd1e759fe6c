"""Files per second and memory of `medaug intake` on single-frame CT, beside MONAI's reading of the same files.

Writes N CT files of 512 x 512 (drawn chests with noise that differs in every file, series of 50 slices) with a label table. In
turns, `medaug intake` makes a cohort of them in 2 processes, and MONAI's ``LoadImage(reader="PydicomReader")`` reads them in 2 workers of
a DataLoader. MONAI only reads; intake also joins labels, scales, resizes, searches duplicates and writes PNG files.
The peak of resident memory is measured in a process of its own for N and for 4 N files: that of the process, and for every
worker that of the largest process it started.

    python benchmarks/intake_speed.py                 5,000 and 20,000 files, about 13 GB of disk in --work
    python benchmarks/intake_speed.py --files 60 --no-record
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rows import WORK, command_of, environment, record, settings_of

from medaug.phantom import draw_patient
from medaug.storage import write_csv

SIZE = 512
SLICES_PER_SERIES = 50
NUM_BODIES = 16
BOUNDS = {"ratio": 1.5, "peak_megabytes": 1024, "memory_growth": 1.1}


def write_files(folder: Path, count: int) -> Path:
    """Write CT files `count` in all and ``labels.csv`` beside them; what is there already stays. Returns the table."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    rows = []
    noise = np.random.default_rng(0).normal(0, 15, (2 * SIZE, 2 * SIZE))  # HU, as in a scan of a chest
    drawn: dict[int, np.ndarray] = {}
    for number in range(count):
        patient, index = divmod(number, min(SLICES_PER_SERIES, max(1, count // 8)))  # two patients of each class at least
        sop = f"2.25.{1_000_000 + number}"
        rows.append({"sop": sop, "label": "ab"[patient % 2]})
        path = folder / "DICOM" / f"PA{patient:06d}" / f"IM{index:06d}"
        if path.exists():
            continue
        # A drawn chest per series and another part of the noise per file: writing must not take longer than reading.
        body = patient % NUM_BODIES
        if body not in drawn:
            drawn[body] = next(iter(draw_patient(body + 1, body % 4, SIZE, 0))).hounsfield
        y, x = np.random.default_rng(number).integers(0, SIZE, 2)
        stored = (drawn[body] + 1024 + noise[y : y + SIZE, x : x + SIZE]).clip(0, 4095).astype("<u2")
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        elements = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": sop,
            "StudyInstanceUID": f"2.25.{1_000 + patient}",
            "SeriesInstanceUID": f"2.25.{2_000_000 + patient}",
            "FrameOfReferenceUID": f"2.25.{3_000_000 + patient}",
            "PatientID": f"BENCH{patient:06d}",
            "PatientName": f"BENCH^{patient:06d}",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "Modality": "CT",
            "InstanceNumber": index + 1,
            "ImagePositionPatient": [-180, -180, 2.5 * index],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.703125, 0.703125],
            "SliceThickness": "2.5",
            "Rows": SIZE,
            "Columns": SIZE,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "WindowCenter": "40",
            "WindowWidth": "400",
            "RescaleIntercept": "-1024",
            "RescaleSlope": "1",
            "RescaleType": "HU",
        }
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.PixelData = stored.tobytes()
        dataset["PixelData"].VR = "OW"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
    write_csv(folder / "labels.csv", rows, ("sop", "label"))
    return folder / "labels.csv"


def take_in(folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """One whole intake; returns its seconds and how many images it used."""
    from medaug.intake.build import IntakeOptions, run_intake

    shutil.rmtree(out, ignore_errors=True)
    options = IntakeOptions(
        source=folder / "DICOM",
        out=out,
        labels=folder / "labels.csv",
        key="sop",
        label_column="label",
        workers=workers,
        pseudonym_key=out.parent / "pseudonym.key",
    )
    start = time.perf_counter()
    result = run_intake(options)
    return {"seconds": time.perf_counter() - start, "used": result.counts["used"]}


def monai_read(folder: Path, workers: int) -> float:
    """Seconds that MONAI takes to read every file once, workers started before the clock as their imports take long."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import LoadImage

    files = [str(path) for path in sorted((folder / "DICOM").rglob("IM*"))]
    warm_up = [files[0]] * (4 * max(workers, 1))
    loader = DataLoader(
        Dataset(warm_up + files, LoadImage(reader="PydicomReader", image_only=True)), batch_size=1, num_workers=workers
    )
    start = time.perf_counter()
    count = 0
    for _ in loader:
        count += 1
        if count == len(warm_up):
            start = time.perf_counter()
    if count != len(files) + len(warm_up):
        raise SystemExit("MONAI read another number of files than there are.")
    return time.perf_counter() - start


def peak_of(folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """Peak resident memory in MB of an intake in a new process: its own, plus its largest child's for every worker."""
    command = [sys.executable, __file__, "--child", str(folder), str(out), str(workers)]
    peaks: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            # The last look at each process counts: between fork and exec it shows the memory of the one that started it.
            peaks |= _peaks_below(process.pid)
            time.sleep(0.1)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        raise SystemExit("The intake whose memory was to be measured failed.")
    found = json.loads(text.splitlines()[-1])
    found["worker_megabytes"] = max(peaks.values(), default=0.0)
    return found | {"megabytes": found["own_megabytes"] + found["worker_megabytes"] * max(workers, 0)}


def _peaks_below(pid: int) -> dict[int, float]:
    """Peak resident memory in MB of all processes that a process started, directly or not."""
    found: dict[int, float] = {}
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(number) for thread in threads for number in (thread / "children").read_text().split()]
    except OSError:  # ended meanwhile
        return found
    for number in children:
        with contextlib.suppress(OSError, StopIteration):
            found[number] = _peak(number)
        found |= _peaks_below(number)
    return found


def _peak(process: int | str) -> float:
    """Peak resident memory in MB of one process; not `ru_maxrss`, which starts at the peak of the process that started it."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def child(folder: Path, out: Path, workers: int) -> None:
    """The process that `peak_of` starts."""
    found = take_in(folder, out, workers)
    print(json.dumps(found | {"own_megabytes": _peak("self")}))


def measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The row."""
    work = options.work.resolve()
    small, large, out = work / "small", work / "large", work / "cohort"
    write_files(small, options.files)
    write_files(large, 4 * options.files)
    peaks = {name: peak_of(folder, out, options.workers) for name, folder in (("n", small), ("4n", large))}
    own: list[float] = []
    others: list[float] = []
    for _ in range(options.repeats):  # in turns, so that a busy minute of the machine meets both
        found = take_in(small, out, options.workers)
        own.append(found["seconds"])
        others.append(monai_read(small, options.workers))
    ratios = [other / mine for mine, other in zip(own, others, strict=True)]
    return {
        "benchmark": "intake_speed",
        "command": command_of(parser, options),
        "settings": settings_of(options),
        "environment": environment(),
        "images_used": peaks["n"]["used"],
        "medaug_files_per_second": [options.files / seconds for seconds in own],
        "monai_files_per_second": [options.files / seconds for seconds in others],
        "ratio": statistics.median(ratios) if ratios else None,
        "peak_megabytes": peaks["n"]["megabytes"],
        "peak_megabytes_4n": peaks["4n"]["megabytes"],
        "memory_growth": peaks["4n"]["megabytes"] / peaks["n"]["megabytes"],
        "peaks": peaks,
        "bounds": BOUNDS,
    }


def main() -> None:
    """Parse, measure, print and write the row."""
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        prog="intake_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--files", type=int, default=5000, help="N; 4 N are written for the second measurement of memory")
    parser.add_argument("--repeats", type=int, default=3, help="turns of medaug and MONAI; 0 measures memory only")
    parser.add_argument("--workers", type=int, default=2, help="processes of either side")
    parser.add_argument("--work", type=Path, default=WORK / "intake_speed", help="where the files and the cohort go")
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    options = parser.parse_args()
    row = measure(parser, options)
    print(json.dumps(row, indent=2))
    if not options.no_record:
        record(row, "intake_speed")


if __name__ == "__main__":
    main()
