"""The cells of the mixing experiment of text-to-image augmentation, by name, and the sources that cells draw from.

A cell says which share of the real images it keeps and what it adds. "copy" is a synthetic image for every real one of the
training split, class by class; "fill" brings the arm to the size of the training split; "of_kept" copies the kept half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaug.cohort import Cohort, read_cohort
from medaug.errors import ConfigError
from medaug.grading.classic_copies import COPIES, make_copies
from medaug.grading.mixing import REAL, Source

_AMOUNTS: dict[str, dict[str, Any]] = {
    "copy": {"per_real": 1.0, "allocation": "proportional"},
    "fill": {"allocation": "fill"},
    "of_kept": {"of_kept": True},
}


@dataclass(frozen=True)
class Preset:
    """One cell.

    Attributes:
        real_fraction: of the real training images; None for none.
        added: (source, amount) pairs, see the module.
    """

    real_fraction: float | None
    added: tuple[tuple[str, str], ...] = ()

    def sources(self, cell: str, named: Mapping[str, Cohort]) -> tuple[Source, ...]:
        """What the cell adds, with the cohorts that the names stand for.

        Raises:
            ConfigError: `source-missing`.
        """
        missing = [name for name, _ in self.added if name not in named]
        if missing:
            raise ConfigError(
                "source-missing",
                f"Cell {cell} needs the images {' and '.join(missing)}; give them with --source {missing[0]}=FOLDER.",
            )
        return tuple(Source(name, named[name], **_AMOUNTS[amount]) for name, amount in self.added)


ALL_REAL = "orig100"  # the same training set as the arm `none`

PRESETS: dict[str, Preset] = {
    ALL_REAL: Preset(1.0),
    "orig+syn1": Preset(1.0, (("syn1", "copy"),)),
    "orig+syn2": Preset(1.0, (("syn2", "copy"),)),
    "orig+syn1+syn2": Preset(1.0, (("syn1", "copy"), ("syn2", "copy"))),
    "orig50": Preset(0.5),
    "orig50+syn1_50": Preset(0.5, (("syn1", "fill"),)),
    "orig50+syn2_50": Preset(0.5, (("syn2", "fill"),)),
    "syn1": Preset(None, (("syn1", "copy"),)),
    "syn2": Preset(None, (("syn2", "copy"),)),
    "orig50+rot": Preset(0.5, (("rot", "of_kept"),)),
    "orig50+vflip": Preset(0.5, (("vflip", "of_kept"),)),
}

__all__ = ["ALL_REAL", "PRESETS", "Preset", "check_presets", "named_sources", "preset_of"]


def preset_of(name: str) -> Preset:
    """A cell by its name.

    Raises:
        ConfigError: `preset-unknown`.
    """
    if name not in PRESETS:
        raise ConfigError("preset-unknown", f"A cell must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def check_presets(names: Sequence[str], sources: Sequence[str]) -> None:
    """Refuse unknown cells and cells whose synthetic images are none of `sources`, before anything is made.

    Raises:
        ConfigError: `preset-unknown`, `source-missing`; `source-name` for a source that has a reserved name.
    """
    if names and (taken := sorted({REAL, *COPIES} & set(sources))):
        raise ConfigError(
            "source-name", f"A source of cells needs a name other than {', '.join((REAL, *COPIES))}; got {taken[0]}."
        )
    for name in names:
        missing = [source for source, _ in preset_of(name).added if source not in (*sources, *COPIES)]
        if missing:
            raise ConfigError("source-missing", f"Cell {name} needs the images {' and '.join(missing)}; a row has to make them.")


def named_sources(given: Sequence[str], used: Sequence[str], real: Cohort, copies: Path) -> dict[str, Cohort]:
    """Source name -> cohort: those given as ``NAME=FOLDER``, and the classic copies that are used.

    Args:
        given: texts of the command line.
        used: names of the cells and sources that are asked for.
        real: copies are made of its training images.
        copies: folder for them.

    Raises:
        ConfigError: `source-name` for a text of another form, a name twice or a reserved one.  DataError: no valid cohort.
    """
    found: dict[str, Cohort] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or name in found or name in (REAL, *COPIES):
            raise ConfigError(
                "source-name",
                f"A source is NAME=FOLDER with a name of its own, other than {', '.join((REAL, *COPIES))}; got {text.split('=')[0]!r}.",
            )
        found[name] = read_cohort(Path(folder), verify=True)
    wanted = {source for name in used for source, _ in (PRESETS[name].added if name in PRESETS else ((name, ""),))}
    return found | {kind: make_copies(real, kind, copies / kind) for kind in COPIES if kind in wanted}
