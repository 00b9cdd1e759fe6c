"""Images made a second time from their lineage, among the same others as the first time, and compared byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medaug import storage
from medaug.assets import list_bundles
from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError, MedaugError
from medaug.generation.generate import GenerationSession, sample_batch
from medaug.generation.plan import PlannedCase
from medaug.io.raster import encode_unit_png, read_unit_png
from medaug.prompts import Prompts
from medaug.replay_record import Batch, Generation, folders_in, read_record, refuse_code
from medaug.transforms.prepare import restore

# The plan of a replay is only what its session is built with: one image per training image, which every cohort allows.
ANY_PLAN = {"counts": None, "synthetic_per_real": 1, "allocation": "proportional", "fixed": None}
# Knobs whose plain value a config cannot take as it is.
PARTS: Mapping[str, Callable[[Any], Any]] = {"prompts": lambda texts: Prompts(tuple(tuple(map(str, own)) for own in texts))}
# What the samplers' `knobs` name. Anything else would let a record choose other parts of the config.
KNOBS = frozenset(
    {
        "seed", "sampler_settings", "guidance_settings", "variation_settings", "disturbance_settings", "stable_diffusion_settings",
        "prompts", "negative_prompt", "source", "target_label", "weights_trusted",
    }
)  # fmt: skip
OpenSession = Callable[[Generation, str], GenerationSession]  # (what made the images, type of the device) -> its session


@dataclass(frozen=True)
class Replayed:
    """One image made again.

    Attributes:
        id: of the case.
        identical: the file on disk has these bytes.
        sha256_on_disk, sha256_replayed: of the PNG in the cohort and of the one made now.
        sha256_in_lineage: of the PNG when it was made.
        largest_difference: of a pixel, intensities in [0, 1]; None if the file on disk is no image of this size.
        made_on: see `medaug.replay_record.machine`.
        png: the bytes made now.
    """

    id: str
    identical: bool
    sha256_on_disk: str
    sha256_replayed: str
    sha256_in_lineage: str
    largest_difference: float | None
    made_on: Mapping[str, Any]
    png: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but the bytes."""
        return {name: value for name, value in asdict(self).items() if name != "png"}


def choose_cases(synthetic: Cohort, ids: Sequence[str], count: int | None = None, seed: int = 0) -> list[Case]:
    """The cases to replay: those named, or `count` drawn by `seed` (all, if there are fewer).

    Raises:
        ConfigError: both or neither (code `replay-which`).  DataError: an id that is not there (code `replay-case-unknown`).
    """
    if bool(ids) == (count is not None) or (count is not None and count < 1):
        raise ConfigError("replay-which", "Name the cases to replay, or give --random with their number, at least 1.")
    by_id = {case.id: case for case in synthetic.training}
    if not by_id:
        raise DataError("replay-nothing", "The synthetic cohort holds no images, so there is nothing to replay.")
    if unknown := sorted(set(ids) - set(by_id)):
        raise DataError("replay-case-unknown", f"{len(unknown)} case(s) are not in this cohort ({', '.join(unknown[:5])}).")
    if count is not None:
        order = numpy_generator(seed, "replay").permutation(len(by_id))
        ids = [sorted(by_id)[int(i)] for i in order[:count]]
    return [by_id[name] for name in dict.fromkeys(ids)]


def replay_settings(generation: Generation, device: str) -> dict[str, Any]:
    """Configuration values that build the session of a generation again, but for its folders; its last result is the session itself.

    Raises:
        DataError: a value that a config would evaluate (code `replay-record-malformed`).
        ConfigError: a device that this machine lacks (code `replay-device`).
    """
    if device not in (there := {"cpu", *(["cuda"] * torch.cuda.is_available()), *(["mps"] * torch.backends.mps.is_available())}):
        raise ConfigError(
            "replay-device",
            f"The images were made on {device!r}, this machine has {', '.join(sorted(there))}; replay them there.",
        )
    try:
        if unknown := sorted(set(generation.knobs) - KNOBS):
            raise ValueError(f"settings named {unknown}")
        if any(folders_in(value) for value in generation.knobs.values()):
            raise ValueError("a folder")
        knobs = {name: PARTS.get(name, refuse_code)(value) for name, value in generation.knobs.items()}
    except (TypeError, ValueError) as error:
        raise DataError(
            "replay-record-malformed", f"The record of this cohort holds what medaug never writes ({error}); generate it again."
        ) from error
    fixed = {"output_dir": None, "device_name": device, "tracking": {"enabled": False}, "generating": ["$@session"]}
    return knobs | ANY_PLAN | fixed


def shipped_bundle(generation: Generation) -> str:
    """Name of the bundle that made the images; a folder is never taken from a record, as a bundle is code.

    Raises:
        ConfigError: none of the shipped ones (code `replay-bundle`).
    """
    if generation.bundle not in list_bundles():
        raise ConfigError(
            "replay-bundle", "The images were generated by a bundle that medaug does not ship; name its folder with --bundle."
        )
    return generation.bundle


def replay_cases(cases: Sequence[Case], synthetic: Cohort, open_session: OpenSession) -> Iterator[Replayed]:
    """Make images again and compare them with their files; every batch once, whatever the number of its images asked for.

    Args:
        cases: of `synthetic`; results come in the order of the batches.
        synthetic: generated or accepted cohort.
        open_session: builds the session that made the images, see `replay_settings`.

    Raises:
        DataError: images without a record (codes `replay-not-recorded`, `replay-record-malformed`).
        ConfigError: other weights, settings, or run and cohort than those of the lineage (codes `replay-other-weights`,
            `replay-other-settings`, `replay-other-config`).
    """
    record = read_record(synthetic.root or Path())
    batches = {sha: generation.batch_of() for sha, generation in record.items()}
    found: list[tuple[str, Batch, Case]] = []
    for case in cases:
        sha = str((case.lineage or {}).get("config_sha256"))
        batch = batches.get(sha, {}).get(case.id)
        if batch is None:
            raise DataError(
                "replay-not-recorded",
                f"Nothing says in which batch {case.id} was made: an earlier medaug made it, or another program; generate it again to "
                "have it replayed.",
            )
        found.append((sha, batch, case))
    place = {id(batch): number for generation in record.values() for number, batch in enumerate(generation.batches)}
    found.sort(key=lambda entry: (entry[0], entry[1].machine["device"], place[id(entry[1])]))
    for (sha, device), own in groupby(found, key=lambda entry: (entry[0], entry[1].machine["device"])):
        session = open_session(record[sha], device)
        for _, together in groupby(own, key=lambda entry: id(entry[1])):
            wanted = [(batch, case) for _, batch, case in together]
            for _, case in wanted:
                _check(session, case)
            images = remake(session, wanted[0][0])
            yield from (_compare(case, synthetic, images[case.id], batch) for batch, case in wanted)


def remake(session: GenerationSession, batch: Batch) -> dict[str, np.ndarray]:
    """Id -> unit image (H, W) or (H, W, 3) of every image of a batch, sampled as `GenerationSession.run` samples it.

    Raises:
        DataError: a reference that is no training case of the session's cohort (code `replay-record-malformed`).
    """
    references = {case.id: case for case in session.cohort.training}
    known = all(reference in references and 0 <= label < len(session.cohort.classes) for _, label, reference in batch.cases)
    if not known:
        raise DataError(
            "replay-record-malformed",
            "The record of this cohort names references or classes that the real cohort lacks; generate it again.",
        )
    todo = session.evaluator.data_loader
    todo.batches = [[PlannedCase(name, label, 0, references[reference]) for name, label, reference in batch.cases]]
    with _threads(batch.machine["threads"]):
        samples = sample_batch(session.evaluator, todo[0])["samples"]
    return {name: restore(image) for (name, _, _), image in zip(batch.cases, samples, strict=True)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Their number may decide the order of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(session: GenerationSession, case: Case) -> None:
    """Refuse a session that would not make the image that the lineage speaks of."""
    lineage = case.lineage or {}
    if session.record.weights_sha256 != lineage.get("weights_sha256"):
        raise ConfigError(
            "replay-other-weights",
            f"{case.id} was made with weights {str(lineage.get('weights_sha256'))[:12]}, the run has {session.record.weights_sha256[:12]}; "
            "name the run that it was generated from.",
        )
    ours, theirs = session.sampler.settings(), lineage.get("sampler") or {}
    if not isinstance(theirs, Mapping):
        raise DataError("replay-record-malformed", f"The lineage of {case.id} holds no sampler settings; generate it again.")
    same = {name for name in ours if storage.sha256_json(ours[name]) == storage.sha256_json(theirs.get(name))}
    if other := sorted({*ours, *theirs} - (same & theirs.keys())):
        raise ConfigError(
            "replay-other-settings",
            f"The lineage of {case.id} has another {', '.join(other)} than the run and the folders given; name those it was generated "
            "with, the ones besides the run by --set, such as classifier_dirs, or --source.",
        )
    if session.config_sha256() != lineage.get("config_sha256"):
        raise ConfigError(
            "replay-other-config",
            f"{case.id} was generated from another cohort, or by a run with other settings (its config sha256 differs); name the cohort "
            "and the run that it was generated from.",
        )


def _compare(case: Case, synthetic: Cohort, image: np.ndarray, batch: Batch) -> Replayed:
    lineage, png = case.lineage or {}, encode_unit_png(image)
    row = (case.id, lineage.get("intended_label"), lineage.get("reference"))
    if row not in batch.cases:
        raise DataError(
            "replay-record-malformed", f"Record and lineage name another label or reference for {case.id}; generate it again."
        )
    on_disk, replayed = storage.sha256_file(synthetic.path(case)), storage.sha256_bytes(png)
    return Replayed(
        id=case.id,
        identical=on_disk == replayed,
        sha256_on_disk=on_disk,
        sha256_replayed=replayed,
        sha256_in_lineage=str(lineage.get("image_sha256", "")),
        largest_difference=_largest_difference(synthetic.path(case), image),
        made_on=batch.machine,
        png=png,
    )


def _largest_difference(path: Path, image: np.ndarray) -> float | None:
    try:
        stored = read_unit_png(path).astype(np.float64)
    except MedaugError:
        return None
    levels = 65535 if image.ndim == 2 else 255
    again = np.rint(image.astype(np.float64) * levels) / levels
    return None if stored.shape != again.shape else round(float(np.abs(stored - again).max()), 7)
