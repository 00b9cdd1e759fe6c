"""How values of records are shown: short, on one line, and never a path."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HIDDEN = "(not shown)"
NOT_RECORDED = "not recorded"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")

__all__ = ["HIDDEN", "NOT_RECORDED", "counted", "figure", "listed", "markdown", "settings", "table", "unknown_patients"]


def markdown(text: str) -> str:
    """Text on one line that Markdown shows as it is: no tags, links, or ends of table cells."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.replace("\\", "\\\\").replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(markdown(str(cell)) for cell in line) + " |" for line in lines) + "\n"


def counted(number: int, noun: str) -> str:
    """A number with its noun, plural unless it is 1."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def listed(names: Iterable[object]) -> str:
    """Names with commas between them."""
    return ", ".join(map(str, names))


def unknown_patients(origins: Mapping[str, int]) -> str | None:
    """What follows from images without a known patient, None without any.

    Args:
        origins: what images were grouped by -> how many: `patient`, `column`, `automatic`.
    """
    by_column, unknown = origins.get("column", 0), origins.get("column", 0) + origins.get("automatic", 0)
    if not unknown:
        return None
    text = (
        f"For {counted(unknown, 'image')} no patient is known, so splits could share patients unnoticed; and where a patient has several "
        "groups, intervals, which resample groups, are too narrow."
    )
    own = f" The groups of {counted(by_column, 'image')} are those of a column of the label table, which may be other than patients."
    return text + (own if by_column else "")


def figure(value: float | None, *, signed: bool = False) -> str:
    """Three decimals; "undefined" for None."""
    return "undefined" if value is None else f"{value:+.3f}" if signed else f"{value:.3f}"


def settings(values: Mapping[str, Any]) -> str:
    """Settings as ``name=value``, nested names joined by dots, in their order.

    Numbers, switches and short plain words are shown. Whatever else a setting holds may be a path or a sentence about a
    person, and is not: its name stays, with "(not shown)".
    """
    return ", ".join(f"{name}={value}" for name, value in _flat(values, ""))


def _flat(value: Any, name: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and all(isinstance(entry, int | float) for entry in value):
        yield name, "[" + " ".join(map(str, value)) + "]"
    elif value is None or isinstance(value, bool | int | float):
        yield name, str(value)
    elif isinstance(value, str) and _PLAIN.fullmatch(value) and not name.endswith(("path", "dir", "folder", "uri", "file")):
        yield name, value
    else:
        yield name, HIDDEN
