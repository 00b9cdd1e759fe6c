"""The records as the stages write them today: gate, grading and a run's record give the figures of the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from medaug import cohort as cohorts
from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.evidence.evidence import write_evidence


def synthetic_copy(real: Cohort, root: Path) -> Cohort:
    """Half of the training images as if they had been generated."""
    groups = sorted(real.groups("training"))
    fit, cases = cohorts.fit_sha256(groups), []
    for case in real.training[::2]:
        storage.write_bytes(root / "images" / f"s{case.id}.png", real.path(case).read_bytes())
        lineage = {"bundle": "drawn", "seed": 0, "reference": case.id, "intended_label": case.label, "fit_on": fit}
        cases.append(Case(f"s{case.id}", f"images/s{case.id}.png", case.label, case.group, case.source, lineage=lineage))
    made = replace(real, training=tuple(cases), validation=(), test=(), fit_on={fit: groups})
    return cohorts.write_cohort(made, root)


@pytest.mark.slow
@pytest.mark.integration
def test_records_of_the_stages_are_read(make_cohort: Callable[..., Cohort], tmp_path: Path) -> None:
    from medaug.grading.grade import grade
    from medaug.grading.options import GradingOptions
    from medaug.quality.gate import run_gate
    from medaug.training.run_folder import new_record

    real = make_cohort(tmp_path / "cohort")
    made = synthetic_copy(real, tmp_path / "synthetic")
    run_gate(tmp_path / "synthetic", tmp_path / "cohort", tmp_path / "accepted", checks=["usable"])
    arms = ["none", f"drawn={tmp_path / 'accepted'}"]
    result = grade(
        tmp_path / "cohort", tmp_path / "bench", arms, GradingOptions("simple_cnn", 2, "tiny"), num_resamples=100, workers=1
    )
    record = replace(new_record("drawn", real, {"training": {"batch_size": 4}}, seed=0), weights_sha256="a" * 64, iterations=5)
    storage.write_json(tmp_path / "run" / "run.json", asdict(record))
    write_evidence(
        tmp_path / "accepted",
        tmp_path / "out",
        cohort=tmp_path / "cohort",
        run=tmp_path / "run",
        benchmark=tmp_path / "bench",
    )
    card = (tmp_path / "out" / "DATASET_CARD.md").read_text()
    assert f"{len(made.training)} of {len(made.training)} images accepted (100.0%)" in card
    assert "were graded as: drawn" in card
    page = (tmp_path / "out" / "checklists.md").read_text()
    scores = [row["balanced_accuracy"] for row in result["rows"] if row["arm"] == "drawn"]
    assert f"drawn: test {sum(scores) / 2:.3f}" in page
    difference = result["verdict"]["drawn"]["against_none"]["difference"]
    assert f"drawn: {result['verdict']['drawn']['verdict']}, {difference:+.3f} (95 %" in page
    area = result["verdict"]["drawn"]["ranking"]["against_none"]["difference"]
    assert f", in the area under the ROC curve {area:+.3f} (95 %" in page
    assert f"drawn ({len(real.training) + len(made.training)} training images, {len(made.training)} of them synthetic" in page
    assert "batch_size=4" in (tmp_path / "out" / "MODEL_CARD.md").read_text()
