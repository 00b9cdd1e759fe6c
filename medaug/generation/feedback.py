"""Decisions of feedback rounds: where to generate next, whether a round helped, when to stop, and what it saved. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaug.errors import ConfigError
from medaug.generation.plan import largest_remainder


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: from 1.
        counts: images generated per class.
        accepted: images that passed the gate.
        before, after: validation scores without and with them, one per seed of the grader.
        kept: whether they stay.
    """

    number: int
    counts: tuple[int, ...]
    accepted: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    kept: bool


def doubt(probs: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """1 - p_y for each image, in [0, 1].

    Args:
        probs: (N, K), rows sum to 1.
        labels: (N,) true classes.
    """
    return 1.0 - probs[np.arange(len(labels)), np.asarray(labels, dtype=int)]


def class_doubt(probs: np.ndarray, labels: Sequence[int], num_classes: int) -> list[float]:
    """Mean doubt per class; a class without an image gets the mean of the others. Arguments as for `doubt`."""
    each = doubt(probs, labels)
    classes = np.asarray(labels, dtype=int)
    found = [float(each[classes == label].mean()) if (classes == label).any() else math.nan for label in range(num_classes)]
    mean = float(np.nanmean(found))
    return [mean if math.isnan(value) else value for value in found]


def spend(total: int, doubts: Sequence[float]) -> list[int]:
    """Split `total` images over the classes in proportion to their doubt; evenly where nothing is doubted."""
    weights = [1.0] * len(doubts) if sum(doubts) <= 0 else list(doubts)
    return largest_remainder([total * weight / sum(weights) for weight in weights], total)


def doubted_references(ids: Sequence[str], labels: Sequence[int], doubts: Sequence[float], share: float) -> list[str]:
    """The most doubted `share` of each class, at least one of each that occurs; ties go by id.

    Args:
        ids, labels, doubts: of training images, judged by graders that were not trained on them.
        share: in (0, 1].

    Raises:
        ConfigError: a share out of range.
    """
    if not 0 < share <= 1:
        raise ConfigError("feedback-option", f"The share of doubted references must lie in (0, 1], got {share}.")
    chosen: list[str] = []
    for label in sorted(set(labels)):
        own = sorted((-float(value), name) for name, at, value in zip(ids, labels, doubts, strict=True) if at == label)
        chosen += [name for _, name in own[: max(1, math.ceil(share * len(own)))]]
    return chosen


def helped(before: Sequence[float], after: Sequence[float], least_gain: float = 0.0) -> bool:
    """Whether a round is kept: the mean gain over the seeds lies above `least_gain` and above its standard error.

    Args:
        before, after: validation scores of the same seeds.
        least_gain: in units of the score.
    """
    gains = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else 0.0
    return bool(gains.mean() > max(least_gain, error))


def next_amount(rounds: Sequence[Round], budget: int, per_round: int, patience: int = 1) -> int:
    """Images to generate in the next round; 0 stops: the budget is spent, or the last `patience` rounds did not help.

    Args:
        rounds: so far; every generated image counts, whether it was kept or not.
        budget: images in all.
        per_round: images per round.
        patience: rounds without help that are borne.
    """
    recent = rounds[-patience:]
    if len(recent) == patience and not any(entry.kept for entry in recent):
        return 0
    return max(0, min(per_round, budget - sum(sum(entry.counts) for entry in rounds)))


def uses_references(settings: Mapping[str, Any]) -> bool:
    """Whether the choice of references shows in the images, for generation settings that rounds can follow.

    Args:
        settings: evaluated ones, those of ``counts``, ``seeds``, ``source``, ``target_label`` and ``disturbance_settings`` that the bundle has.

    Returns:
        True where images are variations of training images that ``seeds`` chooses, False where they come from noise.

    Raises:
        ConfigError: rounds cannot choose classes (code `feedback-option`), or every round would make the same images (`feedback-source`).
    """
    for name in ("counts", "target_label"):
        if settings.get(name) is not None:
            raise ConfigError(
                "feedback-option", f"Feedback itself decides how many images of which class are made; leave {name} at null."
            )
    source = settings.get("source")
    if source not in (None, "generated", "real"):
        raise ConfigError(
            "feedback-source",
            "A finished stage 1 holds the same images in every round; set source to generated, or to real with "
            "disturbance_settings#spread above 0.",
        )
    if source == "real":
        own = settings.get("disturbance_settings") or {}
        guided = any(term.get("scale", 1) for term in own.get("guidance") or [])
        if not (own.get("spread") or 0) > 0 or not guided:
            raise ConfigError(
                "feedback-source",
                "Real images are disturbed without any draw, so every round would make the same ones; set disturbance_settings#spread "
                "above 0, with a guidance it acts on, or source to generated.",
            )
    chosen = "seeds" in settings and source != "generated"
    if chosen and settings["seeds"] is not None:
        raise ConfigError("feedback-option", "Feedback itself chooses the training images to start from; leave seeds at null.")
    return chosen


def saving(
    rounds: Sequence[Round], final: float, one_shot: Mapping[int, float], baseline: float
) -> dict[str, float | int | None]:
    """What the rounds cost beside one shot, in generated images; scores are of validation, which also chose the rounds.

    Args:
        rounds: all of them.
        final: mean score with the images that were kept.
        one_shot: images generated -> mean score of what passed of them, for one shot with an ordinary allocation.
        baseline: mean score without a synthetic image.

    Returns:
        ``generated`` images of all rounds, ``kept`` (accepted ones of the rounds that helped), ``one_shot_needed`` (the fewest images with which
        one shot reaches `final`, 0 if the baseline does; None if it does not), ``saved`` (their difference to ``generated``, None likewise, 0 if
        nothing was kept), ``one_shot_best``.
    """
    kept = sum(entry.accepted for entry in rounds if entry.kept)
    generated = sum(sum(entry.counts) for entry in rounds)
    enough = [amount for amount, score in ({0: baseline} | dict(one_shot)).items() if score >= final]
    needed = min(enough) if enough else None
    if not kept:
        needed = 0  # the final score is the baseline
    return {
        "generated": generated,
        "kept": kept,
        "final": final,
        "one_shot_needed": needed,
        "one_shot_best": max(one_shot.values()) if one_shot else None,
        "saved": None if needed is None else needed - generated if kept else 0,
    }


def saving_text(saved: Mapping[str, Any]) -> str:
    """What `saving` found, as sentences."""
    made = f"{saved['generated']} image(s) generated"
    if not saved["kept"]:
        text = f"Nothing was kept of {made}: nothing is gained, and nothing saved."
    elif saved["one_shot_best"] is None:
        text = f"{saved['kept']} image(s) kept of {made}; not compared with one shot."
    elif saved["one_shot_needed"] is None:
        text = f"{saved['kept']} image(s) kept of {made}; one shot of the whole budget does not reach that score."
    else:
        more = "fewer" if saved["saved"] >= 0 else "more"
        text = f"{saved['kept']} image(s) kept of {made}, {abs(saved['saved'])} {more} than one shot generates for that score."
    return f"{text} All scores are of validation, which also chose the rounds; measure the result on test with `medaug grade`."
