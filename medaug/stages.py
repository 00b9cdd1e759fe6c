"""Stages that are not a bundle's: intake, gate and grading, each as one tracked run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaug import storage
from medaug.cohort import read_cohort
from medaug.progress import progress
from medaug.tracking import Run, track

if TYPE_CHECKING:
    from medaug.intake.records import IntakeOptions, IntakeResult
    from medaug.quality.gate import GateResult


def take_in(options: IntakeOptions, *, tracking: Mapping[str, Any] | None = None) -> IntakeResult:
    """`medaug intake`: make a cohort, tracked with its tables and pictures. See `run_intake`."""
    from medaug.intake.build import run_intake

    if options.dry_run:
        return run_intake(options, progress=progress)
    with track("intake", name=f"intake {storage.sha256_json(options.config())[:8]}", **tracking or {"enabled": False}) as run:
        result = run_intake(options, progress=progress)
        run.log_params({"config_sha256": result.cohort.created_by["config_sha256"], "cohort_sha256": result.cohort.content_sha256, **options.config()})
        run.log_cohort(result.cohort, "intake")
        run.log_dict(result.counts, "counts.json")
        run.log_dict(result.leak, "leak.json")
        run.log_table(result.quarantine, "quarantine.json")
        run.log_artifact(Path(options.out) / "report.html")
        return result


def gate_synthetic(
    synthetic: Path,
    cohort: Path,
    out: Path,
    *,
    checks: str | None = None,
    threshold: float = 0.8,
    profile: str = "cpu32",
    seed: int = 0,
    quota: Sequence[int] | None = None,
    filter_dir: Path | None = None,
    allow_short: bool = False,
    tracking: Mapping[str, Any] | None = None,
) -> GateResult:
    """`medaug gate`: judge every image of a synthetic cohort, tracked as a run of its own. See `run_gate`."""
    from medaug.quality.gate import run_gate

    with track("gate", name=f"gate {storage.sha256_json([threshold, checks, seed])[:8]}", **tracking or {"enabled": False}) as run:
        run.log_params({"threshold": threshold, "checks": checks or "all", "profile": profile, "seed": seed})
        result = run_gate(
            synthetic,
            cohort,
            out,
            checks=None if checks is None else [name.strip() for name in checks.split(",")],
            threshold=threshold,
            profile=profile,
            seed=seed,
            quotas=quota,
            filter_dir=filter_dir,
            allow_short=allow_short,
        )
        _log_gate(run, result)
        return result


def _log_gate(run: Run, result: GateResult) -> None:
    for row in result.per_class:
        run.log_metrics({f"{name}.{row['class']}": row[name] for name in ("accepted", "judged", "acceptance")}, step=0)
    run.log_metrics({f"filter.{name}": value for name, value in result.filter_metrics.items()}, step=0)
    run.log_table(result.verdicts, "verdicts.json")
    if result.sheet is not None:
        run.log_image(result.sheet, "gate", step=0)


def grade_arms(
    cohort: Path,
    out: Path,
    arms: Sequence[str],
    *,
    networks: str | Sequence[str] = "simple_cnn,resnet18",
    seeds: int = 3,
    profile: str = "cpu32",
    command: str = "",
    tracking: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`medaug grade`: measure the arms, tracked as a run of its own. See `medaug.grading.grade.grade`."""
    from medaug.grading.grade import grade

    names = networks if networks == "all" else [name.strip() for name in networks.split(",")] if isinstance(networks, str) else list(networks)
    with track("grading", name=f"grading {storage.sha256_json([names, seeds, profile])[:8]}", **tracking or {"enabled": False}) as run:
        run.log_params({"arms": [arm.split("=")[0] for arm in arms], "networks": names, "seeds": seeds, "profile": profile})
        run.log_cohort(read_cohort(cohort), "grading")
        result = grade(cohort, out, arms, names, seeds, profile, progress=True, command=command, tracking=run)
        run.log_table(result["rows"], "rows.json")
        run.log_dict(result["verdict"], "verdict.json")
        for name in ("report.html", "comparison.png", "table.md"):
            run.log_artifact(out / name)
        return result
