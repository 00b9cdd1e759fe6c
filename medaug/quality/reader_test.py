"""A blinded reader test: real and synthetic images in one shuffled page, and a key that stays with whoever runs it.

Real images come from the training and the validation split, never from the test split. Both kinds pass through one thumbnail
function and get tokens in the place of ids, and every class has as many real as synthetic images, so neither size, encoding, name
nor class tells which is which. Patients come up as seldom as the numbers allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medaug import __version__, storage
from medaug.cohort import Case, Cohort, check_against, read_cohort
from medaug.draws import key_seed, numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.quality.review_page import page_environment
from medaug.quality.thumbnails import read_image, thumbnail_uri

REAL, SYNTHETIC = "real", "synthetic"
CONFIDENCES = ("1", "2", "3", "4", "5")
FORMAT = 1
PAGE, KEY = "blinded.html", "key.json"
MAX_IMAGES = 500  # of either kind: nobody reads more

__all__ = ["CONFIDENCES", "FORMAT", "KEY", "PAGE", "REAL", "SYNTHETIC", "make_reader_test", "pick", "share_out"]


def share_out(available: Sequence[int], n: int) -> list[int]:
    """`n` places over classes in proportion to what is there, by largest remainders, the first class first in a tie.

    Raises:
        DataError: less is there (code `reader-test-too-few`).
    """
    total = sum(available)
    if total < n:
        raise DataError(
            "reader-test-too-few",
            f"A reader test of {n} real and {n} synthetic images of the same classes was asked for; there are {total}. Lower --n or "
            "generate more.",
        )
    exact = [n * count / total for count in available] if total else [0.0] * len(available)
    counts = [int(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])[: n - sum(counts)]:
        counts[index] += 1
    return counts


def pick(cases: Sequence[Case], count: int, *key: object) -> list[Case]:
    """`count` cases in an order that the key decides; a group comes up again only when every group has come up."""
    ordered = sorted(cases, key=lambda case: case.id)
    shuffled = [ordered[index] for index in numpy_generator("reader pick", *key).permutation(len(ordered))]
    seen: Counter[str] = Counter()
    turns = []
    for case in shuffled:
        turns.append(seen[case.group])
        seen[case.group] += 1
    return [shuffled[index] for index in np.argsort(turns, kind="stable")[:count]]


def make_reader_test(cohort_dir: Path, synthetic_dir: Path, out: Path, *, n: int = 50, seed: int = 0) -> dict[str, Any]:
    """Write ``blinded.html`` for the readers and ``key.json`` (mode 0600) for whoever runs the test.

    Args:
        cohort_dir: the real cohort.  synthetic_dir: an accepted cohort that belongs to it.
        out: folder of the test.
        n: images of either kind.
        seed: decides which images, their tokens and their order.

    Returns:
        ``{"images", "per_class", "test_sha256"}``.

    Raises:
        ConfigError: `n` outside 1 to 500 (code `reader-test-size`).
        DataError: too few images, or one that cannot be read (code `image-unreadable`).
    """
    if not 1 <= n <= MAX_IMAGES:
        raise ConfigError("reader-test-size", f"A reader test takes 1 to {MAX_IMAGES} images of either kind, got {n}.")
    real, synthetic = read_cohort(cohort_dir, verify=True), read_cohort(synthetic_dir)
    untrusted = bool(synthetic.training) and all((case.lineage or {}).get("untrusted") for case in synthetic.training)
    check_against(synthetic, real, allow_untrusted=untrusted)
    kinds = {REAL: [case for case in real.training + real.validation if not case.is_synthetic]}
    kinds[SYNTHETIC] = [case for case in synthetic.training if case.is_synthetic]
    counts = [
        {kind: sum(case.label == label for case in cases) for kind, cases in kinds.items()} for label in range(len(real.classes))
    ]
    shares = share_out([min(row.values()) for row in counts], n)
    chosen = []
    for label, share in enumerate(shares):
        for kind, cases in kinds.items():
            of_class = [case for case in cases if case.label == label]
            chosen += [(kind, case) for case in pick(of_class, share, seed, kind, label)]
    test = storage.sha256_json([real.content_sha256, synthetic.content_sha256, n, seed])
    tokens = {(kind, case.id): f"{key_seed('reader token', test, kind, case.id):016x}" for kind, case in chosen}
    chosen.sort(key=lambda pair: tokens[pair[0], pair[1].id])  # the tokens' order is the shuffle
    items = [
        {"id": tokens[kind, case.id], "picture": _picture({REAL: real, SYNTHETIC: synthetic}[kind], case)}
        for kind, case in chosen
    ]
    per_class = dict(zip(real.classes, shares, strict=True))
    with storage.locked(out):
        shown = storage.sha256_json([item["id"] for item in items])  # tells nothing of how the tokens were made
        data = {"items": items, "key": f"medaug-readers-{shown}", "file": f"answers-{shown[:8]}.csv"}
        page = (
            page_environment()
            .get_template("blinded.html.j2")
            .render(data=data, classes=[name for name, share in per_class.items() if share], version=__version__)
        )
        rows = [
            {"id": tokens[kind, case.id], "source": kind, "case": case.id, "class": real.classes[case.label]}
            for kind, case in chosen
        ]
        key = {"format": FORMAT, "version": __version__, "test_sha256": test, "seed": seed, "n": n, "per_class": per_class}
        key |= {"cohort_sha256": real.content_sha256, "synthetic_sha256": synthetic.content_sha256, "cases": rows}
        storage.write_json(out / KEY, key, private=True)
        storage.write_text(out / PAGE, page)
    return {"images": 2 * n, "per_class": per_class, "test_sha256": test}


def _picture(cohort: Cohort, case: Case) -> str:
    image = read_image(cohort, case)
    if image is None:
        raise DataError("image-unreadable", f"The image of case {case.id} cannot be read; run the gate again.")
    return thumbnail_uri(image)
