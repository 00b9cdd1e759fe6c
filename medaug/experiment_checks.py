"""Everything that an experiment's file can get wrong and that no cohort is needed to see, checked before the first stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from medaug.cohort import read_cohort
from medaug.errors import ConfigError, DataError
from medaug.experiment_file import Experiment, ExperimentRow
from medaug.grading.arm_terms import is_mixed
from medaug.grading.arms import images_of
from medaug.grading.classic_copies import COPIES
from medaug.grading.image_sets import at_place, own_seeds
from medaug.grading.mixing import ALLOCATIONS, check_fraction
from medaug.grading.options import ALL_NETWORKS, GradingOptions
from medaug.grading.recipe import grading_recipe
from medaug.grading.variants import amounts
from medaug.kinds import WHOLE
from medaug.networks.grading import NETWORKS, check_network
from medaug.quality.checks import LABEL_SOURCES
from medaug.stages import change
from medaug.training.amst_recipe import amst_recipe
from medaug.workflow import check_overrides

OF_THE_EXPERIMENT = ("dataset_dir", "output_dir", "run_dir", "calibration_dir", "tracking")  # settings that it fills in itself

__all__ = ["check_experiment"]


def check_experiment(experiment: Experiment) -> None:
    """Refuse a bundle, profile, setting, network, recipe or folder that a stage would refuse after hours.

    Raises:
        ConfigError, DataError: as that stage would say it.
    """
    for row in experiment.rows:
        _check_row(row, experiment.profile)
    grading, options = experiment.grading, GradingOptions(**experiment.grading)
    networks, seeds = options.listed_networks, options.listed_seeds
    _check_distinct("networks", networks)
    _check_distinct("seeds", seeds)
    if not seeds or min(seeds) < 0:
        raise ConfigError(
            "config-value", f"seeds of the grading settings are how many, at least 1, or which; got {grading['seeds']}."
        )
    for name in NETWORKS if options.networks == ALL_NETWORKS else networks:
        check_network(name)
        grading_recipe(grading["profile"], name, grading.get("overrides"))
    if (allocation := grading.get("allocation", ALLOCATIONS[0])) not in ALLOCATIONS:
        raise ConfigError("allocation-unknown", f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}.")
    for fraction in amounts(grading.get("real_fraction"), "real_fraction"):
        check_fraction(fraction)
    if any(ratio <= 0 for ratio in amounts(grading.get("synthetic_per_real"), "synthetic_per_real")):
        raise ConfigError("ratio-invalid", f"synthetic_per_real must be above 0, got {grading['synthetic_per_real']!r}.")
    for arm in experiment.arms:
        for seed in own_seeds([arm], seeds):
            _check_folder(at_place(arm, seed), {row.name for row in experiment.rows})


def _check_row(row: ExperimentRow, profile: str | None) -> None:
    for stage, settings in (("training", row.training), ("generating", row.generating)):
        if taken := [key for key in OF_THE_EXPERIMENT if key in settings]:
            raise ConfigError(
                "config-value", f"The experiment sets {taken[0]} of row {row.name} itself; leave it out of {stage}."
            )
        check_overrides(row.bundle, stage, profile, settings, (row.overlay or None) if stage == "generating" else None)
    if not WHOLE[1](row.generating.get("seed", 0)):
        raise ConfigError(
            "config-value", f"seed of generating of row {row.name} must be a whole number, got {row.generating['seed']!r}."
        )
    if row.feedback is not None and row.generating.get("calibrate"):
        raise ConfigError(
            "feedback-option",
            f"Row {row.name} cannot calibrate in rounds of feedback, since each round would; give the scale that another row calibrates.",
        )
    for network in (row.gate.get("network"), (row.feedback or {}).get("network")):
        if network is not None:
            check_network(network)
    change(grading_recipe("cpu32", "simple_cnn"), row.gate.get("filter_recipe") or {})
    amst_recipe("amst", row.gate.get("amst"))
    if (label := row.gate.get("label")) is not None and label not in LABEL_SOURCES:
        raise ConfigError("label-source-unknown", f"Labels must come from one of {', '.join(LABEL_SOURCES)}, got {label!r}.")
    if not 0 <= (row.gate.get("threshold") or 0) <= 1:
        raise ConfigError(
            "config-value", f"threshold of the gate of row {row.name} must lie in [0, 1], got {row.gate['threshold']}."
        )


def _check_folder(arm: str, named: Collection[str]) -> None:
    """An arm of images that are there already: their folder must be a cohort. Names of rows and copies are none."""
    folder = images_of(arm)
    if folder and not is_mixed(folder) and folder not in (*named, *COPIES):
        try:
            read_cohort(Path(folder))
        except DataError as error:
            raise DataError(error.code, f"Arm {arm.partition('=')[0]}: {error.message}") from error


def _check_distinct(what: str, values: Iterable[object]) -> None:
    known = list(values)
    if len(set(known)) != len(known):
        raise ConfigError("config-value", f"{what} of the grading settings must differ from each other, got {known}.")
