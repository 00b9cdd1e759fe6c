"""How far the images of a pilot are from training images, beside held-out real ones as they are and under noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from medaug.cohort import Case, Cohort
from medaug.draws import randn_batch
from medaug.quality.fidelity import MINIMUM, kid
from medaug.quality.fidelity_table import FeatureSet, half_spread
from medaug.quality.images import BATCH_SIZE, image_batches

__all__ = ["kid_rows", "noisy_batches"]


def noisy_batches(cohort: Cohort, cases: Sequence[Case], share: float) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of images under Gaussian noise of `share` times their own standard deviation; draws belong to the case."""
    ids = [case.id for case in cases]
    for number, batch in enumerate(image_batches(cohort, cases)):
        own = ids[number * BATCH_SIZE : number * BATCH_SIZE + len(batch)]
        spread = batch.flatten(1).std(dim=1, correction=0).reshape(-1, 1, 1, 1)
        yield (batch + share * spread * randn_batch(batch.shape[1:], own, "pilot", "noise")).clamp(-1, 1)


def kid_rows(
    training: FeatureSet,
    synthetic: FeatureSet,
    held_out: FeatureSet | None,
    noisy: FeatureSet | None,
    classes: Sequence[str],
    minimum: int = MINIMUM,
) -> list[dict[str, Any]]:
    """Rows ``{"class", "value", "low", "high", "floor", "limit", "n_real", "n_synthetic", "note"}`` of class "all" and each class.

    Args:
        training, synthetic: to compare; the interval of 95 % comes from halves of both, see `half_spread`.
        held_out: in the place of `synthetic` it gives the floor.
        noisy: the same under noise; gives the limit.
        classes: names in class order.
        minimum: fewer images on either side give "insufficient" and no value.
    """
    rows = []
    for label in [None, *range(len(classes))]:
        real, made = training.of_class(label), synthetic.of_class(label)
        others = {"floor": held_out, "limit": noisy}
        row = {
            "class": "all" if label is None else classes[label],
            "n_real": len(real.features),
            "n_synthetic": len(made.features),
        }
        row |= {name: None if other is None else _value(real, other.of_class(label), minimum) for name, other in others.items()}
        value = _value(real, made, minimum)
        spread = 0.0 if value is None else half_spread(_metrics, real, made, key=("pilot", row["class"])).get("kid", 0.0)
        ends = (None, None) if value is None else (value - 1.96 * spread, value + 1.96 * spread)
        rows.append(row | {"value": value, "low": ends[0], "high": ends[1], "note": _note(value, row["limit"], minimum)})
    return rows


def _note(value: float | None, limit: Any, minimum: int) -> str:
    if value is None:
        return f"insufficient: KID needs at least {minimum} training and {minimum} generated images"
    return "" if limit is not None else f"fewer than {minimum} held-out real images, so nothing says what would be near enough"


def _value(real: FeatureSet, other: FeatureSet, minimum: int) -> float | None:
    return kid(real.features, other.features, subsets=10, minimum=minimum).value


def _metrics(real: FeatureSet, other: FeatureSet) -> dict[str, tuple[float | None, str]]:
    found = kid(real.features, other.features, subsets=10, minimum=2)
    return {"kid": (found.value, found.note)}
