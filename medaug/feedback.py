"""Feedback rounds: generate where the grader doubts, keep a round only if it helps on validation, stop otherwise.

The test split is never read. Validation decides, so a validation score of the result is no longer a fair one: `medaug grade` measures it on test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from medaug import replay_record, storage
from medaug.cohort import FILE_NAME, Case, Cohort, check_against, created_by, read_cohort, write_cohort
from medaug.draws import key_seed
from medaug.errors import ConfigError, DataError
from medaug.generation.feedback import (
    Round,
    class_doubt,
    doubt,
    doubted_references,
    helped,
    next_amount,
    saving,
    spend,
    uses_references,
)
from medaug.generation.generate import check_fit_groups, check_run
from medaug.generation.plan import quotas
from medaug.grading.metrics import classification_metrics
from medaug.grading.recipe import grading_recipe
from medaug.grading.verdict import primary_metric
from medaug.kinds import NUMBER, SWITCH, TEXT, check_kinds
from medaug.networks.grading import build_network
from medaug.progress import progress
from medaug.quality.checks import CHECKS
from medaug.stages import gate_synthetic
from medaug.training.classifier import fit_classifier, predict_logits, seeded
from medaug.training.data import CaseImages
from medaug.training.temperature import softmax
from medaug.workflow import load_config, run_stage

RESULT_FILE = "feedback.json"
COMMAND = "medaug feedback"
# Settings that decide whether rounds can follow doubt.
STEERING = ("counts", "seeds", "source", "target_label", "disturbance_settings")
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the one shot, for its curve


@dataclass(frozen=True)
class FeedbackOptions:
    """What rounds may cost and how they are judged.

    Attributes:
        budget: images generated in all, kept or not.
        per_round: images generated in a round.
        share: of each class's training images, the most doubted ones, that are references where references show, see `uses_references`.
        least_gain: of the validation score, at least 0.
        patience: rounds without help before it stops.
        network, grading_profile, seeds: of the grader; a round is judged by the mean over `seeds`.
        folds: that training images are judged in, by group, by graders that did not see them.
        checks: of the gate. Its label filter turns away what it is unsure of, so it is not among them.
        one_shot: compare with one shot of the whole budget.

    Raises:
        ConfigError: a value out of range.
    """

    budget: int
    per_round: int
    share: float = 0.5
    least_gain: float = 0.0
    patience: int = 1
    network: str = "simple_cnn"
    grading_profile: str = "cpu32"
    seeds: int = 3
    folds: int = 2
    checks: Sequence[str] = ("usable", "copies")
    one_shot: bool = True

    def __post_init__(self) -> None:
        whole = {"budget": 1, "per_round": 1, "patience": 1, "seeds": 1, "folds": 2}
        for name, least in whole.items():
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(
                    "feedback-option", f"{name} must be a whole number of at least {least}, got {getattr(self, name)!r}."
                )
        gain = self.least_gain
        if isinstance(gain, bool) or not isinstance(gain, int | float) or not math.isfinite(gain) or gain < 0:
            raise ConfigError("feedback-option", f"least_gain must be a finite number of at least 0, got {gain!r}.")
        if unknown := sorted(set(self.checks) - set(CHECKS)):
            raise ConfigError("feedback-option", f"checks must be of {', '.join(CHECKS)}, got {', '.join(unknown)}.")
        check_kinds("feedback", asdict(self), {"share": NUMBER, "network": TEXT, "grading_profile": TEXT, "one_shot": SWITCH})
        doubted_references([], [], [], self.share)  # checks the share
        grading_recipe(self.grading_profile, self.network)


@dataclass
class FeedbackJob:
    """Rounds of one generator; each part goes on where it stopped.

    Attributes:
        bundle, overlay, profile: what generates, see `medaug.workflow.load_config`.
        cohort: real.
        run: the trained run.
        out: rounds/, one_shot/, graders/, accepted/ (all kept images), feedback.json.
        options: see `FeedbackOptions`.
        overrides: of the generation.
        seed: of everything.
    """

    bundle: str
    cohort: Cohort
    run: Path
    out: Path
    options: FeedbackOptions
    overlay: str | None = None
    profile: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def go(self) -> dict[str, Any]:
        """Run all rounds and the one shot. Returns what ``feedback.json`` holds.

        Raises:
            DataError: no validation split to decide on.
            ConfigError, LeakageError: see `check`, before anything is trained, and the stages.
        """
        if not self.cohort.validation:
            raise DataError(
                "split-empty", "Feedback decides on validation images, and the cohort has none; run intake with another --split."
            )
        refers = self.check()
        with storage.locked(self.out):
            clear_accepted(self.out / "accepted")
            (self.out / RESULT_FILE).unlink(missing_ok=True)
            rounds, kept = self._rounds(refers)
            final = self._grade(kept)["scores"]
            curve = self._one_shot() if self.options.one_shot else {}
            baseline = self._grade([])["scores"]
            result: dict[str, Any] = {
                "metric": primary_metric(self.cohort.ordinal),
                "split": "validation",
                "baseline": float(np.mean(baseline)),
                "rounds": [asdict(entry) for entry in rounds],
                "saving": saving(rounds, float(np.mean(final)), curve, float(np.mean(baseline))),
                "one_shot": {str(amount): score for amount, score in curve.items()},
                "options": asdict(self.options),
                "accepted": None if not kept else len(self._merge(kept).training),
            }
            storage.write_json(self.out / RESULT_FILE, result)
        return result

    def check(self) -> bool:
        """Build all parts of the generation, and a grader, without running them.

        Returns:
            Whether references show in the images, see `uses_references`.

        Raises:
            MedaugError: no run, an unknown setting or network, a run or guide that does not belong to this cohort, or see `uses_references`.
        """
        build_network(self.options.network, self._classes, self.cohort.channels, self.cohort.image_size)
        there = load_config(self.bundle, "generating", self.profile, self.overlay)
        parts = ", ".join(f"'{name}': @{name}" for name in STEERING if name in there)
        found = self._run_stage(self.out / "rounds", {"generating": [f"${{{parts}}}"], "session": "$1"})
        refers = uses_references(found)
        counts = spend(min(self.options.budget, self.options.per_round), [1.0] * self._classes)
        session = self._run_stage(self.out / "rounds", {"counts": counts, "generating": ["$@session"]})
        check_run(session.record, self.cohort)
        check_fit_groups(session.fit_groups, self.cohort)
        if self.options.one_shot:
            self._one_shot_counts()
        return refers

    def _run_stage(self, folder: Path, own: Mapping[str, Any]) -> Any:
        common = {"dataset_dir": str(self.cohort.root), "run_dir": str(self.run), "output_dir": str(folder / "synthetic")}
        settings = dict(self.overrides) | common | {"tracking": {"enabled": False}} | dict(own)
        return run_stage(self.bundle, "generating", self.profile, settings, overlay=self.overlay)

    def _rounds(self, refers: bool) -> tuple[list[Round], list[Cohort]]:
        rounds: list[Round] = []
        kept: list[Cohort] = []
        amount = next_amount(rounds, self.options.budget, self.options.per_round)
        while amount:
            number, now = len(rounds) + 1, self._grade(kept)
            counts = spend(amount, class_doubt(np.asarray(now["validation"]), _labels(self.cohort.validation), self._classes))
            made = self._make(
                self.out / "rounds" / f"{number:02d}", counts, self.seed + number, self._references(kept) if refers else None
            )
            after = self._grade([*kept, made])["scores"] if made.training else now["scores"]
            good = bool(made.training) and helped(now["scores"], after, self.options.least_gain)
            rounds.append(Round(number, tuple(counts), len(made.training), tuple(now["scores"]), tuple(after), good))
            kept += [made] if good else []
            amount = next_amount(rounds, self.options.budget, self.options.per_round, self.options.patience)
        return rounds, kept

    @property
    def _classes(self) -> int:
        return len(self.cohort.classes)

    @property
    def _real(self) -> list[Case]:
        return [case for case in self.cohort.training if not case.is_synthetic]

    def _make(self, folder: Path, counts: Sequence[int], seed: int, references: Sequence[str] | None = None) -> Cohort:
        """Generate and gate; the accepted images."""
        own: dict[str, Any] = {"counts": list(counts), "seed": seed}
        self._run_stage(folder, own if references is None else own | {"seeds": list(references)})
        assert self.cohort.root is not None
        gated = gate_synthetic(
            folder / "synthetic",
            self.cohort.root,
            folder / "accepted",
            checks=self.options.checks,
            seed=self.seed,
            filter_dir=self.out / "filter",
            allow_short=True,
        )
        return gated.accepted

    def _references(self, kept: Sequence[Cohort]) -> list[str]:
        """Training images that graders doubt which have not seen their group."""
        real, folds = self._real, self.options.folds
        doubts: dict[str, float] = {}
        for fold in range(folds):
            inside = [case for case in real if key_seed(self.seed, "fold", case.group) % folds == fold]
            groups = {case.group for case in inside}
            if inside and len(inside) < len(real):
                probs = np.asarray(self._fit(kept, 0, groups)["inside"])
                doubts |= dict(zip([case.id for case in inside], doubt(probs, _labels(inside)).tolist(), strict=True))
        judged = [case for case in real if case.id in doubts]
        return doubted_references(
            [case.id for case in judged], _labels(judged), [doubts[case.id] for case in judged], self.options.share
        )

    def _grade(self, kept: Sequence[Cohort]) -> dict[str, Any]:
        """``scores`` on validation, one per seed, and the mean probabilities ``validation`` (N, K)."""
        target, metric = np.asarray(_labels(self.cohort.validation)), primary_metric(self.cohort.ordinal)
        probs = [np.asarray(self._fit(kept, seed)["validation"]) for seed in range(self.options.seeds)]
        found = [classification_metrics(target, each, ordinal=self.cohort.ordinal) for each in probs]
        scores = [entry["balanced_accuracy"] if entry[metric] is None else entry[metric] for entry in found]
        return {"scores": scores, "validation": np.mean(probs, axis=0)}

    def _fit(self, kept: Sequence[Cohort], seed: int, without: set[str] | None = None) -> dict[str, Any]:
        """Probabilities of one grader on validation, and on the images of the groups `without`, which it does not see."""
        options, left_out = self.options, without or set()
        recipe = grading_recipe(options.grading_profile, options.network)
        facts = [self.cohort.content_sha256, [made.content_sha256 for made in kept], asdict(recipe), options.network]
        key = storage.sha256_json([*facts, self.seed, seed, sorted(left_out)])
        path = self.out / "graders" / f"{key[:32]}.json"
        if path.is_file():
            known: dict[str, Any] = storage.read_json(path)
            return known
        parts = [(self.cohort, self._real), *((made, list(made.training)) for made in kept)]
        sets = [CaseImages(cohort, seen) for cohort, cases in parts if (seen := [c for c in cases if c.group not in left_out])]
        draw = (self.cohort.content_sha256, self.seed, seed)
        with seeded(*draw, "init"):
            network = build_network(options.network, self._classes, self.cohort.channels, self.cohort.image_size)
        fit_classifier(network, ConcatDataset(sets), None, recipe, key=draw)  # validation decides on rounds, not on steps
        found = {"validation": self._probabilities(network, self.cohort.validation)}
        inside = [case for case in self._real if case.group in left_out]
        found |= {"inside": self._probabilities(network, inside)} if inside else {}
        storage.write_json(path, found)
        return found

    def _probabilities(self, network: Any, cases: Sequence[Case]) -> list[list[float]]:
        rows: list[list[float]] = softmax(predict_logits(network, CaseImages(self.cohort, cases))).round(6).tolist()
        return rows

    def _one_shot_counts(self) -> list[int]:
        config = load_config(self.bundle, "generating", self.profile, self.overlay) | dict(self.overrides)
        return quotas(self.cohort, self.options.budget / max(1, len(self._real)), config["allocation"], config["fixed"])

    def _one_shot(self) -> dict[int, float]:
        """Images generated -> mean validation score, of the whole budget made at once with the bundle's own allocation."""
        made = self._make(self.out / "one_shot", self._one_shot_counts(), self.seed)
        names = [case.id for case in read_cohort(self.out / "one_shot" / "synthetic").training]
        order = sorted(names, key=lambda name: (key_seed("one shot", self.seed, name), name))
        curve: dict[int, float] = {}
        with progress("one shot", len(SHARES)) as advance:
            for part in SHARES:
                first = order[: round(part * len(order))]
                ids = set(first)
                cases = [case for case in made.training if case.id in ids]
                few = replace(made, training=tuple(cases), content_sha256=storage.sha256_json([case.id for case in cases]))
                if first:
                    curve[len(first)] = float(np.mean(self._grade([few] if cases else [])["scores"]))
                advance(1)
        return curve

    def _merge(self, kept: Sequence[Cohort]) -> Cohort:
        """All kept images as one cohort in ``accepted/``: an arm for `medaug grade`."""
        folder = self.out / "accepted"
        for made in kept:
            check_against(made, self.cohort)
            for case in made.training:
                storage.write_bytes(folder / case.image, made.path(case).read_bytes())
        replay_record.carry_record([made.root for made in kept], folder)
        cases = tuple(case for made in kept for case in made.training)
        fits = {sha: groups for made in kept for sha, groups in made.fit_on.items()}
        name = f"{self.cohort.name} feedback"
        origin = created_by(COMMAND, asdict(self.options), self.seed)
        return write_cohort(replace(kept[0], name=name, training=cases, fit_on=fits, created_by=origin), folder)


def clear_accepted(folder: Path) -> None:
    """Take away the cohort of an earlier run, so that none stays when less is kept.

    Raises:
        ConfigError: it is not one of `medaug feedback` (code `folder-not-empty`).
    """
    if not folder.exists():
        return
    header = folder / FILE_NAME
    if header.is_file() and read_header(header).get("command") != COMMAND:
        raise ConfigError("folder-not-empty", f"The folder {folder.name} holds another cohort; choose a new output folder.")
    header.unlink(missing_ok=True)
    (folder / replay_record.FILE_NAME).unlink(missing_ok=True)
    for path in (folder / "images").glob("*.png"):
        path.unlink()
    for place in (folder / "images", folder):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def read_header(path: Path) -> dict[str, Any]:
    """What made the cohort of a ``cohort.json``; empty if that is not said."""
    content = storage.read_json(path)
    found = content.get("created_by") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _labels(cases: Sequence[Case]) -> list[int]:
    return [case.label for case in cases]


def run_feedback(
    bundle: str,
    cohort_dir: Path,
    run: Path,
    out: Path,
    options: FeedbackOptions,
    *,
    overlay: str | None = None,
    profile: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`medaug feedback`: see `FeedbackJob.go`."""
    cohort = read_cohort(cohort_dir, verify=True)
    return FeedbackJob(bundle, cohort, Path(run), Path(out), options, overlay, profile, dict(overrides or {}), seed).go()
