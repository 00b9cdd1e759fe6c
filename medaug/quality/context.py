"""What the gate's checks share: the cohorts, the label source, and rulers and features that are made once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError
from medaug.quality.amst_labels import AmstLabels, train_amst_labels
from medaug.quality.copies import CopyReport
from medaug.quality.copy_ruler import CopyRuler, Ruler, feature_ruler, pixel_ruler, real_cases, weak_batches
from medaug.quality.feature_cache import FeatureCache, NamedExtractor, cached_features
from medaug.quality.fidelity import LogitFeatures, RandomConvFeatures, task_features
from medaug.quality.label_source import LabelSource
from medaug.quality.pseudo_label import LabelFilter, train_filter
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.classifier import ClassifierRecipe

RANDOM_CONV, PIXELS, TASK, LOGITS = "random_conv", "pixels", "task", "logits"

__all__ = ["EXTRACTORS", "LABEL_SOURCES", "LOGITS", "PIXELS", "RANDOM_CONV", "TASK", "GateContext"]


@dataclass(eq=False)
class GateContext:
    """What checks may use; the filter and the ruler are made when a check first asks for them.

    Attributes:
        cohort: the real cohort.  synthetic: the cases under judgement.
        filter_dir: cache of trained filters.
        threshold: confidence threshold of the pseudo-label check.
        recipe, network, seed, calibrate: of the filter.
        copies: filled by the copies check.
        label: the source of labels, a name in `LABEL_SOURCES`.
        amst: settings of the source "amst".
        cache: of features; None computes them anew.
        reports: what checks have to say of the whole set, by name.
        carried: case id -> class that a check has given it in the place of the one it was generated for.
        weights, replace_head, weights_trusted: checkpoint that its backbone starts from, and the user's word for it.
    """

    cohort: Cohort
    synthetic: Cohort
    filter_dir: Path
    threshold: float
    recipe: ClassifierRecipe | None = None
    network: str = "simple_cnn"
    seed: int = 0
    calibrate: bool = False
    copies: CopyReport | None = None
    label: str = "filter"
    amst: AmstRecipe | None = None
    weights: Path | None = None
    replace_head: bool = False
    weights_trusted: bool = False
    cache: FeatureCache | None = None
    reports: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, int] = field(default_factory=dict)

    @cached_property
    def label_filter(self) -> LabelSource:
        """The source of labels, trained or read from its cache."""
        return LABEL_SOURCES[self.label](self)

    @cached_property
    def ruler(self) -> CopyRuler:
        """The copy ruler; test stays untouched: validation gives the threshold, or training across groups if it is small."""
        return feature_ruler(self.cohort, self.extractor(RANDOM_CONV), self.cache)

    @cached_property
    def _rulers(self) -> dict[str, Ruler]:
        return {}

    def ruler_of(self, space: str) -> Ruler:
        """The ruler of a space: "random_conv", "pixels", or another name of `EXTRACTORS`.

        Raises:
            ConfigError: unknown space (code `space-unknown`).
        """
        if space == RANDOM_CONV:
            return self.ruler
        if space not in self._rulers:
            made: Ruler = (
                pixel_ruler(self.cohort) if space == PIXELS else feature_ruler(self.cohort, self.extractor(space), self.cache)
            )
            self._rulers[space] = made
        return self._rulers[space]

    def weak_distance(self, ruler: Ruler) -> float:
        """Median distance of weakly augmented copies of the training images to what they were made from."""
        if ruler.name not in self._weak:
            real = real_cases(self.cohort)
            distances = ruler.apart(weak_batches(self.cohort, real), np.arange(len(real)))
            self._weak[ruler.name] = float(np.median(distances))
        return self._weak[ruler.name]

    @cached_property
    def _weak(self) -> dict[str, float]:
        return {}

    @cached_property
    def _extractors(self) -> dict[str, NamedExtractor]:
        return {}

    def extractor(self, name: str | Mapping[str, Any]) -> NamedExtractor:
        """An extractor of features by its name in `EXTRACTORS`, or by the arguments of `local_features`.

        Raises:
            ConfigError: unknown name (code `space-unknown`); weights that are not those asked for.
        """
        if isinstance(name, Mapping):
            key = storage.sha256_json(dict(name))
            if key not in self._extractors:
                self._extractors[key] = _local(name)
            return self._extractors[key]
        if name not in EXTRACTORS:
            known = ", ".join([PIXELS, *EXTRACTORS])
            raise ConfigError("space-unknown", f"A space must be one of {known}, got {name!r}.")
        if name not in self._extractors:
            self._extractors[name] = EXTRACTORS[name](self)
        return self._extractors[name]

    def features(self, name: str | Mapping[str, Any], cohort: Cohort, cases: Sequence[Case]) -> np.ndarray:
        """Features (N, D) float64 of cases by the extractor of this name."""
        return cached_features(self.cache, self.extractor(name), cohort, cases)

    @cached_property
    def cnn_filter(self) -> LabelFilter:
        """The CNN filter, whatever the source of labels is: its features and its logits serve other checks."""
        found = self.label_filter if self.label == "filter" else _filter(self)
        assert isinstance(found, LabelFilter)
        return found


def _filter(context: GateContext) -> LabelFilter:
    return train_filter(
        context.cohort,
        context.filter_dir,
        recipe=context.recipe,
        network=context.network,
        seed=context.seed,
        calibrate=context.calibrate,
    )


def _amst(context: GateContext) -> AmstLabels:
    return train_amst_labels(
        context.cohort,
        context.filter_dir,
        recipe=context.recipe,
        amst=context.amst,
        network=context.network,
        seed=context.seed,
        weights=context.weights,
        replace_head=context.replace_head,
        weights_trusted=context.weights_trusted,
    )


# filter: a CNN must confirm the intended label. amst: the heads' consensus is the label, whatever was intended.
LABEL_SOURCES: dict[str, Callable[[GateContext], LabelSource]] = {"filter": _filter, "amst": _amst}


def _task(context: GateContext) -> NamedExtractor:
    made = context.cnn_filter
    return task_features(made.network, f"task-{made.facts['network']}-{made.facts['weights_sha256'][:16]}")


def _logits(context: GateContext) -> NamedExtractor:
    made = context.cnn_filter
    return LogitFeatures(made.network, f"logits-{made.facts['network']}-{made.facts['weights_sha256'][:16]}")


def _local(settings: Mapping[str, Any]) -> NamedExtractor:
    from medaug.quality.local_features import local_features

    known = set(inspect.signature(local_features).parameters)
    if not {"path", "sha256", "architecture"} <= set(settings) <= known:
        raise ConfigError(
            "space-unknown",
            f"Local weights are given by path, sha256, architecture and may add {', '.join(sorted(known - {'path', 'sha256', 'architecture'}))}; "
            f"got {', '.join(map(str, settings))}.",
        )
    return local_features(**settings)


# Training images look nearer than new ones to features that were fitted on them: random_conv is the ruler for copies.
EXTRACTORS: dict[str, Callable[[GateContext], NamedExtractor]] = {
    RANDOM_CONV: lambda context: RandomConvFeatures(0, context.cohort.channels),
    TASK: _task,
    LOGITS: _logits,
}
