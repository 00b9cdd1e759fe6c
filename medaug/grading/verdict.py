"""From predictions to a plain sentence per arm: helps, no evidence, harms.

An arm "helps" only if the 95 % interval of its difference lies above 0 against plain training *and* against the control that repeats real
images, both also after Holm's correction over the arms; without that control no arm is said to help. An arm that shows its images
through views of its own (AMST) must in the same way beat real images seen through its weak view. It "harms" if its interval against
plain training lies below 0, also after Holm's correction. Both ask every seed to agree on the sign, three seeds at least, and test images
of two groups.
Everything else is "no evidence", which is not "no effect".

Both metrics depend on where the classes are cut: images that make a network say one class more often can raise them, and a threshold
may have done the same. The area under the ROC curve does not (`pair_auc`), so it is given beside every verdict, and a verdict for which
it shows no difference says so.

The intervals cover the choice of test patients and the luck of training, see `with_training_luck`. Where all seeds train on the same
folder of images, no interval covers the luck of the generator: the verdict is about these images, and another run of the same method
may deserve another one. Where every seed has images of its own (`medaug.grading.image_sets`), that luck is part of what differs between
the seeds, and the verdict is about the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from medaug.errors import ConfigError, DataError
from medaug.grading.scores import Predictions, Scores, score_cells
from medaug.grading.statistics import PairedDifference, holm, wilcoxon_networks

BASELINE = "none"
CONTROL = "oversample"
SIGNIFICANCE = 0.05
FEW_GROUPS = 20
FEWEST_GROUPS = 2  # resamples of one group are all alike: the interval would hold nothing of the luck of patients
FEWEST_SEEDS = 3  # with two, one benchmark in six without an effect got a verdict in simulation

METRIC_LABELS = {"balanced_accuracy": "balanced accuracy", "quadratic_kappa": "quadratic kappa"}

__all__ = ["BASELINE", "CONTROL", "Opponents", "Predictions", "check_complete", "default_opponents", "judge", "primary_metric"]


@dataclass(frozen=True)
class Opponents:
    """What an arm is compared with.

    Attributes:
        baseline: plain training on all real images, in a comparison over fractions on the arm's.
        control: real images repeated to the count of the arm's, see `medaug.grading.controls`; None without one.
        views: real images seen through the arm's own weak view; None for an arm without views of its own.
    """

    baseline: str = BASELINE
    control: str | None = None
    views: str | None = None

    def names(self) -> set[str]:
        """The arms that there are."""
        return {name for name in (self.baseline, self.control, self.views) if name is not None}


def primary_metric(ordinal: bool) -> str:
    """The one figure the verdict rests on: quadratic kappa for ordered classes, else balanced accuracy."""
    return "quadratic_kappa" if ordinal else "balanced_accuracy"


def check_complete(predictions: Predictions, opponents: Mapping[str, Opponents]) -> None:
    """Every arm must have every network, and what it is compared with must be there.

    Raises:
        ConfigError: no baseline arm, or no other opponent.  DataError: a missing cell or a different number of seeds or cases.
    """
    for other in opponents.values():
        if other.baseline not in predictions.arms:
            raise ConfigError(
                "baseline-missing",
                f"A verdict compares with the arm `{other.baseline}`, got {', '.join(predictions.arms)}; add --arm {BASELINE}.",
            )
    missing = set(opponents).union(*(other.names() for other in opponents.values())) - set(predictions.arms)
    if missing:
        raise ConfigError("control-missing", f"A verdict needs the arm(s) {', '.join(sorted(missing))}; run them too.")
    shapes = {values.shape for values in predictions.probs.values()}
    if len(shapes) != 1 or len(predictions.probs) != len(predictions.arms) * len(predictions.networks):
        raise DataError(
            "rows-incomplete",
            "Every arm needs the same networks, seeds and test cases; run the same grading command again to fill the gaps.",
        )


def default_opponents(arms: Sequence[str]) -> dict[str, Opponents]:
    """Every arm but the baseline against it and, if it is there, against the control."""
    control = CONTROL if CONTROL in arms else None
    return {arm: Opponents(control=None if arm == CONTROL else control) for arm in arms if arm != BASELINE}


def judge(
    predictions: Predictions,
    *,
    ordinal: bool,
    notes: Sequence[str] = (),
    opponents: Mapping[str, Opponents] | None = None,
    scores: Scores | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Judge every arm that has opponents.

    Args:
        ordinal: chooses the primary metric.  notes: warnings about the data, repeated in every verdict.
        opponents: arm -> what it is compared with; None: see `default_opponents`.
        scores: of `score_cells`, where they are there already, in place of `num_resamples` and `seed` of the bootstrap.

    Returns:
        arm -> verdict ("helps", "no evidence", "harms"), sentence, metric, opponents, against_none, against_control and
        against_views (difference, low, high, p_value, p_holm, score_a, score_b ...; None without such a control),
        seed_differences, ranking (against_none, against_control, per_network of `pair_auc`), per_class (class by class), per_network and
        per_network_control, wilcoxon and wilcoxon_control (with wins and p_holm), validation_difference, warnings.
    """
    metric = primary_metric(ordinal)
    opponents = default_opponents(predictions.arms) if opponents is None else opponents
    check_complete(predictions, opponents)
    scores = scores or score_cells(predictions, metric, num_resamples=num_resamples, seed=seed)
    kinds = [
        {arm: name for arm, other in opponents.items() if (name := of(other)) is not None}
        for of in (attrgetter("baseline"), attrgetter("control"), attrgetter("views"))
    ]
    none, control, views = (_comparison(scores, kind) for kind in kinds)
    ranking = [_comparison(scores.ranking, kind) for kind in kinds] if scores.ranking else []
    has_control = CONTROL in {arm.partition("@")[0] for arm in predictions.arms}
    warnings, num_groups = _warnings(predictions, notes, has_control), len(set(predictions.groups))
    verdicts: dict[str, dict[str, Any]] = {}
    for arm, other in opponents.items():
        seeds = scores.seed_differences(arm, other.baseline)
        required = [family for family in (none, control, views) if arm in family.overall]
        helped = has_control and all(_above(family, arm) for family in required) and min(seeds) > 0
        harmed = none.overall[arm].high < 0 and none.p_holm[arm] < SIGNIFICANCE and max(seeds) < 0
        spoken = "helps" if helped else "harms" if harmed else "no evidence"
        verdict = spoken if len(seeds) >= FEWEST_SEEDS and num_groups >= FEWEST_GROUPS else "no evidence"
        results = [family.overall.get(arm) for family in (none, control, views)]
        ranked = [family.overall[arm] for family in ranking if arm in family.overall]
        verdicts[arm] = {
            "verdict": verdict,
            "sentence": _sentence(arm, verdict, METRIC_LABELS[metric], other, results, seeds, len(predictions.networks))
            + _unranked(verdict, ranked),
            "metric": metric,
            "opponents": asdict(other),
            "against_none": none.plain(arm),
            "against_control": control.plain(arm),
            "against_views": views.plain(arm),
            "seed_differences": [_none_if_nan(value) for value in seeds],
            "ranking": _ranking(ranking, arm),
            "per_class": _per_class(scores, arm, other),
            "per_network": none.plain_networks(arm),
            "per_network_control": control.plain_networks(arm),
            "wilcoxon": none.wilcoxon[arm],
            "wilcoxon_control": control.wilcoxon.get(arm),
            "validation_difference": _validation_difference(predictions, arm, other.baseline),
            "warnings": warnings,
        }
    return verdicts


@dataclass(frozen=True)
class _Family:
    """Every arm against one kind of opponent; Holm's corrections are over the arms.

    Attributes:
        overall: arm -> difference over all networks.  p_holm: its adjusted p-value.
        networks: arm -> network -> difference.  wilcoxon: arm -> see `wilcoxon_networks`, with p_holm.
    """

    overall: Mapping[str, PairedDifference]
    p_holm: Mapping[str, float]
    networks: Mapping[str, Mapping[str, PairedDifference]]
    wilcoxon: Mapping[str, Mapping[str, Any]]

    def plain(self, arm: str) -> dict[str, Any] | None:
        """The difference over all networks as JSON, None without one."""
        return _plain(self.overall[arm]) | {"p_holm": self.p_holm[arm]} if arm in self.overall else None

    def plain_networks(self, arm: str) -> dict[str, dict[str, Any]]:
        """The differences of the networks as JSON."""
        return {network: _plain(result) for network, result in self.networks.get(arm, {}).items()}


def _comparison(scores: Scores, opponents: Mapping[str, str]) -> _Family:
    overall = {arm: scores.compare(arm, other) for arm, other in opponents.items()}
    networks = {arm: scores.compare_networks(arm, other) for arm, other in opponents.items()}
    ranks = {arm: wilcoxon_networks([one.difference for one in results.values()]) for arm, results in networks.items()}
    adjusted = holm({arm: 1.0 if rank["p_value"] is None else rank["p_value"] for arm, rank in ranks.items()})
    wilcoxon = {arm: rank | {"p_holm": None if rank["p_value"] is None else adjusted[arm]} for arm, rank in ranks.items()}
    return _Family(overall, holm({arm: result.p_value for arm, result in overall.items()}), networks, wilcoxon)


def _per_class(scores: Scores, arm: str, other: Opponents) -> list[dict[str, Any]]:
    """Recall of every class against plain training and the control; no verdict rests on it. Empty where it was not scored."""
    if arm not in scores.recalls:
        return []
    none = scores.compare_classes(arm, other.baseline)
    control = scores.compare_classes(arm, other.control) if other.control else [None] * len(none)
    return [
        {"against_none": _plain(one), "against_control": _plain(two) if two is not None else None}
        for one, two in zip(none, control, strict=True)
    ]


def _above(family: _Family, arm: str) -> bool:
    return family.overall[arm].low > 0 and family.p_holm[arm] < SIGNIFICANCE


def _validation_difference(predictions: Predictions, arm: str, other: str) -> float | None:
    pairs = [
        (predictions.validation.get((arm, network)), predictions.validation.get((other, network)))
        for network in predictions.networks
    ]
    known = [ours - baseline for ours, baseline in pairs if ours is not None and baseline is not None]
    return float(np.mean(known)) if known else None


def _warnings(predictions: Predictions, known: Sequence[str], has_control: bool) -> list[str]:
    notes = list(known)
    num_groups = len(set(predictions.groups))
    if num_groups < FEWEST_GROUPS:
        notes.append("All test images are of one group, which shows nothing of the luck of patients: no arm gets a verdict.")
    elif num_groups < FEW_GROUPS:
        notes.append(f"The test split has only {num_groups} groups; intervals from so few are rough.")
    num_seeds = len(next(iter(predictions.probs.values())))
    if num_seeds < FEWEST_SEEDS:
        notes.append(
            f"{num_seeds} seed(s) show too little of the luck of training for a verdict; grade with at least {FEWEST_SEEDS} seeds."
        )
    if not has_control:
        notes.append(
            f"There is no `{CONTROL}` arm, so nothing shows that new images do more than repeated ones, and no arm is said to help; add "
            f"--arm {CONTROL}."
        )
    return notes


def _sentence(
    arm: str,
    verdict: str,
    metric: str,
    opponents: Opponents,
    results: Sequence[PairedDifference | None],
    seeds: Sequence[float],
    num_networks: int,
) -> str:
    """One plain sentence with the numbers the verdict rests on: `results` against none, the control and the views."""
    none, control, views = results
    assert none is not None
    if math.isnan(none.difference):
        return f"{arm}: no evidence; {metric} is undefined on this test split."
    opening = {"helps": "helps", "harms": "harms", "no evidence": "shows no evidence of help or harm"}[verdict]
    if len(seeds) < FEWEST_SEEDS:
        opening = "has too few seeds for a verdict"
    text = (
        f"{arm} {opening}: {metric} {none.score_a:.3f} against {none.score_b:.3f} without augmentation, "
        f"difference {none.difference:+.3f} (95 % interval {none.low:+.3f} to {none.high:+.3f})"
    )
    if control is not None and not math.isnan(control.difference):
        own = (
            "" if str(opponents.control).partition("@")[0] == CONTROL else f" of its own count and classes ({opponents.control})"
        )
        text += f"; against repeated real images{own} {control.difference:+.3f} ({control.low:+.3f} to {control.high:+.3f})"
    if views is not None and not math.isnan(views.difference):
        text += f"; against real images seen through the same weak view {views.difference:+.3f} ({views.low:+.3f} to {views.high:+.3f})"
    text += f"; mean over {num_networks} network(s) and {len(seeds)} seed(s)"
    if len(seeds) > 1 and min(seeds) < 0 < max(seeds):
        text += f", whose seeds disagree on the sign ({min(seeds):+.3f} to {max(seeds):+.3f})"
    return text + "."


def _ranking(families: Sequence[_Family], arm: str) -> dict[str, Any] | None:
    """The ranking of an arm as JSON; None where it was not scored."""
    if not families:
        return None
    none, control, _ = families
    return {"against_none": none.plain(arm), "against_control": control.plain(arm), "per_network": none.plain_networks(arm)}


def _unranked(verdict: str, ranked: Sequence[PairedDifference]) -> str:
    """What weakens a verdict: no difference in the ranking was shown (`ranked`: against none first), so a threshold may do as much."""
    if not ranked or verdict == "no evidence":
        return ""
    none = ranked[0]
    if math.isnan(none.difference):
        return " Whether classes are told apart better is unknown: the area under the ROC curve is undefined on this test split."
    if all(one.low > 0 for one in ranked) if verdict == "helps" else none.high < 0:
        return ""
    word, moved = ("gain", "bring that without new images") if verdict == "helps" else ("loss", "undo that")
    return (
        f" No {word} in the area under the ROC curve was shown ({none.score_a:.3f} against {none.score_b:.3f}, {none.difference:+.3f}, "
        f"{none.low:+.3f} to {none.high:+.3f}), so the {word} may lie, in part or in whole, in where the classes are cut: a threshold could {moved}."
    )


def _plain(result: PairedDifference) -> dict[str, Any]:
    return {name: _none_if_nan(value) for name, value in asdict(result).items()}


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
