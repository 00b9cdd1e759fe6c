"""`medaug labels`: which labels of a cohort look wrong, for a person to look at; nothing in the cohort changes.

Training labels are judged by networks that never saw their group; validation, test and synthetic labels by one network that
was trained on all real training images. The four are told apart everywhere: a test label that is corrected because a network
doubts it bends the test towards that network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medaug import __version__, storage
from medaug.cohort import Case, Cohort, check_against, read_cohort
from medaug.errors import ConfigError, DataError
from medaug.quality.images import image_batches
from medaug.quality.label_issues import class_thresholds, confident_issues, label_quality, load_cleanlab
from medaug.quality.label_page import write_label_page
from medaug.quality.out_of_fold import OutOfFold, out_of_fold
from medaug.quality.pseudo_label import LabelFilter, real_training, train_filter
from medaug.training.classifier import ClassifierRecipe, confusion_counts

FORMAT = 1
COLUMNS = ("id", "label", "suggested", "quality", "reason")
TRAINING, SYNTHETIC = "training", "synthetic"
HELD_OUT = ("validation", "test")
SCORES = {
    True: "1 - expected distance in grades between the label and the prediction, over the largest distance",
    False: "normalised margin: (p(label) - largest other p + 1) / 2",
}
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

__all__ = ["COLUMNS", "JudgedLabels", "judge_labels", "run_labels"]


@dataclass(frozen=True)
class JudgedLabels:
    """Labels of one part of the data and what networks think of them.

    Attributes:
        name: "training", "validation", "test" or "synthetic".
        cohort, cases: the images.
        probs: (N, K) by networks that did not see them.
        issues: (N,) bool, labels that look wrong.
        quality: (N,) in [0, 1], low for a doubtful label.
    """

    name: str
    cohort: Cohort
    cases: tuple[Case, ...]
    probs: np.ndarray
    issues: np.ndarray
    quality: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(N,) given classes, indices."""
        return np.array([case.label for case in self.cases], dtype=np.int64)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table, those that look wrong first, the worst quality first."""
        suggested = np.where(self.issues, self.probs.argmax(1), self.labels)
        order = sorted(range(len(self.cases)), key=lambda i: (not self.issues[i], self.quality[i], self.cases[i].id))
        return [self._row(index, int(suggested[index])) for index in order]

    def _row(self, index: int, suggested: int) -> dict[str, Any]:
        case, probs, names = self.cases[index], self.probs[index], self.cohort.classes
        reason = ""
        if self.issues[index]:
            apart = f", {abs(suggested - case.label)} grade(s) apart" if self.cohort.ordinal else ""
            seen, said = (f"{names[label]} ({probs[label]:.2f})" for label in (suggested, case.label))
            reason = f"Predicted {seen}, labelled {said}{apart}."
        quality = round(float(self.quality[index]), 6)
        return {
            "id": case.id, "label": names[case.label], "suggested": names[suggested], "quality": quality, "reason": reason,
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Counts for ``labels.json``; `commonest` is the share of the largest class, what a guess would agree with."""
        labels, preds, num_classes = self.labels, self.probs.argmax(1), len(self.cohort.classes)
        found = confusion_counts(labels[self.issues], preds[self.issues], num_classes)
        counts = np.bincount(labels, minlength=num_classes)
        per_class = [
            {"class": name, "n": int(n), "issues": int(issues)}
            for name, n, issues in zip(self.cohort.classes, counts, found.sum(1), strict=True)
        ]
        summary: dict[str, Any] = {
            "n": len(labels),
            "issues": int(self.issues.sum()),
            "agreement": float((labels == preds).mean()),
            "commonest": float(counts.max() / len(labels)),
            "mean_quality": float(self.quality.mean()),
            "per_class": per_class,
            "label_and_suggestion": found.tolist(),
        }
        if self.cohort.ordinal:
            apart = np.bincount(np.abs(labels - preds)[self.issues], minlength=num_classes)
            summary["issues_by_distance"] = {str(grades): int(n) for grades, n in enumerate(apart) if grades}
        return summary


def judge_labels(name: str, cohort: Cohort, cases: Sequence[Case], probs: np.ndarray, thresholds: np.ndarray) -> JudgedLabels:
    """The labels of cases beside probabilities (N, K) of networks that did not see them."""
    labels = np.array([case.label for case in cases], dtype=np.int64)
    issues = confident_issues(labels, probs, thresholds)
    return JudgedLabels(name, cohort, tuple(cases), probs, issues, label_quality(labels, probs, ordinal=cohort.ordinal))


def run_labels(
    cohort_dir: Path,
    out: Path,
    *,
    recipe: ClassifierRecipe,
    network: str = "simple_cnn",
    num_folds: int = 5,
    seed: int = 0,
    synthetic_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find doubtful labels and write ``labels.csv``, one table per further part, ``labels.json`` and ``report.html``.

    Args:
        cohort_dir: the real cohort; it is read, never changed.
        out: another folder; keeps the folds and the network, so that a run that was stopped goes on.
        recipe: training of every network.
        network: of `build_network`.
        num_folds: by group.
        seed: of folds and networks.
        synthetic_dir: a synthetic cohort of this cohort whose labels are judged, too.
        progress: called as ``progress(description, total)``, like `medaug.progress.progress`.

    Returns:
        The content of ``labels.json``.

    Raises:
        MissingDependencyError: cleanlab is not installed.  ConfigError: `out` is a cohort's folder; fewer than 2 folds.
        DataError: one class (code `labels-one-class`), a class without real training images or with fewer groups than
            folds, synthetic images that are none.  LeakageError: see `check_against`.
    """
    load_cleanlab()
    out = Path(out)
    real = read_cohort(cohort_dir, verify=True)
    synthetic = None if synthetic_dir is None else _synthetic(Path(synthetic_dir), real)
    if any(cohort.root and out.resolve() == cohort.root.resolve() for cohort in (real, synthetic) if cohort):
        raise ConfigError("out-is-input", "--out must be another folder than the cohort and the synthetic cohort.")
    if len(real.classes) < 2:
        raise DataError("labels-one-class", "A label is only in doubt where there is another class; this cohort has one class.")
    cases = real_training(real)
    with storage.locked(out):
        with progress("labels", num_folds + 1) if progress else nullcontext(lambda steps: None) as advance:
            held = out_of_fold(
                real, cases, out / "folds", network=network, recipe=recipe, num_folds=num_folds, seed=seed, advance=advance
            )
            whole = train_filter(real, out / "network", recipe=recipe, network=network, seed=seed)
            advance(1)
        parts = _parts(real, synthetic, cases, held.probs, whole)
        summary = _summary(
            real, parts, held, whole, {"network": network, "folds": num_folds, "seed": seed, "recipe": asdict(recipe)}
        )
        _write(out, parts, summary)
    return summary


def _synthetic(folder: Path, real: Cohort) -> Cohort:
    """The synthetic cohort, known to belong to the real one."""
    synthetic = read_cohort(folder)
    if not synthetic.training or not all(case.is_synthetic for case in synthetic.training):
        raise DataError("not-synthetic", "--synthetic needs a cohort of generated images, such as `medaug gate` writes.")
    check_against(synthetic, real, allow_untrusted=all((case.lineage or {}).get("untrusted") for case in synthetic.training))
    return synthetic


def _parts(
    real: Cohort, synthetic: Cohort | None, cases: Sequence[Case], probs: np.ndarray, whole: LabelFilter
) -> list[JudgedLabels]:
    """Training by its own folds, everything else by the network that saw the real training images alone."""
    thresholds = class_thresholds(np.array([case.label for case in cases]), probs)
    others = [(name, real, real.split(name)) for name in HELD_OUT]
    others += [] if synthetic is None else [(SYNTHETIC, synthetic, synthetic.training)]
    parts = [judge_labels(TRAINING, real, cases, probs, thresholds)]
    for name, cohort, chosen in others:
        if chosen:
            seen = np.concatenate([whole.probabilities(batch) for batch in image_batches(cohort, chosen)])
            parts.append(judge_labels(name, cohort, chosen, seen, thresholds))
    return parts


def _summary(
    real: Cohort, parts: Sequence[JudgedLabels], held: OutOfFold, whole: LabelFilter, config: dict[str, Any]
) -> dict[str, Any]:
    training = parts[0]
    hits = training.labels == training.probs.argmax(1)
    groups = np.array([case.group for case in training.cases])
    folds = [
        {"fold": fold, "n": int(own.sum()), "groups": len(set(groups[own])), "agreement": float(hits[own].mean())}
        for fold in range(config["folds"])
        for own in [held.folds == fold]
    ]
    return {
        "format": FORMAT,
        "version": __version__,
        "name": real.name,
        "classes": list(real.classes),
        "ordinal": real.ordinal,
        "cohort_sha256": real.content_sha256,
        "config": config,
        "quality": SCORES[real.ordinal],
        "folds": folds,
        "network": {key: whole.facts[key] for key in ("fit_on", "fit_cases", "weights_sha256")},
        "parts": {part.name: part.summary() for part in parts},
    }


def _table(name: str) -> str:
    return "labels.csv" if name == TRAINING else f"labels_{name}.csv"


def _write(out: Path, parts: Sequence[JudgedLabels], summary: dict[str, Any]) -> None:
    rows = {part.name: part.rows() for part in parts}
    for name in (*HELD_OUT, SYNTHETIC):
        if name not in rows:  # of an earlier run with other arguments
            with storage.storage_errors(_table(name)):
                (out / _table(name)).unlink(missing_ok=True)
    for name, table in rows.items():
        storage.write_csv(out / _table(name), table, COLUMNS)
    write_label_page(out / "report.html", [(part.name, part.cohort, part.cases, rows[part.name]) for part in parts], summary)
    storage.write_json(out / "labels.json", summary)
