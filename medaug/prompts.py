"""What a text-conditioned generator is told: the prompts of each class, and the keyed choice among them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaug.draws import key_seed
from medaug.errors import ConfigError

TEMPLATES = {
    "syn1": "{label}",
    "syn2": "a photo of a {label}",
    "style": "{label} in the style of {style}",
    "chest_xray": "a chest X-ray showing {label}",
    "chest_ct": "a chest CT slice showing {label}",
    "mri": "an MRI slice showing {label}",
    "ultrasound": "an ultrasound image showing {label}",
    "fundus": "a fundus photograph showing {label}",
    "dermoscopy": "a dermoscopic image showing {label}",
    "histology": "a histology patch showing {label}",
}
MAX_FILE_BYTES = 16 * 2**20
MAX_PROMPT = 1000  # characters; text encoders read far fewer
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_PARTS = re.compile(r"\w+|[^\w\s]")
_LISTED = 5  # line numbers in a message


@dataclass(frozen=True)
class Prompts:
    """The prompts of every class.

    Attributes:
        texts: per class, in class order, the distinct prompts that may be drawn for it; none is empty.
    """

    texts: tuple[tuple[str, ...], ...]

    def prompt(self, label: int, *key: str | int) -> str:
        """The prompt of class index `label` for this key alone, for example (seed, image id): every one is equally likely."""
        choices = self.texts[label]
        return choices[key_seed("prompt", label, *key) % len(choices)]

    def all(self) -> tuple[str, ...]:
        """The distinct prompts of all classes, sorted."""
        return tuple(sorted({text for texts in self.texts for text in texts}))


def make_prompts(
    classes: Sequence[str],
    *,
    templates: str | Sequence[str] = "syn1",
    labels: Mapping[str, str] | None = None,
    styles: Sequence[str] = (),
    file: str | Path | None = None,
) -> Prompts:
    """The prompts of every class, from templates or from a file of the user.

    Args:
        classes: class names, in order.
        templates: names in `TEMPLATES`, or literal templates that hold "{label}"; one or several.
        labels: class name -> human text; None takes the class name with blanks for underscores.
        styles: what "{style}" may stand for.
        file: prompts that take the place of the templates: a ``.jsonl`` file with one ``{"label": class name, "prompt": text}`` per line, or
            a folder with one ``<class name>.txt`` per class, a prompt per line. "{label}" in them stands for the human text.

    Raises:
        ConfigError: an unknown template (code `template-unknown`); "{style}" without styles or the reverse (`template-style`); a class that is not
            there (`prompt-label-unknown`) or has no text (`label-without-text`); an empty text (`prompt-empty`); a file that is missing, too large
            or has bad lines (`prompt-file-missing`, `prompt-file-malformed`); a prompt that no encoder can read (`prompt-unreadable`); one of
            two classes (`prompt-ambiguous`).
    """
    names = _label_texts(classes, labels)
    if file is None:
        if not isinstance(templates, Sequence):
            raise ConfigError("template-unknown", f"templates must be a text or a list of texts, got {templates!r}.")
        patterns = [_template(template) for template in ([templates] if isinstance(templates, str) else templates)]
        if not patterns:
            raise ConfigError("template-unknown", f"At least one template is needed; known are {', '.join(TEMPLATES)}.")
        per_class = [patterns] * len(classes)
    else:
        if not isinstance(file, str | Path):
            raise ConfigError("prompt-file-missing", f"The option `file` of the prompts must be a path, got {file!r}.")
        per_class = _read(Path(file), classes)
    _check_styles([pattern for patterns in per_class for pattern in patterns], styles)
    filled = [
        [text for pattern in patterns for text in _fill(pattern, name, styles)]
        for name, patterns in zip(names, per_class, strict=True)
    ]
    prompts = Prompts(tuple(tuple(dict.fromkeys(texts)) for texts in filled))
    for text in prompts.all():
        check_readable(text)
    _refuse_shared(prompts, classes)
    return prompts


def check_readable(text: str) -> None:
    """Refuse a text that cannot be written as UTF-8 or holds control characters.

    Raises:
        ConfigError: code `prompt-unreadable`.
    """
    if _has_strange_signs(text):
        raise ConfigError(
            "prompt-unreadable", f"The prompt {ascii(text[:40])} holds a control character or half a character; take it out."
        )


def _has_strange_signs(text: str) -> bool:
    return any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text)


def _label_texts(classes: Sequence[str], labels: Mapping[str, str] | None) -> list[str]:
    if labels is None:
        texts = {name: name.replace("_", " ") for name in classes}
    elif not isinstance(labels, Mapping):
        raise ConfigError("prompt-label-unknown", f"labels must be a table of class name: text, got {type(labels).__name__}.")
    else:
        labels = {str(name): text for name, text in labels.items()}  # YAML reads the class 0 as a number
        unknown = sorted(set(labels) - set(classes))
        if unknown:
            raise ConfigError(
                "prompt-label-unknown", f"The label texts name {unknown[:_LISTED]}; the classes are {list(classes)}."
            )
        missing = [name for name in classes if name not in labels]
        if missing:
            raise ConfigError("label-without-text", f"The label texts leave out {missing[:_LISTED]}; give every class a text.")
        texts = dict(labels)
    for name in classes:
        if not isinstance(texts[name], str) or not texts[name].strip():
            raise ConfigError("prompt-empty", f"Class {name!r} has an empty text; write one in the table of label texts.")
    return [" ".join(texts[name].split()) for name in classes]


def _template(template: str) -> str:
    pattern = TEMPLATES.get(template, template) if isinstance(template, str) else ""
    if "{label}" not in pattern:
        raise ConfigError(
            "template-unknown", f"A template is one of {', '.join(TEMPLATES)} or a text that holds {{label}}, got {template!r}."
        )
    strange = sorted(set(_PLACEHOLDER.findall(pattern)) - {"{label}", "{style}"})
    if strange:
        raise ConfigError("template-unknown", f"A template may hold {{label}} and {{style}}, got {', '.join(strange)} as well.")
    return pattern


def _check_styles(patterns: Sequence[str], styles: Sequence[str]) -> None:
    if isinstance(styles, str) or not isinstance(styles, Sequence):
        raise ConfigError("prompt-empty", f"styles must be a list of texts, got {styles!r}.")
    if not all(isinstance(style, str) and style.strip() for style in styles):
        raise ConfigError("prompt-empty", "styles must be a list of texts, none of them empty.")
    if any("{style}" in pattern for pattern in patterns) != bool(styles):
        raise ConfigError(
            "template-style",
            "Styles and templates with {style} need each other; give both, as `templates: style` with `styles`, or neither.",
        )


def _fill(pattern: str, label: str, styles: Sequence[str]) -> list[str]:
    """The pattern with the label, once per style if it asks for one. Plain replacement: a brace in a label means nothing."""
    used = styles if "{style}" in pattern else [""]
    parts = [pattern.replace("{style}", " ".join(style.split())) for style in used]
    return [part.replace("{label}", label) for part in parts]


def _read(path: Path, classes: Sequence[str]) -> list[list[str]]:
    """Prompts per class of a jsonl file or a folder."""
    found: dict[str, list[str]] = {name: [] for name in classes}
    if path.is_dir():
        for name in classes:
            if (own := path / f"{name}.txt").is_file():
                found[name] = _checked_lines(_lines(own), own.name)
        unknown = [own.name for own in sorted(path.glob("*.txt")) if own.stem not in found]
        if unknown:
            raise ConfigError(
                "prompt-label-unknown",
                f"{len(unknown)} file(s) of the prompt folder have the name of no class; the classes are {list(classes)}.",
            )
    else:
        for name, prompt in _read_jsonl(path, classes):
            found[name].append(prompt)
    missing = [name for name, texts in found.items() if not texts]
    if missing:
        raise ConfigError(
            "label-without-text", f"The prompts in {path.name} leave out {missing[:_LISTED]}; give every class a prompt."
        )
    return [found[name] for name in classes]


def _lines(path: Path) -> list[tuple[int, str]]:
    """(line number from 1, text) of the lines that are not blank."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
        why = getattr(error, "strerror", None) or "no name of a file"
        raise ConfigError(
            "prompt-file-missing",
            f"The prompt file {path.name!r} cannot be read ({why}); check the option `file` of the prompts.",
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            "prompt-file-malformed", f"{path.name} is larger than {MAX_FILE_BYTES // 2**20} MB; split or shorten it."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError("prompt-file-malformed", f"{path.name}, line {line}: no UTF-8 text; save the file as UTF-8.") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_jsonl(path: Path, classes: Sequence[str]) -> list[tuple[str, str]]:
    rows = [(number, _object(line)) for number, line in _lines(path)]
    bad = [number for number, row in rows if row is None]
    if bad:
        raise ConfigError(
            "prompt-file-malformed",
            f'{path.name}, {_at(bad)}: each line must be an object {{"label": class name, "prompt": text}} and no more.',
        )
    good = [(number, row["label"], row["prompt"]) for number, row in rows if row is not None]
    unknown = [number for number, label, _ in good if label not in classes]
    if unknown:
        raise ConfigError(
            "prompt-label-unknown", f"{path.name}, {_at(unknown)}: the label is no class; the classes are {list(classes)}."
        )
    texts = _checked_lines([(number, prompt) for number, _, prompt in good], path.name)
    return [(label, text) for (_, label, _), text in zip(good, texts, strict=True)]


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line, object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(row, dict) and set(row) == {"label", "prompt"} and all(isinstance(value, str) for value in row.values())
    return row if fits else None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice: one of its values would be lost")
    return found


def _checked_lines(lines: Sequence[tuple[int, str]], name: str) -> list[str]:
    """The prompts of a file with single blanks; refuses empty, overlong and unknown placeholders by their line numbers."""
    texts = [(number, " ".join(text.split())) for number, text in lines]
    if empty := [number for number, text in texts if not text]:
        raise ConfigError("prompt-empty", f"{name}, {_at(empty)}: the prompt is empty; write one or take the line out.")
    if long := [number for number, text in texts if len(text) > MAX_PROMPT]:
        raise ConfigError(
            "prompt-file-malformed", f"{name}, {_at(long)}: the prompt is longer than {MAX_PROMPT} characters; shorten it."
        )
    if broken := [number for number, text in texts if _has_strange_signs(text)]:
        raise ConfigError(
            "prompt-file-malformed",
            f"{name}, {_at(broken)}: the prompt holds a control character or half a character; take it out.",
        )
    if strange := [number for number, text in texts if set(_PLACEHOLDER.findall(text)) - {"{label}", "{style}"}]:
        raise ConfigError(
            "prompt-file-malformed", f"{name}, {_at(strange)}: a prompt may hold {{label}} and {{style}} in braces, nothing else."
        )
    return [text for _, text in texts]


def _at(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_LISTED])) + (f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else "")
    return f"line{'s' if len(numbers) > 1 else ''} {shown}"


def _refuse_shared(prompts: Prompts, classes: Sequence[str]) -> None:
    """An image's label is that of its prompt, so a prompt may not belong to two classes."""
    owner: dict[str, int] = {}
    for label, texts in enumerate(prompts.texts):
        for text in texts:
            if (other := owner.setdefault(_as_read(text), label)) != label:
                raise ConfigError(
                    "prompt-ambiguous",
                    f"Classes {classes[other]!r} and {classes[label]!r} share a prompt, which could not tell them apart; reword it.",
                )


def _as_read(text: str) -> str:
    """What text encoders make of a text before they look its parts up: case, widths and blanks around signs are gone."""
    return " ".join(_PARTS.findall(unicodedata.normalize("NFKC", text).lower()))
