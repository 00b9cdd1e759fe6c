"""The controls that arms bring with them: what an arm has beside new images must not earn it a verdict.

An arm with more images has more steps per class, maybe another mix of classes: its control repeats real images to the same count,
class by class. An arm that trains by AMST sees every image shifted: its control is real images seen the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medaug.grading.arm import Arm, weak_view

OVERSAMPLE = "oversample"
WEAK_VIEW = "weak_view"  # that of AMST; the policy `weak` shifts by half as much and never mirrors
COUNTS_ALIKE = 0.05  # of the images of the larger training set

__all__ = [
    "COUNTS_ALIKE",
    "OVERSAMPLE",
    "WEAK_VIEW",
    "alike",
    "count_control",
    "view_controls",
    "with_count_controls",
    "with_view_controls",
]


def alike(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """True if the images per class of two training sets differ by at most `COUNTS_ALIKE` of all images of the larger one."""
    differing = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return differing <= COUNTS_ALIKE * max(sum(ours), sum(theirs))


def count_control(base: str) -> str:
    """Name of the control that an arm has for itself."""
    return f"{OVERSAMPLE}-{base}"


def with_count_controls(arms: Sequence[Arm], served: Mapping[str, Sequence[str]]) -> list[Arm]:
    """The arms and, for every arm that `served` names, real images of the same fraction repeated to its count and classes.

    Args:
        served: name of an arm -> names of the arms that meet its control, its own among them.
    """
    return [
        *arms,
        *(
            Arm(
                count_control(arm.name),
                oversample=True,
                real_fraction=arm.real_fraction,
                matches=arm,
                serves=tuple(served[arm.name]),
            )
            for arm in arms
            if arm.name in served
        ),
    ]


def _is_view_control(arm: Arm, of: Arm) -> bool:
    """True if `arm` is the control of `of`, which trains by AMST."""
    if arm.views is None or of.amst is None or arm.real_fraction != of.real_fraction:
        return False
    return weak_view(arm.views) == weak_view(of.amst.views) and arm.synthetic is None and not arm.oversample


def with_view_controls(arms: Sequence[Arm]) -> list[Arm]:
    """The arms and, for those that train by AMST, the real images alone seen through the same weak view, if no arm does so.

    AMST shows every image shifted, plain training as it is; without this control the shifts alone could earn a verdict. The
    arms that are added come last and are named `WEAK_VIEW`, further ones `WEAK_VIEW`-2 and so on.
    """
    out = list(arms)
    for arm in arms:
        if arm.amst is not None and not any(_is_view_control(other, arm) for other in out):
            taken = {other.name for other in out}
            names = (WEAK_VIEW if number == 1 else f"{WEAK_VIEW}-{number}" for number in range(1, len(out) + 2))
            name = next(name for name in names if name not in taken)
            out.append(Arm(name, views=arm.amst.views, real_fraction=arm.real_fraction))
    return out


def view_controls(arms: Sequence[Arm]) -> dict[str, str]:
    """Name of every arm that trains by AMST -> name of its control, see `with_view_controls`."""
    return {arm.name: next(other.name for other in arms if _is_view_control(other, arm)) for arm in arms if arm.amst is not None}
