"""All items read, in this process or in several, and put together in their order.

Which process read a file changes nothing of the result. A process takes a few files at a time and as many parts wait as there
are processes, so that memory does not grow with the number of files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.intake.join import Joiner
from medaug.intake.read import Done, Quarantine, Reader, Suspects
from medaug.intake.records import IntakeOptions, Item, Record, quarantine_name
from medaug.intake.scan import Scan
from medaug.io.dicom_elements import stay_quiet

CHUNK = 8
FEW = 64  # files that are not worth starting processes for


def read_records(
    found: Scan,
    options: IntakeOptions,
    folder: Path | None,
    quarantine: Quarantine,
    advance: Callable[[int], None],
    suspects: Suspects | None = None,
) -> tuple[list[Record], Joiner]:
    """Read all images, write those with a label to ``folder/images`` (None writes nothing), keep thumbnails.

    Faults of single files go to the quarantine, and so do images without label and labels without image.

    Args:
        suspects: receives the pictures that may hold text.
    """
    if folder is not None:
        with storage.storage_errors(folder.name):
            (folder / "images").mkdir(exist_ok=True)
    joiner = Joiner(options, found.items)
    suspects = Suspects() if suspects is None else suspects
    records: list[Record] = []
    taken: dict[str, tuple[str, str]] = {}
    for done in _all_done(found.items, options, joiner, folder):
        joiner.add_seen(done.used, done.restored)
        quarantine.rows.extend(done.quarantine.rows)
        quarantine.places |= done.quarantine.places
        suspects.searched += done.searched
        for suspect in done.suspects:
            suspects.add(suspect)
        for record in done.records:
            record.case_id = case_id_of(record, taken)
            if folder is not None:
                settle_image(folder, record)
            records.append(record)
        advance(1)
    for row in joiner.unused():
        quarantine.add(
            f"table row {row.number}", "label-without-image", "No image of the source belongs to this row of the label table."
        )
    return records, joiner


def _all_done(items: Sequence[Item], options: IntakeOptions, joiner: Joiner, folder: Path | None) -> Iterator[Done]:
    """What became of every item, in their order."""
    if options.workers < 2 or len(items) < FEW:
        reader = Reader(options, joiner, folder)
        yield from (reader.read(index, item) for index, item in enumerate(items))
        return
    parts = [range(start, min(start + CHUNK, len(items))) for start in range(0, len(items), CHUNK)]
    while parts:
        with _pool(options.workers, options, joiner, folder) as pool:
            waiting: list[Any] = []
            upcoming = iter(parts)
            try:
                for _ in range(2 * options.workers):
                    _submit(pool, waiting, upcoming, items)
                while waiting:
                    done = waiting[0][1].result()
                    part, _ = waiting.pop(0)
                    parts = parts[1:]
                    _submit(pool, waiting, upcoming, items)
                    yield from done
            except BrokenProcessPool:
                pass
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if parts:  # a file killed its process: read the part that was due file by file
            yield from _one_by_one(parts[0], items, options, joiner, folder)
            parts = parts[1:]


def _submit(pool: ProcessPoolExecutor, waiting: list[Any], upcoming: Iterator[range], items: Sequence[Item]) -> None:
    part = next(upcoming, None)
    if part is not None:
        waiting.append((part, pool.submit(_read_part, [(index, items[index]) for index in part])))


def _one_by_one(
    part: range, items: Sequence[Item], options: IntakeOptions, joiner: Joiner, folder: Path | None
) -> Iterator[Done]:
    """Each file in a process of its own, so that the one that kills it is known."""
    for index in part:
        try:
            with _pool(1, options, joiner, folder) as pool:
                yield from pool.submit(_read_part, [(index, items[index])]).result()
        except BrokenProcessPool:
            done = Done()
            done.quarantine.add(
                quarantine_name(items[index]),
                "reader-crashed",
                "The process that read this file died; the file may be an attack.",
                items[index].relative,
            )
            yield done


def _pool(workers: int, options: IntakeOptions, joiner: Joiner, folder: Path | None) -> ProcessPoolExecutor:
    # Not fork: the tracking of this process runs threads, whose locks a forked child would inherit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(options, joiner, folder))


_reader: Reader | None = None


def _start_process(options: IntakeOptions, joiner: Joiner, folder: Path | None) -> None:
    global _reader  # the usual place for what a process of a pool needs for every task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    os.environ["OMP_NUM_THREADS"] = "1"
    stay_quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reader = Reader(options, joiner, folder)


def _end_with_parent() -> None:
    """A process of a pool waits for its next task for ever, also when whoever gave the tasks was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read_part(part: Sequence[tuple[int, Item]]) -> list[Done]:
    assert _reader is not None
    results = []
    for index, item in part:
        done = _reader.read(index, item)
        done.used, done.restored = _reader.joiner.take_seen()
        results.append(done)
    return results


def image_path(record: Record) -> str:
    """Path of a case's image inside the cohort."""
    return f"images/{record.case_id}{record.suffix}"


def settle_image(folder: Path, record: Record) -> None:
    """Give the staged image the name of its case; the copy of a file has the same."""
    staged, final = folder / "images" / record.staged, folder / image_path(record)
    if final.exists():
        staged.unlink()
    else:
        staged.rename(final)
    record.staged = ""


def case_id_of(record: Record, taken: dict[str, tuple[str, str]]) -> str:
    """First 12 hex digits of the source's sha256, with the slice; copies of one file share an id, and one of them stays."""
    own = (record.source, "" if record.item.kind == "npz" else record.position)
    base = record.source[:12] + own[1]
    name, number = base, 0
    while taken.setdefault(name, own) != own:
        number += 1
        name = f"{base}_{number:03d}"
    return name
