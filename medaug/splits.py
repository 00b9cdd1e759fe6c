"""Splits and folds that keep every group on one side and every class on all of them.

A group is the unit of splitting: a patient, else a cluster of near-duplicates. The result depends on the labels, the
names of the groups and the seed, never on the order of the cases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from medaug import draws
from medaug.cohort import SPLITS
from medaug.errors import ConfigError, DataError

MUST, SHOULD = 100.0, 1.0  # weight of a class that is absent from a part: training and test, validation


def grouped_split(
    labels: Sequence[int], groups: Sequence[Hashable], ratios: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[str]:
    """Assign every case to a split: disjoint by group, stratified by class.

    Groups go largest first to the part where they lower the chi-square distance to the wanted counts most; ties are
    broken by a draw keyed by (seed, group). A class with at least 2 groups is then in training and test, with at least
    3 also in validation, as far as their ratios are above zero. Groups may hold several classes.

    Args:
        labels: class index per case.
        groups: group name per case; anything hashable with a stable `repr`.
        ratios: wanted shares of training, validation and test; they sum to 1, and training is above zero.
        seed: key of the tie-breaking.

    Returns:
        "training", "validation" or "test" per case.

    Raises:
        ConfigError: the ratios are not three shares of one whole.
        DataError: no case, lists of different length, or groups with mixed classes that allow no such split.
    """
    shares = _checked_ratios(ratios)
    counts, names, member = _group_counts(labels, groups)
    groups_per_class = (counts > 0).sum(axis=0)
    demand = np.zeros((len(shares), counts.shape[1]))
    demand[0] = MUST
    demand[1] = np.where(groups_per_class >= 3, SHOULD, 0.0) if shares[2] > 0 else np.where(groups_per_class >= 2, MUST, 0.0)
    demand[2] = np.where(groups_per_class >= 2, MUST, 0.0)
    demand[shares == 0] = 0.0
    part = _assign(counts, shares, demand, [draws.key_seed(seed, "split", name) for name in names])
    _refuse_absent(counts, part, demand, SPLITS)
    return [SPLITS[part[index]] for index in member]


def grouped_folds(labels: Sequence[int], groups: Sequence[Hashable], num_folds: int, seed: int = 0) -> list[int]:
    """Assign every case to a fold 0 .. num_folds - 1: disjoint by group, stratified by class.

    Args:
        labels: class index per case.
        groups: group name per case.
        num_folds: at least 2, and at most the number of groups of the rarest class.
        seed: key of the tie-breaking.

    Raises:
        ConfigError: fewer than 2 folds.  DataError: a class has fewer groups than folds, or see `grouped_split`.
    """
    if num_folds < 2:
        raise ConfigError("folds-invalid", f"The number of folds must be at least 2, got {num_folds}.")
    counts, names, member = _group_counts(labels, groups)
    fewest = int((counts > 0).sum(axis=0).min())
    if fewest < num_folds:
        raise DataError(
            "class-too-small",
            f"{num_folds} folds need {num_folds} groups of every class, the rarest has {fewest}; use fewer folds.",
        )
    demand = np.full((num_folds, counts.shape[1]), MUST)
    part = _assign(counts, np.full(num_folds, 1 / num_folds), demand, [draws.key_seed(seed, "fold", name) for name in names])
    _refuse_absent(counts, part, demand, [f"fold {index}" for index in range(num_folds)])
    return [int(part[index]) for index in member]


def parse_ratios(text: str) -> tuple[float, float, float]:
    """Read ``0.7,0.1,0.2``.

    Raises:
        ConfigError: not three shares of one whole.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError("split-ratios-invalid", f"--split needs three numbers like 0.7,0.1,0.2, got {text!r}.") from error
    training, validation, test = _checked_ratios(values)
    return float(training), float(validation), float(test)


def _checked_ratios(ratios: Sequence[float]) -> np.ndarray:
    shares = np.asarray(ratios, dtype=np.float64)
    valid = shares.shape == (3,) and bool(np.isfinite(shares).all()) and bool((shares >= 0).all())
    if not valid or shares[0] <= 0 or abs(float(shares.sum()) - 1) > 1e-6:
        raise ConfigError(
            "split-ratios-invalid",
            "Split ratios are the shares of training, validation and test, at least 0, training above 0, sum 1; "
            f"got {list(ratios)}.",
        )
    return shares


def _group_counts(labels: Sequence[int], groups: Sequence[Hashable]) -> tuple[np.ndarray, list[Hashable], list[int]]:
    """Cases per group and class (G, K), the group names in an order of their own, and each case's group index."""
    if len(labels) != len(groups) or not len(labels):
        raise DataError(
            "split-input-invalid",
            f"A split needs as many groups as labels and at least one, got {len(groups)} and {len(labels)}.",
        )
    names = sorted(set(groups), key=repr)
    index = {name: position for position, name in enumerate(names)}
    member = [index[group] for group in groups]
    classes = {label: position for position, label in enumerate(sorted({int(label) for label in labels}))}
    counts = np.zeros((len(names), len(classes)))
    for position, label in zip(member, labels, strict=True):
        counts[position, classes[int(label)]] += 1
    return counts, names, member


def _assign(counts: np.ndarray, shares: np.ndarray, demand: np.ndarray, ties: Sequence[int]) -> np.ndarray:
    """Part per group: greedy, then repaired until the demands (S, K) are met or no move helps."""
    targets = np.maximum(shares[:, None] * counts.sum(axis=0)[None, :], 1e-9)
    filled = np.zeros_like(targets)
    part = np.zeros(len(counts), dtype=np.int64)
    usable = shares > 0
    for group in sorted(range(len(counts)), key=lambda index: (-counts[index].sum(), ties[index])):
        added = counts[group]
        change = (added * (2 * (filled - targets) + added) / targets).sum(axis=1)
        part[group] = int(np.argmin(np.where(usable, change, np.inf)))
        filled[part[group]] += added
    return _repair(counts, part, targets, demand, usable)


def _repair(counts: np.ndarray, part: np.ndarray, targets: np.ndarray, demand: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Move or swap groups, the best step first, while that lowers the weight of unmet demands."""
    part = part.copy()
    for _ in range(4 * demand.size):
        unmet = _unmet(counts, part, demand)
        if not unmet.any():
            break
        current = float(unmet.sum())
        best: tuple[float, float, np.ndarray] | None = None
        for target, label in zip(*np.nonzero(unmet), strict=True):
            for candidate in _steps(counts, part, int(target), int(label), usable):
                weight = float(_unmet(counts, candidate, demand).sum())
                if weight >= current or (best is not None and weight > best[0]):
                    continue
                error = _chi_square(counts, candidate, targets)
                if best is None or (weight, error) < best[:2]:
                    best = (weight, error, candidate)
        if best is None:
            break
        part = best[2]
    return part


def _steps(
    counts: np.ndarray, part: np.ndarray, target: int, label: int, usable: np.ndarray, limit: int = 64
) -> list[np.ndarray]:
    """Assignments one move or one swap away that bring a group with `label` into `target`; smallest groups first."""
    sizes = counts.sum(axis=1)
    movable = sorted(np.nonzero((counts[:, label] > 0) & (part != target) & usable[target])[0], key=lambda index: sizes[index])[
        :limit
    ]
    inside = sorted(np.nonzero(part == target)[0], key=lambda index: sizes[index])[:limit]
    steps = []
    for group in movable:
        moved = part.copy()
        moved[group] = target
        steps.append(moved)
        for other in inside if len(movable) * len(inside) <= limit * 4 else inside[:4]:
            swapped = moved.copy()
            swapped[other] = part[group]
            steps.append(swapped)
    return steps


def _unmet(counts: np.ndarray, part: np.ndarray, demand: np.ndarray) -> np.ndarray:
    return np.where(_filled(counts, part, len(demand)) > 0, 0.0, demand)


def _filled(counts: np.ndarray, part: np.ndarray, num_parts: int) -> np.ndarray:
    return np.stack([counts[part == index].sum(axis=0) for index in range(num_parts)])


def _chi_square(counts: np.ndarray, part: np.ndarray, targets: np.ndarray) -> float:
    return float(((_filled(counts, part, len(targets)) - targets) ** 2 / targets).sum())


def _refuse_absent(counts: np.ndarray, part: np.ndarray, demand: np.ndarray, names: Sequence[str]) -> None:
    absent = np.argwhere(_unmet(counts, part, demand) >= MUST)
    if len(absent):
        where, label = absent[0]
        raise DataError(
            "split-impossible",
            f"The groups hold several classes in a way that leaves class number {label} out of {names[where]}; "
            "use finer groups, other ratios or another seed.",
        )


def _spend(total: int, urgency: Callable[[int, int], float], num_classes: int) -> list[int]:
    """Give `total` images away one by one to the class of highest ``urgency(class, added so far)``; ties to the earlier.

    One by one means that a larger total only adds: no class ever loses an image, so training sets nest.
    """
    added = [0] * num_classes
    for _ in range(total):
        added[max(range(num_classes), key=lambda label: (urgency(label, added[label]), -label))] += 1
    return added


def in_proportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to `weights`, exactly, by the method of Sainte-Lague (largest remainders would not nest)."""
    return _spend(total, lambda label, added: weights[label] / (2 * added + 1), len(weights))


def level(total: int, present: Sequence[int]) -> list[int]:
    """Split `total` so that present + added is as equal over the classes as it can be."""
    return _spend(total, lambda label, added: -(present[label] + added), len(present))


def stratified_part(labels: Sequence[int], names: Sequence[str], total: int, seed: int = 0) -> list[bool]:
    """Choose `total` cases in proportion to the classes; a larger total contains the smaller one.

    Args:
        labels: class index per case.
        names: unique name per case; with `seed` they decide who is chosen, whatever the order.
        total: at least the number of classes that occur, so that none is lost, and at most the number of cases.
        seed: key of the order.

    Raises:
        ConfigError: `part-invalid`: a total that is too small or too large.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64)).tolist()
    fewest = sum(count > 0 for count in counts)
    if not fewest <= total <= len(labels):
        raise ConfigError("part-invalid", f"The part must have {fewest} to {len(labels)} images, got {total}.")

    def urgency(label: int, added: int) -> float:
        if added >= counts[label]:
            return -np.inf
        return counts[label] / (2 * added + 1) if added else np.inf

    wanted = _spend(total, urgency, len(counts))
    order = sorted(range(len(labels)), key=lambda index: (draws.key_seed(seed, "part", names[index]), names[index]))
    chosen = [False] * len(labels)
    for label, count in enumerate(wanted):
        for index in [index for index in order if labels[index] == label][:count]:
            chosen[index] = True
    return chosen
