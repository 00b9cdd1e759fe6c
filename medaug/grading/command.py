"""The command line of a grading as a page may show it: folders are variables, since a path may name a person or a place."""

from __future__ import annotations

import re
from collections.abc import Sequence

from medaug.grading.arm_terms import NO_REAL, is_mixed, split_term
from medaug.grading.classic_copies import COPIES
from medaug.grading.image_sets import SEED
from medaug.grading.mixing import REAL
from medaug.grading.options import GradingOptions

_QUOTED = re.compile(r"[^A-Za-z0-9_.,=+@/-]")  # what a shell may read as something else
_RECIPE_OPTIONS = {"head": "linear", "precision": "float32"}  # fields of a recipe that the command line changes

__all__ = ["grade_command"]


def grade_command(arms: Sequence[str], options: GradingOptions) -> str:
    """`medaug grade` with these arms and options."""
    names = {text.partition("=")[0] for text in options.sources}
    parts = ['medaug grade --cohort "$COHORT" --out "$OUT"']
    parts += [f"--arm {_quoted(_public(text, names))}" for text in arms]
    parts += [f"--source {_quoted(_public(text, set()))}" for text in options.sources]
    parts.append(f"--networks {','.join(options.listed_networks)} --seeds {options.seeds} --profile {options.profile}")
    if options.synthetic_per_real is not None:
        parts.append(f"--per-real {_listed(options.synthetic_per_real)}")
    if options.allocation != "as_generated":
        parts.append(f"--allocation {options.allocation}")
    if _listed(options.real_fraction) != "1":
        parts.append(f"--real-fraction {_listed(options.real_fraction)}")
    if options.allow_untrusted:
        parts.append("--allow-untrusted")
    for name, usual in _RECIPE_OPTIONS.items():
        if (value := (options.overrides or {}).get(name, usual)) != usual:
            parts.append(f"--{name} {value}")
    parts += [f'--pretrained "{name}=${_variable(name)}_WEIGHTS"' for name in options.pretrained or {}]
    return " ".join(parts)


def _listed(values: float | Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in ([values] if isinstance(values, int | float) else values))


def _public(text: str, names: set[str]) -> str:
    """An arm or a source with variables in the place of its folders."""
    name, separator, rest = text.partition("=")
    if not separator:
        return text
    known = {*names, *COPIES, REAL, NO_REAL}
    if not is_mixed(rest):
        return f"{name}={_place(rest, name, known)}"
    terms = [split_term(term) for term in rest.split(" + ")]
    shown = [_place(place, f"{name}_{number}", known) for number, (place, _) in enumerate(terms, 1)]
    return f"{name}=" + " + ".join(
        f"{place}?{options}" if options else place for place, (_, options) in zip(shown, terms, strict=True)
    )


def _place(text: str, name: str, known: set[str]) -> str:
    """A folder, maybe with its trainer and a folder of unlabelled images behind it."""
    if text in known:
        return text
    folder, *trainer = text.split(":", 2)
    shown = [f"${_variable(name)}{_seed_of(folder)}" if folder else "", *trainer[:1]]
    return ":".join([*shown, *(f"${_variable(name)}_UNLABELLED{_seed_of(folder)}" for folder in trainer[1:])])


def _seed_of(folder: str) -> str:
    return f"/{SEED}" if SEED in folder else ""


def _variable(name: str) -> str:
    return re.sub(r"\W", "_", name).upper()


def _quoted(text: str) -> str:
    return f'"{text}"' if _QUOTED.search(text) else text
