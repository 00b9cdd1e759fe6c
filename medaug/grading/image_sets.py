"""Images of its own for every seed of the graders: arms and sources whose folder holds ``{seed}``.

All seeds of an arm may train on one folder of images; then no interval covers the luck of the generator. With
``NAME=runs/{seed}/accepted`` the seed 0 trains on ``runs/0/accepted``, the seed 1 on ``runs/1/accepted``, each made by a generator
of its own: what differs between the seeds is then the luck of the whole way, and the interval covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from medaug.errors import DataError
from medaug.grading.arm import Arm

SEED = "{seed}"

__all__ = ["SEED", "at_place", "image_sets", "join_sets", "own_seeds"]


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
        DataError: `set-missing`; ConfigError, DataError: see `parse_arm`.
    """
    tables = {seed: _read_for(seed, read) for seed in seeds}
    joined = [{seed: arms[place] for seed, arms in tables.items()} for place in range(len(tables[seeds[0]]))]
    return [replace(at[seeds[0]], by_seed=at if len({one.images() for one in at.values()}) > 1 else {}) for at in joined]


def _read_for(seed: int, read: Callable[[int], Sequence[Arm]]) -> list[Arm]:
    try:
        return list(read(seed))
    except DataError as error:
        if error.code != "cohort-missing":
            raise
        raise DataError("set-missing", f"For seed {seed}: {error.message}") from error


def image_sets(arms: Sequence[Arm]) -> dict[str, int]:
    """Arms whose seeds have images of their own, and how many sets."""
    return {arm.base: len(arm.by_seed) for arm in arms if arm.by_seed}
