"""Arms of a comparison: which images a classifier trains on, and how they are augmented.

An arm holds all real training images unless it says otherwise. What it adds is exact by class, nested over the amount (more
synthetic images contain the fewer, at the same seed), and checked: no image whose generator, guide or filter saw a held-out
group. Which images, and how many, is said in `medaug.grading.mixing`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.cohort import Case, Cohort, read_cohort
from medaug.errors import ConfigError, DataError
from medaug.grading import mixing
from medaug.grading.arm import Arm, Variant
from medaug.grading.arm_checks import check_arm
from medaug.grading.arm_terms import is_mixed, read_terms
from medaug.grading.controls import OVERSAMPLE, WEAK_VIEW, alike, with_count_controls, with_view_controls
from medaug.grading.mixing import ALLOCATIONS, REAL, Pair, class_counts, in_proportion, keyed_order, level, real_cases
from medaug.grading.presets import PRESETS
from medaug.training.amst_recipe import ABLATIONS, amst_recipe
from medaug.training.mixture import Mixture
from medaug.transforms.policies import POLICIES

_Training = tuple[float | None, list[int]]  # fraction of the real images, images per class
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
# FOLDER:amst or FOLDER:amst:UNLABELLED, and the ablations of AMST in its place.
_TRAINED = re.compile(rf"(?P<folder>.*?):(?P<trainer>{'|'.join(sorted(ABLATIONS, key=len, reverse=True))})(:(?P<unlabelled>.+))?")

__all__ = [
    "ALLOCATIONS",
    "OVERSAMPLE",
    "WEAK_VIEW",
    "Arm",
    "Pair",
    "Variant",
    "arm_mixture",
    "at_seed",
    "build_training_set",
    "check_arm",
    "check_arm_name",
    "extra_counts",
    "images_of",
    "in_proportion",
    "kept_cases",
    "level",
    "own_controls",
    "parse_arm",
    "prepare_arms",
    "training_facts",
    "training_sha256",
]


def parse_arm(
    text: str,
    *,
    synthetic_per_real: float | None = None,
    allocation: str = "as_generated",
    allow_untrusted: bool = False,
    amst: Mapping[str, Any] | None = None,
    real_fraction: float = 1.0,
    named: Mapping[str, Cohort] | None = None,
) -> Arm:
    """Read an arm as the command line writes it: a policy's name, ``oversample``, ``weak_view``, or ``NAME=FOLDER`` of accepted images.

    Further: a cell of `PRESETS`, whose synthetic images are `named`, and ``NAME=TERM + TERM`` of several sources, see
    `medaug.grading.arm_terms`. `real_fraction` counts for every arm that does not say its own.

    ``NAME=FOLDER:amst`` trains by AMST, which takes the images of the folder but not their labels; ``amst-no_cr`` and the
    other names of `ABLATIONS` are its ablations. ``NAME=FOLDER:amst:UNLABELLED`` adds a cohort of unlabelled images; FOLDER
    may then be empty. `amst` changes fields of `AmstRecipe` for all such arms alike.

    Raises:
        ConfigError: no such arm, a bad name, ratio or allocation.  DataError, LeakageError: the folder is no valid cohort.
    """
    mixing.check_fraction(real_fraction)
    name, separator, folder = text.partition("=")
    if not separator:
        return _built_in(name, real_fraction, amst, named or {}, allow_untrusted)
    check_arm_name(name)
    if not folder:
        raise ConfigError("arm-name", f"An arm NAME=FOLDER needs a folder, got {text!r}.")
    if synthetic_per_real is not None and not synthetic_per_real > 0:
        raise ConfigError("ratio-invalid", f"synthetic_per_real must be above 0, got {synthetic_per_real!r}.")
    if allocation not in ALLOCATIONS:
        raise ConfigError("allocation-unknown", f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}.")
    if is_mixed(folder) or folder in (named or {}):
        terms = read_terms(name, folder, named or {}, per_real=synthetic_per_real, allocation=allocation)
        fields: dict[str, Any] = {"real_fraction": real_fraction} | dict(terms.fields)
        return Arm(name, sources=terms.sources, allow_untrusted=allow_untrusted, **fields)
    options: dict[str, Any] = {
        "synthetic_per_real": synthetic_per_real,
        "allocation": allocation,
        "allow_untrusted": allow_untrusted,
        "real_fraction": real_fraction,
    }
    trained = _TRAINED.fullmatch(folder)
    if trained is not None:
        folder, unlabelled = trained["folder"], trained["unlabelled"]
        options["amst"] = amst_recipe(trained["trainer"], amst)
        options["unlabelled"] = None if unlabelled is None else read_cohort(Path(unlabelled), verify=True)
        if not folder and unlabelled is None:
            raise ConfigError(
                "arm-name", f"Arm {name} trains by AMST on nothing; write NAME=FOLDER:amst or NAME=:amst:UNLABELLED."
            )
    return Arm(name, synthetic=read_cohort(Path(folder), verify=True) if folder else None, **options)


def images_of(text: str) -> str:
    """The folder or terms of images in the text of an arm, without its way of training; empty for a built-in arm."""
    rest = text.partition("=")[2]
    trained = _TRAINED.fullmatch(rest)
    return rest if trained is None else trained["folder"]


def check_arm_name(name: object) -> None:
    """Refuse a name that no arm of its own images can have.

    Raises:
        ConfigError: `arm-name`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (*POLICIES, OVERSAMPLE, WEAK_VIEW):
        raise ConfigError(
            "arm-name",
            "The name of an arm NAME=FOLDER must be up to 64 letters, digits, . _ + -, beginning with a letter or digit, and not a built-in "
            f"arm, got {str(name)[:80]!r}.",
        )


def _built_in(
    name: str, real_fraction: float, amst: Mapping[str, Any] | None, named: Mapping[str, Cohort], allow_untrusted: bool
) -> Arm:
    """An arm that needs no folder of its own."""
    if name == OVERSAMPLE:
        return Arm(name, oversample=True, real_fraction=real_fraction)
    if name == WEAK_VIEW:
        return Arm(name, views=amst_recipe("amst", amst).views, real_fraction=real_fraction)
    if name in POLICIES:
        return Arm(name, policy=name, real_fraction=real_fraction)
    if name in PRESETS:
        sources = PRESETS[name].sources(name, named)
        return Arm(name, sources=sources, real_fraction=PRESETS[name].real_fraction, allow_untrusted=allow_untrusted)
    known = ", ".join([*POLICIES, OVERSAMPLE, WEAK_VIEW, *PRESETS, "NAME=FOLDER", "NAME=FOLDER + FOLDER", "NAME=FOLDER:amst"])
    raise ConfigError(
        "arm-unknown", f"An arm must be one of {known}, got {name!r}; NAME=FOLDER names a folder of accepted synthetic images."
    )


def kept_cases(arm: Arm, real: Cohort, seed: int) -> list[Case]:
    """The real images of an arm at one seed."""
    return [] if arm.real_fraction is None else mixing.keep_fraction(real_cases(real), arm.real_fraction, seed)


def extra_counts(arm: Arm, real: Cohort, seed: int = 0) -> tuple[int, ...]:
    """Synthetic images per class that an arm adds to `real`; the seed matters where groups are kept or left whole, and where every
    seed has images of its own.

    Raises:
        DataError: a source holds fewer than asked for, with the class and both numbers.
    """
    kept = kept_cases(arm, real, seed)
    counts = [mixing.source_counts(source, real, kept, f"Arm {arm.name}") for source in arm.at(seed).added()]
    return tuple(sum(column) for column in zip(*counts, strict=True)) if counts else (0,) * len(real.classes)


def own_controls(points: Sequence[Sequence[Arm]], real: Cohort) -> dict[str, list[str]]:
    """The synthetic arms that the common control does not match, see `controls.alike`, and which of them can share one of their own.

    Args:
        points: the same arms at every ratio and fraction; they share a control only if they can at every point, and at every seed that
            has images of its own.

    Returns:
        name of the arm that a control matches -> names of those that meet it.

    Raises:
        DataError, LeakageError: see `prepare_arms`.
    """
    for arms in points:
        for arm in arms:
            check_arm(arm, real)
    tables = [_training_counts(arms, real, seed) for arms in points for seed in _seeds_with_images(arms)]
    served: dict[str, list[str]] = {}
    for name in tables[0]:
        if name == OVERSAMPLE or _same(tables, name, OVERSAMPLE, any_fraction=True):
            continue
        first = next((other for other in served if _same(tables, name, other)), name)
        served.setdefault(first, []).append(name)
    return served


def _same(tables: Sequence[Mapping[str, _Training]], one: str, other: str, *, any_fraction: bool = False) -> bool:
    """True if the training sets of two arms are alike at every point."""
    pairs = [(table[one], table[other]) for table in tables]
    return all(alike(ours[1], theirs[1]) and (any_fraction or ours[0] == theirs[0]) for ours, theirs in pairs)


def _seeds_with_images(arms: Sequence[Arm]) -> list[int]:
    """The seeds that have images of their own in any arm; 0 stands for all if there is none."""
    return sorted({seed for arm in arms for seed in arm.by_seed}) or [0]


def _training_counts(arms: Sequence[Arm], real: Cohort, seed: int) -> dict[str, _Training]:
    """Fraction of the real images and images per class of every synthetic arm, and of the common control under its name, at one seed.

    Empty without such a control; an arm without real images is left out: nothing could be repeated for it.
    """
    control = next((arm for arm in arms if arm.oversample and arm.matches is None and arm.extra is None), None)
    largest = _largest(arms, real)
    if control is None or largest is None:
        return {}

    def counted(kept: Arm, added: Arm) -> _Training:
        counts = class_counts(kept_cases(kept, real, 0), len(real.classes))
        return kept.real_fraction, [sum(pair) for pair in zip(counts, extra_counts(added, real, seed), strict=True)]

    served = {name for arm in arms for name in arm.serves}
    candidates = [arm for arm in arms if arm.added() and arm.real_fraction is not None and arm.base not in served]
    return {OVERSAMPLE: counted(control, largest)} | {arm.name: counted(arm, arm) for arm in candidates}


def _largest(arms: Sequence[Arm], real: Cohort) -> Arm | None:
    """The synthetic arm that adds most, of equals the first."""
    return max((arm for arm in arms if arm.added()), key=lambda arm: sum(extra_counts(arm, real)), default=None)


def prepare_arms(arms: Sequence[Arm], real: Cohort) -> list[Arm]:
    """Check every arm, add the controls of `medaug.grading.controls`, and fix the images each arm adds per class.

    The control repeats real images to the count and classes of the largest synthetic arm; without one, until every
    class is as large as the largest. Arms that it does not match have one of their own. Arms that are prepared already stay as they are.

    Raises:
        ConfigError: no arm, or two of one name.  DataError, LeakageError: see `check_arm` and `extra_counts`.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) != len(names):
        raise ConfigError("arms-invalid", f"A comparison needs arms of different names, got {names}.")
    arms = with_view_controls(arms)
    arms = with_count_controls(arms, own_controls([arms], real))
    largest = _largest(arms, real)
    return [
        _with_repeats(arm, arm.matches or largest, real) if arm.oversample else replace(arm, extra=extra_counts(arm, real))
        for arm in arms
    ]


def _with_repeats(arm: Arm, matches: Arm | None, real: Cohort) -> Arm:
    """A control with the images it repeats per class; with those it was given, if any."""
    if arm.extra is None:
        arm = replace(arm, matches=matches, extra=extra_counts(matches, real) if matches else _levelling(arm, real))
    present = class_counts(real_cases(real), len(real.classes))
    needed = zip(real.classes, present, arm.extra or (), strict=True)
    _refuse_lacking([name for name, has, need in needed if need and not has])
    return arm


def at_seed(arm: Arm, real: Cohort, seed: int) -> Arm:
    """An arm of `prepare_arms` as it trains at one seed, prepared: what it would be if this seed's images were all there are."""
    if arm.matches is not None and arm.matches.by_seed:
        matches = at_seed(arm.matches, real, seed)
        return replace(arm, matches=matches, extra=extra_counts(matches, real))
    return replace(one, extra=extra_counts(one, real)) if (one := arm.at(seed)) is not arm else arm


def _levelling(arm: Arm, real: Cohort) -> tuple[int, ...]:
    """Copies per class that make every class of the arm's real images as large as the largest."""
    counts = class_counts(kept_cases(arm, real, 0), len(real.classes))
    return tuple(max(counts) - count for count in counts)


def _refuse_lacking(names: Sequence[str]) -> None:
    if names:
        raise DataError(
            "class-empty", f"The control arm cannot repeat real images of {', '.join(names)}: the images it keeps have none."
        )


def build_training_set(arm: Arm, real: Cohort, seed: int) -> list[Pair]:
    """The training images of an arm from `prepare_arms`: the real ones first, then the added ones, class by class.

    Added images are taken in an order that belongs to (seed, case): a smaller amount is a subset of a larger one. See
    `medaug.grading.mixing.build_training_set`, which does it for any sources.

    Raises:
        LeakageError, DataError: see `check_arm`.  ConfigError: the arm did not pass through `prepare_arms`.
    """
    arm = at_seed(arm, real, seed)
    check_arm(arm, real)
    if arm.extra is None:
        raise ConfigError("arm-unprepared", f"Arm {arm.name} has no counts yet; pass it through prepare_arms.")
    if not arm.oversample:
        index = mixing.build_training_set(real, arm.added(), real_fraction=arm.real_fraction, seed=seed, what=f"Arm {arm.name}")
        return list(index.pairs)
    kept = kept_cases(arm, real, seed)
    pairs: list[Pair] = [(real, case) for case in kept]
    for label, count in enumerate(arm.extra if arm.matches is None else extra_counts(arm.matches, real, seed)):
        pool = keyed_order([case for case in kept if case.label == label], seed)
        _refuse_lacking([real.classes[label]] if count and not pool else [])
        pairs += [(real, pool[place % len(pool)]) for place in range(count)]
    return pairs


def _provenance(arm: Arm, pairs: Sequence[Pair]) -> list[str]:
    """The source of every image; no two sources of an arm hold the same images."""
    names = {source.cohort.content_sha256: source.name for source in arm.added()}
    return [names[owner.content_sha256] if case.is_synthetic else REAL for owner, case in pairs]


def arm_mixture(arm: Arm, pairs: Sequence[Pair]) -> Mixture | None:
    """Batch shares and loss weights of an arm's images; None if every image counts alike.

    Raises:
        ConfigError: `share-invalid`, `share-without-source`.
    """
    shares = {source.name: source.share for source in arm.sources if source.share is not None}
    if arm.real_share is not None:
        shares[REAL] = arm.real_share
    weights = {source.name: source.weight for source in arm.sources if source.weight != 1}
    return Mixture(tuple(_provenance(arm, pairs)), shares, weights) if shares or weights else None


def training_facts(arm: Arm, pairs: Sequence[Pair], num_classes: int) -> dict[str, Any]:
    """What a row says of its training set; of a mixed arm also the images per class of every source."""
    names = _provenance(arm, pairs)
    num_real = len({case.id for name, (_, case) in zip(names, pairs, strict=True) if name == REAL})
    synthetic = len(names) - names.count(REAL)
    facts: dict[str, Any] = {
        "num_training": len(pairs),
        "num_synthetic": synthetic,
        "ratio": synthetic / num_real if num_real else None,
        "added_per_class": class_counts([case for _, case in pairs[num_real:]], num_classes),
    }
    if arm.sources or arm.real_fraction != 1:
        facts |= {"num_real": num_real, "real_fraction": arm.real_fraction}
        facts["per_source"] = mixing.TrainingIndex(tuple(pairs), tuple(names)).counts(num_classes)
    return facts


def training_sha256(pairs: Sequence[Pair]) -> str:
    """sha256 over the ordered case ids and cohorts of a training set."""
    return storage.sha256_json([[cohort.content_sha256, case.id] for cohort, case in pairs])
