"""AMST, asymmetric multi-head self-training (DreamDA): label synthetic images by consensus, train on all of them.

Stage 1 trains auxiliary heads on real images (eq. 7), stage 2 labels the synthetic ones where the heads agree under
drop-out, stage 3 trains the network on real and accepted images (eq. 8) and by consistency on the rest (eq. 9). What
comes out is the plain network: the auxiliary heads are thrown away. Draws are keyed as in `medaug.training.classifier`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from medaug.errors import ConfigError, DataError
from medaug.networks.amst import AuxiliaryHeads, feature_dimension, main_head
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.amst_stages import Joined, MainStep, pretrain, refresh
from medaug.training.classifier import (
    BestKeeper,
    ClassifierRecipe,
    FitResult,
    LabelledImages,
    in_memory,
    seeded,
)
from medaug.training.pseudo_labels import BATCH_SIZE, PseudoLabels, accept, label_report, score_batches
from medaug.training.steps import batch_indices, class_weights
from medaug.training.teacher import Teacher

Key = tuple[Hashable, ...]
Images = Dataset[dict[str, Any]]
INERT = 0.99  # a mean weight above this share of the largest tells no image from another

_log = logging.getLogger(__name__)

__all__ = ["AmstResult", "fit_amst", "make_heads", "stage_steps"]


@dataclass(frozen=True)
class AmstResult:
    """What AMST leaves behind, beside the trained network.

    Attributes:
        fit: best step and history; steps count on from stage 1, whose steps are the first.
        rounds: per round: labelled, unlabelled, mean_lambda and min_lambda of the consistency (None without), and with heads
            or a teacher the entries of `label_report`.
        notes: sentences on what was empty, left out or without effect, each with its code in front.
        labels: of the last round, for the candidates in their order; None without any.
        repeated: unlabelled images left out because their pixels are those of a real or a synthetic one.
        image_passes: images that went forward and backward through the backbone, every view counted.
        forward_passes: images that went forward only: labelled, or judged as the target of the consistency.
    """

    fit: FitResult
    rounds: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    labels: PseudoLabels | None = None
    repeated: int = 0
    image_passes: int = 0
    forward_passes: int = 0

    def report(self) -> dict[str, Any]:
        """Plain values."""
        return {"rounds": self.rounds, "notes": self.notes, "unlabelled_repeated": self.repeated}


def make_heads(
    network: nn.Module, amst: AmstRecipe, num_classes: int, channels: int, image_size: int, key: Key
) -> AuxiliaryHeads:
    """Auxiliary heads for a network, initialised by `key`."""
    with seeded(*key, "heads"):
        return AuxiliaryHeads(feature_dimension(network, channels, image_size), num_classes, amst.heads, amst.dropout)


def stage_steps(recipe: ClassifierRecipe, amst: AmstRecipe, num_real: int) -> tuple[int, int, list[int]]:
    """Optimiser steps of stage 1, of one refresh, and of every round of stage 3; together the recipe's `num_steps`.

    Raises:
        ConfigError: too few steps for that many rounds.
    """
    first = max(1, round(recipe.num_steps * amst.pretraining_share)) if amst.needs_heads else 0
    epoch = -(-num_real // recipe.batch_size) if amst.needs_heads else 0
    main = recipe.num_steps - first - (amst.rounds - 1) * epoch
    if main < amst.rounds:
        raise ConfigError(
            "amst-too-few-steps",
            f"AMST with {amst.rounds} round(s) needs more than {recipe.num_steps} steps: {first} go to the auxiliary heads and "
            f"{epoch} to each further round; raise num_steps or lower pretraining_share.",
        )
    edges = [main * part // amst.rounds for part in range(amst.rounds + 1)]
    return first, epoch, [after - before for before, after in zip(edges, edges[1:], strict=False)]


def fit_amst(
    network: nn.Module,
    real: Images,
    candidates: Images | None,
    validation: Images | None,
    recipe: ClassifierRecipe,
    amst: AmstRecipe | None = None,
    *,
    key: Key,
    names: Sequence[str] | None = None,
    unlabelled: Images | None = None,
    teacher: Teacher | None = None,
    device: str | torch.device = "cpu",
    on_eval: Callable[[Mapping[str, Any]], None] | None = None,
) -> AmstResult:
    """Train `network` in place by AMST and leave the weights with the best validation macro-F1 in it.

    Args:
        network: of `build_network`; make it under ``seeded(*key, "init")`` or start it by `load_backbone`.
        real: labelled real training images, at least one of every class.
        candidates: synthetic images with their seed labels.
        validation: real images; only chooses the step. None keeps the last weights.
        recipe: steps in all, batch size, rates and loss; its `policy` gives way to the views of `amst`.
        amst: None takes the defaults.
        key: decides order, views and drop-out.
        names: one per candidate, the key of its drop-out in stage 2; None numbers them.
        unlabelled: further images for the consistency loss; their labels are ignored. Those with the very pixels of a real
            image or a candidate are left out, so that no image counts twice.
        teacher: needed by labels "teacher".
        device: "cpu", "cuda", "mps".
        on_eval: called with each history entry.

    Raises:
        DataError: a class without a real image.  ConfigError: no teacher, too few steps, a loss that is not finite.
    """
    amst = amst or AmstRecipe()
    known, given = in_memory(real), _in_memory_or_none(candidates)
    rest, repeated = _without_repeats(_in_memory_or_none(unlabelled), known, given)
    job = _Job(network, known, given, rest, recipe, amst, key, device, repeated)
    if amst.labels == "teacher" and teacher is None:
        raise ConfigError("teacher-missing", "Labels from a teacher need a teacher: any classifier, see teacher_from_checkpoint.")
    first, epoch, rounds = stage_steps(recipe, amst, len(job.real))
    keeper = BestKeeper(network, _in_memory_or_none(validation), device, on_eval)
    start = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()} if amst.reinitialise else None
    network.to(device)
    heads = job.heads()
    if amst.needs_heads:
        keeper.losses += pretrain(network, heads, job.real, recipe, amst, first, key=(*key, "stage 1"), device=device)
        job.image_passes += first * job.viewed
    result, done, before = AmstResult(FitResult(0, None)), 0, first
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    for number, steps in enumerate(rounds):
        if number and amst.needs_heads:
            refresh(network, heads, job.real, recipe, amst, epoch, key=(*key, "refresh", number), device=device)
            before += epoch
            job.forward_passes += epoch * job.viewed
        found = job.label(heads, names, teacher, number)
        if number == 0 and start is not None:
            network.load_state_dict(start)
        step = job.main_step(found, optimiser, sum(rounds), steps, number)
        for index in range(done, done + steps):
            keeper.losses.append(step(index))
            total = before + index + 1
            if total % recipe.evaluate_every == 0 or index + 1 == sum(rounds):
                keeper.evaluate(total)
        done += steps
        job.image_passes += step.image_passes
        job.forward_passes += step.forward_passes
        result = AmstResult(result.fit, [*result.rounds, job.report(found, step)], job.notes(found, step), found)
    passes = {"image_passes": job.image_passes, "forward_passes": job.forward_passes}
    return AmstResult(keeper.restore(), result.rounds, result.notes, result.labels, job.repeated, **passes)


def _in_memory_or_none(dataset: Images | None) -> LabelledImages | None:
    return None if dataset is None or len(dataset) == 0 else in_memory(dataset)  # type: ignore[arg-type]


def _without_repeats(unlabelled: LabelledImages | None, *others: LabelledImages | None) -> tuple[LabelledImages | None, int]:
    """The unlabelled images whose pixels are in none of the other sets, and how many are left out."""
    if unlabelled is None:
        return None, 0
    seen = {digest for images in others if images is not None for digest in _pixel_digests(images)}
    kept = [index for index, digest in enumerate(_pixel_digests(unlabelled)) if digest not in seen]
    return (unlabelled.select(kept) if kept else None), len(unlabelled) - len(kept)


def _pixel_digests(images: LabelledImages) -> Iterator[bytes]:
    for start in range(0, len(images), BATCH_SIZE):
        batch, _ = images.batch(range(start, min(start + BATCH_SIZE, len(images))))
        for image in batch:
            yield hashlib.sha256(image.numpy().tobytes()).digest()


@dataclass(eq=False)
class _Job:
    """The images of one AMST training and what follows from labels for them. Numbers: real, candidates, unlabelled."""

    network: nn.Module
    real: LabelledImages
    candidates: LabelledImages | None
    unlabelled: LabelledImages | None
    recipe: ClassifierRecipe
    amst: AmstRecipe
    key: Key
    device: str | torch.device
    repeated: int = 0
    image_passes: int = 0
    forward_passes: int = 0

    def __post_init__(self) -> None:
        self.num_classes = int(main_head(self.network).out_features)  # type: ignore[arg-type]
        self.pool = Joined(self.real, self.candidates, self.unlabelled)
        self.real_labels = self.real.labels()
        self.num_candidates = 0 if self.candidates is None else len(self.candidates)
        self.seeds = np.zeros(0, dtype=np.int64) if self.candidates is None else self.candidates.labels()
        missing = sorted(set(range(self.num_classes)) - set(self.real_labels.tolist()))
        if missing:
            raise DataError(
                "class-empty",
                "AMST learns every class from real images first, and the training split has none of class "
                f"{', '.join(map(str, missing))} (numbered from 0); add some or leave the class out.",
            )

    @property
    def viewed(self) -> int:
        """Images through the backbone in one step of the auxiliary heads: the batch once per view."""
        return self.recipe.batch_size * len(set(self.amst.heads))

    def heads(self) -> AuxiliaryHeads:
        images, _ = self.real.batch([0])
        return make_heads(self.network, self.amst, self.num_classes, images.shape[1], images.shape[-1], self.key)

    def label(
        self, heads: AuxiliaryHeads, names: Sequence[str] | None, teacher: Teacher | None, number: int
    ) -> PseudoLabels | None:
        """Stage 2, images as they are."""
        if self.candidates is None:
            return None
        if self.amst.labels == "seed":
            yes, probs = np.ones(len(self.seeds), dtype=bool), np.eye(self.num_classes)[self.seeds]
            return PseudoLabels(self.seeds, np.zeros(len(self.seeds)), yes, yes, 0.0, probs)
        if self.amst.labels == "teacher" and teacher is not None:
            return self._taught(teacher)
        self.forward_passes += self.num_candidates
        key = (*self.key, "stage 2", number)
        batches = self._batches(list(range(len(self.seeds))) if names is None else list(names))
        scores = score_batches(self.network, heads, batches, key=key, passes=self.amst.passes, measure=self.amst.uncertainty)
        found = accept(scores, self.amst.threshold, self.amst.quantile)
        if self.amst.labels == "soft":
            yes = np.ones(len(scores), dtype=bool)
            found = PseudoLabels(scores.probs.argmax(1), found.uncertainty, found.consensus, yes, found.threshold, scores.probs)
        return found

    def _batches(self, names: Sequence[Hashable]) -> Iterator[tuple[Tensor, Sequence[Hashable]]]:
        assert self.candidates is not None
        for start in range(0, len(names), BATCH_SIZE):
            part = names[start : start + BATCH_SIZE]
            yield self.candidates.batch(range(start, start + len(part)))[0].to(self.device), part

    def _taught(self, teacher: Teacher) -> PseudoLabels:
        parts = [np.asarray(teacher.predict(images).cpu(), dtype=np.float64) for images, _ in self._batches(self.seeds.tolist())]
        probs = np.concatenate(parts)
        if probs.shape != (len(self.seeds), self.num_classes) or not np.isfinite(probs).all():
            raise ConfigError(
                "teacher-classes",
                f"The teacher must give a probability for each of {self.num_classes} classes, got shape {probs.shape}.",
            )
        agreed, sure = np.ones(len(probs), dtype=bool), probs.max(1) >= self.amst.teacher_confidence
        return PseudoLabels(probs.argmax(1), np.zeros(len(probs)), agreed, sure, 0.0, probs)

    def main_step(
        self, found: PseudoLabels | None, optimiser: torch.optim.Optimizer, num_steps: int, round_steps: int, number: int
    ) -> MainStep:
        """Stage 3 with these labels: P_L = real and accepted, P_U = the rest and the unlabelled."""
        num_real, key = len(self.real), (*self.key, "stage 3", number)
        yes = np.zeros(0, dtype=bool) if found is None else found.accepted
        labelled = np.concatenate([np.arange(num_real), num_real + np.flatnonzero(yes)])
        rest = np.concatenate([num_real + np.flatnonzero(~yes), np.arange(num_real + len(yes), len(self.pool))])
        labels = self.real_labels if found is None else np.concatenate([self.real_labels, found.label])
        weights = class_weights(labels[labelled], self.num_classes).to(self.device) if self.recipe.class_balanced else None
        targets = torch.from_numpy(labels)
        if self.amst.labels == "soft" and found is not None:
            known = np.eye(self.num_classes)[self.real_labels]
            targets = torch.from_numpy(np.concatenate([known, found.probs])).float()
        take = batch_indices(len(labelled), self.recipe, key, labelled >= num_real)
        return MainStep(
            self.network, optimiser, self.pool, lambda step: labelled[take(step)], targets, rest,
            self.recipe, self.amst, num_steps, round_steps, key, weights, self.device,
        )  # fmt: skip

    def report(self, found: PseudoLabels | None, step: MainStep) -> dict[str, Any]:
        accepted = 0 if found is None else int(found.accepted.sum())
        sizes = {"real": len(self.real), "labelled": len(self.real) + accepted, "unlabelled": len(step.unlabelled)}
        labels = {} if found is None else label_report(found, self.seeds, self.num_classes)
        weights = {
            "mean_lambda": float(np.mean(step.weights)) if step.weights else None,
            "min_lambda": min(step.smallest) if step.smallest else None,
        }
        return sizes | weights | labels

    def notes(self, found: PseudoLabels | None, step: MainStep) -> list[str]:
        """What was empty, left out or without effect; the training goes on."""
        notes = []
        if self.repeated:
            notes.append(
                f"amst-unlabelled-repeated: {self.repeated} unlabelled image(s) have the pixels of a real or a synthetic training "
                "image and are left out."
            )
        if step.weights and np.mean(step.weights) > INERT * self.amst.lambda_max:
            notes.append(
                f"amst-softmatch-inert: The weights of the unlabelled images are {np.mean(step.weights):.3f} on average (least "
                f"{min(step.smallest):.3f}), so the consistency acted as plain pseudo-labelling; train longer or lower the momentum."
            )
        if found is not None and not found.accepted.any():
            notes.append(
                f"amst-none-accepted: No synthetic image of {len(found.accepted)} got a trusted label; the network is trained on "
                "real labels and by consistency. Train longer, raise the threshold or set a quantile."
            )
        rest = len(self.pool) - len(self.real) - (0 if found is None else int(found.accepted.sum()))
        if rest == 0 and self.amst.consistency:
            notes.append("amst-none-unlabelled: No image is left without a label, so the consistency loss is 0.")
        for note in notes:
            _log.warning("%s", note)
        return notes
