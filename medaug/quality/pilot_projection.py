"""What the full generation will cost, from the rate of a pilot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medaug.quality.pilot import share_interval
from medaug.quality.verdicts import ClassAcceptance

BASIS = (
    "Images to make: those wanted of a class over the share of it that the gate accepted. Time: seconds per image of the pilot's batches, sampling "
    "and saving, without the start of the program. Disk: bytes per image of the pilot's folder, an accepted image counted twice, as it is stored "
    "again. Memory: the highest of this process, its growth since the parts were loaded scaled to full batches; of a GPU it says nothing."
)

__all__ = ["BASIS", "Rate", "project"]


@dataclass(frozen=True)
class Rate:
    """What the pilot's own generation took; the sum over all runs of a pilot that was killed and went on.

    Attributes:
        images: generated under the clock.  seconds: for them.
        largest_batch: images of the largest batch.
        memory_before: highest resident memory in bytes before the first batch, network loaded.  memory_peak: after the last.
    """

    images: int = 0
    seconds: float = 0.0
    largest_batch: int = 0
    memory_before: int = 0
    memory_peak: int = 0

    def full_memory(self, batch_size: int) -> int | None:
        """Bytes at batches of `batch_size`; None if nothing was generated under the clock."""
        if not self.images:
            return None
        scale = max(1.0, batch_size / self.largest_batch)
        return round(self.memory_before + scale * max(0, self.memory_peak - self.memory_before))


def project(
    acceptance: Sequence[ClassAcceptance], wanted: Sequence[int], rate: Rate, image_bytes: float | None, batch_size: int
) -> dict[str, Any]:
    """Images, seconds, bytes on the disk and bytes of memory that the full generation takes, and how they were found.

    Args:
        acceptance: of the pilot, in class order.
        wanted: accepted images per class.
        rate: of the pilot.
        image_bytes: on the disk, per image of the pilot.
        batch_size: of the full generation.

    Returns:
        ``classes`` (rows ``{"name", "wanted", "generate", "low", "high"}``), ``generate``, ``seconds``, ``bytes`` and their
        ``..._low`` and ``..._high`` from the 95 % interval of the acceptance, ``memory_bytes``, ``seconds_per_image``,
        ``image_bytes``, ``basis`` and ``reason``. None stands for what cannot be said: without end, if nothing was accepted.
    """
    rows = [_needed(entry, count) for entry, count in zip(acceptance, wanted, strict=True)]
    per_image = rate.seconds / rate.images if rate.images else None
    found: dict[str, Any] = {"classes": rows, "wanted": sum(wanted), "made": sum(entry.generated for entry in acceptance)}
    for end, suffix in (("generate", ""), ("low", "_low"), ("high", "_high")):
        total = _total([row[end] for row in rows])
        found[f"generate{suffix}"] = total
        found[f"seconds{suffix}"] = None if total is None or per_image is None else total * per_image
        found[f"bytes{suffix}"] = None if total is None or image_bytes is None else round((total + sum(wanted)) * image_bytes)
    largest = max((row["generate"] or batch_size for row in rows), default=batch_size)
    found |= {"seconds_per_image": per_image, "image_bytes": image_bytes}
    found |= {"memory_bytes": rate.full_memory(min(batch_size, largest)), "measured_images": rate.images}
    return found | {"basis": BASIS, "reason": _reason(rows, rate)}


def _needed(entry: ClassAcceptance, wanted: int) -> dict[str, Any]:
    """Images of one class to make: at the seen acceptance, at its upper and at its lower end."""
    row: dict[str, Any] = {"name": entry.name, "wanted": wanted}
    if not wanted:
        return row | {"generate": 0, "low": 0, "high": 0}
    if not entry.generated:
        return row | {"generate": None, "low": None, "high": None}
    low, high = share_interval(entry.passed, entry.generated)
    seen = -(-wanted * entry.generated // entry.passed) if entry.passed else None
    return row | {"generate": seen, "low": _over(wanted, high), "high": _over(wanted, low)}


def _over(wanted: int, share: float) -> int | None:
    """Images to make for `wanted` ones at this share; None without end."""
    return math.ceil(wanted / share) if share > 0 else None


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _reason(rows: Sequence[dict[str, Any]], rate: Rate) -> str:
    never = [row["name"] for row in rows if row["generate"] is None]
    if never:
        return f"No image of class {', '.join(never)} was accepted, so no number of images is known to be enough."
    return "" if rate.images else "All images of the pilot were there before, so no rate was measured; choose a new --out."
