"""The pilot: a few images of every class by the code, plan and draws of the full generation, measured before it is paid for.

The images lie in ``OUT/synthetic`` under the ids that the full generation gives them: `medaug generate --out OUT/synthetic` with
the same settings only adds to them. The test split is never read.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events

from medaug import assets, storage
from medaug.augment import DEFAULTS
from medaug.cohort import Case, Cohort, read_cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.generation.plan import check_counts, quotas
from medaug.grading.metrics import classification_metrics
from medaug.networks.grading import build_network
from medaug.progress import progress
from medaug.quality import pilot as checks
from medaug.quality.checks import ACCEPT, GateContext
from medaug.quality.context import RANDOM_CONV
from medaug.quality.copy_ruler import real_cases
from medaug.quality.feature_cache import FeatureCache
from medaug.quality.fidelity import features_of
from medaug.quality.fidelity_table import FeatureSet
from medaug.quality.gate import FEATURES, GateResult
from medaug.quality.outlier_checks import outliers
from medaug.quality.pilot_measures import kid_rows, noisy_batches
from medaug.quality.pilot_projection import Rate, project
from medaug.quality.pilot_report import write_pilot_report
from medaug.quality.pseudo_label import default_recipe, softmax
from medaug.stages import change, gate_synthetic
from medaug.tracking import track
from medaug.training.classifier import fit_classifier, predict_logits, seeded
from medaug.training.data import CaseImages
from medaug.workflow import load_config, read_yaml, run_stage, split_overrides

FORMAT = 1
RESULT_FILE, RATE_FILE = "pilot.json", "rate.json"
PER_CLASS = 32
TEACHING_SEEDS = 3
NETWORK = "simple_cnn"  # that of the gate's filter, by its recipe

__all__ = ["PER_CLASS", "PilotOptions", "read_limits", "run_pilot", "wanted_counts"]


@dataclass(frozen=True)
class PilotOptions:
    """How large a pilot is, and what it is a pilot for.

    Attributes:
        per_class: images generated of each class that is wanted.
        wanted: accepted images wanted in all, shared among the classes by the bundle's allocation.
        per_real: accepted images wanted per real training image; without either the bundle's own numbers.
        limits: name in ``configs/pilots``, or a YAML file.

    Raises:
        ConfigError: a number out of range, or both ways of saying how many are wanted.
    """

    per_class: int = PER_CLASS
    wanted: int | None = None
    per_real: float | None = None
    limits: str = "default"

    def __post_init__(self) -> None:
        for name, value in (("per-class", self.per_class), ("wanted", 1 if self.wanted is None else self.wanted)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError("pilot-option", f"--{name} must be a whole number of at least 1, got {value!r}.")
        if self.wanted is not None and self.per_real is not None:
            raise ConfigError("option-conflict", "--wanted and --per-real both say how many images are wanted; give one of them.")


def read_limits(file: str) -> checks.PilotLimits:
    """Limits from a file; what it leaves out is that of the default one.

    Raises:
        ConfigError: no such file, an unknown limit, or a value out of range.
    """
    return checks.PilotLimits.of(read_yaml(assets.pilot_path("default")) | read_yaml(assets.pilot_path(file)))


def wanted_counts(cohort: Cohort, config: Mapping[str, Any], options: PilotOptions) -> list[int]:
    """Accepted images wanted per class.

    Raises:
        ConfigError: a number in all of a bundle that is given one per class; see `quotas`.
    """
    if options.wanted is None and options.per_real is None:
        counts = config["counts"] or quotas(cohort, config["synthetic_per_real"], config["allocation"], config["fixed"])
        return check_counts(cohort, counts)
    if config["counts"] or config["allocation"] == "fixed":
        raise ConfigError("option-conflict", "The settings give a number per class; leave out --wanted and --per-real, or those.")
    real = max(1, sum(cohort.class_counts("training")))
    return quotas(cohort, options.per_real if options.wanted is None else options.wanted / real, config["allocation"])


def run_pilot(
    bundle: str,
    cohort_dir: Path,
    run: Path,
    out: Path,
    options: PilotOptions | None = None,
    *,
    profile: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    tracking: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate a few images of every class, measure them, and say go or no-go to the full generation.

    Args:
        bundle: name or folder.
        cohort_dir: real cohort.
        run: trained run.
        out: folder: synthetic/, accepted/ (the gate's), filter/, classifiers/, rate.json, pilot.json, report.html.
        options: size and limits.
        profile: overlay of the bundle; the gate takes its settings from the section ``augment``, as `medaug augment` does.
        overrides: configuration ids of the generation, and ``augment#...``.
        seed: of every stage.
        tracking: keyword arguments of `medaug.tracking.track`.

    Returns:
        The content of ``pilot.json``; ``go`` is the decision.

    Raises:
        ConfigError: an option out of range, or a folder that holds more than a pilot (code `pilot-outgrown`).
        LeakageError, DataError, StorageError: see the stages.
    """
    options = options or PilotOptions()
    limits = read_limits(options.limits)
    settings, stages = split_overrides(bundle, profile, dict(overrides or {}), DEFAULTS)
    tracked = dict(tracking or {"enabled": False})
    cohort = read_cohort(cohort_dir, verify=True)
    if Path(out).resolve() in {Path(cohort_dir).resolve(), Path(run).resolve()}:
        raise ConfigError("out-is-input", "--out must be another folder than the cohort and the run.")
    job = _Pilot(bundle, cohort, Path(run), Path(out), options, profile, settings, stages["generating"], seed, tracked)
    wanted = wanted_counts(cohort, job.config, options)
    with storage.locked(job.out):
        synthetic, rate = job.generate([options.per_class if count else 0 for count in wanted])
        gated = job.judge()
        measured = job.measure(synthetic, gated, limits)
        measured["projection"] = project(
            gated.acceptance,
            wanted,
            rate,
            _bytes_per_image(job.out / "synthetic", synthetic),
            job.config["generation_batch_size"],
        )
        found = _decide(gated, measured, limits, shutil.disk_usage(job.out).free)
        facts: dict[str, Any] = {
            "bundle": Path(bundle).name,
            "weights_sha256": _weights(synthetic),
            "cohort_sha256": cohort.content_sha256,
        }
        facts |= {"synthetic_sha256": synthetic.content_sha256, "seed": seed, "per_class": options.per_class}
        result: dict[str, Any] = {"format": FORMAT, "go": checks.go(found), "checks": [asdict(check) for check in found], **facts}
        result |= {"limits": asdict(limits), "acceptance": [asdict(entry) for entry in gated.acceptance], **measured}
        storage.write_json(job.out / RESULT_FILE, result)
        write_pilot_report(job.out / "report.html", cohort, synthetic, result, gated.verdicts)
        # Only now, as the stages have runs of their own, and MLflow's thread imports modules while MONAI looks through them.
        with track("pilot", name=f"pilot {Path(bundle).name}", **tracked) as record:
            record.log_params(facts)
            record.log_metrics({"go": float(result["go"]), **{check.name: check.value for check in found}})
            record.log_table(result["checks"], "pilot_checks")
            record.log_artifact(job.out / "report.html")
    return result


def _decide(gated: GateResult, measured: Mapping[str, Any], limits: checks.PilotLimits, free: int) -> list[checks.Check]:
    everything = measured["kid"][0] if measured["kid"] else None
    return [
        checks.acceptance_check(gated.acceptance, limits.least_acceptance),
        checks.outlier_check(measured["outliers"], limits.most_outliers, measured["reasons"].get("outliers", "")),
        checks.kid_check(everything, limits.kid_noise),
        checks.copy_check(measured["copies"], limits.most_copies),
        checks.accuracy_check(measured["accuracy"], limits.least_accuracy, measured["reasons"].get("accuracy", "")),
        checks.time_check(measured["projection"], limits.most_hours),
        checks.disk_check(measured["projection"], free, limits.most_disk),
    ]


def _weights(synthetic: Cohort) -> str:
    return str((synthetic.training[0].lineage or {})["weights_sha256"])


def _bytes_per_image(folder: Path, cohort: Cohort) -> float:
    """What the folder of a generation takes on the disk, its list of cases included, per image."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / len(cohort.training)


@dataclass
class _Pilot:
    """The parts of one pilot; each goes on where it stopped."""

    bundle: str
    cohort: Cohort
    run: Path
    out: Path
    options: PilotOptions
    profile: str | None
    settings: Mapping[str, Any]
    overrides: Mapping[str, Any]
    seed: int
    tracking: Mapping[str, Any]
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        found = load_config(self.bundle, "generating", self.profile, self.settings["overlay"])
        self.config = found | {key: value for key, value in self.overrides.items() if key in found}

    def generate(self, counts: Sequence[int]) -> tuple[Cohort, Rate]:
        """The images in ``synthetic/``, made by the bundle's own session, and what they took.

        Raises:
            ConfigError: the folder holds more images (code `pilot-outgrown`); going on would take them away.
        """
        folder = self.out / "synthetic"
        own = {
            "dataset_dir": str(self.cohort.root),
            "run_dir": str(self.run),
            "output_dir": str(folder),
            "seed": self.seed,
            "tracking": dict(self.tracking),
            "counts": list(counts),
            # All that the bundle does before, but the session itself runs under the clock.
            "generating": [*(entry for entry in self.config["generating"] if entry != "$@session.run()"), "$@session"],
        }
        session = run_stage(self.bundle, "generating", self.profile, {**self.overrides, **own}, overlay=self.settings["overlay"])
        planned = {f"{case.id}.png" for cases in session.plan for case in cases}
        if extra := sum(path.name not in planned for path in (folder / "images").glob("*.png")):
            raise ConfigError(
                "pilot-outgrown",
                f"{folder.name} holds {extra} image(s) that are no part of this pilot; choose a new --out, as going on would take them away.",
            )
        clock = _Clock(self.out / RATE_FILE, session.config_sha256())
        clock.attach(session.evaluator)
        made: Cohort = session.run()
        return made, clock.rate

    def judge(self) -> GateResult:
        """The verdicts that `medaug augment` would come to."""
        assert self.cohort.root is not None
        return gate_synthetic(
            self.out / "synthetic",
            self.cohort.root,
            self.out / "accepted",
            threshold=self.settings["gate_threshold"],
            filter_recipe=self.settings["filter"],
            seed=self.seed,
            filter_dir=self.out / "filter",
            allow_short=True,
            tracking=self.tracking,
        )

    def measure(self, synthetic: Cohort, gated: GateResult, limits: checks.PilotLimits) -> dict[str, Any]:
        """Copies, outliers, KID and accuracy of the readable images; None with a reason for what cannot be measured."""
        readable = {row["id"] for row in gated.verdicts if row["checks"]["usable"] == ACCEPT}
        cases = [case for case in synthetic.training if case.id in readable]
        found: dict[str, Any] = {"copies": gated.summary.get("near_copies"), "outliers": None, "kid": [], "accuracy": None}
        reasons: dict[str, str] = dict.fromkeys(("outliers", "accuracy"), checks.NOTHING_READABLE)
        if not cases:
            return found | {"reasons": reasons}
        cache = FeatureCache(self.out / "accepted" / FEATURES)
        context = GateContext(
            self.cohort, synthetic, self.out / "filter", self.settings["gate_threshold"], seed=self.seed, cache=cache
        )
        try:
            outliers(context, cases)
            found["outliers"] = context.reports["outliers"]["mahalanobis"]
        except DataError as error:
            reasons["outliers"] = error.message
        found["kid"] = self._kid(context, cases, limits.kid_noise)
        found["features"] = context.extractor(RANDOM_CONV).name
        found["accuracy"], reasons["accuracy"] = self._accuracy(synthetic, cases)
        return found | {"reasons": {name: reason for name, reason in reasons.items() if found[name] is None}}

    def _kid(self, context: GateContext, cases: Sequence[Case], noise: float) -> list[dict[str, Any]]:
        held = self.cohort.validation

        def of(name: str, features: np.ndarray, own: Sequence[Case]) -> FeatureSet:
            return FeatureSet(name, features, np.array([case.label for case in own]))

        real = real_cases(self.cohort)
        training = of("training", context.features(RANDOM_CONV, self.cohort, real), real)
        synthetic = of("synthetic", context.features(RANDOM_CONV, context.synthetic, cases), cases)
        held_out, noisy = None, None
        if held:
            held_out = of("held-out", context.features(RANDOM_CONV, self.cohort, held), held)
            extractor = context.extractor(RANDOM_CONV)
            noisy = of("noisy", features_of(extractor, noisy_batches(self.cohort, held, noise)), held)
        return kid_rows(training, synthetic, held_out, noisy, self.cohort.classes)

    def _accuracy(self, synthetic: Cohort, cases: Sequence[Case]) -> tuple[dict[str, Any] | None, str]:
        """What the pilot teaches, and what as many real images of the same classes teach; None and the reason if that cannot be said."""
        classes = range(len(self.cohort.classes))
        made, real = ([[c for c in part if c.label == label] for label in classes] for part in (cases, real_cases(self.cohort)))
        counts = [min(len(made[label]), len(real[label])) for label in classes]
        judged = [case for case in self.cohort.validation if counts[case.label]]
        if not judged:
            return None, "There are no real validation images of these classes, so what the pilot teaches cannot be said."
        if sum(count > 0 for count in counts) < 2:
            return None, "A classifier needs images of two classes, and the pilot has readable ones of fewer."
        taken: dict[str, list[Case]] = {
            "synthetic": [case for label in classes for case in made[label][: counts[label]]],
            "real": [],
        }
        for label in classes:
            order = numpy_generator(self.seed, "pilot", "real", label).permutation(len(real[label]))[: counts[label]]
            taken["real"] += [real[label][index] for index in sorted(order)]
        sources = {"synthetic": synthetic, "real": self.cohort}
        scores: dict[str, list[dict[str, float]]] = {}
        with progress("what the pilot teaches", 2 * TEACHING_SEEDS) as advance:
            for name, own in taken.items():
                scores[name] = []
                for seed in range(TEACHING_SEEDS):
                    scores[name].append(self._teach(sources[name], own, judged, seed))
                    advance(1)
        found: dict[str, Any] = {"n": sum(counts), "n_validation": len(judged), "chance": 1 / sum(count > 0 for count in counts)}
        for name, rows in scores.items():
            found[name] = float(np.mean([row["balanced_accuracy"] for row in rows]))
            found[f"{name}_accuracy"] = float(np.mean([row["accuracy"] for row in rows]))
            found[f"{name}_seeds"] = [row["balanced_accuracy"] for row in rows]
        return found, ""

    def _teach(self, source: Cohort, cases: Sequence[Case], judged: Sequence[Case], seed: int) -> dict[str, float]:
        """Accuracy and balanced accuracy on validation of one classifier, trained by the recipe of the gate's filter."""
        recipe = change(default_recipe(), self.settings["filter"])
        key = storage.sha256_json(
            [
                FORMAT,
                source.content_sha256,
                self.cohort.content_sha256,
                [case.id for case in cases],
                asdict(recipe),
                self.seed,
                seed,
            ]
        )
        path = self.out / "classifiers" / f"{key[:32]}.json"
        if path.is_file():
            known: dict[str, float] = storage.read_json(path)
            return known
        draw = (self.seed, "pilot", seed)  # the same start for synthetic and real
        with seeded(*draw, "init"):
            network = build_network(NETWORK, len(self.cohort.classes), self.cohort.channels, self.cohort.image_size)
        fit_classifier(network, CaseImages(source, cases), None, recipe, key=draw)
        probs = softmax(predict_logits(network, CaseImages(self.cohort, judged)))
        metrics = classification_metrics(np.array([case.label for case in judged]), probs, ordinal=self.cohort.ordinal)
        found = {name: metrics[name] for name in ("accuracy", "balanced_accuracy")}
        storage.write_json(path, found)
        return found


class _Clock:
    """Seconds and images of an evaluator's batches, in a file that a pilot which was killed goes on with.

    A batch runs from where it is asked for to where the next one is, so that saving its images counts.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self.path, self.made_by = path, made_by
        found = storage.read_json(path) if path.is_file() else {}
        known = isinstance(found, dict) and found.pop("made_by", None) == made_by and found.keys() == asdict(Rate()).keys()
        self.rate = Rate(**found) if known else Rate()  # of other settings it says nothing
        self._before = peak_memory()
        self._since: float | None = None
        self._images = 0

    def attach(self, evaluator: Any) -> None:
        """Listen to an ignite engine."""
        evaluator.add_event_handler(Events.GET_BATCH_STARTED, self._next)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._made)
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._next)

    def _made(self, engine: Any) -> None:
        self._images = len(engine.state.output["cases"])

    def _next(self) -> None:
        now = time.monotonic()
        if self._since is not None and self._images:
            old = self.rate
            self.rate = Rate(
                old.images + self._images,
                old.seconds + now - self._since,
                max(old.largest_batch, self._images),
                max(old.memory_before, self._before),
                max(old.memory_peak, peak_memory()),
            )
            storage.write_json(self.path, asdict(self.rate) | {"made_by": self.made_by})
        self._since, self._images = now, 0


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts in kilobytes on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
