"""Every measure of fidelity and diversity in one table: overall and per class, with n, an interval, and what real images give.

A number without the same number for real images means little: each row carries `floor`, the held-out real images in the place of the
synthetic ones. Intervals come from halves of both sets, drawn without replacement: the spread of an estimate over halves is
that of the estimate over whole sets (Politis et al. 1999, ch. 2.2), and no image meets its own twin, as it would in a bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.quality.fidelity import MINIMUM, Estimate, frechet_reduced, kid, neighbourhood_metrics
from medaug.quality.mmd import gaussian_mmd, intraclass_diversity
from medaug.quality.real_fake import fit_real_fake

HALVES = 30
SHARES = ("precision", "recall", "coverage")  # cannot leave [0, 1]

__all__ = ["FeatureSet", "fidelity_table", "half_spread"]


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Images of one kind.

    Attributes:
        name: such as "training", "held-out", "synthetic".
        features: (N, D).
        labels: (N,) class indices.
        groups: of each image, for the classifier test; empty: every image its own.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    groups: Sequence[str] = ()

    def of_class(self, label: int | None) -> FeatureSet:
        """Those of one class; None keeps all."""
        if label is None:
            return self
        chosen = np.flatnonzero(np.asarray(self.labels) == label)
        names = [self.names()[index] for index in chosen]
        return FeatureSet(self.name, np.asarray(self.features)[chosen], np.asarray(self.labels)[chosen], names)

    def names(self) -> list[str]:
        """The groups, or one name per image."""
        return list(self.groups) or [f"{self.name} {index}" for index in range(len(self.features))]


Metrics = Callable[[FeatureSet, FeatureSet], dict[str, tuple[float | None, str]]]


def _distances(real: FeatureSet, other: FeatureSet) -> dict[str, tuple[float | None, str]]:
    found: dict[str, Estimate] = {"kid": kid(real.features, other.features, subsets=10, minimum=2)}
    found["frechet"] = frechet_reduced(real.features, other.features, minimum=2)
    found |= neighbourhood_metrics(real.features, other.features, minimum=2)
    values: dict[str, tuple[float | None, str]] = {name: (estimate.value, estimate.note) for name, estimate in found.items()}
    own = intraclass_diversity(other.features, other.labels)
    reference = intraclass_diversity(real.features, real.labels)
    ratio = None if own is None or not reference else own / reference
    return values | {"diversity": (ratio, "mean distance within a class, over that of the real set")}


def half_spread(metrics: Metrics, real: FeatureSet, other: FeatureSet, halves: int = HALVES, key: object = 0) -> dict[str, float]:
    """Standard deviation of each metric over random halves of both sets."""
    values: dict[str, list[float]] = {}
    for index in range(halves):
        parts = []
        for side, whole in enumerate((real, other)):
            order = _order(whole)
            draw = numpy_generator("halves", key, index, side)
            chosen = order[np.sort(draw.permutation(len(order))[: max(2, len(order) // 2)])]
            names = [whole.names()[i] for i in chosen]
            parts.append(FeatureSet(whole.name, whole.features[chosen], np.asarray(whole.labels)[chosen], names))
        for name, (value, _) in metrics(*parts).items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: float(np.std(found, ddof=1)) for name, found in values.items() if len(found) > 1}


def _order(whole: FeatureSet) -> np.ndarray:
    """Rows sorted by content: a draw then belongs to the set of images, not to its order."""
    return np.lexsort(np.asarray(whole.features).T[::-1])


def fidelity_table(
    synthetic: FeatureSet,
    real: Mapping[str, FeatureSet],
    classes: Sequence[str],
    extractor: str,
    *,
    minimum: int = MINIMUM,
    halves: int = HALVES,
    key: object = 0,
) -> list[dict[str, Any]]:
    """Rows ``{"metric", "class", "against", "value", "low", "high", "floor", "n_real", "n_synthetic", "extractor", "note"}``.

    Args:
        synthetic: the images under judgement.
        real: "training" and, where there are some, "held-out"; both together give the floor: held-out in the place of synthetic
            against training, and training in its place against held-out.
        classes: names in class order; class "all" is the whole.
        extractor: name of the feature space; values of different spaces cannot be compared.
        minimum: fewer images on either side give "insufficient" and no value.
        halves: behind an interval of 95 %; 0 gives none.
        key: of all draws.
    """
    rows = []
    for label in [None, *range(len(classes))]:
        name = "all" if label is None else classes[label]
        sets = {against: part.of_class(label) for against, part in real.items()}
        for against, reference in sets.items():
            others = [part for other, part in sets.items() if other != against]
            common = {"class": name, "against": against, "extractor": extractor}
            floor = others[0] if others else None
            rows += [
                common | row for row in _rows(reference, synthetic.of_class(label), floor, minimum, halves, (key, name, against))
            ]
    return rows


def _rows(
    real: FeatureSet, synthetic: FeatureSet, floor: FeatureSet | None, minimum: int, halves: int, key: object
) -> list[dict[str, Any]]:
    counts = {"n_real": len(real.features), "n_synthetic": len(synthetic.features)}
    if min(counts.values()) < minimum:
        names = ("kid", "frechet", "precision", "recall", "density", "coverage", "diversity", "mmd", "c2st")
        nothing = {"value": None, "low": None, "high": None, "floor": None, "note": "insufficient"}
        return [{"metric": name, **nothing, **counts} for name in names]
    there = floor if floor is not None and len(floor.features) >= minimum else None
    found, spread = _distances(real, synthetic), half_spread(_distances, real, synthetic, halves, key) if halves else {}
    floors = _distances(real, there) if there is not None else {}
    rows = []
    for name, (value, note) in found.items():
        low, high = _interval(name, value, spread.get(name))
        rows.append(
            {
                "metric": name,
                "value": value,
                "low": low,
                "high": high,
                "floor": floors.get(name, (None, ""))[0],
                **counts,
                "note": note,
            }
        )
    return rows + [row | counts for row in (_mmd_row(real, synthetic, there, key), _c2st_row(real, synthetic, there, key))]


def _interval(name: str, value: float | None, spread: float | None) -> tuple[float | None, float | None]:
    if value is None or spread is None:
        return None, None
    low, high = value - 1.96 * spread, value + 1.96 * spread
    return (max(low, 0.0), min(high, 1.0)) if name in SHARES else (low, high)


def _mmd_row(real: FeatureSet, synthetic: FeatureSet, floor: FeatureSet | None, key: object) -> dict[str, Any]:
    """The permutation test takes the place of an interval."""
    row: dict[str, Any] = {"metric": "mmd", "value": None, "low": None, "high": None, "floor": None, "note": ""}
    try:
        found = gaussian_mmd(real.features, synthetic.features, key=key)
    except DataError as error:
        return row | {"note": error.code}
    below = None if floor is None else gaussian_mmd(real.features, floor.features, permutations=0, key=key).value
    return row | {"value": found.value, "floor": below, "note": f"permutation p {found.p:.3g}, bandwidth {found.bandwidth:.4g}"}


def _c2st_row(real: FeatureSet, synthetic: FeatureSet, floor: FeatureSet | None, key: object) -> dict[str, Any]:
    """Cross-fitted AUC of telling real from synthetic; 0.5 is best."""
    row: dict[str, Any] = {"metric": "c2st", "value": None, "low": None, "high": None, "floor": None, "note": ""}
    try:
        found = fit_real_fake(real.features, synthetic.features, real.names(), synthetic.names(), key=key)
        below = None if floor is None else fit_real_fake(real.features, floor.features, real.names(), floor.names(), key=key).auc
    except DataError as error:
        return row | {"note": error.code}
    note = f"AUC, cross-fitted; accuracy {found.accuracy:.3f}, p {found.p:.3g}"
    return row | {"value": found.auc, "low": found.low, "high": found.high, "floor": below, "note": note}
