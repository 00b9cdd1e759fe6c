"""What the records say of a comparison of arms: networks, recipes, metrics, intervals; None where there is no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from medaug.evidence.records import Record, Records
from medaug.evidence.shown import counted, figure, listed, settings

METRIC_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "auc": "macro AUC (one class against the rest)",
    "quadratic_kappa": "quadratically weighted kappa",
    "grade_mae": "mean absolute error of the grade",
    "ece": "expected calibration error",
}
BASELINE = "none"

Fact = Callable[[Records], str | None]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _runs(records: Records, arm: str) -> list[Record]:
    return [row for row in records.rows if row["arm"] == arm]


def arm_names(records: Records) -> list[str]:
    """Arms of the benchmark, the baseline first."""
    return sorted(_distinct(row["arm"] for row in records.rows), key=lambda name: (name != BASELINE, name))


def arms(records: Records) -> str | None:
    """What was compared, with the sizes of the training sets."""
    if not records.rows:
        return None
    parts = []
    for arm in arm_names(records):
        row = _runs(records, arm)[0]
        added = f", {row['num_synthetic']} of them synthetic" if row["num_synthetic"] else ""
        policy = row["key"]["recipe"].get("policy", "none")
        parts.append(f"{arm} ({counted(row['num_training'], 'training image')}{added}; augmentation {policy})")
    return f"Arms: {'; '.join(parts)}."


def graded_as(records: Records) -> str | None:
    """The arms that trained on the described images."""
    if not records.rows or not records.synthetic:
        return None
    sha = records.described.content_sha256
    used = _distinct(row["arm"] for row in records.rows if sha in _sources(row["key"]["arm"]))
    partly = [arm for arm in used if not all(sha in _sources(row["key"]["arm"]) for row in _runs(records, arm))]
    beside = f" Of {listed(partly)} they are one of several sets: other seeds trained on other images." if partly else ""
    return (
        f"The described images were graded as: {listed(used)}.{beside}"
        if used
        else "No arm of the benchmark trained on the described images."
    )


def _sources(arm: Mapping[str, Any]) -> list[Any]:
    return [arm.get("synthetic"), *(source[1] for source in arm.get("sources", ()))]


def networks(records: Records) -> str | None:
    """The graded networks and how many runs each had."""
    if not records.rows:
        return None
    names, seeds = _distinct(row["network"] for row in records.rows), sorted({row["seed"] for row in records.rows})
    return f"Classifiers: {listed(names)}; seeds {listed(seeds)}; {counted(len(records.rows), 'training run')} in all."


def classifier_training(records: Records) -> str | None:
    """The recipe of every network; the arms share it but for their augmentation."""
    if not records.rows:
        return None
    parts = []
    for network in _distinct(row["network"] for row in records.rows):
        recipes = [row["key"]["recipe"] for row in records.rows if row["network"] == network]
        shown = _distinct(settings({key: value for key, value in recipe.items() if key != "policy"}) for recipe in recipes)
        parts.append(f"{network}: {' or '.join(shown)}")
    return f"Classifiers were trained with AdamW and the same number of optimiser steps in every arm. {'; '.join(parts)}."


def initialisation(records: Records) -> str | None:
    """Where the weights of the classifiers began."""
    if not records.rows:
        return None
    loaded = {row["network"]: row["key"]["weights"] for row in records.rows if row["key"].get("weights")}
    others = [name for name in _distinct(row["network"] for row in records.rows) if name not in loaded]
    parts = [f"{name} from a weights file with sha256 {sha}" for name, sha in sorted(loaded.items())]
    parts += [f"{listed(others)} at random, the same weights in every arm for each network and seed"] if others else []
    return f"Classifiers began: {'; '.join(parts)}."


def model_selection(records: Records) -> str | None:
    """How the tested weights were chosen."""
    if not records.rows:
        return None
    best = [row["best_step"] for row in records.rows]
    if any(row["validation"] is None for row in records.rows):
        return "There was no validation split; the last weights were tested."
    choices = [
        f" The ratio of {arm} was chosen on validation among {listed(entry['choice']['scores'])}."
        for arm, entry in sorted((records.verdict or {}).items())
        if entry.get("choice")
    ]
    return (
        f"Of each run the weights with the best macro F1 on the real validation images were kept (steps {min(best)} to {max(best)}) "
        f"and tested once.{''.join(choices)}"
    )


def ensembling(records: Records) -> str | None:
    """Whether predictions were combined."""
    return "None: every run is scored by itself; figures are means over networks and seeds." if records.rows else None


def output(records: Records) -> str | None:
    """What a classifier answers."""
    if not records.rows:
        return None
    classes = records.rows[0]["key"]["classes"]
    return f"Probabilities of the classes {listed(classes)}, which sum to 1; the predicted class is the most probable one, without a threshold."


def metrics(records: Records) -> str | None:
    """The metrics that have a value, and the one that decides."""
    if not records.rows:
        return None
    known = [name for name in METRIC_NAMES if any(row["test"]["metrics"].get(name) is not None for row in records.rows)]
    deciding = _distinct(entry["metric"] for entry in (records.verdict or {}).values())
    decides = f" The comparison rests on {METRIC_NAMES.get(deciding[0], deciding[0])}." if deciding else ""
    return f"On the test split: {listed(METRIC_NAMES[name] for name in known)}.{decides}"


def statistics(records: Records) -> str | None:
    """Intervals, tests and corrections of the comparison."""
    entries = list((records.verdict or {}).values())
    if not entries:
        return None
    resamples = max(entry["against_none"]["num_resamples"] for entry in entries)
    # Verdicts of earlier versions do not hold the spread over patients: their intervals are of the bootstrap alone.
    widened = all("patient_std" in entry["against_none"] and len(entry["seed_differences"]) > 1 for entry in entries)
    seeds = ", widened by the variance over seeds (critical values after Cochran and Cox)" if widened else ""
    several = any(entry["wilcoxon"]["num_networks"] > 1 for entry in entries)
    networks = "; over networks there is a Wilcoxon signed-rank test" if several else ""
    return (
        f"Differences between arms are paired on the same test images. Their 95 % intervals come from {resamples} bootstrap resamples of "
        f"test groups{seeds}; p-values are two-sided and corrected by Holm over the arms{networks}. "
        f"{_generator(entries)}"
    )


def _generator(entries: Sequence[Mapping[str, Any]]) -> str:
    """Whether the intervals cover another run of the generator: they do where every seed has images of its own."""
    if not any("image_sets" in entry for entry in entries):
        return "No interval covers another run of the generator."
    return (
        "Arms whose seeds trained on images of generators of their own have intervals that cover the luck of these; those of the others "
        "cover no other run of the generator."
    )


def results(records: Records) -> str | None:
    """Mean and standard deviation of the deciding metric over networks and seeds, per arm, on validation and test."""
    name = _deciding(records)
    if name is None:
        return None
    parts = []
    for arm in arm_names(records):
        runs = _runs(records, arm)
        test = _spread(row["test"]["metrics"].get(name) for row in runs)
        validation = _spread(row["validation"]["metrics"].get(name) for row in runs if row["validation"])
        parts.append(f"{arm}: test {test}, validation {validation}")
    return f"Mean {METRIC_NAMES[name]} ± standard deviation over runs: {'; '.join(parts)}."


def _deciding(records: Records) -> str | None:
    if not records.rows:
        return None
    chosen = _distinct(entry["metric"] for entry in (records.verdict or {}).values())
    return str(chosen[0]) if chosen else ("quadratic_kappa" if records.rows[0]["key"]["ordinal"] else "balanced_accuracy")


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "undefined"
    return figure(fmean(known)) + (f" ± {figure(stdev(known))}" if len(known) > 1 else "")


def comparisons(records: Records) -> str | None:
    """Every arm against training without augmentation, with its interval and verdict."""
    return _compared(records, records.verdict or {})


def own_comparisons(records: Records) -> str | None:
    """As `comparisons`, of the arms alone that trained on the described images."""
    own = {row["arm"] for row in records.rows if records.described.content_sha256 in _sources(row["key"]["arm"])}
    return _compared(records, {arm: entry for arm, entry in (records.verdict or {}).items() if arm in own})


def _compared(records: Records, verdict: Mapping[str, Any]) -> str | None:
    if not verdict:
        return None
    parts = []
    for arm, entry in sorted(verdict.items()):
        text = f"{arm}: {entry['verdict']}, {_difference(entry['against_none'])}"
        text += f", against repeated real images {_difference(entry['against_control'])}" if entry["against_control"] else ""
        text += f", against the same views of real images {_difference(entry['against_views'])}" if entry["against_views"] else ""
        ranking = (entry.get("ranking") or {}).get("against_none")  # verdicts of an earlier medaug have none
        text += f", in the area under the ROC curve {_difference(ranking)}" if ranking else ""
        parts.append(text)
    metric = METRIC_NAMES.get(str(_deciding(records)), "score")
    return f'Differences in {metric} to training without augmentation: {"; ".join(parts)}. "No evidence" is not "no effect".'


def _difference(result: Mapping[str, Any]) -> str:
    if result["difference"] is None:
        return "undefined"
    return (
        f"{figure(result['difference'], signed=True)} (95 % {figure(result['low'], signed=True)} to {figure(result['high'], signed=True)}, "
        f"Holm p {figure(result.get('p_holm'))})"
    )


def robustness(records: Records) -> str | None:
    """What the seeds and networks say of each other."""
    if not records.verdict:
        return None
    parts = []
    for arm, entry in sorted(records.verdict.items()):
        known = [value for value in entry["seed_differences"] if value is not None]
        seeds = (
            f"{figure(min(known), signed=True)} to {figure(max(known), signed=True)} over {counted(len(known), 'seed')}"
            if known
            else "undefined"
        )
        parts.append(
            f"{arm} {seeds}, better in {entry['wilcoxon']['wins']} of {counted(entry['wilcoxon']['num_networks'], 'network')}"
        )
    return f"Differences to training without augmentation by seed and network: {'; '.join(parts)}."


def errors(records: Records) -> str | None:
    """Wrong test predictions of every arm, and the confusion that occurs most."""
    if not records.rows:
        return None
    classes, parts = records.rows[0]["key"]["classes"], []
    for arm in arm_names(records):
        tables = [row["test"]["metrics"]["confusion"] for row in _runs(records, arm)]
        size = range(len(classes))
        cells = {(truth, said): sum(table[truth][said] for table in tables) for truth in size for said in size}
        wrong = {cell: count for cell, count in cells.items() if cell[0] != cell[1] and count}
        text = f"{arm} {sum(wrong.values())} of {sum(cells.values())} wrong"
        if wrong:
            (truth, said), count = max(wrong.items(), key=lambda item: (item[1], [-index for index in item[0]]))
            text += f", most often {classes[truth]} taken for {classes[said]} ({count})"
        parts.append(text)
    return f"Test predictions over all runs: {'; '.join(parts)}."


def class_imbalance(records: Records) -> str | None:
    """Whether the loss was balanced, and what the arms added to which class."""
    if not records.rows:
        return None
    weighted = sum(bool(row["key"]["recipe"].get("class_balanced")) for row in records.rows)
    text = f"In {weighted} of {counted(len(records.rows), 'training run')} the loss was weighted by the inverse frequency of the class"
    classes = records.rows[0]["key"]["classes"]
    added = {arm: _runs(records, arm)[0]["added_per_class"] for arm in arm_names(records)}
    parts = [f"{arm} {_per_class(classes, counts)}" for arm, counts in added.items() if any(counts)]
    return f"{text}; images added per class: {'; '.join(parts)}." if parts else f"{text}; no arm added images."


def _per_class(classes: list[str], counts: list[int]) -> str:
    return listed(f"{name}: {count}" for name, count in zip(classes, counts, strict=True))


def grading_version(records: Records) -> str | None:
    """The medaug that graded."""
    versions = sorted({str(row["key"]["version"]) for row in records.rows})
    return f"Graded with medaug {listed(versions)}." if versions else None


def warnings(records: Records) -> str | None:
    """What the verdicts warn of."""
    if records.verdict is None:
        return None
    return " ".join(warning_texts(records)) or "The verdict warns of nothing."


def warning_texts(records: Records) -> list[str]:
    """The warnings of the verdict, each once."""
    return _distinct(text for entry in (records.verdict or {}).values() for text in entry["warnings"])
