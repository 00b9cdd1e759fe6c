"""What the strict gate does with noise, another modality and wrong labels planted among good images.

The good images are real ones of the cohort's test split: no part of the gate has seen them, and its limits come from validation.
The gate is run as `medaug gate --gate strict` runs it, with its thresholds as they are. Asked of it, before any run: 95 % of each
kind of noise and of the other modality are turned away; of wrong labels the filter rejects what its accuracy on validation promises;
each score for outliers turns away at most 5 % of the good images, beyond what the draw of validation and test images explains.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows import command_of, environment, make_parser, record, settings_of
from scipy.ndimage import gaussian_filter
from scipy.stats import betabinom, binomtest

from medaug.assets import gate_path
from medaug.cohort import Case, Cohort, read_cohort, write_cohort
from medaug.draws import numpy_generator
from medaug.io.raster import read_unit_png, write_unit_png
from medaug.quality.finding import ACCEPT
from medaug.quality.gate import run_gate
from medaug.quality.gate_config import checks_of, take_threshold
from medaug.quality.outliers import PASS_SHARE
from medaug.workflow import read_yaml

NAME = "planted_kinds"
GOOD, OTHER, WRONG = "good", "other modality", "wrong label"
LEAST = 0.95
SMOOTH_SHARE = 1 / 8  # of the side: standard deviation of the low-pass
LABEL_CHECK, SCORES = "pseudo_label", "outlier_scores"

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def matched(made: np.ndarray, image: np.ndarray) -> np.ndarray:
    """`made` with the mean and the spread of `image`, so that neither gives it away."""
    return (made - made.mean()) / made.std() * image.std() + image.mean()


def white(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """White Gaussian noise with the mean and spread of an image."""
    return matched(draw.standard_normal(image.shape), image)


def smooth(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The same noise after a Gaussian low-pass: blobs as large as organs."""
    sigma = (SMOOTH_SHARE * image.shape[0],) * 2 + (0,) * (image.ndim - 2)
    return matched(gaussian_filter(draw.standard_normal(image.shape), sigma, mode="wrap"), image)


def shuffled(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The image's own pixels in another order: its histogram and nothing else of it."""
    return draw.permutation(image.reshape(image.shape[0] * image.shape[1], -1)).reshape(image.shape)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A grey image at another side (bilinear, averaged when made smaller)."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def another_class(case: Case, classes: int, draw: np.random.Generator) -> int:
    """Any class but the case's own, all as likely."""
    return (case.label + int(draw.integers(1, classes))) % classes


NOISE: dict[str, Change] = {"white noise": white, "smooth noise": smooth, "shuffled pixels": shuffled}


def plant(cohort: Cohort, other: Cohort, images: int, good: int, seed: int, folder: Path) -> tuple[Cohort, dict[str, str]]:
    """Write a cohort of `images` of each kind and up to `good` good ones to `folder`; it, and the kind of each case id.

    Wrong labels and good images come from different images of the test split. Groups get new names, as the gate refuses images
    of test patients, but stay groups. Noise is like images of the test split too, of every class.
    """
    if other.channels != cohort.channels or cohort.channels != 1:
        raise SystemExit("Both cohorts must be grey.")
    if len(cohort.test) < 3 * images:
        raise SystemExit(f"{images} images of each kind need {3 * images} test images, the cohort has {len(cohort.test)}.")
    held = [cohort.test[index] for index in numpy_generator(NAME, seed).permutation(len(cohort.test))]
    strange = other.cases()
    chosen = [strange[index] for index in numpy_generator(NAME, seed, OTHER).permutation(len(strange))[:images]]
    made: list[Case] = []
    kinds: dict[str, str] = {}

    def add(kind: str, image: np.ndarray, case: Case, label: int) -> None:
        name = f"planted-{len(made):05d}"
        write_unit_png(folder / f"{name}.png", np.ascontiguousarray(image.clip(0, 1), dtype=np.float32))
        own = replace(case, id=name, name=name, image=f"{name}.png", label=label, patient="", lineage={"untrusted": True})
        made.append(replace(own, group=f"{kind if kind == OTHER else 'held'}-{case.group}"))
        kinds[name] = kind

    for case in held[:images]:
        draw, image = numpy_generator(NAME, seed, case.id), read_unit_png(cohort.path(case))
        add(WRONG, image, case, another_class(case, len(cohort.classes), draw))
        for kind, change in NOISE.items():
            add(kind, change(image, draw), case, case.label)
    for case in held[images : images + good]:
        add(GOOD, read_unit_png(cohort.path(case)), case, case.label)
    for case in chosen:
        label = int(numpy_generator(NAME, seed, OTHER, case.id).integers(len(cohort.classes)))
        add(OTHER, resized(read_unit_png(other.path(case)), cohort.image_size), case, label)
    # In the order of nothing: the gate must not profit from kinds that stand together.
    mixed = [made[index] for index in numpy_generator(NAME, seed, "order").permutation(len(made))]
    planted = replace(cohort, name="planted", training=tuple(mixed), validation=(), test=(), fit_on={}, root=folder)
    return write_cohort(planted, folder), kinds


def promised(n_validation: int, n: int, pass_share: float = PASS_SHARE) -> float:
    """The largest rate among `n` new real images that 97.5 % of draws of them and of `n_validation` others stay within.

    The limit is an order statistic of the validation scores, so the number beyond it is beta-binomial, whatever the scores are.
    """
    rank = int(np.ceil(pass_share * (n_validation - 1))) + 1
    return float(betabinom.ppf(0.975, n, n_validation - rank + 1, rank)) / n


def rate_of(count: int, n: int) -> dict[str, Any]:
    """Count, n, rate and its 95 % interval (Clopper-Pearson)."""
    interval = binomtest(count, n).proportion_ci(method="exact")
    return {"n": n, "caught": count, "rate": count / n, "low": float(interval.low), "high": float(interval.high)}


def row_of(kind: str, verdicts: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """How many of a kind were turned away, by which check, and by which score for outliers."""
    caught = sum(verdict["verdict"] != ACCEPT for verdict in verdicts)
    by_check = Counter(name for verdict in verdicts for name, word in verdict["checks"].items() if word != ACCEPT)
    alone = Counter(
        names[0] for verdict in verdicts if len(names := [k for k, v in verdict["checks"].items() if v != ACCEPT]) == 1
    )
    scores = {name: sum(verdict.get(SCORES, {}).get(name, 0) > limit for verdict in verdicts) for name, limit in limits.items()}
    return (
        {"kind": kind} | rate_of(caught, len(verdicts)) | {"by_check": dict(by_check), "only_by": dict(alone), "by_score": scores}
    )


def judged(row: dict[str, Any], n_validation: int, accuracy: float) -> dict[str, Any]:
    """The row with what was asked of it, and whether it was met."""
    if row["kind"] == GOOD:
        bar = promised(n_validation, row["n"])
        return row | {"asked": bar, "met": max(row["by_score"].values()) <= bar * row["n"]}
    if row["kind"] == WRONG:
        return row | {"asked": accuracy, "met": rate_of(row["by_check"].get(LABEL_CHECK, 0), row["n"])["high"] >= accuracy}
    return row | {"asked": LEAST, "met": row["rate"] >= LEAST}


def main() -> None:
    """Plant, run the gate, print the table and record the row."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--other", type=Path, required=True, help="cohort folder of another modality")
    parser.add_argument("--images", type=int, default=50, help="planted of each kind")
    parser.add_argument("--good", type=int, default=500, help="good images, or as many as the test split has")
    options = parser.parse_args()
    cohort, other = read_cohort(options.cohort, verify=True), read_cohort(options.other, verify=True)
    checks, threshold = take_threshold(checks_of(read_yaml(gate_path("strict"))), None)
    out = options.work / cohort.content_sha256[:16]
    with tempfile.TemporaryDirectory() as temporary:
        planted, kinds = plant(cohort, other, options.images, options.good, options.seed, Path(temporary))
        gate = run_gate(Path(temporary), options.cohort, out, checks=checks, threshold=threshold, allow_short=True)
    limits = {name: report["limit"] for name, report in gate.summary["outliers"].items()}
    validation = gate.summary["filter"]["validation"]
    rows = []
    for kind in [GOOD, *NOISE, OTHER, WRONG]:
        own = [verdict for verdict in gate.verdicts if kinds[verdict["id"]] == kind]
        rows.append(judged(row_of(kind, own, limits), len(cohort.validation), validation["accuracy"]))
        show(rows[-1])
    facts = {"command": command_of(parser, options), "settings": settings_of(options), "cohort": cohort.content_sha256}
    facts |= {"other": other.content_sha256, "modalities": [cohort.modality, other.modality], "checks": checks}
    facts |= {"n_validation": len(cohort.validation), "filter_validation": validation, "planted": planted.content_sha256}
    if not options.no_record:
        record(facts | {"rows": rows, "real_fake": gate.summary["real_fake"], "limits": limits} | environment(), NAME)


def show(row: Mapping[str, Any]) -> None:
    """One line of the table."""
    parts = [f"{name} {count / row['n']:.3f}" for name, count in (*row["by_check"].items(), *row["by_score"].items())]
    print(
        f"{row['kind']:<16}{row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}] of {row['n']:<5}{', '.join(parts)}  "
        f"asked {row['asked']:.3f}, {'met' if row['met'] else 'MISSED'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
