"""From predictions to a plain sentence per arm: helps, no evidence, harms.

An arm "helps" only if the 95 % interval of its difference lies above 0 against plain training *and* against the control
that repeats real images, both also after Holm's correction over the arms. An arm that shows its images through views of its
own (AMST) must in the same way beat real images seen through its weak view. It "harms" if its interval against plain
training lies below 0, also after Holm's correction. Both ask every seed to agree on the sign, and three seeds at least. Everything else is
"no evidence", which is not "no effect".

The intervals cover the choice of test patients and the luck of training, see `with_training_luck`. What no interval here covers is the
luck of the generator: all seeds train on the same folder of images, so a verdict is about these images; another run of the same method
may deserve another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medaug.errors import ConfigError, DataError
from medaug.grading.statistics import (
    PairedDifference,
    bootstrap_scores,
    compare_scores,
    holm,
    wilcoxon_networks,
    with_training_luck,
)

BASELINE = "none"
CONTROL = "oversample"
SIGNIFICANCE = 0.05
FEW_GROUPS = 20
FEWEST_SEEDS = 3  # with two, one benchmark in six without an effect got a verdict in simulation

METRIC_LABELS = {"balanced_accuracy": "balanced accuracy", "quadratic_kappa": "quadratic kappa"}

__all__ = ["BASELINE", "CONTROL", "Predictions", "check_complete", "judge", "primary_metric"]


@dataclass(frozen=True)
class Predictions:
    """What the rows of a benchmark say about the test set.

    Attributes:
        target: (N,) true classes.  groups: (N,) group of each case.
        probs: (arm, network) -> (S, N, K), one entry per seed, seeds in the same order everywhere.
        validation: (arm, network) -> primary metric on validation, mean over seeds; None where undefined.
    """

    target: np.ndarray
    groups: Sequence[str]
    probs: Mapping[tuple[str, str], np.ndarray]
    validation: Mapping[tuple[str, str], float | None]

    @property
    def arms(self) -> list[str]:
        """Arm names in first-seen order."""
        return list(dict.fromkeys(arm for arm, _ in self.probs))

    @property
    def networks(self) -> list[str]:
        """Network names in first-seen order."""
        return list(dict.fromkeys(network for _, network in self.probs))


def primary_metric(ordinal: bool) -> str:
    """The one figure the verdict rests on: quadratic kappa for ordered classes, else balanced accuracy."""
    return "quadratic_kappa" if ordinal else "balanced_accuracy"


def check_complete(predictions: Predictions) -> None:
    """Every arm must have every network and the baseline must be there.

    Raises:
        ConfigError: no baseline arm.  DataError: a missing cell or a different number of seeds or cases.
    """
    if BASELINE not in predictions.arms:
        raise ConfigError(
            "baseline-missing",
            f"A verdict compares with the arm `{BASELINE}`, got {', '.join(predictions.arms)}; add --arm {BASELINE}.",
        )
    shapes = {values.shape for values in predictions.probs.values()}
    if len(shapes) != 1 or len(predictions.probs) != len(predictions.arms) * len(predictions.networks):
        raise DataError(
            "rows-incomplete",
            "Every arm needs the same networks, seeds and test cases; run the same grading command again to fill the gaps.",
        )


def judge(
    predictions: Predictions,
    *,
    ordinal: bool,
    notes: Sequence[str] = (),
    view_controls: Mapping[str, str] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Judge every arm but the baseline.

    Args:
        ordinal: chooses the primary metric.  notes: warnings about the data, repeated in every verdict.
        view_controls: arm -> the arm of real images seen through the same weak view, for arms that bring views of their own.
        num_resamples, seed: of the bootstrap.

    Returns:
        arm -> verdict ("helps", "no evidence", "harms"), sentence, metric, against_none, against_control and
        against_views (difference, low, high, p_value, p_holm, score_a, score_b ...; None without such a control), seed_differences, per_network,
        wilcoxon, validation_difference, warnings.
    """
    check_complete(predictions)
    metric = primary_metric(ordinal)
    scores = {
        cell: bootstrap_scores(predictions.target, predictions.groups, probs, metric, num_resamples=num_resamples, seed=seed)
        for cell, probs in predictions.probs.items()
    }
    pooled = {arm: np.mean([scores[arm, network] for network in predictions.networks], axis=0) for arm in predictions.arms}
    judged = [arm for arm in predictions.arms if arm != BASELINE]
    by_seed = {arm: _seed_scores(predictions, arm, metric) for arm in predictions.arms}
    num_groups = len(set(predictions.groups))

    def compare(arm: str, other: str) -> PairedDifference:
        result = compare_scores(pooled[arm], pooled[other])
        return with_training_luck(result, _minus(by_seed[arm], by_seed[other]), num_groups)

    against_none = {arm: compare(arm, BASELINE) for arm in judged}
    has_control = CONTROL in predictions.arms
    against_control = {arm: compare(arm, CONTROL) for arm in judged if has_control and arm != CONTROL}
    own_views = {arm: compare(arm, other) for arm, other in _known(view_controls, predictions).items()}
    holm_views = holm({arm: result.p_value for arm, result in own_views.items()})
    holm_none = holm({arm: result.p_value for arm, result in against_none.items()})
    holm_control = holm({arm: result.p_value for arm, result in against_control.items()})
    warnings = _warnings(predictions, notes, has_control)
    verdicts: dict[str, dict[str, Any]] = {}
    for arm in judged:
        control, views = against_control.get(arm), own_views.get(arm)
        seeds = _minus(by_seed[arm], by_seed[BASELINE])
        helped = (
            _above(against_none[arm], holm_none[arm])
            and (control is None or _above(control, holm_control[arm]))
            and (views is None or _above(views, holm_views[arm]))
            and min(seeds) > 0
        )
        harmed = against_none[arm].high < 0 and holm_none[arm] < SIGNIFICANCE and max(seeds) < 0
        spoken = "helps" if helped else "harms" if harmed else "no evidence"
        verdict = spoken if len(seeds) >= FEWEST_SEEDS else "no evidence"
        networks = {network: compare_scores(scores[arm, network], scores[BASELINE, network]) for network in predictions.networks}
        verdicts[arm] = {
            "verdict": verdict,
            "sentence": _sentence(
                arm, verdict, METRIC_LABELS[metric], against_none[arm], control, views, seeds, len(predictions.networks)
            ),
            "metric": metric,
            "against_none": _plain(against_none[arm], holm_none[arm]),
            "against_control": None if control is None else _plain(control, holm_control[arm]),
            "against_views": None if views is None else _plain(views, holm_views[arm]),
            "seed_differences": [_none_if_nan(value) for value in seeds],
            "per_network": {network: _plain(result, None) for network, result in networks.items()},
            "wilcoxon": wilcoxon_networks([result.difference for result in networks.values()]),
            "validation_difference": _validation_difference(predictions, arm),
            "warnings": warnings,
        }
    return verdicts


def _known(view_controls: Mapping[str, str] | None, predictions: Predictions) -> Mapping[str, str]:
    """The controls, all of them run.

    Raises:
        ConfigError: an arm or its control has no predictions.
    """
    missing = {name for pair in (view_controls or {}).items() for name in pair} - set(predictions.arms)
    if missing:
        raise ConfigError("control-missing", f"A verdict on views needs the arm(s) {', '.join(sorted(missing))}; run them too.")
    return view_controls or {}


def _above(result: PairedDifference, p_holm: float) -> bool:
    return result.low > 0 and p_holm < SIGNIFICANCE


def _seed_scores(predictions: Predictions, arm: str, metric: str) -> list[float]:
    """The arm's score for each seed, mean over networks: how much a verdict owes to chance in training."""

    def score(index: int) -> float:
        runs = np.stack([predictions.probs[arm, network][index] for network in predictions.networks])
        return float(bootstrap_scores(predictions.target, predictions.groups, runs, metric, num_resamples=0)[0])

    return [score(index) for index in range(len(next(iter(predictions.probs.values()))))]


def _minus(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    return [score - other for score, other in zip(scores, others, strict=True)]


def _validation_difference(predictions: Predictions, arm: str) -> float | None:
    pairs = [
        (predictions.validation.get((arm, network)), predictions.validation.get((BASELINE, network)))
        for network in predictions.networks
    ]
    known = [ours - baseline for ours, baseline in pairs if ours is not None and baseline is not None]
    return float(np.mean(known)) if known else None


def _warnings(predictions: Predictions, known: Sequence[str], has_control: bool) -> list[str]:
    notes = list(known)
    num_groups = len(set(predictions.groups))
    if num_groups < FEW_GROUPS:
        notes.append(f"The test split has only {num_groups} groups; intervals from so few are rough.")
    num_seeds = len(next(iter(predictions.probs.values())))
    if num_seeds < FEWEST_SEEDS:
        notes.append(
            f"{num_seeds} seed(s) show too little of the luck of training for a verdict; grade with at least {FEWEST_SEEDS} seeds."
        )
    if not has_control:
        notes.append(
            f"There is no `{CONTROL}` arm, so nothing shows that new images do more than repeated ones; add --arm {CONTROL}."
        )
    return notes


def _sentence(
    arm: str,
    verdict: str,
    metric: str,
    none: PairedDifference,
    control: PairedDifference | None,
    views: PairedDifference | None,
    seeds: Sequence[float],
    num_networks: int,
) -> str:
    """One plain sentence with the numbers the verdict rests on."""
    if math.isnan(none.difference):
        return f"{arm}: no evidence; {metric} is undefined on this test split."
    opening = {"helps": "helps", "harms": "harms", "no evidence": "shows no evidence of help or harm"}[verdict]
    text = (
        f"{arm} {opening}: {metric} {none.score_a:.3f} against {none.score_b:.3f} without augmentation, "
        f"difference {none.difference:+.3f} (95 % interval {none.low:+.3f} to {none.high:+.3f})"
    )
    if control is not None:
        text += f"; against repeated real images {control.difference:+.3f} ({control.low:+.3f} to {control.high:+.3f})"
    if views is not None:
        text += f"; against real images seen through the same weak view {views.difference:+.3f} ({views.low:+.3f} to {views.high:+.3f})"
    text += f"; mean over {num_networks} network(s) and {len(seeds)} seed(s)"
    if len(seeds) > 1 and min(seeds) < 0 < max(seeds):
        text += f", whose seeds disagree on the sign ({min(seeds):+.3f} to {max(seeds):+.3f})"
    return text + "."


def _plain(result: PairedDifference, p_holm: float | None) -> dict[str, Any]:
    row = {name: _none_if_nan(value) for name, value in asdict(result).items()}
    return row if p_holm is None else row | {"p_holm": p_holm}


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
