"""One arm of a comparison: what it trains on and how, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from medaug.cohort import Cohort
from medaug.errors import ConfigError
from medaug.grading.arm_checks import check_mix
from medaug.grading.mixing import Source
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.teacher import Teacher
from medaug.transforms.views import Views

__all__ = ["Arm", "Variant", "weak_view"]


@dataclass(frozen=True)
class Variant:
    """Which of several variants of one arm this is; all empty for an arm that stands alone.

    Attributes:
        base: name of the arm.
        per_real: the ratio that tells it from the others; None if they do not differ in it.
        real_fraction: the fraction of the real images that does; None likewise.
    """

    base: str = ""
    per_real: float | None = None
    real_fraction: float | None = None


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as the report prints it.
        policy: classic augmentation of every training image, a name in `POLICIES`.
        oversample: repeat real images instead of adding new ones; the control for "more images per step".
        synthetic: the cohort whose training cases are added.
        synthetic_per_real: how many per real image; None takes all.
        allocation: classes of those: "as_generated" (the synthetic cohort's own mix), "proportional" (the real mix) or
            "balance" (level the classes).
        extra: images added per class; filled in by `prepare_arms`, which leaves the repeats of a control alone if they are given.
        matches: with `oversample`, the arm whose added images the repeats match in number, class by class and seed by seed; filled in
            by `prepare_arms` with the largest synthetic arm where it is left out.
        serves: with `matches`, names of the arms that are compared with this control and not with the common one.
        allow_untrusted: accept synthetic images whose origin is unknown (made elsewhere).
        amst: each network is trained by AMST, which labels the synthetic images itself, in as many optimiser steps as the
            other arms have; None trains by the labels the images carry.
        unlabelled: with `amst`, further images to train on by consistency: the training cases of this cohort, real or
            synthetic, whose labels are ignored.
        teacher: with `amst` and its labels "teacher".
        views: every training image is seen through the weak view of these, in the place of a policy: the control of an arm
            that trains by AMST, whose images are seen that way too.
        real_fraction: of the real training images, see `mixing.keep_fraction`; None for an arm without real images.
        sources: several synthetic sources, or one with a batch share or loss weight, in the place of `synthetic`.
        real_share: of every batch that is real, with `sources`.
        variant: of an arm that is graded at several ratios or fractions, see `medaug.grading.variants`; no part of its content.
        by_seed: the arm with the images of each seed of the graders, where every seed has images of its own; see `at`. What the arm
            itself holds are those of the first.

    Raises:
        ConfigError: `arm-views`: AMST brings its own views, so it takes neither a policy nor others, and an arm has one of both.
            `fraction-invalid`, `arm-mix`, `source-twice`, `share-invalid`, `share-without-source`: see `check_mix`.
    """

    name: str
    policy: str = "none"
    oversample: bool = False
    synthetic: Cohort | None = None
    synthetic_per_real: float | None = None
    allocation: str = "as_generated"
    extra: tuple[int, ...] | None = None
    matches: Arm | None = None
    serves: tuple[str, ...] = ()
    allow_untrusted: bool = False
    amst: AmstRecipe | None = None
    unlabelled: Cohort | None = None
    teacher: Teacher | None = None
    views: Views | None = None
    real_fraction: float | None = 1.0
    sources: tuple[Source, ...] = ()
    real_share: float | None = None
    variant: Variant = Variant()
    by_seed: Mapping[int, Arm] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The name without the ratio and fraction that tell variants apart."""
        return self.variant.base or self.name

    def __post_init__(self) -> None:
        check_mix(self)
        given = [self.policy != "none", self.amst is not None, self.views is not None]
        if sum(given) > 1:
            raise ConfigError(
                "arm-views",
                f"Arm {self.name} sees its images through the views of AMST, through a policy ({self.policy}) or through views of its "
                "own; give it one of them.",
            )

    def content(self) -> dict[str, object]:
        """What decides this arm's training set, for content addressing."""
        trained: dict[str, object] = {} if self.amst is None else {"amst": self.amst.content()}
        if self.unlabelled is not None:
            trained["unlabelled"] = self.unlabelled.content_sha256
        if self.teacher is not None:
            trained["teacher"] = self.teacher.content()
        if self.views is not None:
            trained["weak_view"] = weak_view(self.views)
        if self.real_fraction != 1:
            trained["real_fraction"] = self.real_fraction
        if self.sources:
            trained["sources"] = [
                [source.name, source.cohort.content_sha256, source.weight, source.share] for source in self.sources
            ]
            trained["real_share"] = self.real_share
        return trained | {
            "name": self.base,  # so that a variant finds the rows of the same arm graded alone, and the other way round
            "policy": self.policy,
            "oversample": self.oversample,
            "extra": list(self.extra or ()),
            "synthetic": None if self.synthetic is None else self.synthetic.content_sha256,
        }

    def at(self, seed: int) -> Arm:
        """The arm as it trains at one seed of the graders; itself if all seeds share their images."""
        own = self.by_seed.get(seed)
        if own is None:
            return self
        return replace(self, synthetic=own.synthetic, sources=own.sources, unlabelled=own.unlabelled, extra=None, by_seed={})

    def sets(self) -> tuple[Arm, ...]:
        """The arm once for every set of images it trains on."""
        return tuple(self.by_seed.values()) or (self,)

    def images(self) -> tuple[str, ...]:
        """The content sha256 of every cohort beside the real images; copies of these are not among them."""
        given = [source.cohort for source in self.added() if not source.of_kept]
        return tuple(cohort.content_sha256 for cohort in (*given, self.unlabelled) if cohort is not None)

    def all_added(self) -> list[Source]:
        """The synthetic sources of all sets, each once."""
        found = [source for one in self.sets() for source in one.added()]
        return list({source.cohort.content_sha256: source for source in found}.values())

    def added(self) -> tuple[Source, ...]:
        """The synthetic sources, be it one or several; of an arm with images for every seed those of the first."""
        if self.synthetic is None:
            return self.sources
        return (Source("synthetic", self.synthetic, self.synthetic_per_real, self.allocation),)


def weak_view(views: Views) -> dict[str, object]:
    """What decides the weak view."""
    return {"pad": views.pad, "flip": views.flip}
