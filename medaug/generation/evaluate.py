"""How good the samples of a run are: distances to real images beside the same distance between real sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from torch import Tensor

from medaug import storage
from medaug.cohort import Cohort
from medaug.generation.generate import check_run
from medaug.progress import progress
from medaug.quality.fidelity import Estimate, features_of, kid, neighbourhood_metrics, task_features
from medaug.quality.images import image_batches
from medaug.quality.pseudo_label import LabelFilter, train_filter
from medaug.tracking import track
from medaug.training.run_folder import RunRecord

METRICS_FILE = "metrics.json"


@dataclass
class EvaluationSession:
    """Samples a plan and writes ``metrics.json``.

    Attributes:
        cohort: the cohort the run was trained on; its test split is the yardstick.
        record: the run's record.
        evaluator: MONAI evaluator over `PlanBatches`, as for generation.
        output_dir: where the metrics go.
        seed: of the judge, a classifier of the real training split whose features and labels measure the samples.
        tracking: keyword arguments of `medaug.tracking.track`.
    """

    cohort: Cohort
    record: RunRecord
    evaluator: Any
    output_dir: Path
    seed: int = 0
    tracking: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Sample, measure, write. Returns the metrics.

        Raises:
            LeakageError: the run was trained on a group that this cohort holds out.
        """
        check_run(self.record, self.cohort)
        folder = Path(self.output_dir)
        with (
            storage.locked(folder),
            track("evaluation", name=f"evaluation {self.record.weights_sha256[:8]}", **self.tracking) as run,
        ):
            judge = train_filter(self.cohort, folder / "judge", seed=self.seed + 1, report_test=True)
            samples, labels = self._sample()
            metrics = measure(samples, labels, self.cohort, judge)
            metrics["weights_sha256"] = self.record.weights_sha256
            settings = self.evaluator.inferer.settings()
            metrics |= {"scale": settings["scale"]} if "scale" in settings else {}  # of a perturbation
            storage.write_json(folder / METRICS_FILE, metrics)
            run.log_params({"weights_sha256": self.record.weights_sha256, "seed": self.seed})
            run.log_metrics({name: value for name, value in metrics.items() if isinstance(value, int | float)}, step=0)
        return metrics

    def _sample(self) -> tuple[Tensor, list[int]]:
        kept: list[Tensor] = []
        labels: list[int] = []

        def keep(engine: Any) -> None:
            kept.append(engine.state.output["samples"].cpu().clamp(-1, 1))
            labels.extend(case.label for case in engine.state.output["cases"])
            advance(len(kept[-1]))

        total = sum(len(batch) for batch in self.evaluator.data_loader.batches)
        with progress("sampling", total) as advance:
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
            self.evaluator.run()
        return torch.cat(kept), labels


def measure(samples: Tensor, labels: Sequence[int], cohort: Cohort, judge: LabelFilter) -> dict[str, Any]:
    """KID, precision, recall, density, coverage and label agreement of samples.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        labels: intended class of each.
        cohort: real images; the test split is compared with, and the training split gives the floor.
        judge: its penultimate layer is the feature space, its labels the agreement.

    Returns:
        Flat figures; None with a ``..._note`` where a figure is undefined. ``kid_floor`` is real training against real test.
    """
    extractor = task_features(judge.network, "simple_cnn on the training split")
    synthetic = features_of(extractor, samples.split(128))
    test = features_of(extractor, image_batches(cohort, cohort.test))
    training = features_of(extractor, image_batches(cohort, cohort.training))
    estimates: dict[str, Estimate] = {"kid": kid(test, synthetic), "kid_floor": kid(test, training)} | neighbourhood_metrics(
        test, synthetic
    )
    metrics: dict[str, Any] = {}
    for name, estimate in estimates.items():
        metrics |= {name: estimate.value, f"{name}_std": estimate.std} | (
            {f"{name}_note": estimate.note} if estimate.note else {}
        )
    agree = judge_agreement(judge, samples.split(128), labels)
    return metrics | {
        "label_agreement": agree,
        "judge_test_balanced_accuracy": (judge.facts.get("test") or {}).get("balanced_accuracy"),
        "samples": len(samples),
        "test_images": len(cohort.test),
        "features": extractor.name,
    }


def judge_agreement(judge: LabelFilter, batches: Iterable[Tensor], labels: Sequence[int]) -> float:
    """Share of samples whose most probable class is the intended one."""
    predicted: Iterator[np.ndarray] = (judge.probabilities(batch).argmax(1) for batch in batches)
    return float((np.concatenate(list(predicted)) == np.asarray(labels)).mean())
