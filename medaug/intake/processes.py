"""All items read, in this process or in several, and put together in their order.

Which process read a file changes nothing of the result. A process takes a few files at a time, with the rows of the label
table that may be about them, and twice as many parts wait as there are processes: its memory does not grow with the number
of files. Of what it read, this process keeps what the decisions need and puts the rest on the disk.
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
from medaug.intake.join import Known, Table
from medaug.intake.pseudonyms import Pseudonyms
from medaug.intake.read import Done, Quarantine, Reader, Suspects
from medaug.intake.records import IntakeOptions, Item, Record, quarantine_name
from medaug.intake.scan import Scan
from medaug.intake.spool import Spool, plain
from medaug.io.dicom_elements import stay_quiet

CHUNK = 8
FEW = 64  # files that are not worth starting processes for


def read_records(
    found: Scan,
    options: IntakeOptions,
    folder: Path | None,
    quarantine: Quarantine,
    advance: Callable[[int], None],
    suspects: Suspects,
    spool: Spool,
    pseudonyms: Pseudonyms,
) -> tuple[list[Record], Table]:
    """Read all images, write those with a label to ``folder/images`` (None writes nothing).

    Faults of single files go to the quarantine, and so do images without label and labels without image.

    Args:
        suspects: receives the pictures that may hold text.
        spool: receives facts and thumbnails.
        pseudonyms: what names series.
    """
    if folder is not None:
        with storage.storage_errors(folder.name):
            (folder / "images").mkdir(exist_ok=True)
    table = Table(options, found.items)
    records: list[Record] = []
    taken: dict[str, int] = {}
    reader = Reader(options, table.by_position, folder)
    for item, done in zip(found.items, _all_done(found.items, table, reader), strict=True):
        table.add_seen(done.used, done.restored)
        quarantine.rows.extend(done.quarantine.rows)
        quarantine.places |= done.quarantine.places
        suspects.searched += done.searched
        for suspect in done.suspects:
            suspects.add(suspect)
        for record in done.records:
            record.item = item
            record.case_id = case_id_of(record, taken, records)
            if folder is not None:
                settle_image(folder, record)
            _spool(record, spool, pseudonyms)
            _share(record, records[-1] if records else record)
            records.append(record)
        advance(1)
    for number in table.unused():
        quarantine.add(
            f"table row {number}", "label-without-image", "No image of the source belongs to this row of the label table."
        )
    return records, table


def _spool(record: Record, spool: Spool, pseudonyms: Pseudonyms) -> None:
    """Put on the disk what no decision needs."""
    facts = dict(record.acquisition)
    if record.item.series:  # one pseudonym for the images of a series: exports put them into one series again
        facts["series"] = pseudonyms.hexadecimal("series", record.item.series)
    if record.intensity["kind"] == "percentile":  # differs in every image, so every case says it
        facts["intensity"] = plain(record.intensity)
        record.intensity = {"kind": "percentile"}
    record.acquisition = spool.put(facts)
    if record.thumbnail is not None:
        record.place, record.thumbnail = spool.add(record.thumbnail), None


SHARED = (
    "labels",
    "split",
    "group_keys",
    "secrets",
    "position",
    "volume",
    "modality",
    "intensity",
    "votes",
    "burned_in",
    "suffix",
)


def _share(record: Record, other: Record) -> None:
    """Let images that came one after the other hold the same object where they hold equal ones, as most of a series do."""
    record.source = record.item.sha256 if record.item.sha256 == record.source else record.source
    for name in SHARED:
        if getattr(record, name) == getattr(other, name):
            setattr(record, name, getattr(other, name))


def _all_done(items: Sequence[Item], table: Table, reader: Reader) -> Iterator[Done]:
    """What became of every item, in their order."""
    workers = reader.options.workers
    if workers < 2 or len(items) < FEW:
        yield from (reader.read(index, item, table.known(index, item)) for index, item in enumerate(items))
        return
    parts = [range(start, min(start + CHUNK, len(items))) for start in range(0, len(items), CHUNK)]
    while parts:
        with _pool(workers, reader) as pool:
            waiting: list[Any] = []
            upcoming = iter(parts)
            try:
                for _ in range(2 * workers):
                    _submit(pool, waiting, upcoming, items, table)
                while waiting:
                    done = waiting[0][1].result()
                    part, _ = waiting.pop(0)
                    parts = parts[1:]
                    _submit(pool, waiting, upcoming, items, table)
                    yield from done
            except BrokenProcessPool:
                pass
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if parts:  # a file killed its process: read the part that was due file by file
            yield from _one_by_one(parts[0], items, table, reader)
            parts = parts[1:]


def _submit(
    pool: ProcessPoolExecutor, waiting: list[Any], upcoming: Iterator[range], items: Sequence[Item], table: Table
) -> None:
    part = next(upcoming, None)
    if part is not None:
        waiting.append(
            (part, pool.submit(_read_part, [(index, items[index], table.known(index, items[index])) for index in part]))
        )


def _one_by_one(part: range, items: Sequence[Item], table: Table, reader: Reader) -> Iterator[Done]:
    """Each file in a process of its own, so that the one that kills it is known."""
    for index in part:
        try:
            with _pool(1, reader) as pool:
                yield from pool.submit(_read_part, [(index, items[index], table.known(index, items[index]))]).result()
        except BrokenProcessPool:
            done = Done()
            done.quarantine.add(
                quarantine_name(items[index]),
                "reader-crashed",
                "The process that read this file died; the file may be an attack.",
                items[index].relative,
            )
            yield done


def _pool(workers: int, reader: Reader) -> ProcessPoolExecutor:
    # Not fork: the tracking of this process runs threads, whose locks a forked child would inherit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(reader,))


_reader: Reader | None = None


def _start_process(reader: Reader) -> None:
    global _reader  # the usual place for what a process of a pool needs for every task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    os.environ["OMP_NUM_THREADS"] = "1"
    stay_quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reader = reader


def _end_with_parent() -> None:
    """A process of a pool waits for its next task for ever, also when whoever gave the tasks was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_NO_ITEM = Item("", "", "")


def _read_part(part: Sequence[tuple[int, Item, Known]]) -> list[Done]:
    assert _reader is not None
    results = []
    for index, item, known in part:
        done = _reader.read(index, item, known)
        for record in done.records:
            record.item = _NO_ITEM  # who asked has it, and needs no copy
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


def case_id_of(record: Record, taken: dict[str, int], records: Sequence[Record]) -> str:
    """First 12 hex digits of the source's sha256, with the slice; copies of one file share an id, and one of them stays.

    Args:
        taken: id -> index of the first record that has it; gets the new one.
        records: before this one.
    """
    own = _place_in_source(record)
    base = record.source[:12] + own[1]
    name, number = base, 0
    while (first := taken.setdefault(name, len(records))) != len(records) and _place_in_source(records[first]) != own:
        number += 1
        name = f"{base}_{number:03d}"
    return name


def _place_in_source(record: Record) -> tuple[str, str]:
    return record.source, "" if record.item.kind == "npz" else record.position
