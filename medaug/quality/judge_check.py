"""The gate's independent judge: a network that is not the label filter must see the same class.

The filter decides what is accepted, so its own agreement with what it accepted says nothing. The judge has another
architecture and another seed and was trained on the same real training images; what it is worth, real validation images
show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medaug.cohort import Case
from medaug.errors import ConfigError
from medaug.quality.context import GateContext
from medaug.quality.finding import ACCEPT, QUARANTINE, VERDICTS, Finding
from medaug.quality.pseudo_label import LabelFilter, default_recipe, train_filter
from medaug.training.classifier import confusion_counts

DISAGREES = "judge-disagrees"
DEFAULT, OTHER = "resnet18", "simple_cnn"  # the second where the filter is the first
NUM_STEPS = 300  # more than the graders' 200 of a resnet18 at 32 px: no step is chosen by validation here
_FACTS = ("network", "seed", "fit_on", "fit_cases", "best_step", "weights_sha256", "validation")

__all__ = ["DISAGREES", "judge", "train_judge"]


def judge(
    context: GateContext,
    cases: Sequence[Case],
    *,
    network: str | None = None,
    seed: int | None = None,
    num_steps: int = NUM_STEPS,
    verdict: str = QUARANTINE,
) -> list[Finding]:
    """Hold images back that the judge takes for another class than the one they are to carry.

    Images that AMST trusts with no label carry none, so nothing is asked about them.

    Args:
        context, cases: of the gate.
        network, seed, num_steps: of the judge, see `train_judge`.
        verdict: of an image that it disagrees on; "accept" only reports.

    Raises:
        ConfigError: an unknown verdict; a judge that is not independent.
    """
    if verdict not in VERDICTS:
        raise ConfigError("verdict-unknown", f"A verdict must be one of {', '.join(VERDICTS)}, got {verdict!r}.")
    made = train_judge(context, network, seed, num_steps)
    asked = [case for case in cases if context.label != "amst" or case.id in context.carried]
    labels = np.array([context.carried.get(case.id, case.label) for case in asked], dtype=np.int64)
    seen = made.judge(context.synthetic, asked, threshold=0.0)
    counts = confusion_counts(labels, np.array([one.label for one in seen], dtype=np.int64), len(made.classes))
    facts = {key: made.facts[key] for key in _FACTS}
    agreement = float(np.trace(counts) / counts.sum()) if asked else None
    context.reports["judge"] = facts | {"n": len(asked), "agreement": agreement, "confusion": counts.tolist()}
    findings: dict[str, Finding] = {}
    for case, label, one in zip(asked, labels.tolist(), seen, strict=True):
        text = f"Its label is {made.classes[label]}, the judge sees {made.classes[one.label]} ({one.confidence:.2f})."
        reasons = ((DISAGREES, text),) if one.label != label else ()
        lineage = {"judge_label": one.label, "judge_confidence": round(one.confidence, 6)}
        findings[case.id] = Finding(verdict if reasons else ACCEPT, reasons, lineage)
    return [findings.get(case.id, Finding(ACCEPT)) for case in cases]


def train_judge(
    context: GateContext, network: str | None = None, seed: int | None = None, num_steps: int = NUM_STEPS
) -> LabelFilter:
    """The judge of a gate, trained on the real training images or read from the filters' cache.

    Args:
        context: of the gate.
        network: None takes a resnet18, or a simple_cnn where the filter is a resnet18.
        seed: None takes the one after the filter's.
        num_steps: optimiser steps.

    Raises:
        ConfigError: the filter's own architecture or seed (code `judge-not-independent`).
    """
    network = network or (OTHER if context.network == DEFAULT else DEFAULT)
    seed = context.seed + 1 if seed is None else seed
    if network == context.network or seed == context.seed:
        raise ConfigError(
            "judge-not-independent",
            f"The judge needs another network and another seed than the filter's {context.network} and {context.seed}, "
            f"got {network} and {seed}.",
        )
    recipe = replace(default_recipe(), num_steps=num_steps, learning_rate=1e-3)
    return train_filter(context.cohort, context.filter_dir, recipe=recipe, network=network, seed=seed)
