"""The options of `medaug intake` as a section of a YAML file, in which paths may contain environment variables.

The file can then be passed on: where the images are on one machine is said by that machine's environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from medaug.errors import ConfigError
from medaug.intake.records import IntakeOptions
from medaug.kinds import SWITCH, TEXT, TEXTS, WHOLE, Kind, numbers

PATHS = ("source", "labels", "masks")

__all__ = ["check_section", "publishable", "section_options"]

_PAIRS: Kind = (
    "a mapping of labels to names",
    lambda value: isinstance(value, Mapping) and bool(value) and all(isinstance(name, str) for name in value.values()),
)
# Not among them: where the cohort goes, what is written beside it, and what belongs to a machine.
_TEXTS = ("key", "key_column", "label_column", "group_column", "patient_column", "split_column", "slice_column", "reader_column")
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((*PATHS, *_TEXTS, "senior", "name", "sheet", "modality", "conflicts", "burned_in", "slices"), TEXT),
    **dict.fromkeys(("image_size", "training_images", "dimensions", "seed"), WHOLE),
    **dict.fromkeys(("ordinal", "strict", "keep_names"), SWITCH),
    **{"split": numbers(3), "window": numbers(2), "class_names": _PAIRS, "classes": TEXTS},
}


def check_section(content: Any) -> None:
    """Refuse a section that cannot be meant, without looking at any file or variable.

    Raises:
        ConfigError: no mapping or no `source`, an option that is not known (code `config-key-unknown`) or a value that it cannot have.
    """
    _options(content, Path("cohort"), _unexpanded).check_values()


def section_options(content: Mapping[str, Any], out: Path) -> IntakeOptions:
    """The options of a section, with the variables of its paths filled in.

    Args:
        content: `source` and options of `medaug intake` by their names: lists for `split`, `window` and `classes`, a mapping for
            `class_names`. Relative paths are taken from the working directory, as on the command line; ``$$`` is a dollar sign.
        out: folder of the cohort.

    Raises:
        ConfigError: see `check_section`; a variable that is not set (code `variable-unset`).
    """
    return _options(content, out, _expanded)


def publishable(content: Mapping[str, Any]) -> dict[str, Any]:
    """A section as results may repeat it: paths with their variables unfilled, of others only the last part, and no reader's name."""
    shown = {key: value for key, value in content.items() if key != "senior"}
    paths = {key: value if "$" in value else Path(value).name for key, value in shown.items() if key in PATHS}
    return shown | paths


def _options(content: Any, out: Path, place: Callable[[str], Path]) -> IntakeOptions:
    if not isinstance(content, Mapping) or "source" not in content:
        raise ConfigError(
            "intake-section", "The section `intake` must be a mapping with at least `source`, the images to take in."
        )
    if unknown := sorted(set(map(str, content)) - set(_KINDS)):
        raise ConfigError(
            "config-key-unknown", f"The section `intake` knows {', '.join(sorted(_KINDS))}; got {', '.join(unknown)}."
        )
    for key, value in content.items():
        words, fits = _KINDS[key]
        if not fits(value):
            raise ConfigError("config-value", f"The option {key} of `intake` must be {words}, got {str(value)[:40]!r}.")
    read: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    read |= {key: place(read[key]) for key in PATHS if key in read}
    if "class_names" in read:
        read["class_names"] = tuple((str(label), name) for label, name in read["class_names"].items())
    return IntakeOptions(**read, out=out, workers=min(os.cpu_count() or 1, 8))


def _unexpanded(text: str) -> Path:
    if not Template(text).is_valid():
        raise ConfigError(
            "config-value", "A dollar sign in a path of `intake` begins the name of a variable; write $$ for the sign."
        )
    return Path(text)


def _expanded(text: str) -> Path:
    _unexpanded(text)
    for name in Template(text).get_identifiers():
        if not os.environ.get(name):
            inside = text.partition(name)[2].lstrip("}").strip("/")
            what = f"the folder that holds {inside}" if inside else "the path of the images"
            raise ConfigError(
                "variable-unset",
                f"The images are at {text}, and {name} is not set; set the environment variable {name} to {what}.",
            )
    return Path(Template(text).substitute(os.environ))
