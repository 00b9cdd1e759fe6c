"""A small study with all its records, numbers chosen by hand; what medaug computes (metrics, verdict) is computed by medaug."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medaug import cohort as cohorts
from medaug import storage
from medaug.cohort import Case, Cohort, fit_sha256
from medaug.draws import numpy_generator
from medaug.grading.metrics import classification_metrics
from medaug.grading.verdict import Predictions, judge
from medaug.io.raster import write_unit_png

WEIGHTS = "0123456789abcdef" * 4
CONFIG = "c" * 64
SPLIT_OF_PATIENT = ["training"] * 6 + ["validation"] * 2 + ["test"] * 2
ARMS = {"none": [0, 0, 1, 0], "guided": [0, 0, 1, 1]}  # predictions on the four test images, whose truth is 0, 0, 1, 1
RECIPE = {"num_steps": 30, "batch_size": 16, "learning_rate": 0.003, "policy": "none", "class_balanced": False}
LEAK = {
    "level": "low", "n": 4, "balanced_accuracy": 0.75, "chance": 0.5, "memoryless": 0.625, "warning": None,
    "accuracy": 0.75, "verdict": "Low: nothing.",
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Folders of the records."""

    cohort: Path
    accepted: Path
    run: Path
    benchmark: Path

    @property
    def options(self) -> dict[str, Path]:
        """Everything but the described folder."""
        return {"cohort": self.cohort, "run": self.run, "benchmark": self.benchmark}


def make_study(root: Path) -> Study:
    """20 real images of 10 patients, 6 accepted of 10 generated ones, one run, two arms of three seeds."""
    study = Study(root / "cohort", root / "accepted", root / "run", root / "benchmark")
    real = _real(study.cohort)
    accepted = _accepted(real, study.accepted)
    _run(real, study.run)
    _benchmark(real, accepted, study.benchmark)
    return study


def _draw(path: Path, *key: object) -> None:
    write_unit_png(path, numpy_generator("evidence", *key).random((8, 8)).astype(np.float32))


def _real(root: Path) -> Cohort:
    cases: dict[str, list[Case]] = {split: [] for split in cohorts.SPLITS}
    for patient, split in enumerate(SPLIT_OF_PATIENT):
        for index in range(2):
            name = f"r{patient}{index}"
            _draw(root / "images" / f"{name}.png", name)
            spacing = [0.5 + patient / 10, 0.7]
            facts = {"spacing_mm": spacing, "slice_thickness_mm": 2.5, "format": "DICOM", "photometric": "MONOCHROME2"}
            pseudonym = f"pseudonym{patient}"
            source = storage.sha256_bytes(name.encode())
            case = Case(name, f"images/{name}.png", patient % 2, pseudonym, source, patient=pseudonym, acquisition=facts)
            cases[split].append(case)
    notes = {
        "leak": LEAK,
        "groups": {"number": 10, "images_by_origin": {"patient": 20}},
        "drawn_splits": ["training", "validation", "test"],
        "pseudonym_key": "f00dfeedbeefcafe",
        "burned_in": {"checked": True, "policy": "keep", "suspects": 1},
    }
    window = {"kind": "window_hu", "0": -1350.0, "1": 150.0}
    made = Cohort("drawn chest", "CT", ("low", "high"), True, 8, 1, window, cohorts.created_by("intake", {}, 3), notes=notes)
    real = cohorts.write_cohort(made.with_cases(**cases), root)
    report = {
        "counts": {"files": 23, "used": 20, "quarantined": 3, "quarantine": {"image-unreadable": 2, "conflicting-label": 1}},
        "join": {"key": "sop", "rows": 22, "rows_without_image": 1, "images_without_row": 0},
        "agreement": {"read_twice": 5, "disagreed": 2, "percent_agreement": 0.6, "kappa": 0.25, "weights": "quadratic", "pairs": []},
        "content_sha256": real.content_sha256,
    }  # fmt: skip
    storage.write_json(root / "report.json", report)
    return real


def _accepted(real: Cohort, root: Path) -> Cohort:
    fit = sorted(real.groups("training"))
    cases = []
    for number, label in enumerate([0, 0, 0, 0, 1, 1]):
        reference = [case for case in real.training if case.label == label][number % 4]
        lineage = {
            "bundle": "guided_ddpm", "weights_sha256": WEIGHTS, "config_sha256": CONFIG, "seed": 7, "reference": reference.id,
            "intended_label": label, "fit_on": fit_sha256(fit), "verdict": "accept", "reasons": [],
            "sampler": {"step": "ddim", "num_inference_steps": 8},
        }  # fmt: skip
        _draw(root / "images" / f"s{number}.png", "synthetic", number)
        case = Case(f"s{number}", f"images/s{number}.png", label, reference.group, WEIGHTS, lineage=lineage)
        cases.append(case)
    made = replace(real, name="accepted", validation=(), test=(), fit_on={fit_sha256(fit): fit})
    made = replace(made, training=tuple(cases), created_by=cohorts.created_by("medaug gate", {}, 0))
    accepted = cohorts.write_cohort(made, root)
    verdicts = [{"id": f"s{number}", "verdict": "accept" if number < 6 else "reject", "reasons": []} for number in range(10)]
    rate = {"n": 10, "copies": 1, "rate": 0.1, "low": 0.0025, "high": 0.445}
    acceptance = [
        {"name": "low", "generated": 5, "accepted": 4, "rate": 0.8, "quota": 4, "short": False},
        {"name": "high", "generated": 5, "accepted": 2, "rate": 0.4, "quota": 4, "short": True},
    ]
    gate = {
        "format": 1,
        "cohort_sha256": real.content_sha256,
        "synthetic_sha256": "d" * 64,
        "config": {"checks": ["usable", "pseudo_label", "copies"], "threshold": 0.8, "quotas": [4, 4], "network": "simple_cnn"},
        "acceptance": acceptance,
        "reasons": {"confidence-low": 3, "near-copy": 1},
        "filter": {"network": "simple_cnn", "weights_sha256": "e" * 64, "validation": {"n": 4, "balanced_accuracy": 0.75}},
        "copies": rate,
        "near_copies": rate,
        "copy_spaces": {"pixels": rate | {"space": "pixels", "threshold": 0.021}},
        "verdicts": verdicts,
    }
    storage.write_json(root / "gate.json", gate)
    return accepted


def _run(real: Cohort, root: Path) -> None:
    groups = sorted(real.groups("training"))
    record = {
        "bundle": "guided_ddpm",
        "classes": list(real.classes),
        "ordinal": True,
        "image_size": 8,
        "channels": 1,
        "fit_groups": groups,
        "fit_on": fit_sha256(groups),
        "cohort_sha256": real.content_sha256,
        "settings": {
            "network": {"backbone": "lean", "reference": {"pretrained_path": None}},
            "diffusion": {"parameterisation": "edm"},
            "sampler": {"step": "ddim"},
            "training": {"batch_size": 32, "learning_rate": 0.001},
        },
        "seed": 0,
        "config_sha256": "b" * 64,
        "weights_sha256": WEIGHTS,
        "iterations": 640,
        "version": "0.1.0",
    }
    storage.write_json(root / "run.json", record)
    metrics = {"kid": None, "kid_note": "insufficient", "kid_floor": 0.0125, "label_agreement": 0.875, "samples": 16}
    storage.write_json(root / "evaluation" / "metrics.json", metrics | {"test_images": 4, "weights_sha256": WEIGHTS})


def _benchmark(real: Cohort, accepted: Cohort, root: Path) -> None:
    target = np.array([case.label for case in real.test])
    probs = {arm: np.eye(2)[predicted] * 0.8 + 0.1 for arm, predicted in ARMS.items()}
    rows = [_row(real, accepted, arm, seed, target, probs[arm]) for arm in ARMS for seed in range(3)]
    for row in rows:
        storage.write_json(root / "rows" / f"{row['sha256']}.json", row)
    with open(root / "rows.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["sha256", "arm"], *([row["sha256"], row["arm"]] for row in rows)])
    groups = [case.group for case in real.test]
    stacked = {(arm, "simple_cnn"): np.stack([values] * 3) for arm, values in probs.items()}
    predictions = Predictions(target, groups, stacked, dict.fromkeys(stacked, 0.5))
    storage.write_json(root / "verdict.json", judge(predictions, ordinal=True, num_resamples=200))


def _row(real: Cohort, accepted: Cohort, arm: str, seed: int, target: np.ndarray, probs: np.ndarray) -> dict[str, Any]:
    used = accepted.content_sha256 if arm == "guided" else None
    key = {"version": "0.1.0", "cohort": real.content_sha256, "classes": list(real.classes), "ordinal": True}
    key |= {"arm": {"name": arm, "synthetic": used}, "recipe": dict(RECIPE)}
    metrics = classification_metrics(target, probs, ordinal=True)
    return {
        "sha256": storage.sha256_json([arm, seed]),
        "arm": arm,
        "network": "simple_cnn",
        "seed": seed,
        "num_training": 18 if used else 12,
        "num_synthetic": 6 if used else 0,
        "added_per_class": [4, 2] if used else [0, 0],
        "best_step": 10 * (seed + 1),
        "key": key,
        "test": {"metrics": metrics, "ids": [case.id for case in real.test], "probs": probs.tolist()},
        "validation": {"metrics": metrics, "ids": [], "probs": []},
    }
