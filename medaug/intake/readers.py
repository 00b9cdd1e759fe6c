"""Readers who disagree: how often they do, and which label counts then."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

MAX_PAIRS = 20

Vote = tuple[int, str, str]  # number of the table's row, reader ("" if unknown), label


def settle(votes: Sequence[Vote], index: Mapping[str, int], *, policy: str, senior: str | None, ordinal: bool) -> int | None:
    """The class that an image gets from its readers; None if they cannot be reconciled.

    Args:
        votes: of one image; labels as `index` knows them.
        index: label text -> rank of its class.
        policy: "quarantine" (all must agree), "majority" (a tie decides nothing), "senior" (the senior reader; where
            that one did not read, or gave two grades, all others must agree), "mean" (of the ranks of ordered classes,
            halves to the even rank as IEEE 754 rounds; the exact fraction decides, not a float).
        senior: name of that reader.
        ordinal: the classes are ordered; without it "mean" is "quarantine".
    """
    ranks = [index[label] for _, _, label in votes]
    if len(set(ranks)) == 1:
        return ranks[0]
    if policy == "majority":
        (first, most), (_, next_most) = Counter(ranks).most_common(2)
        return first if most > next_most else None
    if policy == "senior":
        own = {rank for rank, (_, reader, _) in zip(ranks, votes, strict=True) if same_reader(reader, senior)}
        others = {rank for rank, (_, reader, _) in zip(ranks, votes, strict=True) if not same_reader(reader, senior)}
        decisive = own or others
        return decisive.pop() if len(decisive) == 1 else None
    if policy == "mean" and ordinal:
        return round(Fraction(sum(ranks), len(ranks)))
    return None


def same_reader(reader: str, other: str | None) -> bool:
    """Two spellings of one reader: case and blanks do not count."""
    return bool(other) and " ".join(reader.split()).casefold() == " ".join(str(other).split()).casefold()


def agreement(units: Iterable[Sequence[Vote]], index: Mapping[str, int], num_classes: int, ordinal: bool) -> dict[str, Any]:
    """How far readers agree, over all images that more than one of them read. Readers are numbered, never named.

    Args:
        units: the votes of each separately read thing (image, series, patient), once.
        index: label text -> rank of its class.
        num_classes: K.
        ordinal: with ordered classes kappa is weighted quadratically, else not weighted.

    Returns:
        read_twice (units with two or more votes), disagreed, percent_agreement (over pairs of votes of one unit),
        kappa (pairs taken both ways, since unnamed readers have no order), weights, and `pairs` of named readers with
        their own n, percent_agreement and kappa. Figures are None without a pair, kappa also where all votes are one class.
    """
    confusion = np.zeros((num_classes, num_classes))
    named: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros((num_classes, num_classes)))
    read_twice = disagreed = 0
    for votes in units:
        if len(votes) < 2:
            continue
        ranked = [(" ".join(reader.split()).casefold(), index[label]) for _, reader, label in votes]
        read_twice += 1
        disagreed += len({rank for _, rank in ranked}) > 1
        for (left, first), (right, second) in combinations(sorted(ranked), 2):
            confusion[first, second] += 1
            confusion[second, first] += 1
            if left and right and left != right:
                named[left, right][first, second] += 1
    numbers = {name: number for number, name in enumerate(sorted({name for pair in named for name in pair}), start=1)}
    kappa = weighted_kappa if ordinal else plain_kappa
    return {
        "read_twice": read_twice,
        "disagreed": disagreed,
        "percent_agreement": _share(confusion),
        "kappa": kappa(confusion),
        "weights": "quadratic" if ordinal else "none",
        "pairs": [
            {
                "readers": [numbers[left], numbers[right]],
                "n": int(table.sum()),
                "percent_agreement": _share(table),
                "kappa": kappa(table),
            }
            for (left, right), table in sorted(named.items())[:MAX_PAIRS]
        ],
    }


def weighted_kappa(confusion: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen 1968) of a (K, K) table of counts; None where chance explains all."""
    ranks = np.arange(len(confusion))
    return _kappa(confusion, (ranks[:, None] - ranks[None, :]) ** 2.0)


def plain_kappa(confusion: np.ndarray) -> float | None:
    """Cohen's kappa (1960) of a (K, K) table of counts."""
    return _kappa(confusion, 1.0 - np.eye(len(confusion)))


def _kappa(confusion: np.ndarray, weights: np.ndarray) -> float | None:
    total = confusion.sum()
    if not total:
        return None
    expected = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / total
    by_chance = float((weights * expected).sum())
    return None if by_chance == 0 else 1.0 - float((weights * confusion).sum()) / by_chance


def _share(confusion: np.ndarray) -> float | None:
    return float(np.trace(confusion) / confusion.sum()) if confusion.sum() else None


def describe(found: Mapping[str, Any], policy: str) -> str:
    """One sentence for the notes."""
    number: Callable[[float | None], str] = lambda value: "unknown" if value is None else f"{value:.2f}"  # noqa: E731
    return (
        f"{found['read_twice']} image(s), series or patients were read more than once and {found['disagreed']} of them differently "
        f"(agreement of pairs {number(found['percent_agreement'])}, kappa {number(found['kappa'])}); policy: {policy}."
    )
