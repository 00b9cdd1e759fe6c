"""What a reader must know before a verdict: one sentence for each fact that weakens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medaug import sessions
from medaug.cohort import Cohort
from medaug.grading.arm import Arm
from medaug.grading.arms import kept_cases
from medaug.grading.image_sets import set_notes
from medaug.grading.mixing import class_counts
from medaug.grading.rows import Row
from medaug.training.teacher import check_origin

__all__ = ["arm_notes", "data_notes", "pretrained_notes", "run_notes"]


def data_notes(cohort: Cohort) -> list[str]:
    """Of the real images: a split that leaks, a class that a held-out split lacks."""
    leak = (cohort.notes.get("leak") or {}).get("warning")
    notes = [str(leak)] if leak else []
    for split, cases, effect in (
        ("validation", cohort.validation, "the choice of weights is blind to it"),
        ("test", cohort.test, "the figures say nothing of it"),
    ):
        counts = class_counts(cases, len(cohort.classes))
        absent = [name for name, count in zip(cohort.classes, counts, strict=True) if not count]
        if cases and absent:
            notes.append(f"The {split} split has no image of class {', '.join(absent)}: {effect}.")
    return notes


def arm_notes(cohort: Cohort, arms: Sequence[Arm]) -> list[str]:
    """Of the arms: images nobody can vouch for, and comparisons that are not like with like."""
    notes = []
    for name, arm in {arm.base: arm for arm in arms}.items():
        sources = arm.all_added()
        given = [case for source in sources for case in source.cohort.training]
        unknown = [case for case in given if not (case.lineage or {}).get("fit_on")]
        if unknown:
            notes.append(f"Nothing shows that the maker of {len(unknown)} image(s) of arm {name} never saw the test patients.")
        if arm.teacher is not None and check_origin(arm.teacher.fit_groups, cohort, name, trusted=True):
            notes.append(f"Nothing shows that the teacher of arm {name} never saw the test patients.")
        known = str(cohort.intensity.get("kind", ""))
        kinds = {str(source.cohort.intensity.get("kind", "")) for source in sources} - {known, ""}
        if known and kinds:
            notes.append(
                f"The images of arm {name} were scaled in another way ({', '.join(sorted(kinds))}) than the real ones ({known}), so the "
                "same grey value need not mean the same."
            )
        if any((case.lineage or {}).get("weights_trusted") for case in given):
            notes.append(f"The labels of arm {name} come from a network that began from weights of unknown origin.")
        if any((case.lineage or {}).get("generator_trusted") for case in given):
            notes.append(f"The images of arm {name} come from a generator that began from weights of unknown origin.")
        notes += set_notes(arm)
    better_taught = {arm.base for arm in arms if _saw_more(arm, cohort)}
    for name in dict.fromkeys(arm.base for arm in arms if arm.base in better_taught):
        notes.append(
            f"The makers of the images of arm {name} learned from training images that its fraction of the real ones leaves out: a gain at "
            "that fraction is partly theirs."
        )
    return notes


def _saw_more(arm: Arm, cohort: Cohort) -> bool:
    """True if generator, guide or filter of an arm learned from groups that its part of the real images does not hold."""
    if arm.real_fraction in (None, 1):
        return False
    kept = {case.group for case in kept_cases(arm, cohort, 0)}
    makers = [
        source.cohort.fit_on for source in arm.all_added() if not source.of_kept
    ]  # copies of kept images have no other maker
    return any(set(groups) - kept for fit_on in makers for groups in fit_on.values())


def pretrained_notes(weights: Mapping[str, Path]) -> list[str]:
    """Of weights that training began from."""
    names = ", ".join(sorted(weights))
    return [f"The weights of {names} come from a file; nothing shows that they never saw the test patients."] if weights else []


def run_notes(out: Path, rows: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    """Of the runs themselves: versions that differ between them, weights that did nothing, networks that are left out."""
    return [*_versions(out), *_inert(rows), *_left_out(failed)]


def _versions(out: Path) -> list[str]:
    """One sentence if rows of a folder may come from different versions of the packages that decide their figures."""
    found = [entry["packages"] for entry in sessions.read_sessions(out)["environments"]]
    names = sorted({name for packages in found for name in packages})
    differing = [name for name in names if len({packages.get(name) for packages in found}) > 1]
    if not differing:
        return []
    return [
        f"The runs were made with different versions of {', '.join(differing)}, which may differ between arms; grade into a new folder to "
        "have them of one version."
    ]


def _left_out(failed: Sequence[Row]) -> list[str]:
    """One sentence per network that the verdict does not rest on."""
    reasons = {row["network"]: row["reason"] for row in reversed(failed)}
    return [f"{name} is left out of the verdict: {reason}" for name, reason in sorted(reasons.items())]


def _inert(rows: Sequence[Row]) -> list[str]:
    """Arms whose weighting of unlabelled images did nothing, in how many runs."""
    found: dict[str, int] = {}
    for row in rows:
        if any(note.startswith("amst-softmatch-inert") for note in row.get("amst", {}).get("notes", ())):
            found[row["arm"]] = found.get(row["arm"], 0) + 1
    return [
        f"In {count} run(s) of arm {arm} the weights of unlabelled images stayed near 1: its consistency was plain pseudo-labelling."
        for arm, count in found.items()
    ]
