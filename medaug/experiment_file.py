"""The files of ``configs/experiments``: what a table of arms is made of, read and checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaug import assets, storage
from medaug.errors import ConfigError
from medaug.grading.arms import check_arm_name, parse_arm
from medaug.grading.image_sets import SEED
from medaug.grading.presets import ALL_REAL, PRESETS, check_presets
from medaug.grading.recipe import grading_recipe
from medaug.intake.section import check_section
from medaug.kinds import MAPPING, NUMBER, SWITCH, TEXT, TEXTS, WHOLE, Kind, check_kinds, one_or_several
from medaug.quality.gate_config import plan_checks, take_threshold
from medaug.training.amst_recipe import amst_recipe
from medaug.workflow import read_yaml

if TYPE_CHECKING:
    from medaug.feedback import FeedbackOptions

EXTENDS = "extends"
KEYS = (EXTENDS, "name", "title", "profile", "intake", "arms", "grading", "generator_per_seed", "shared", "rows", "cells")
MAPPINGS = ("training", "generating", "gate", "feedback")  # a row's own values are laid over the shared ones key by key
ROW_KEYS = ("name", "bundle", "overlay", *MAPPINGS, "trainer")
_WORD: Kind = ("a text", lambda value: isinstance(value, str))  # which may be empty, for none
ROW_KINDS = {"bundle": TEXT, **dict.fromkeys(("overlay", "trainer"), _WORD), **dict.fromkeys(MAPPINGS, MAPPING)}
GATE_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("network", "label"), TEXT),
    **dict.fromkeys(("filter_recipe", "amst"), MAPPING),
    **{"checks": ("a list of checks", lambda value: isinstance(value, list)), "threshold": NUMBER, "calibrate": SWITCH},
}
GENERATORS = "generators"  # folder of what each seed of the graders has of its own
GRADING: dict[str, Any] = {"networks": ["simple_cnn", "resnet18"], "seeds": 3, "profile": "cpu32"}
GRADING_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("profile", "allocation"), TEXT),
    **dict.fromkeys(("synthetic_per_real", "real_fraction"), one_or_several(NUMBER)),
    **dict.fromkeys(("amst", "overrides"), MAPPING),
    **{"networks": one_or_several(TEXT), "seeds": one_or_several(WHOLE)},
}
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("name", "profile"), TEXT),
    **dict.fromkeys(("arms", "cells"), TEXTS),
    **{"title": _WORD, "shared": MAPPING, "generator_per_seed": SWITCH},
}


@dataclass(frozen=True)
class ExperimentRow:
    """One arm of the table.

    Attributes:
        name: of the arm.
        bundle: name or folder of the bundle that makes its images.
        training, generating: overrides of these stages, as for `run_stage`; a `seed` of generating is added to the experiment's,
            so that rows of one run draw images of their own.
        overlay: of the bundle, for generating; empty for none.
        gate: keyword arguments of `medaug.stages.gate_synthetic`, those of `GATE_KINDS`; without any check only unreadable and
            empty images are turned away.
        feedback: make the images in rounds, see `feedback_options`; None makes them at once.
        trainer: how the graders use its images, as in ``NAME=FOLDER:trainer``; empty for plain training.
    """

    name: str
    bundle: str
    training: Mapping[str, Any] = field(default_factory=dict)
    generating: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    feedback: Mapping[str, Any] | None = None
    trainer: str = ""
    overlay: str = ""

    def run_name(self) -> str:
        """Name of the training run: rows of the same bundle and training settings have the same one."""
        return storage.sha256_json([Path(self.bundle).name, dict(self.training)])[:12]

    def accepted_folder(self, out: Path) -> Path:
        """Where in the experiment's folder its accepted images are."""
        return out / "accepted" / self.name if self.feedback is None else out / "feedback" / self.name / "accepted"

    def feedback_options(self, budget: int) -> FeedbackOptions:
        """How its rounds go: `budget` images in all, in as many rounds as ``feedback`` says; the checks are those of its gate.

        Raises:
            ConfigError: no number of rounds, an unknown option, or a gate with more than names of checks.
        """
        from medaug.feedback import FeedbackOptions

        settings = dict(self.feedback or {})
        known = {option.name for option in fields(FeedbackOptions)} - {"budget", "per_round", "checks"}
        _check_keys("feedback settings of a row", settings, ("rounds", *sorted(known)))
        rounds = settings.pop("rounds", None)
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ConfigError("feedback-option", f"feedback of row {self.name} needs `rounds`, at least 1, got {rounds!r}.")
        checks = FeedbackOptions.checks if self.gate.get("checks") is None else self.gate["checks"]
        if set(self.gate) - {"checks"} or not all(isinstance(check, str) for check in checks):
            raise ConfigError(
                "feedback-option", f"The gate of row {self.name} takes names of checks alone, since feedback runs it."
            )
        return FeedbackOptions(budget, math.ceil(budget / rounds), checks=tuple(checks), **settings)


@dataclass(frozen=True)
class Experiment:
    """What a file of ``configs/experiments`` says.

    Attributes:
        name, title: for people.
        rows: the arms with synthetic images.
        intake: how the cohort is made, see `medaug.intake.section`; None if the file does not say.
        arms: real-only arms beside them; `none` is always there.
        profile: overlay for all bundles.
        grading: fields of `GradingOptions`, those of `GRADING_KINDS`.
        cells: mixtures of real images and the rows' images; where there are any, the rows are no arms of their own.
        generator_per_seed: every seed of the graders trains on images of a generator of its own, so that the verdict is about the
            method and not about one set of images.
    """

    name: str
    title: str
    rows: tuple[ExperimentRow, ...]
    intake: Mapping[str, Any] | None = None
    arms: tuple[str, ...] = ("none", "oversample")
    profile: str | None = None
    grading: Mapping[str, Any] = field(default_factory=lambda: dict(GRADING))
    cells: tuple[str, ...] = ()
    generator_per_seed: bool = False

    def places(self, out: Path) -> dict[int, Path]:
        """What is added to the seed of the stages -> where their images go: once, or once for each seed of the graders."""
        if not self.generator_per_seed:
            return {0: out}
        seeds = self.grading["seeds"]
        return {seed: out / GENERATORS / str(seed) for seed in (range(seeds) if isinstance(seeds, int) else seeds)}

    def maker(self, row: ExperimentRow) -> ExperimentRow:
        """The row whose images a row uses: the first one that makes them in the same way, be it itself."""
        return next(other for other in self.rows if replace(other, name="", trainer="") == replace(row, name="", trainer=""))

    def arm_specs(self, out: Path, facts: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """Arms and named sources as `medaug grade` takes them; all real images alone are the arm `none`.

        Args:
            out: the experiment's folder.
            facts: row -> what its images were like; a row without an accepted one, be it at one seed, is no arm.
        """
        place = out / GENERATORS / SEED if self.generator_per_seed else out
        images = {row.name: f"{row.name}={self.maker(row).accepted_folder(place)}" for row in self.rows}
        if self.cells:
            return [*self.arms, *(cell for cell in self.cells if cell != ALL_REAL)], list(images.values())
        made = [row for row in self.rows if not facts[row.name]["seeds_without"]]  # the others stay in the table, without a score
        return [*self.arms, *(images[row.name] + (f":{row.trainer}" if row.trainer else "") for row in made)], []


def read_experiment(file: str, profile: str | None = None) -> Experiment:
    """Read an experiment by its name in ``configs/experiments``, or by path.

    Args:
        file: name or path.
        profile: replaces the file's own.

    Raises:
        ConfigError: not there, an unknown key, no row, two rows of one name, an arm, check, trainer or setting that cannot be meant,
            or a cell that is unknown or lacks its row.
    """
    content = _content(file)
    _check_keys("experiment", content, KEYS)
    check_kinds("an experiment", content, KINDS)
    shared, rows = content.get("shared") or {}, content.get("rows") or []
    _check_keys("shared settings", shared, ROW_KEYS)
    if not isinstance(rows, list) or not rows:
        raise ConfigError("experiment-empty", f"{Path(file).name} must list at least one row under `rows`.")
    made = tuple(_row(shared, row) for row in rows)
    names = [row.name for row in made]
    if len(set(names)) != len(names):
        raise ConfigError("experiment-rows", f"The rows of an experiment need different names, got {names}.")
    if (intake := content.get("intake")) is not None:
        check_section(intake)
    arms = tuple(dict.fromkeys(["none", *(content.get("arms") or ["oversample"])]))
    for arm in arms:
        if "=" not in arm and arm not in PRESETS:
            parse_arm(arm)
    name, title = str(content.get("name") or Path(file).stem), str(content.get("title") or "")
    if Path(name).name != name:
        raise ConfigError("config-value", f"name of an experiment becomes that of a file and can be no path, got {name[:80]!r}.")
    cells = tuple(content.get("cells") or ())
    check_presets(cells, names)
    own_generators = bool(content.get("generator_per_seed"))
    return Experiment(
        name, title, made, intake, arms, profile or content.get("profile"), _grading(content), cells, own_generators
    )


def _content(file: str) -> dict[str, Any]:
    """What the file says, its keys laid over those of the file that it extends."""
    path = assets.experiment_path(file)
    own = read_yaml(path)
    if EXTENDS not in own:
        return own
    name = str(own.pop(EXTENDS))
    beside = path.parent / name
    base = read_yaml(assets.experiment_path(beside if beside.is_file() else name))
    if EXTENDS in base:
        raise ConfigError("experiment-extends", f"{Path(name).name} extends another file itself; extend that one.")
    return {key: value for key, value in base.items() if key != "name"} | own


def _grading(content: Mapping[str, Any]) -> dict[str, Any]:
    grading = content.get("grading") or {}
    _check_keys("grading settings", grading, tuple(GRADING_KINDS))
    check_kinds("the grading settings", grading, GRADING_KINDS)
    settings = GRADING | {key: value for key, value in grading.items() if value is not None}
    grading_recipe(settings["profile"], "simple_cnn", settings.get("overrides"))  # a wrong field shows before hours of training
    amst_recipe("amst", settings.get("amst"))
    return settings


def _check_keys(what: str, content: Any, known: Sequence[str]) -> None:
    unknown = set(content) - set(known) if isinstance(content, Mapping) else {"(not a mapping)"}
    if unknown:
        raise ConfigError(
            "config-key-unknown", f"The {what} know {', '.join(known)}; got {', '.join(sorted(map(str, unknown)))}."
        )


def _row(shared: Mapping[str, Any], row: Any) -> ExperimentRow:
    """The shared settings with a row's own laid over them, mapping by mapping."""
    _check_keys("rows of an experiment", row, ROW_KEYS)
    merged: dict[str, Any] = {key: value for key, value in {**shared, **row}.items() if value is not None}
    for part in (shared, row):
        check_kinds("a row of an experiment", part, ROW_KINDS)
    for key in MAPPINGS:
        given = [part[key] for part in (shared, row) if part.get(key) is not None]
        if given:
            merged[key] = {name: value for part in given for name, value in part.items()}
    for key in ("gate", "feedback"):  # of these null is no value but stands for a key that is left out
        if key in merged:
            merged[key] = {name: value for name, value in merged[key].items() if value is not None}
    missing = [key for key in ("name", "bundle") if not merged.get(key)]
    if missing:
        raise ConfigError("experiment-rows", f"A row of an experiment needs {' and '.join(missing)}.")
    check_arm_name(merged["name"])
    made = ExperimentRow(**merged)
    _check_keys("gate settings of a row", made.gate, tuple(GATE_KINDS))
    check_kinds("the gate settings of a row", made.gate, GATE_KINDS)
    plan_checks(take_threshold(made.gate.get("checks") or [], None)[0])
    if made.trainer:
        amst_recipe(made.trainer.partition(":")[0])
    if made.feedback is not None:
        made.feedback_options(1)
    return made
