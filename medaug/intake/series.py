"""From files to series: which images belong together, in which order, which are set aside, which slices are taken.

Only headers are read here. Images without orientation and position, as X-rays are, pass through untouched.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from medaug import storage
from medaug.errors import DataError
from medaug.intake.identity import known_patient, patient_of
from medaug.intake.masks import lesion_slice, stem_of
from medaug.intake.records import IntakeOptions, Item, quarantine_name
from medaug.io import dicom, nifti, stacks
from medaug.io.dicom_header import DicomHeader

MIN_PARALLEL = 400  # headers; below, starting processes takes longer than reading
_CHUNK = 64
_FACTS = [fact.name for fact in fields(DicomHeader)]
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


@dataclass
class Arrangement:
    """What `arrange` decided.

    Attributes:
        items: those that stay, sorted by their place in the source; an image of a series knows its `series` (a key of
            it that must not be published) and `slice_index`, a file of several slices its chosen `slices`.
        quarantine: rows of file, code, reason for what was left out.
        notes: sentences for the report.
        places: what the quarantine calls a file -> its path inside the source; for the mapping table only.
    """

    items: list[Item]
    quarantine: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class _Image:
    """A DICOM file with its header, and other files of the very same instance that go its way."""

    item: Item
    header: DicomHeader
    copies: Sequence[Item] = ()

    def items(self) -> list[Item]:
        return [self.item, *self.copies]

    def order(self) -> tuple[str, str]:
        return self.header.sop, self.item.relative


@dataclass
class _Volume:
    """Slices that make one volume, from the feet to the head."""

    images: list[_Image]
    key: str
    positions: list[float]


class _Arranger:
    def __init__(self, options: IntakeOptions) -> None:
        self.options = options
        self.left_out: set[int] = set()  # id() of items
        self.rows: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.places: dict[str, str] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def leave_out(self, images: Iterable[_Image], code: str, reason: str) -> None:
        for image in images:
            for item in image.items():
                if id(item) not in self.left_out:
                    self.left_out.add(id(item))
                    name = quarantine_name(item, image.header.secrets)
                    self.places[name] = item.relative
                    self.rows.append({"file": name, "code": code, "reason": reason})

    def remaining(self, images: Iterable[_Image]) -> list[_Image]:
        return [image for image in images if id(image.item) not in self.left_out]


def arrange(items: Sequence[Item], options: IntakeOptions) -> Arrangement:
    """Group DICOM images by study, series and geometry, sort them, and set aside what does not belong.

    Left out with a code: `localizer` (ImageType), `geometry-differs` (a few images of another plane or size among the
    slices of a series), `duplicate-instance` (same SOP Instance UID and pixels as another file, which stays),
    `conflicting-instance` (same UID, other pixels: none stays), `duplicate-position` (a second slice at one place that
    no phase explains). Images of several patients in one series are divided by
    patient. Phases of a 4-D series become volumes of their own. With `options.strict` a series with such
    duplicates, with several patients (`patients-in-one-series`) or planes (`geometry-mixed`), images without position among slices (`geometry-missing`),
    missing slices (`slice-missing`) or uneven distances (`slice-spacing-uneven`) is left out whole; else the report says
    so. With `options.slices` "lesion" each volume keeps the slice with the largest mask: see `masks.find_mask`.

    Args:
        items: as scanned; their fields `declared`, `key`, `series`, `slice_index` and `slices` are set.
        options: strict, slices, masks, dimensions, key, labels and workers are used.

    Returns:
        The result depends neither on the order of `items` nor on the number of processes.
    """
    work = _Arranger(options)
    images = _read_headers(items, options)
    images.sort(key=_Image.order)
    images = _settle_instances(work, images)
    localizers = [image for image in work.remaining(images) if "LOCALIZER" in image.header.image_type]
    work.leave_out(localizers, "localizer", "The image is a localizer: its ImageType says so.")
    volumes = [found for uids, members in _series(work, images) for found in _volumes(work, uids, members)]
    for found in volumes:
        _place(found)
    if options.slices == "lesion":
        _take_lesions(work, items, volumes)
    kept = sorted((item for item in items if id(item) not in work.left_out), key=lambda item: (item.relative, item.split or ""))
    work.notes += [f"{count} {text}" for text, count in sorted(work.counts.items())]
    return Arrangement(kept, work.rows, work.notes, work.places)


def _series(work: _Arranger, images: Sequence[_Image]) -> list[tuple[tuple[str, ...], list[_Image]]]:
    """Images by study, series and patient: a UID that two patients share, as copied phantoms do, makes them no volume."""
    found: dict[tuple[str, str], dict[str, list[_Image]]] = defaultdict(lambda: defaultdict(list))
    for image in work.remaining(images):
        header = image.header
        if header.series or header.study:
            # A single fact is enough to tell two apart here; none joins what the UIDs do not.
            patient = (
                patient_of(header.patient, header.patient_name, header.birth_date) or f"{header.patient_name} {header.birth_date}"
            )
            hashed = storage.sha256_json(known_patient(patient)) if known_patient(patient) else ""
            found[header.study, header.series][hashed].append(image)
    parted: list[tuple[tuple[str, ...], list[_Image]]] = []
    for uids, patients in sorted(found.items()):
        if len(patients) > 1:
            if work.options.strict:
                reason = f"{len(patients)} patients share the Study and Series Instance UID of this image."
                work.leave_out([image for members in patients.values() for image in members], "patients-in-one-series", reason)
                continue
            work.counts[
                "series hold images of several patients (patients-in-one-series); each patient's images are a volume."
            ] += 1
        parted += [((*uids, patient), members) for patient, members in sorted(patients.items())]
    return parted


def _read_headers(items: Sequence[Item], options: IntakeOptions) -> list[_Image]:
    """Headers of the DICOM files but for broken ones, whose fault reading them will name."""
    chosen = [item for item in items if item.kind == "dicom"]
    if options.workers > 1 and len(chosen) >= MIN_PARALLEL:
        # A script without `if __name__ == "__main__"` cannot be imported again: its pool breaks.
        # Processes, since parsing is Python; spawned, since a fork copies the threads' locks of this process.
        context = multiprocessing.get_context("spawn")
        with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            return _with_headers(chosen, pool.map(_header, (item.path for item in chosen), chunksize=_CHUNK), options.key)
    return _with_headers(chosen, map(_header, (item.path for item in chosen)), options.key)


def _header(path: Path) -> DicomHeader | None:
    try:
        return dicom.read_header(path)
    except DataError:
        return None


def _with_headers(items: Sequence[Item], headers: Iterable[DicomHeader | None], key: str) -> list[_Image]:
    """The images of the files whose header could be read; files that follow each other share equal facts.

    Items get what is needed of the headers later. Of the identifiers only the `key` is, and a dict for every file would
    be the largest part of its header.
    """
    images = []
    last, none = DicomHeader(), DicomHeader().identifiers
    for item, header in zip(items, headers, strict=True):
        if header is not None:
            same = {name: value for name in _FACTS if (value := getattr(last, name)) == getattr(header, name)}
            wanted = header.identifiers.get(key, "")
            last = replace(header, **same | {"identifiers": none})
            item.declared, item.key = last.declared, last.sop if last.sop == wanted else wanted
            images.append(_Image(item, last))
    return images


def _settle_instances(work: _Arranger, images: Sequence[_Image]) -> list[_Image]:
    """Each instance once, with the other files that hold it (PS3.5 9: a UID names one object)."""
    same: dict[str, list[_Image]] = defaultdict(list)
    for number, image in enumerate(images):
        same[image.header.sop or f"file {number}"].append(image)
    settled = []
    for copies in same.values():
        if len(copies) < 2:
            settled += copies
            continue
        hashes = [_pixels_sha256(image.item.path) for image in copies]
        # A broken copy says nothing about the others: reading it will name its fault.
        readable = [image for image, found in zip(copies, hashes, strict=True) if found is not None]
        if len(set(hashes) - {None}) > 1:
            reason = f"{len(readable)} files have the same SOP Instance UID and different pixels, so one of them is wrong."
            work.leave_out(readable, "conflicting-instance", reason)
            continue
        if readable and _labelled_alike(work.options, readable):
            work.leave_out(readable[1:], "duplicate-instance", "Another file holds the same instance with the same pixels.")
        elif readable:
            # Each may have a label of its own: labels that differ are found later, by the equal pixels.
            readable[0].copies = [image.item for image in readable[1:]]
        settled += readable[:1]
    return settled


def _labelled_alike(options: IntakeOptions, copies: Sequence[_Image]) -> bool:
    by_name = options.labels is not None and options.key == "file"
    facts = {(image.item.label, image.item.split, image.item.group, image.item.patient) for image in copies}
    return not by_name and len(facts) == 1


def _pixels_sha256(path: Path) -> str | None:
    """Hash of all frames as they are read; None if they cannot be."""
    try:
        parts = [f"{picture.unit} {storage.sha256_bytes(picture.pixels.tobytes())}" for picture in dicom.read_frames(path)]
    except DataError:
        return None
    return storage.sha256_json(parts)


def _volumes(work: _Arranger, uids: tuple[str, ...], images: Sequence[_Image]) -> list[_Volume]:
    """The volumes of one series: one per multi-frame file, one per plane geometry and phase."""
    volumes = []
    for image in images:
        if image.header.frames > 1:
            volumes += _multi_frame(work, uids, image)
    single = [image for image in images if image.header.frames == 1]
    slices = [image for image in single if image.header.orientation is not None and image.header.position is not None]
    if 3 <= len(slices) < len(single):
        others = [image for image in single if image.header.orientation is None or image.header.position is None]
        if work.options.strict:
            work.leave_out(others, "geometry-missing", "The image has no orientation or position, unlike the rest of its series.")
        else:
            work.counts["image(s) have no orientation or position, unlike the rest of their series."] += len(others)
    if not slices:
        return volumes
    clusters = stacks.cluster([image.header for image in slices])
    largest = len(clusters[0])
    main = []
    for members in clusters:
        group = [slices[index] for index in members]
        if len(members) < 3 and 3 * len(members) <= largest:
            reason = "The image has another orientation, size, pixel spacing or frame of reference than the slices of its series."
            work.leave_out(group, "geometry-differs", reason)
        else:
            main.append(group)
    if len(main) > 1 and largest > 1:
        reason = f"The series holds {len(main)} stacks of different plane geometry."
        if work.options.strict:
            work.leave_out(slices, "geometry-mixed", reason)
            return volumes
        work.counts["series hold stacks of different plane geometry; each stack is a volume."] += 1
    for number, group in enumerate(main):
        key = storage.sha256_json([*uids, number] if number else list(uids))
        volumes += _stack(work, key, group)
    return volumes


def _multi_frame(work: _Arranger, uids: tuple[str, ...], image: _Image) -> list[_Volume]:
    header = image.header
    key = storage.sha256_json([*uids, header.sop])
    if header.frame_positions is None or header.orientation is None:
        return [_Volume([image], key, [])]
    positions = [dicom_projected(header, place) for place in header.frame_positions]
    if not stacks.repeated(positions) and _refused(work, [image], positions):
        return []
    return [_Volume([image], key, positions)]


def dicom_projected(header: DicomHeader, place: Sequence[float]) -> float:
    """Position in mm of a frame along the normal of the file's planes."""
    assert header.orientation is not None
    return stacks.projected(header.orientation, place)


def _stack(work: _Arranger, key: str, images: list[_Image]) -> list[_Volume]:
    """Volumes of images of one plane geometry: its phases, sorted, without faults that may not stay."""
    positions = stacks.positions_of([image.header for image in images])
    phases: list[list[int]] | None = [list(range(len(images)))]
    if stacks.repeated(positions):
        phases = stacks.split_phases([image.header for image in images])
        if phases is not None:
            work.counts["4-D series were split into phases, each a volume of its own."] += 1
        elif work.options.strict:
            work.leave_out(images, "duplicate-position", "Slices of the series are at one place and no phase tells them apart.")
            return []
        else:
            phases = [_first_of_each_place(work, images, positions)]
    volumes = []
    for number, members in enumerate(phases or []):
        ordered = sorted(members, key=lambda index: (positions[index], *images[index].order()))
        group, places = [images[index] for index in ordered], [positions[index] for index in ordered]
        if not _refused(work, group, places):
            volumes.append(_Volume(group, storage.sha256_json([key, "phase", number]) if number else key, places))
    return volumes


def _first_of_each_place(work: _Arranger, images: Sequence[_Image], positions: Sequence[float]) -> list[int]:
    """One slice per place, the one with the lowest instance number."""
    kept: list[int] = []
    far = 1 << 40
    numbers = [far if image.header.instance_number is None else image.header.instance_number for image in images]
    for index in sorted(range(len(images)), key=lambda index: (positions[index], numbers[index], *images[index].order())):
        if not kept or positions[index] - positions[kept[-1]] >= stacks.SAME_POSITION_MM:
            kept.append(index)
        else:
            reason = "Another slice of the series is at the same place, and no phase tells them apart."
            work.leave_out([images[index]], "duplicate-position", reason)
    return kept


def _refused(work: _Arranger, images: Sequence[_Image], positions: Sequence[float]) -> bool:
    """True if the distances of the slices are faulty and the intake is strict; else the fault is counted."""
    fault = stacks.spacing_fault(positions)
    if fault is None:
        return False
    if work.options.strict:
        work.leave_out(images, fault.code, fault.reason)
        return True
    what = "seem to miss slices" if fault.code == "slice-missing" else "have unevenly spaced slices"
    work.counts[f"series {what} ({fault.code}); --strict leaves them out."] += 1
    return False


def _place(found: _Volume) -> None:
    """Tell the items of a volume where they are in it."""
    for place, image in enumerate(found.images):
        for item in image.items():
            item.series = found.key
            if image.header.frames == 1:
                item.slice_index = place


def _names(images: Sequence[_Image]) -> list[str]:
    """What the mask of a DICOM volume may be called; nothing that could leave the folder of masks."""
    header = images[0].header
    names = [header.series] if _UID.fullmatch(header.series) else []
    if len(images) == 1:
        names.append(stem_of(images[0].item.path))
    folders = {image.item.path.parent.name for image in images}
    return [name for name in [*names, *(folders if len(folders) == 1 else ())] if name not in ("", ".", "..")]


def _take_lesions(work: _Arranger, items: Sequence[Item], volumes: Sequence[_Volume]) -> None:
    """Keep the slice with the largest lesion of every volume; other images pass."""
    for item in (item for item in items if item.kind == "nifti"):
        try:
            header = nifti.read_nifti_header(item.path)
            if header.num_slices > 1:
                item.slices = (lesion_slice(work.options, [stem_of(item.path)], header.num_slices, header.positions),)
        except DataError as error:
            work.leave_out([_Image(item, DicomHeader())], error.code, error.message)
    for found in volumes:
        frames = found.images[0].header.frames
        num_slices = max(frames, len(found.images))
        if num_slices < 2:
            continue
        try:
            chosen = lesion_slice(work.options, _names(found.images), num_slices, found.positions or None)
        except DataError as error:
            work.leave_out(found.images, error.code, error.message)
            continue
        if frames > 1:
            for item in found.images[0].items():
                item.slices = (chosen,)
            continue
        # Not chosen is no fault: no row of the quarantine, a note instead.
        others = [image for place, image in enumerate(found.images) if place != chosen]
        work.left_out.update(id(item) for image in others for item in image.items())
        work.counts["slice(s) were not chosen: their volume has a slice with a larger lesion."] += len(others)
