"""Which changed copies of training images the gate's check for copies catches, and how many new real images it flags.

Thresholds come from training and validation; copies are planted from training images, and the held-out test split of the cohort
says how often an honest image is flagged. The rule is the gate's own, by its own function.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows import command_of, environment, make_parser, record, settings_of
from scipy.stats import binomtest

from medaug.cohort import Case, Cohort, read_cohort
from medaug.draws import numpy_generator
from medaug.io.raster import read_unit_png, write_unit_png
from medaug.quality.context import GateContext
from medaug.quality.copy_check import SPACES, copies
from medaug.quality.finding import ACCEPT

NAME = "planted_copies"
HELD_OUT = "held-out test images"


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved by whole pixels; the border is repeated."""
    around = [(abs(down),) * 2, (abs(right),) * 2, *[(0, 0)] * (image.ndim - 2)]
    padded = np.pad(image, around, mode="edge")
    top, left = abs(down) - down, abs(right) - right
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def cropped(image: np.ndarray, share: float) -> np.ndarray:
    """The middle, `share` of the side, enlarged again (bilinear)."""
    side = image.shape[0]
    off = side * (1 - share) / 2
    planes = image[..., None] if image.ndim == 2 else image
    box = (off, off, side - off, side - off)
    size = (side, side)
    made = [
        np.asarray(Image.fromarray(planes[..., i]).resize(size, Image.Resampling.BILINEAR, box=box))
        for i in range(planes.shape[-1])
    ]
    return made[0] if image.ndim == 2 else np.stack(made, axis=-1)


def noisy(image: np.ndarray, draw: np.random.Generator, sigma: float = 0.02) -> np.ndarray:
    """White noise of `sigma` of the range."""
    return image + sigma * draw.standard_normal(image.shape)


def contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    """Contrast about the middle of the range."""
    return (image - 0.5) * factor + 0.5


Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
# name -> (change, least recall asked for; None for those that are only reported)
CHANGES: dict[str, tuple[Change, float | None]] = {
    "exact": (lambda x, draw: x, 0.99),
    "flipped left-right": (lambda x, draw: x[:, ::-1], 0.99),
    "flipped up-down": (lambda x, draw: x[::-1], 0.99),
    "shifted 2 px": (lambda x, draw: shifted(x, *draw.choice([-2, 2], 2)), 0.95),
    "noise .02": (noisy, 0.95),
    "contrast .9": (lambda x, draw: contrasted(x, 0.9), 0.95),
    "contrast 1.1": (lambda x, draw: contrasted(x, 1.1), 0.95),
    "crop 95 %": (lambda x, draw: cropped(x, 0.95), 0.95),
    "crop 92 %": (lambda x, draw: cropped(x, 0.92), None),
    "flipped, shifted 1 px, contrast .95, noise .01": (
        lambda x, draw: noisy(contrasted(shifted(x[:, ::-1], 1, -1), 0.95), draw, 0.01),
        None,
    ),
}


def plant(cohort: Cohort, cases: list[Case], change: Change, name: str, seed: int, folder: Path) -> tuple[Cohort, list[Case]]:
    """A cohort of changed copies of `cases`, written to `folder`."""
    made = []
    for case in cases:
        image = change(read_unit_png(cohort.path(case)), numpy_generator("planted", seed, name, case.id))
        write_unit_png(folder / f"{case.id}.png", np.ascontiguousarray(image.clip(0, 1), dtype=np.float32))
        made.append(replace(case, image=f"{case.id}.png", lineage={}))
    return replace(cohort, root=folder), made


def flagged(context: GateContext, cohort: Cohort, cases: list[Case], spaces: tuple[str, ...]) -> dict[str, Any]:
    """n, flagged, rate and its 95 % interval; and the rate of each space."""
    context.synthetic = cohort
    findings = copies(context, cases, spaces=spaces)
    count = sum(finding.verdict != ACCEPT for finding in findings)
    interval = binomtest(count, len(cases)).proportion_ci(method="exact")
    by_space = {space: row["rate"] for space, row in context.reports["copy_spaces"].items()}
    rate = {"n": len(cases), "flagged": count, "rate": count / len(cases)}
    return rate | {"low": float(interval.low), "high": float(interval.high), "by_space": by_space}


def main() -> None:
    """Plant, judge, print the table and record the row."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--images", type=int, default=200, help="training images that are planted; 0 takes all")
    options = parser.parse_args()
    cohort = read_cohort(options.cohort, verify=True)
    context = GateContext(cohort, cohort, options.work / "filter", 0.0)
    real = [case for case in cohort.training if not case.is_synthetic]
    chosen = numpy_generator(NAME, options.seed).permutation(len(real))[: options.images or None]
    cases = [real[index] for index in sorted(chosen)]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, (change, least) in CHANGES.items():
            folder = Path(temporary) / str(len(rows))
            found = flagged(context, *plant(cohort, cases, change, name, options.seed, folder), SPACES)
            rows.append({"planted": name, "asked": least, "met": least is None or found["rate"] >= least} | found)
            show(rows[-1])
    found = flagged(context, cohort, list(cohort.test), SPACES)
    rows.append({"planted": HELD_OUT, "asked": 0.05, "met": found["rate"] <= 0.05} | found)
    show(rows[-1])
    thresholds = {space: [context.ruler_of(space).threshold, context.ruler_of(space).basis] for space in SPACES}
    facts = {"command": command_of(parser, options), "settings": settings_of(options), "cohort": cohort.content_sha256}
    row = facts | {"rows": rows, "thresholds": thresholds} | environment()
    if not options.no_record:
        record(row, NAME)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    spaces = ", ".join(f"{space} {rate:.3f}" for space, rate in row["by_space"].items())
    asked = "" if row["asked"] is None else f"asked {row['asked']}, {'met' if row['met'] else 'MISSED'}"
    print(
        f"{row['planted']:<48}{row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}] of {row['n']:<5} {spaces}  {asked}",
        flush=True,
    )


if __name__ == "__main__":
    main()
