"""Bundles from Python: the same YAML that ``python -m monai.bundle run`` executes, with profiles and overrides."""

from __future__ import annotations

import difflib
import logging
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medaug import assets
from medaug.errors import ConfigError, MedaugError

STAGES = {"training": "train.yaml", "generating": "inference.yaml", "evaluating": "evaluate.yaml"}
MAX_VALUES = 10_000
PROFILE_SECTIONS = ("augment",)  # read by `medaug augment`, not by a bundle
OVERLAY_MARK = "overlay_of"  # key of an overlay that names its stage
WHOLE_METHOD = "whole_method"  # key of inference.yaml: the overlay that `medaug augment` lays over it
COMPANIONS = "also_trains"  # key of train.yaml: overlays whose networks the method needs besides, each trained in RUN/<overlay>


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``["batch_size=4", "network_settings#class_conditional=true"]`` as a dict; values are YAML.

    Raises:
        ConfigError: an entry without "=", or a value that is not YAML.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError("override-malformed", f"--set takes KEY=VALUE, got {pair!r}.")
        try:
            parsed[key.strip().replace("::", "#")] = load_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError("override-malformed", f"The value of --set {key} is not YAML.") from error
    return parsed


def load_config(bundle: str, stage: str, profile: str | None = None, overlay: str | None = None) -> dict[str, Any]:
    """The config of one stage of a bundle with an overlay of the bundle and then a profile laid over it.

    Args:
        bundle: name of a bundle, or a folder.
        stage: "training", "generating" or "evaluating".
        profile: name of a profile, or a YAML file; None for the bundle's own values.
        overlay: name of another file in the bundle's ``configs/``, made for this stage (``overlay_of``); None for none.

    Raises:
        ConfigError: unknown bundle or profile; a file that is not a YAML mapping; a profile key that no stage of it and of no shipped bundle knows. One profile
            serves several bundles: a key of another one is passed over.
    """
    root = assets.bundle_root(bundle)
    config = read_yaml(root / "configs" / STAGES[stage])
    if overlay is not None:
        for key, value in read_yaml(_overlay_path(root, stage, overlay)).items():
            _lay_over(config, key, value)
    if profile is not None:
        own = read_yaml(assets.profile_path(profile))
        known = _known_keys(root).union(PROFILE_SECTIONS)
        strange = [key for key in own if key.lstrip("+") not in known]
        elsewhere = set().union(*(_known_keys(assets.bundle_root(name)) for name in assets.list_bundles())) if strange else set()
        for key in strange:
            if key.lstrip("+") not in elsewhere:
                raise _unknown(f"Profile key {key!r}", key, known)
        for key, value in own.items():
            if (old := key.lstrip("+")) in config:
                if key.startswith("+"):
                    _check_switches(key, config[old], value)
                else:
                    _check_kind(key, config[key], value)
                _lay_over(config, key, value)
    return config


def list_overlays(bundle: str) -> dict[str, str]:
    """Overlays of a bundle: name -> the stage it is laid over."""
    return _overlays(assets.bundle_root(bundle))


def _overlays(root: Path) -> dict[str, str]:
    files = [path for path in sorted((root / "configs").glob("*.yaml")) if path.name not in STAGES.values()]
    found = {path.stem: read_yaml(path).get(OVERLAY_MARK) for path in files}
    return {name: str(stage) for name, stage in found.items() if stage is not None}


def _overlay_path(root: Path, stage: str, overlay: str) -> Path:
    fitting = [name for name, of in _overlays(root).items() if of == stage]
    if overlay not in fitting:
        raise ConfigError(
            "overlay-unknown",
            f"Bundle {root.name} has for {stage} the overlays {', '.join(fitting) or '(none)'}, got {overlay!r}.",
        )
    return root / "configs" / f"{overlay}.yaml"


def _known_keys(root: Path) -> set[str]:
    """Top-level keys of all stages and overlays of a bundle."""
    files = [root / "configs" / name for name in (*STAGES.values(), *(f"{name}.yaml" for name in _overlays(root)))]
    return {key.lstrip("+") for file in files if file.is_file() for key in read_yaml(file)}


def _lay_over(config: dict[str, Any], key: str, value: Any) -> None:
    """Replace an entry, or merge into it if the key starts with "+", as MONAI does with several files."""
    old = config.get(key.lstrip("+"))
    if not key.startswith("+"):
        config[key] = value
    elif isinstance(old, dict) and isinstance(value, dict):
        config[key[1:]] = old | value
    elif isinstance(old, list) and isinstance(value, list):
        config[key[1:]] = old + value
    else:
        raise ConfigError(
            "config-value", f"Profile key {key!r} merges mappings or lists, got {type(value).__name__} for {type(old).__name__}."
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; duplicate keys are refused.

    Raises:
        ConfigError: unreadable, not a mapping, or a key twice.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError("config-malformed", f"{path.name} is not UTF-8 text; save it again as UTF-8.") from error
    except OSError as error:
        raise ConfigError("config-missing", f"The configuration {path.name} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("config-malformed", f"{path.name} is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError("config-malformed", f"{path.name} must hold named keys and values, got {type(content).__name__}.")
    return content


def load_yaml(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        yaml.YAMLError: not YAML, a key twice, a number that is not finite, or aliases that multiply to more than `MAX_VALUES` values.
    """
    content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    waiting, seen = [content], 0
    while waiting:
        part = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values; aliases may not multiply")
        if isinstance(part, float) and not math.isfinite(part):
            raise yaml.YAMLError("a number is not finite")
        waiting += list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(sorted(twice))}", node.start_mark)
        return super().construct_mapping(node, deep)


# As in YAML 1.2 only true and false are switches: `on`, a key of a guidance, `no`, perhaps a class, are words.
_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != _BOOL]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# YAML 1.1 reads 1e-4 as a word unless it has a point.
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def run_training(
    bundle: str, profile: str | None = None, overrides: Mapping[str, Any] | None = None, overlay: str | None = None
) -> Any:
    """Train a bundle, and then the other networks its method needs, such as a guiding classifier, in folders inside the run's.

    Args:
        bundle, profile, overlay: see `load_config`; with an overlay nothing else is trained.
        overrides: see `run_stage`; each training takes those it knows, and at least one must.

    Returns:
        The record of the first run.

    Raises:
        ConfigError, MedaugError: see `run_stage`.
    """
    given = dict(overrides or {})
    record = run_stage(bundle, "training", profile, given, **({} if overlay is None else {"overlay": overlay}))
    listed = load_config(bundle, "training", profile).get(COMPANIONS) if overlay is None else None
    for name in given.get(COMPANIONS, listed) or []:
        inside = {key: value for key, value in given.items() if key != COMPANIONS}
        inside["output_dir"] = str(Path(given.get("output_dir", "run")) / name)
        run_stage(bundle, "training", profile, inside, overlay=name)
    return record


def check_overrides(
    bundle: str, stage: str, profile: str | None, overrides: Mapping[str, Any], overlay: str | None = None
) -> None:
    """Refuse settings of a stage that do not exist or are of another kind, without running it; inside a mapping nothing is looked at.

    Raises:
        ConfigError: see `load_config` and `run_stage`.
    """
    config = load_config(bundle, stage, profile, overlay)
    for key, value in overrides.items():
        if key.replace("::", "#").split("#")[0] not in config:
            raise _unknown(f"Configuration key {key!r}", key, set(config))
        if key in config:
            _check_kind(key, config[key], value)


def run_stage(
    bundle: str,
    stage: str,
    profile: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    overlay: str | None = None,
) -> Any:
    """Run one stage of a bundle in this process and return what its last expression returned.

    Args:
        bundle, stage, profile, overlay: see `load_config`.
        overrides: id ("a" or "a#b") -> value; the id must exist.

    Raises:
        ConfigError: an unknown id.  MedaugError: whatever the stage raises, without MONAI's wrapping.
    """
    from monai.bundle import ConfigParser

    for name in ("ignite.engine.engine.SupervisedTrainer", "ignite.engine.engine.SupervisedEvaluator"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their traceback before our sentence helps nobody
    parser = ConfigParser(load_config(bundle, stage, profile, overlay))
    for key, value in (overrides or {}).items():
        if key not in parser:
            raise _unknown(f"Configuration key {key!r}", key, {str(name) for name in parser.get()})
        _check_kind(key, parser[key], value)
        parser[key] = value
    try:
        parser.parse()
        session = parser.get_parsed_content("session")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        cause = root_cause(error)
        fallback = ConfigError(
            "config-value", f"The {stage} settings cannot be used ({type(cause).__name__}: {str(cause)[:200]})."
        )
        raise own_error(error) or fallback from error
    try:
        results = parser.get_parsed_content(stage) if session is not None else []
    except RuntimeError as error:
        raise own_error(error) or error from error
    return results[-1]


def run_setting(run: Path | None, bundle: str, overlay: str | None = None) -> dict[str, str]:
    """What --run says to the generation of a bundle; one whose `run_dir` is null by itself needs no run.

    Raises:
        ConfigError: no run for a bundle that generates from one (code `run-not-given`).
    """
    if run is not None:
        return {"run_dir": str(run)}
    if load_config(bundle, "generating", overlay=overlay).get("run_dir") is not None:
        raise ConfigError("run-not-given", "These images come from a training run; name its folder with --run.")
    return {}


def _check_kind(key: str, old: Any, new: Any) -> None:
    """Refuse a word where a number or a mapping is; null and ``$`` expressions fit everywhere."""
    _check_switches(key, old, new)
    if new is None or (isinstance(new, str) and new[:1] in ("$", "@", "%")):
        return
    kinds = ((bool, (bool,)), (int | float, (int, float)), (Mapping, (Mapping,)))
    for kind, allowed in kinds:
        if isinstance(old, kind):
            if not isinstance(new, allowed) or (kind is not bool and isinstance(new, bool)):
                raise ConfigError(
                    "config-value",
                    f"Configuration key {key!r} is {reprlib.repr(old)} by default and takes the like, got {reprlib.repr(new)}.",
                )
            return


def _check_switches(key: str, old: Any, new: Any) -> None:
    """Refuse a word such as ``no`` for a switch inside a mapping, where it would count as true."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name, value in new.items():
            if isinstance(old.get(name), bool) and isinstance(value, str):
                _check_kind(f"{key}#{name}", old[name], value)


def split_overrides(
    bundle: str,
    profile: str | None,
    overrides: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Sort the overrides of a job that runs several stages.

    Args:
        bundle, profile: see `load_config`.
        overrides: ids of any stage; ``augment#KEY`` for the job itself.
        defaults: the job's settings, overridden by the profile's section ``augment`` and then by `overrides`.

    Returns:
        (the job's settings, stage -> its overrides).

    Raises:
        ConfigError: an id that neither the job nor any stage knows.
    """
    section = (read_yaml(assets.profile_path(profile)).get("augment") or {}) if profile is not None else {}
    own = {key.removeprefix("augment#"): value for key, value in overrides.items() if key.startswith("augment#")}
    settings = {**defaults, **section, **own}
    for key in settings:
        if key not in defaults:
            raise _unknown(f"Setting augment#{key}", key, set(defaults))
    rest = {key: value for key, value in overrides.items() if not key.startswith("augment#")}
    if "overlay" in defaults:  # a bundle may say which one makes its whole method out of inference.yaml
        settings["overlay"] = settings["overlay"] or load_config(bundle, "generating", profile).get(WHOLE_METHOD)
    overlays = {"training": None, "generating": settings.get("overlay")}
    configs = {stage: load_config(bundle, stage, profile, overlay) for stage, overlay in overlays.items()}
    for key in rest:
        if all(key.split("#")[0] not in config for config in configs.values()):
            raise _unknown(f"Configuration key {key!r}", key, set().union(*configs.values()))
    return settings, {stage: {k: v for k, v in rest.items() if k.split("#")[0] in config} for stage, config in configs.items()}


def own_error(error: BaseException | None) -> MedaugError | None:
    """The medaug error inside a chain of exceptions: MONAI wraps what a config component raises."""
    while error is not None:
        if isinstance(error, MedaugError):
            return error
        error = error.__cause__ or error.__context__
    return None


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def _unknown(what: str, key: str, known: set[str]) -> ConfigError:
    near = difflib.get_close_matches(key.split("#")[0], known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known keys are {', '.join(sorted(known))}."
    return ConfigError("config-key-unknown", f"{what} is not known; {hint}")
