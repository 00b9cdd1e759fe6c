"""AMST as the gate's source of labels: the consensus of auxiliary heads under drop-out, not the seed's word.

The heads and their backbone are trained on the real training split alone (stage 1), the synthetic images are labelled
(stage 2). An accepted image carries the heads' label, which may be another than it was generated for; the others stay
unlabelled and are kept for training by consistency.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medaug import storage
from medaug.cohort import Case, Cohort, fit_sha256
from medaug.errors import ConfigError, DataError
from medaug.networks.amst import AuxiliaryHeads, fit_metadata, load_backbone
from medaug.networks.grading import build_network
from medaug.networks.weights import load_weights, save_weights
from medaug.quality.images import image_batches
from medaug.quality.label_source import SourceVerdict
from medaug.quality.pseudo_label import default_recipe, real_training
from medaug.training.amst import make_heads
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.amst_stages import pretrain
from medaug.training.classifier import ClassifierRecipe, LabelledImages, confusion_counts, seeded
from medaug.training.data import CaseImages
from medaug.training.pseudo_labels import BATCH_SIZE, HeadScores, PseudoLabels, accept, label_report, score_batches
from medaug.training.teacher import check_origin

FORMAT = 1
NO_CONSENSUS, UNCERTAIN = "heads-disagree", "uncertainty-high"

_log = logging.getLogger(__name__)

__all__ = ["NO_CONSENSUS", "UNCERTAIN", "AmstLabels", "train_amst_labels"]


@dataclass(eq=False)
class AmstLabels:
    """Trained heads, a `LabelSource`.

    Attributes:
        network, heads: backbone and auxiliary heads, in evaluation mode.
        classes: names in class order.
        amst: thresholds and passes.
        key: of the drop-out, beside the case's id.
        fit_groups: sorted groups they were fitted on; a checkpoint they started from adds none, unless only the user's word
            speaks for it: then `facts` and every lineage say so (``weights_trusted``).
        facts: what ``amst.json`` says.
        report: of the last `verdicts`: acceptance rate, pseudo-label against seed label, histogram of the uncertainty.
    """

    network: nn.Module
    heads: AuxiliaryHeads
    classes: tuple[str, ...]
    amst: AmstRecipe
    key: str
    fit_groups: tuple[str, ...]
    facts: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)

    def scores(self, cohort: Cohort, cases: Sequence[Case]) -> HeadScores:
        """What the heads say of cases, as they are; each case's drop-out belongs to its id."""
        return score_batches(
            self.network,
            self.heads,
            _named_batches(cohort, cases),
            key=(self.key,),
            passes=self.amst.passes,
            measure=self.amst.uncertainty,
        )

    def verdicts(self, cohort: Cohort, cases: Sequence[Case], threshold: float) -> list[SourceVerdict]:
        """See `LabelSource`; `threshold` is the other sources', AMST has its own (tau or a quantile)."""
        if not cases:
            return []
        found = accept(self.scores(cohort, cases), self.amst.threshold, self.amst.quantile)
        self.report = label_report(found, np.array([case.label for case in cases]), len(self.classes))
        self.facts["report"] = self.report
        return [self._verdict(found, index) for index in range(len(cases))]

    def _verdict(self, found: PseudoLabels, index: int) -> SourceVerdict:
        label, uncertainty = int(found.label[index]), float(found.uncertainty[index])
        reasons = []
        if not found.consensus[index]:
            reasons.append((NO_CONSENSUS, f"The {len(self.heads.views)} heads do not agree on a class."))
        elif not found.accepted[index]:
            text = f"The heads' largest uncertainty is {uncertainty:.4f}, the threshold {found.threshold:.4f}."
            reasons.append((UNCERTAIN, text))
        lineage = {
            "pseudo_label": label,
            "confidence": round(float(found.probs[index, label]), 6),
            "uncertainty": round(uncertainty, 8),
        }
        if self.facts.get("weights_trusted"):
            lineage["weights_trusted"] = True
        return SourceVerdict(label, tuple(reasons), lineage, relabel=True)


def _named_batches(cohort: Cohort, cases: Sequence[Case]) -> Iterator[tuple[Tensor, Sequence[str]]]:
    ids = [case.id for case in cases]
    for number, images in enumerate(image_batches(cohort, cases, BATCH_SIZE)):
        yield images, ids[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]


def train_amst_labels(
    cohort: Cohort,
    folder: Path,
    *,
    recipe: ClassifierRecipe | None = None,
    amst: AmstRecipe | None = None,
    network: str = "simple_cnn",
    seed: int = 0,
    weights: Path | None = None,
    replace_head: bool = False,
    weights_trusted: bool = False,
    device: str | torch.device = "cpu",
) -> AmstLabels:
    """Train the heads on the real training split (stage 1), or read the same ones from `folder`.

    Validation only measures them, test is never seen. The folder is named by the content of the cohort and every
    setting of the training; thresholds and passes need none.

    Args:
        folder: ``<folder>/<key>/amst.safetensors`` and ``amst.json`` are written there.
        recipe: all of its steps go to stage 1; None takes the label filter's.
        amst: None takes the defaults. Only its heads are trained here, so `rounds` must be 1 and `labels` "amst".
        network: of `build_network`.
        weights: safetensors checkpoint that the backbone starts from.
        replace_head: see `load_backbone`.
        weights_trusted: the user vouches for a checkpoint that does not say what it was fitted on, or names other groups than this
            cohort's; see `check_origin`.

    Raises:
        LeakageError: the checkpoint was fitted on a validation or test group, or nothing shows that it was not.
        DataError: a class without a real training image.  ConfigError: a checkpoint that does not fit, wrong settings.
    """
    recipe, amst = recipe or default_recipe(), amst or AmstRecipe()
    if amst.labels != "amst" or amst.rounds != 1:
        raise ConfigError("amst-gate", "The gate labels by AMST's heads in one round; set labels to amst and rounds to 1.")
    trained = {name: amst.content()[name] for name in ("single_head", "dropout", "orthogonality", "views")}
    settings = {"network": network, "recipe": asdict(recipe), "amst": trained, "seed": seed}
    started = None if weights is None else storage.sha256_file(Path(weights))
    key = storage.sha256_json([FORMAT, cohort.content_sha256, list(cohort.classes), settings, started, replace_head])
    with seeded(key, "init"):
        module = build_network(network, len(cohort.classes), cohort.channels, cohort.image_size)
    on_trust = False
    if weights is not None:
        groups = load_backbone(weights, module, replace_head=replace_head)
        on_trust = check_origin(groups, cohort, Path(weights).name, weights_trusted)
    heads = make_heads(module, amst, len(cohort.classes), cohort.channels, cohort.image_size, (key,))
    both = nn.ModuleDict({"network": module, "heads": heads})
    home = Path(folder) / f"amst-{key[:16]}"
    facts = _read(home, key, both)
    if facts is None:
        facts = {"key": key, **settings, **_fit(module, heads, cohort, recipe, amst, key, device)}
        facts["weights_trusted"] = on_trust
        metadata = {"num_classes": str(len(cohort.classes)), "network": network, "key": key}
        metadata |= {} if on_trust else fit_metadata(facts["fit_groups"])  # what began unknown stays so
        facts["weights_sha256"] = save_weights(home / "amst.safetensors", both, metadata)
        storage.write_json(home / "amst.json", facts)
    made = AmstLabels(module.eval(), heads.eval(), cohort.classes, amst, key, tuple(facts["fit_groups"]), facts)
    facts |= {"source": "amst", "temperature": 1.0, "validation": _measure(made, cohort)}
    return made


def _read(home: Path, key: str, both: nn.Module) -> dict[str, Any] | None:
    """Facts of the cached heads, weights loaded; None if there are none or they are damaged (they are then trained again)."""
    if not (home / "amst.json").is_file():
        return None
    try:
        facts: dict[str, Any] = storage.read_json(home / "amst.json")
        if facts["key"] != key or fit_sha256(facts["fit_groups"]) != facts["fit_on"]:
            raise DataError("filter-damaged", "amst.json does not belong to these heads.")
        load_weights(home / "amst.safetensors", both, {"key": key}, sha256=facts["weights_sha256"])
        return facts
    except (ConfigError, DataError, KeyError, TypeError, ValueError) as error:
        code = getattr(error, "code", type(error).__name__)
        _log.warning("The cached AMST heads are damaged (%s); they are trained again.", code)
        return None


def _fit(
    module: nn.Module,
    heads: AuxiliaryHeads,
    cohort: Cohort,
    recipe: ClassifierRecipe,
    amst: AmstRecipe,
    key: str,
    device: str | torch.device,
) -> dict[str, Any]:
    training = real_training(cohort)
    images = LabelledImages(CaseImages(cohort, training))
    losses = pretrain(module, heads, images, recipe, amst, recipe.num_steps, key=(key, "fit"), device=device)
    module.to("cpu")
    heads.to("cpu")
    fitted = sorted({case.group for case in training})
    return {
        "format": FORMAT,
        "classes": list(cohort.classes),
        "cohort_sha256": cohort.content_sha256,
        "fit_groups": fitted,
        "fit_on": fit_sha256(fitted),
        "fit_cases": len(training),
        "best_step": recipe.num_steps,
        "final_loss": float(np.mean(losses[-recipe.evaluate_every :])),
    }


def _measure(made: AmstLabels, cohort: Cohort) -> dict[str, Any] | None:
    """How the heads' labels do on real validation images: all of them, and those they would accept."""
    cases = list(cohort.validation)
    if not cases:
        return None
    found = accept(made.scores(cohort, cases), made.amst.threshold, made.amst.quantile)
    truth, yes = np.array([case.label for case in cases]), found.accepted
    counts = confusion_counts(truth, found.label, len(cohort.classes))
    present = counts.sum(1) > 0
    involved = counts.sum(0) + counts.sum(1)
    f1 = 2 * np.diagonal(counts) / np.maximum(involved, 1)
    return {
        "n": len(cases),
        "accuracy": float((found.label == truth).mean()),
        "balanced_accuracy": float((np.diagonal(counts)[present] / counts.sum(1)[present]).mean()),
        "macro_f1": float(f1[involved > 0].mean()),
        "accepted": int(yes.sum()),
        "accepted_accuracy": float((found.label == truth)[yes].mean()) if yes.any() else None,
        "confusion": counts.tolist(),
    }


def facts_for_report(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What ``gate.json`` repeats of AMST beside the common facts."""
    return {key: facts[key] for key in ("source", "amst", "report", "weights_trusted") if key in facts}
