"""``replay.json``: the batch every image of a synthetic cohort was made in. With its lineage it is all that making the image again takes.

Every draw is keyed by its image, but sums in another batch size are rounded otherwise: to meet the same bytes, an image is made again
among the same others. The file is written before the images are, once per run, and travels with the images that the gate accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medaug import __version__, storage
from medaug.errors import DataError

FILE_NAME = "replay.json"
FORMAT = 1
MAX_THREADS = 4096
Row = tuple[str, int, str]  # id of an image, its intended label, id of its reference


@dataclass(frozen=True)
class Batch:
    """Images that were sampled together.

    Attributes:
        machine: see `machine`.
        cases: all of them, in the order of the batch.
        made: ids of those whose file it wrote; the others were there, from a batch before.
    """

    machine: Mapping[str, Any]
    cases: tuple[Row, ...]
    made: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """What made the images that share a config sha256.

    Attributes:
        bundle: name of the bundle.
        overlay: laid over its inference config, or None.
        knobs: configuration values that make the sampler again; none names a file or a folder.
        batches: in the order they were made.
    """

    bundle: str
    overlay: str | None
    knobs: Mapping[str, Any]
    batches: tuple[Batch, ...] = field(default=(), repr=False)

    def batch_of(self) -> dict[str, Batch]:
        """Id of an image -> the batch that wrote it."""
        return {name: batch for batch in self.batches for name in batch.made}


def machine(device: str) -> dict[str, Any]:
    """What the rounding of a sum and the bytes of a PNG depend on besides weights, settings and batch.

    Args:
        device: type of the device, as torch calls it: cpu, cuda, mps.
    """
    import platform

    import PIL
    import torch

    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    versions = {"medaug": __version__, "torch": torch.__version__, "pillow": PIL.__version__}
    return versions | {"device": device, "cpu": cpu, "threads": torch.get_num_threads()}


def write_record(
    folder: Path, config_sha256: str, generation: Generation, here: Mapping[str, Any], batches: Iterable[Sequence[Row]]
) -> None:
    """Say of the images that are missing in which batch they are about to be made; what is known of the others stays.

    Args:
        folder: of the synthetic cohort.
        config_sha256: of the lineages.
        generation: without batches.
        here: see `machine`.
        batches: that hold at least one image whose file is missing.
    """

    def there(name: str) -> bool:
        return (folder / "images" / f"{name}.png").is_file()

    known = read_record(folder).get(config_sha256, generation).batches if (folder / FILE_NAME).is_file() else ()
    old = [replace(batch, made=tuple(filter(there, batch.made))) for batch in known]
    new = [Batch(here, tuple(cases), tuple(name for name, _, _ in cases if not there(name))) for cases in batches]
    _write(folder, {config_sha256: replace(generation, batches=_joined([*old, *new]))})


def carry_record(sources: Iterable[Path | None], folder: Path) -> None:
    """Write what the `sources`, folders of synthetic cohorts, know of their images into `folder`; nothing for images made elsewhere."""
    found: dict[str, Generation] = {}
    for source in sources:
        if source is not None and (source / FILE_NAME).is_file():
            for sha, entry in read_record(source).items():
                known = found.get(sha, replace(entry, batches=()))
                found[sha] = replace(known, batches=_joined([*known.batches, *entry.batches]))
    if found:
        _write(folder, found)
    else:
        with storage.storage_errors(FILE_NAME):
            (folder / FILE_NAME).unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Generation]:
    """Config sha256 -> what made the images with that lineage. The file is data: nothing in it is evaluated, see `refuse_code`.

    Raises:
        DataError: no file (code `replay-not-recorded`), or not one that medaug wrote (code `replay-record-malformed`).
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise DataError(
            "replay-not-recorded",
            f"{Path(folder).name} does not say in which batches its images were made (no {FILE_NAME}): an earlier medaug made them, or "
            "another program; generate them again to have them replayed.",
        )
    content = storage.read_json(path)
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        if content["format"] == FORMAT:
            return {str(sha): _generation(entry) for sha, entry in content["generations"].items()}
    raise DataError(
        "replay-record-malformed",
        f"{FILE_NAME} of {Path(folder).name} is not one this medaug wrote; restore it or generate again.",
    )


def refuse_code(value: Any) -> Any:
    """Plain data as it is; what a config would evaluate (``$``, ``@``, ``%``, ``_target_``) is refused, as a cohort is data and no program.

    Raises:
        ValueError: such a text or name.
    """
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, str) and value.startswith(("$", "@", "%", "_", "+")):
        raise ValueError("a text that a config evaluates")
    for part in parts:
        refuse_code(part)
    return value


def folders_in(value: Any) -> bool:
    """Whether a setting, or one inside it, names a folder: those a user gives, a record never does."""
    if isinstance(value, dict):
        return any(
            (name.endswith(("dir", "dirs", "path")) and inner is not None) or folders_in(inner) for name, inner in value.items()
        )
    return isinstance(value, list) and any(map(folders_in, value))


def _generation(entry: Mapping[str, Any]) -> Generation:
    overlay, knobs = entry["overlay"], entry["knobs"]
    if not isinstance(entry["bundle"], str) or not isinstance(overlay, str | None) or not isinstance(knobs, dict):
        raise TypeError("names and values")
    return Generation(entry["bundle"], overlay, knobs, tuple(_batch(batch) for batch in entry["batches"]))


def _batch(entry: Mapping[str, Any]) -> Batch:
    threads = entry["machine"]["threads"]
    cases = tuple((str(name), int(label), str(reference)) for name, label, reference in entry["cases"])
    made = tuple(entry["made"])
    if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS or not {name for name, _, _ in cases}.issuperset(made):
        raise ValueError("threads or ids")
    return Batch(dict(entry["machine"]) | {"device": str(entry["machine"]["device"])}, cases, made)


def _joined(batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """Equal batches as one, without those that no image is left of: a resumed run then leaves the record of a whole one."""
    found: dict[str, Batch] = {}
    for batch in batches:
        key = storage.sha256_json([batch.machine, batch.cases])
        known = found.get(key, replace(batch, made=()))
        made = {*known.made, *batch.made}
        found[key] = replace(known, made=tuple(name for name, _, _ in batch.cases if name in made))
    return tuple(batch for batch in found.values() if batch.made)


def _write(folder: Path, generations: Mapping[str, Generation]) -> None:
    storage.write_json(folder / FILE_NAME, {"format": FORMAT, "generations": generations}, default=asdict)
