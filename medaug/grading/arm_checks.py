"""What no arm may be: a mixture that contradicts itself, or images that held-out patients leaked into."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from medaug.cohort import Cohort, check_against
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.grading.mixing import check_fraction
from medaug.io.pixels import held_out_pixels, shared_pixels
from medaug.training.teacher import check_origin

if TYPE_CHECKING:
    from medaug.grading.arm import Arm

__all__ = ["check_arm", "check_mix"]


def check_mix(arm: Arm) -> None:
    """Refuse a mixture that contradicts itself; its amounts are looked at when the training set is made.

    Raises:
        ConfigError: `fraction-invalid`, `arm-mix`, `source-twice`, `share-without-source`.  DataError: `arm-empty`.
    """
    check_fraction(arm.real_fraction)
    others = [arm.synthetic is not None, arm.oversample, arm.amst is not None, arm.views is not None]
    if arm.sources and any(others):
        raise ConfigError(
            "arm-mix", f"Arm {arm.name} mixes sources; it takes no other synthetic images, repeats, views or AMST beside them."
        )
    if arm.real_fraction is None and (not arm.sources or arm.real_share is not None):
        raise ConfigError("arm-mix", f"Arm {arm.name} has no real image; give it sources, and no batch share of real images.")
    for source in arm.sources:
        if not source.cohort.training:
            raise DataError("arm-empty", f"Source {source.name} of arm {arm.name} has no image; generate or accept more.")
    for what, values in (
        ("name", [source.name for source in arm.sources]),
        ("images", [source.cohort.content_sha256 for source in arm.sources]),
    ):
        if len(set(values)) != len(values):
            raise ConfigError("source-twice", f"Two sources of arm {arm.name} have the same {what}; give each source once.")
    if arm.real_share is not None and not arm.sources:
        raise ConfigError("share-without-source", f"Arm {arm.name} gives a batch share to real images and has no other source.")
    if arm.sources and all(source.weight == 0 for source in arm.sources) and arm.real_fraction is None:
        raise ConfigError("arm-mix", f"Every source of arm {arm.name} has loss weight 0; nothing would be trained.")


def check_arm(arm: Arm, real: Cohort) -> None:
    """Refuse an arm that would train on anything the held-out images leaked into.

    Raises:
        LeakageError: see `medaug.cohort.check_against`; also a real image that poses as synthetic, an image with the pixels of a
            held-out one, and a teacher that saw one, see `check_origin`.
        DataError: classes or sizes differ, or there is no synthetic image; `sets-alike`: seeds that should have images of their own share them.
    """
    if arm.teacher is not None:
        check_origin(arm.teacher.fit_groups, real, f"The teacher of arm {arm.name}", arm.teacher.trusted or arm.allow_untrusted)
    _check_sets(arm)
    for one in arm.sets():
        if one.unlabelled is not None:
            _check_unlabelled(one, one.unlabelled, real)
        for source in one.added():
            _check_source(one, source.cohort, real)


def _check_sets(arm: Arm) -> None:
    """Refuse one set of images under the names of two seeds: the luck of the generator would seem smaller than it is."""
    known: dict[tuple[str, ...], int] = {}
    for seed, one in arm.by_seed.items():
        if (first := known.setdefault(one.images(), seed)) != seed:
            raise DataError(
                "sets-alike",
                f"Arm {arm.name} has the same images for the seeds {first} and {seed}; generate each set by a generator of another seed.",
            )


def _check_source(arm: Arm, synthetic: Cohort, real: Cohort) -> None:
    """The checks of one source."""
    check_against(synthetic, real, allow_untrusted=arm.allow_untrusted)
    posing = [case.id for case in synthetic.cases() if not case.is_synthetic]
    if posing:
        raise LeakageError(
            "real-in-synthetic-arm",
            f"Arm {arm.name} holds {len(posing)} real image(s) ({', '.join(sorted(posing)[:5])}), which may be held-out ones; "
            "give it the folder that `medaug gate` or `medaug import` wrote.",
        )
    if not synthetic.training:
        raise DataError("arm-empty", f"Arm {arm.name} has no synthetic training image; generate or accept more.")
    _check_pixels(arm, synthetic, "synthetic", real)


def _check_pixels(arm: Arm, cohort: Cohort, what: str, real: Cohort) -> None:
    """Refuse an image that is a held-out one under another name, whatever its source, patient and group say."""
    shared = shared_pixels(cohort, cohort.training, held_out_pixels(real))
    if shared:
        raise LeakageError(
            "pixels-held-out",
            f"{len(shared)} {what} image(s) of arm {arm.name} have the very pixels of a validation or test image "
            f"({', '.join(shared[:5])}); leave them out.",
        )


def _check_unlabelled(arm: Arm, unlabelled: Cohort, real: Cohort) -> None:
    """Refuse unlabelled images that are held-out ones, were made from them, or do not fit; their classes do not matter."""
    if arm.amst is None:
        raise ConfigError("arm-unlabelled", f"Arm {arm.name} has unlabelled images; only AMST trains on those.")
    if not unlabelled.training:
        raise DataError("arm-empty", f"Arm {arm.name} has no unlabelled image in the training split of its second cohort.")
    only = replace(unlabelled, classes=real.classes, validation=(), test=())
    check_against(only, real, allow_untrusted=arm.allow_untrusted)
    held_out = real.validation + real.test
    for what in ("source", "patient"):
        known = {getattr(case, what) for case in held_out} - {""}
        shared = sorted(case.id for case in unlabelled.training if not case.is_synthetic and getattr(case, what) in known)
        if shared:
            raise LeakageError(
                "unlabelled-held-out",
                f"{len(shared)} unlabelled image(s) of arm {arm.name} share their {what} with a validation or test case "
                f"({', '.join(shared[:5])}); leave them out.",
            )
    _check_pixels(arm, unlabelled, "unlabelled", real)
