"""``review.html``: every judged image beside its reference and its nearest training image, for a person to decide.

One file, or parts of at most `PART_IMAGES` images and about `PART_BYTES` of pictures; nothing in it needs a server or a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medaug import __version__, storage
from medaug.cohort import Case, Cohort
from medaug.quality.review import Decision, standing
from medaug.quality.thumbnails import read_image, thumbnail_uri

PART_IMAGES = 2000  # synthetic images on one page
PART_BYTES = 48 << 20  # of embedded pictures on one page, as text
PAGE = "review.html"
_PART = re.compile(r"review(-\d+)?\.html")
_NUMBERS = ("confidence", "nearest_training_distance", "seed_distance")

__all__ = ["PAGE", "PART_BYTES", "PART_IMAGES", "judgement_sha256", "page_environment", "part_name", "write_review"]


def page_environment() -> Environment:
    """Templates of the quality room; every value is escaped and an unknown one is an error."""
    return Environment(loader=PackageLoader("medaug.quality", "."), autoescape=True, undefined=StrictUndefined)


def judgement_sha256(real: Cohort, synthetic: Cohort, rows: Sequence[Mapping[str, Any]]) -> str:
    """What a reader's decisions on a page belong to: these images, judged so; the same with and without a review."""
    judged = [[row["id"], row["verdict"], row["reasons"]] for row in rows]
    return storage.sha256_json([real.content_sha256, synthetic.content_sha256, judged])


def part_name(number: int) -> str:
    """File name of a part, counted from 1."""
    return PAGE if number == 1 else f"review-{number}.html"


def write_review(
    out: Path, real: Cohort, synthetic: Cohort, rows: Sequence[Mapping[str, Any]], decisions: Mapping[str, Decision]
) -> list[Path]:
    """Write ``review.html`` and its further parts, and remove parts of an earlier gate.

    Args:
        out: folder of the gate.  real: the real cohort.  synthetic: the judged one.
        rows: verdicts of the checks as in ``gate.json``, before any review.
        decisions: of a review, to start from.

    Returns:
        The files, in order.
    """
    sha = judgement_sha256(real, synthetic, rows)
    template = page_environment().get_template("review.html.j2")
    paths: list[Path] = []
    total = 0
    for part in _parts(real, synthetic, rows):
        path = out / part_name(len(paths) + 1)
        paths.append(path)
        size = sum(map(len, part["pictures"].values()))
        total += size
        ids = {item["id"] for item in part["items"]}
        facts: dict[str, Any] = {"key": f"medaug-review-{sha}-{len(paths)}", "file": f"review-{sha[:8]}-{len(paths)}.csv"}
        facts |= {"decisions": {key: [word.verdict, word.reader] for key, word in decisions.items() if key in ids}}
        before, after = part_name(len(paths) - 1) if len(paths) > 1 else None, part_name(len(paths) + 1) if part["more"] else None
        storage.write_text(
            path,
            template.render(
                data={"items": part["items"], "pictures": part["pictures"], **facts},
                name=synthetic.name, classes=real.classes, number=len(paths), before=before, after=after, judged=len(rows),
                megabytes=size / 1e6, total=total / 1e6, side=real.image_size, version=__version__,
            ),
        )  # fmt: skip
    with storage.storage_errors(PAGE):
        for path in out.glob("review*.html"):
            if _PART.fullmatch(path.name) and path not in paths:
                path.unlink()
    return paths


def _parts(real: Cohort, synthetic: Cohort, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Items and pictures, part by part: the memory of one part at a time."""
    made, known = {case.id: case for case in synthetic.training}, {case.id: case for case in real.training}
    items: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    size = 0
    for index, row in enumerate(rows):
        case = made[row["id"]]
        item = _item(row, case, real.classes)
        wanted = {f"s:{case.id}": (synthetic, case)}
        for role, name in (("reference", (case.lineage or {}).get("reference")), ("nearest", row.get("nearest_training_case"))):
            if name in known:
                item[role] = {"id": name, "class": real.classes[known[name].label]}
                wanted[f"r:{name}"] = (real, known[name])
        items.append(item)
        for key in set(wanted) - set(pictures):
            image = read_image(*wanted[key])
            pictures[key] = "" if image is None else thumbnail_uri(image)
            size += len(pictures[key])
        last = index == len(rows) - 1
        if last or len(items) == PART_IMAGES or size >= PART_BYTES:
            yield {"items": items, "pictures": dict(sorted(pictures.items())), "more": not last}
            items, pictures, size = [], {}, 0


def _item(row: Mapping[str, Any], case: Case, classes: Sequence[str]) -> dict[str, Any]:
    """What the page says of one image."""
    seen = {"class": row.get("label") or classes[case.label], "verdict": row["verdict"], "reasons": row["reasons"]}
    numbers = {name.replace("_", " "): row[name] for name in _NUMBERS if isinstance(row.get(name), int | float)}
    label = row.get("pseudo_label")
    if isinstance(label, int):
        numbers = {"class by the filter": classes[label], **numbers}
    return {"id": case.id, **seen, "numbers": numbers, "locked": standing(row.get("checks", {}))}
