"""Images of its own for every seed of the graders: arms and sources whose folder holds ``{seed}``.

All seeds of an arm may train on one folder of images; then no interval covers the luck of the generator. With
``NAME=runs/{seed}/accepted`` the seed 0 trains on ``runs/0/accepted``, the seed 1 on ``runs/1/accepted``, each made by a generator
of its own: what differs between the seeds is then the luck of the whole way, and the interval covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from medaug.errors import DataError, MedaugError
from medaug.grading.arm import Arm

SEED = "{seed}"

__all__ = ["SEED", "at_place", "image_sets", "join_sets", "own_seeds", "set_notes"]


def own_seeds(texts: Sequence[str], seeds: Sequence[int]) -> list[int]:
    """The seeds to read arms and sources for: all if any text holds ``{seed}``, else one that stands for all."""
    return (list(seeds) if any(SEED in text for text in texts) else list(seeds[:1])) or [0]


def at_place(text: str, seed: int) -> str:
    """An arm or source as it is written for one seed."""
    return text.replace(SEED, str(seed))


def join_sets(read: Callable[[int], Sequence[Arm]], seeds: Sequence[int]) -> list[Arm]:
    """The arms of the first seed, and where seeds have images of their own, those of every seed in `Arm.by_seed`.

    Args:
        read: seed -> the same arms with its images.  seeds: of `own_seeds`.

    Raises:
        DataError: `sets-alike`.  MedaugError: see `parse_arm`; of several seeds it names the one.
    """
    if len(seeds) == 1:
        return list(read(seeds[0]))
    tables = {seed: _read_for(seed, read) for seed in seeds}
    joined = [{seed: arms[place] for seed, arms in tables.items()} for place in range(len(tables[seeds[0]]))]
    own = [len({one.images() for one in at.values()}) > 1 for at in joined]
    if not any(own):
        raise DataError(
            "sets-alike", f"The folders with {SEED} hold the same images for every seed; make each set by a generator of its own."
        )
    return [replace(at[seeds[0]], by_seed=at if differ else {}) for at, differ in zip(joined, own, strict=True)]


def _read_for(seed: int, read: Callable[[int], Sequence[Arm]]) -> list[Arm]:
    try:
        return list(read(seed))
    except MedaugError as error:
        raise type(error)(error.code, f"For seed {seed}: {error.message}") from error


def image_sets(arms: Sequence[Arm]) -> dict[str, int]:
    """Arms whose seeds have all their images to themselves, by generators of their own, and how many sets."""
    return {arm.base: len(arm.by_seed) for arm in arms if arm.by_seed and not set_notes(arm)}


def set_notes(arm: Arm) -> list[str]:
    """Why the interval of an arm with images for every seed does not cover the luck of the generator; empty if it does."""
    if not arm.by_seed:
        return []
    notes = []
    images = [sha for one in arm.sets() for sha in set(one.images())]
    if len(images) > len(set(images)):
        notes.append(f"Seeds of arm {arm.base} share some of their images: the interval does not cover the luck of making those.")
    makers = [_makers(one) for one in arm.sets()]
    if any(None in of_seed for of_seed in makers):
        notes.append(f"Nothing shows that the images for the seeds of arm {arm.base} come from different generators.")
    elif sum(map(len, makers)) > len(set().union(*makers)):
        notes.append(
            f"Seeds of arm {arm.base} have images of one generator: the interval covers the luck of drawing them, not that of training it."
        )
    return notes


def _makers(arm: Arm) -> set[str | None]:
    """The weights that made the images of one set; None stands for unknown ones."""
    cases = [case for source in arm.added() if not source.of_kept for case in source.cohort.training]
    return {(case.lineage or {}).get("weights_sha256") for case in cases}
