"""The main job: train, generate until the gate has accepted enough, grade. Every stage resumes where it stopped."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.cohort import read_cohort
from medaug.generation.plan import quotas
from medaug.grading.options import GradingOptions
from medaug.quality.gate import GateResult
from medaug.sessions import Sessions
from medaug.stages import gate_synthetic, grade_arms, take_in
from medaug.training.run_folder import RUN_FILE, RunRecord
from medaug.workflow import load_config, run_stage, run_training, split_overrides

_PATH_LIKE = r"[/\\]"
ARMS = ("none", "crop_rotate", "oversample")
DEFAULTS: dict[str, Any] = {
    "gate_threshold": 0.8,  # least confidence of the pseudo-label
    "max_attempts": 5.0,  # images generated per image wanted, at most
    "first_attempts": 1.5,  # images generated per image wanted before the first look at the gate
    "allow_short": False,  # go on when a class misses its quota
    "overlay": None,  # overlay of the bundle for generating; null: the one its inference.yaml names, if any
    "filter_network": "simple_cnn",  # confirms the labels
    "filter": {},  # fields of its recipe
    "grading_profile": "paper",
    "networks": ["simple_cnn", "resnet18"],
    "seeds": 3,
}


def run_augment(
    bundle: str,
    cohort_dir: Path,
    out: Path,
    *,
    profile: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_short: bool | None = None,
    seed: int = 0,
    tracking: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a bundle, generate and gate until every class has its quota, grade the accepted images against real-only arms.

    Args:
        bundle: name or folder.
        cohort_dir: real cohort.
        out: folder of the job: run/, synthetic/, accepted/, benchmark/, augment.json.
        profile: overlay for all stages; its section ``augment`` overrides `DEFAULTS`.
        overrides: configuration ids of any stage, and ``augment#...``.
        allow_short: True goes on when a class misses its quota; None leaves it to the profile.
        seed: of every stage.
        tracking: keyword arguments of `medaug.tracking.track`.

    Returns:
        {"rows", "verdict", "accepted", "acceptance", "weights_sha256"}.

    Raises:
        DataError: a class missed its quota (code `quota-missed`).  LeakageError, ConfigError, StorageError: see the stages.
    """
    settings, stages = split_overrides(bundle, profile, dict(overrides or {}), DEFAULTS)
    if allow_short is not None:
        settings["allow_short"] = allow_short
    read_cohort(Path(cohort_dir))  # refused before anything is written
    command = _command(bundle, profile, overrides or {}, settings["allow_short"], seed)
    job = _Job(
        bundle, Path(cohort_dir), Path(out), profile, settings, stages, seed, dict(tracking or {"enabled": False}), command
    )
    with storage.locked(job.out):
        with Sessions(job.out).stage("training", needed=not (job.out / "run" / RUN_FILE).is_file()):
            record = job.train()
        quota = job.quota()
        judge = partial(job.judge, quota)
        with Sessions(job.out).stage("generation and gate", needed=not (job.out / "augment.json").is_file()):
            gated = _generate_until_enough(job.generate, judge, quota, settings, job.out / "counts.json")
        result = job.grade()
        summary = {
            "bundle": Path(bundle).name,
            "rows": result["rows"],
            "verdict": result["verdict"],
            "accepted": len(gated.accepted.training),
            "acceptance": [asdict(entry) for entry in gated.acceptance],
            "short": gated.short,
            "weights_sha256": record.weights_sha256,
        }
        storage.write_json(job.out / "augment.json", summary)
        return summary


def _command(bundle: str, profile: str | None, overrides: Mapping[str, Any], allow_short: bool, seed: int) -> str:
    """The command line with the cohort as a variable; a setting that may be a path is named and not shown."""
    name = Path(bundle).name
    parts = [f'medaug augment {name} --cohort "$COHORT" --out runs/{name}']
    parts += [f"--profile {Path(profile).name}"] if profile else []
    for key, value in overrides.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"--set '{key}={'...' if re.search(_PATH_LIKE, text) else text}'")
    parts += ["--allow-short"] if allow_short else []
    return " ".join([*parts, f"--seed {seed}"])


@dataclass(frozen=True)
class _Job:
    """The stages of one main job, with what they share."""

    bundle: str
    cohort_dir: Path
    out: Path
    profile: str | None
    settings: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    seed: int
    tracking: Mapping[str, Any]
    command: str

    def _overrides(self, stage: str, **own: Any) -> dict[str, Any]:
        return (
            dict(self.stages[stage])
            | {"dataset_dir": str(self.cohort_dir), "seed": self.seed, "tracking": dict(self.tracking)}
            | own
        )

    def train(self) -> RunRecord:
        """Weights in ``run/``."""
        record: RunRecord = run_training(self.bundle, self.profile, self._overrides("training", output_dir=str(self.out / "run")))
        return record

    def quota(self) -> list[int]:
        """Accepted images wanted per class."""
        config = load_config(self.bundle, "generating", self.profile, self.settings["overlay"]) | dict(self.stages["generating"])
        wanted = config["counts"] or quotas(
            read_cohort(self.cohort_dir), config["synthetic_per_real"], config["allocation"], config["fixed"]
        )
        return list(wanted)

    def generate(self, counts: Sequence[int]) -> None:
        """Images of a plan with these counts per class in ``synthetic/``."""
        paths = {"run_dir": str(self.out / "run"), "output_dir": str(self.out / "synthetic")}
        overrides = self._overrides("generating", **paths, counts=list(counts))
        run_stage(self.bundle, "generating", self.profile, overrides, overlay=self.settings["overlay"])

    def judge(self, quota: Sequence[int], allow_short: bool) -> GateResult:
        """The gate's verdicts; accepted images in ``accepted/``."""
        return gate_synthetic(
            self.out / "synthetic",
            self.cohort_dir,
            self.out / "accepted",
            threshold=self.settings["gate_threshold"],
            network=self.settings["filter_network"],
            filter_recipe=self.settings["filter"],
            seed=self.seed,
            quotas=quota,
            filter_dir=self.out / "filter",
            allow_short=allow_short,
            tracking=self.tracking,
        )

    def grade(self) -> dict[str, Any]:
        """Rows, verdict and report in ``benchmark/``."""
        name = Path(self.bundle).name
        return grade_arms(
            self.cohort_dir,
            self.out / "benchmark",
            [*ARMS, f"{name}={self.out / 'accepted'}"],
            GradingOptions(self.settings["networks"], self.settings["seeds"], self.settings["grading_profile"]),
            command=self.command,
            tracking=self.tracking,
        )


def _generate_until_enough(
    generate: Callable[[list[int]], None],
    judge: Callable[[bool], GateResult],
    quota: Sequence[int],
    settings: Mapping[str, Any],
    memory: Path,
) -> GateResult:
    """Generate more of the classes whose accepted images fall short, up to `max_attempts` per image wanted.

    Args:
        generate: makes the images of a plan with these counts per class.
        judge: runs the gate; its argument allows a missed quota.
        quota: accepted images wanted per class.
        settings: see `DEFAULTS`.
        memory: where the last counts are kept, so that a repeated job does not start with a smaller plan.
    """
    most = [math.ceil(settings["max_attempts"] * count) for count in quota]
    first = [math.ceil(settings["first_attempts"] * count) for count in quota]
    counts = storage.read_json(memory) if memory.is_file() else first
    counts = [min(limit, count) for count, limit in zip(counts, most, strict=True)]
    while True:
        storage.write_json(memory, counts)
        generate(counts)
        gated = judge(True)
        accepted = [entry.accepted for entry in gated.acceptance]
        more = [next_count(*numbers) for numbers in zip(accepted, counts, quota, most, strict=True)]
        if more == counts:
            return judge(False) if gated.short and not settings["allow_short"] else gated
        counts = more


def next_count(accepted: int, made: int, wanted: int, limit: int) -> int:
    """How many images of a class to have made in all, after `accepted` of `made` passed and `wanted` are needed.

    The share that passed is taken as a forecast with a margin of a tenth; a class with none goes straight to the limit.
    """
    if accepted >= wanted:
        return made
    if accepted == 0:
        return limit
    return min(limit, made + max(1, math.ceil(1.1 * (wanted - accepted) * made / accepted)))


def run_quickstart(out: Path, *, seed: int = 0, tracking: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Draw a phantom export, take it in, and run the main job on it with the profile `quickstart`.

    Args:
        out: folder: export/, cohort/, job/.
        seed: of every stage.
        tracking: keyword arguments of `medaug.tracking.track`.
    """
    from medaug.intake.records import IntakeOptions
    from medaug.phantom import write_phantom_export

    out = Path(out)
    table = write_phantom_export(out / "export", seed=seed)
    options = IntakeOptions(
        source=out / "export",
        out=out / "cohort",
        labels=table,
        key="sop",
        label_column="grade",
        image_size=32,
        name="phantom chest CT",
        burned_in="keep",  # a drawing holds no text, though the spicules of a nodule may look like letters
        seed=seed,
    )
    take_in(options, tracking=tracking)
    return run_augment("guided_ddpm", out / "cohort", out / "job", profile="quickstart", seed=seed, tracking=tracking)
