"""Stages that are not a bundle's: intake, gate and grading, each as one tracked run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaug import storage
from medaug.cohort import read_cohort
from medaug.errors import ConfigError
from medaug.progress import progress
from medaug.tracking import track

if TYPE_CHECKING:
    from medaug.grading.options import GradingOptions
    from medaug.intake.records import IntakeOptions, IntakeResult
    from medaug.quality.gate import GateResult
    from medaug.quality.gate_config import CheckSpec
    from medaug.training.classifier import ClassifierRecipe

LABEL_NETWORK = "simple_cnn"
TRACKED_OPTIONS = ("seeds", "profile", "synthetic_per_real", "real_fraction", "allocation")  # parameters of a grading in MLflow
# Rare classes count as much; shifts keep it from learning single images by heart.
AS_A_FILTER = {"policy": "weak", "class_balanced": True}


def take_in(options: IntakeOptions, *, tracking: Mapping[str, Any] | None = None) -> IntakeResult:
    """`medaug intake`: make a cohort, tracked with its tables and pictures. See `run_intake`."""
    from medaug.intake.build import run_intake

    if options.dry_run:
        return run_intake(options, progress=progress)
    with track("intake", name=f"intake {storage.sha256_json(options.config())[:8]}", **tracking or {"enabled": False}) as run:
        result = run_intake(options, progress=progress)
        run.log_params(
            {
                "config_sha256": result.cohort.created_by["config_sha256"],
                "cohort_sha256": result.cohort.content_sha256,
                **{key: value for key, value in options.config().items() if key != "senior"},  # a person's name
            }
        )
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
    checks: Sequence[CheckSpec] | None = None,
    threshold: float | None = None,
    network: str = LABEL_NETWORK,
    filter_recipe: Mapping[str, Any] | None = None,
    calibrate: bool = False,
    label: str = "filter",
    amst: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    weights_trusted: bool = False,
    seed: int = 0,
    quotas: Sequence[int] | None = None,
    filter_dir: Path | None = None,
    allow_short: bool = False,
    run_dir: Path | None = None,
    review: Sequence[Path] = (),
    tracking: Mapping[str, Any] | None = None,
) -> GateResult:
    """`medaug gate`: judge every image of a synthetic cohort, tracked as a run of its own.

    Args:
        checks: names, or mappings of a name to its settings, as a gate's file lists them; None: the default ones. An empty list turns
            away unreadable and empty images alone.
        threshold: least confidence of the pseudo-label; None: what `checks` say, else 0.8.
        network: the one that must confirm the label, a name of `medaug.networks.grading`; with label "amst" the backbone of the heads.
        filter_recipe: fields of `ClassifierRecipe` that differ from `label_recipe` of that network.
        calibrate: apply the filter's temperature, fitted on validation, before the threshold.
        label: "filter" or "amst", see `run_gate`.
        amst: fields of `AmstRecipe` that differ from its default.
        weights: checkpoint that AMST's backbone starts from.
        weights_trusted: True for the user's word that a checkpoint of unknown origin saw no held-out image.
        others: see `run_gate` and `track`.
    """
    from medaug.quality.gate import DEFAULT_CHECKS, run_gate
    from medaug.quality.gate_config import plan_checks, take_threshold
    from medaug.quality.pseudo_label import PAPER_THRESHOLD
    from medaug.training.amst_recipe import amst_recipe

    specs, least = take_threshold(list(DEFAULT_CHECKS if checks is None else checks), threshold)
    threshold = PAPER_THRESHOLD if least is None else least
    names = [check.name for check in plan_checks(specs)]
    recipe = change(label_recipe(network), filter_recipe or {})
    heads = amst_recipe("amst", amst) if label == "amst" else None
    settings = {"checks": names, "threshold": threshold, "seed": seed, "label": label}
    settings |= {"calibrate": True} if calibrate else {}
    settings |= {"network": network} if network != LABEL_NETWORK else {}
    with track("gate", name=f"gate {storage.sha256_json(settings)[:8]}", **tracking or {"enabled": False}) as run:
        run.log_params(settings)
        return run_gate(
            synthetic,
            cohort,
            out,
            checks=specs,
            threshold=threshold,
            quotas=quotas,
            recipe=recipe,
            network=network,
            calibrate=calibrate,
            label=label,
            amst=heads,
            weights=weights,
            weights_trusted=weights_trusted,
            seed=seed,
            filter_dir=filter_dir,
            allow_short=allow_short,
            run_dir=run_dir,
            review=review,
            tracking=run,
            progress=progress,
        )


def label_recipe(network: str) -> ClassifierRecipe:
    """How a network that confirms labels is trained: `default_recipe`, or for another than the usual one as a grader of profile cpu32."""
    from medaug.grading.recipe import grading_recipe
    from medaug.quality.pseudo_label import default_recipe

    return default_recipe() if network == LABEL_NETWORK else grading_recipe("cpu32", network, AS_A_FILTER)


def check_labels(
    cohort: Path,
    out: Path,
    *,
    network: str = LABEL_NETWORK,
    folds: int = 5,
    synthetic: Path | None = None,
    profile: str = "cpu32",
    seed: int = 0,
) -> dict[str, Any]:
    """`medaug labels`: find labels that look wrong. See `run_labels`; `profile` names a recipe of `grading_recipe`."""
    from medaug.grading.recipe import grading_recipe
    from medaug.quality.labels import run_labels

    recipe = grading_recipe(profile, network, AS_A_FILTER)
    return run_labels(
        cohort, out, recipe=recipe, network=network, num_folds=folds, seed=seed, synthetic_dir=synthetic, progress=progress
    )


def change(recipe: ClassifierRecipe, fields: Mapping[str, Any]) -> ClassifierRecipe:
    """A recipe with other values in some fields.

    Raises:
        ConfigError: an unknown field.
    """
    known = [entry.name for entry in fields_of(recipe)]
    if unknown := sorted(set(fields) - set(known)):
        raise ConfigError(
            "recipe-unknown-key", f"The filter's recipe has the fields {', '.join(known)}, got {', '.join(unknown)}."
        )
    return replace(recipe, **fields)


def grade_arms(
    cohort: Path,
    out: Path,
    arms: Sequence[str],
    options: GradingOptions,
    *,
    command: str = "",
    executor: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    tracking: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`medaug grade`: measure the arms, tracked as a run with one nested run per cell. See `medaug.grading.grade.grade`.

    Grading again into the same folder with the same settings continues the run of before, which then holds every cell once.
    """
    from medaug.grading.command import grade_command
    from medaug.grading.grade import grade

    real = read_cohort(cohort)
    settings = {key: getattr(options, key) for key in TRACKED_OPTIONS} | {"networks": options.listed_networks}
    same_work = [str(Path(out).resolve()), real.content_sha256, list(arms), asdict(options), settings]
    name = f"grading {storage.sha256_json([settings[key] for key in ('networks', 'seeds', 'profile')])[:8]}"
    where = dict(tracking or {"enabled": False})
    with track("grading", name=name, same_work=storage.sha256_json(same_work), **where) as run:
        run.log_params({"arms": [arm.split("=")[0] for arm in arms], **settings})
        run.log_cohort(real, "grading")
        result = grade(
            cohort,
            out,
            arms,
            options,
            executor=executor,
            workers=workers,
            ray_address=ray_address,
            progress=True,
            command=command or grade_command(arms, options),
            tracking=run,
        )
        _log_grading(run, result, Path(out))
        return result


def _log_grading(run: Any, result: Mapping[str, Any], out: Path) -> None:
    """Rows, verdict, failures and the files of the report, in the tracked run."""
    from medaug.grading.report import CLASSES, CURVES, FIGURES, TABLES

    run.log_table(result["rows"], "rows.json")
    run.log_dict(result["verdict"], "verdict.json")
    run.log_metrics({f"{arm}/difference": entry["against_none"]["difference"] for arm, entry in result["verdict"].items()})
    run.log_dict({"failed": result["failed"]}, "failed.json")
    for file in ("report.html", CURVES, CLASSES, *FIGURES, *TABLES):
        if (out / file).is_file():
            run.log_artifact(out / file)
