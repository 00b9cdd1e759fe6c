"""One tiny grading for all tests of pages: drawn discs, names with signs that mean something elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medaug import cohort as cohorts
from medaug import storage
from medaug.cohort import Case, Cohort

CLASSES = ("a|b <b>bold</b>", "*star* _line_", "`code` [x](y)")
LEAK = {"n": 9, "balanced_accuracy": 0.9, "chance": 0.33, "memoryless": 0.4, "accuracy": 0.9, "level": "high"}
WARNING = "High: patients probably cross the split."
QUICK = {"num_steps": 3, "evaluate_every": 1, "batch_size": 8}


def drawn_copies(real: Cohort, root: Path) -> Cohort:
    """Every second training image as if it had been generated and gated."""
    groups = sorted(real.groups("training"))
    fit, cases = cohorts.fit_sha256(groups), []
    for case in real.training[::2]:
        storage.write_bytes(root / "images" / f"s{case.id}.png", real.path(case).read_bytes())
        lineage = {"bundle": "drawn", "seed": 0, "reference": case.id, "intended_label": case.label, "fit_on": fit}
        cases.append(Case(f"s{case.id}", f"images/s{case.id}.png", case.label, case.group, case.source, lineage=lineage))
    made = replace(real, training=tuple(cases), validation=(), test=(), fit_on={fit: groups})
    acceptance = [{"name": name, "generated": 9, "accepted": 4, "rate": 0.44, "quota": None, "short": False} for name in CLASSES]
    storage.write_json(root / "gate.json", {"cohort_sha256": real.content_sha256, "acceptance": acceptance})
    return cohorts.write_cohort(made, root)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, make_cohort: Callable[..., Cohort]) -> Path:
    """cohort/, accepted/ and bench/: three arms, two networks, three seeds."""
    from medaug.grading.options import GradingOptions
    from medaug.stages import grade_arms

    root = tmp_path_factory.mktemp("world")
    real = make_cohort(root / "cohort")
    notes = {"leak": LEAK | {"verdict": WARNING, "warning": WARNING}, "groups": {"images_by_origin": {"automatic": 36}}}
    real = cohorts.write_cohort(replace(real, name="<discs> & co", classes=CLASSES, notes=notes), root / "cohort")
    drawn_copies(real, root / "accepted")
    grade_arms(
        root / "cohort", root / "bench", ["none", "oversample", f"drawn={root / 'accepted'}"],
        GradingOptions("simple_cnn,resnet18", 3, "tiny", QUICK), workers=1,
    )  # fmt: skip
    return root


@pytest.fixture
def bench(world: Path, tmp_path: Path) -> Path:
    """A copy of the grading that a test may spoil."""
    shutil.copytree(world / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("cache*"))
    return tmp_path / "bench"


@pytest.fixture(scope="session")
def page(world: Path) -> Path:
    """The page of the grading."""
    from medaug.results.page import write_page

    write_page(world / "bench", world / "page")
    return world / "page"
