"""The cohort: the one contract between stages, and the rules that keep test patients out of training.

A cohort is a folder with ``cohort.json`` (header and cases), ``images/``, ``report.html``, ``report.json`` and
``quarantine.csv``. The lists ``training``, ``validation`` and ``test`` are a MONAI datalist. This module is the only
code that reads or writes ``cohort.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medaug import __version__, storage
from medaug.errors import DataError, LeakageError, well_formed

SPLITS = ("training", "validation", "test")
FORMAT = 1
FILE_NAME = "cohort.json"
QUARANTINE_COLUMNS = ("file", "code", "reason")


@dataclass(frozen=True, slots=True)
class Case:
    """One image with its label and its origin.

    Attributes:
        id: unique in the cohort, made from content, never from a patient's data.
        image: path relative to the cohort folder, POSIX separators.
        label: index into the cohort's `classes`.
        patient: pseudonym, empty when unknown.
        group: the unit of splitting: the patient, else a near-duplicate group. A synthetic case has its reference's.
        source: sha256 of the file (or array) the image came from.
        name: file name of an imported image, else the id.
        acquisition: facts that matter (spacing_mm, window, photometric, original_size ...).
        lineage: for a synthetic case only: bundle, weights_sha256, config_sha256, seed, reference, intended_label,
            pseudo_label, confidence, guidance, noise, nearest_training_distance, verdict, reasons, fit_on; for an image made
            elsewhere by nobody knows what, `untrusted` in the place of fit_on.
    """

    id: str
    image: str
    label: int
    group: str
    source: str
    patient: str = ""
    name: str = ""
    acquisition: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] | None = None

    @property
    def is_synthetic(self) -> bool:
        """True for a generated case."""
        return self.lineage is not None


@dataclass(frozen=True)
class Cohort:
    """Header and cases of a cohort; immutable, use `replace` or `with_cases` for a changed copy.

    Attributes:
        classes: ordered class names; `ordinal` says whether the order means something.
        image_size: side of the square images in pixels.
        channels: 1 (grey, 16-bit PNG) or 3 (colour, 8-bit PNG).
        spatial_dims: 2, or 3 for volumes: grey 16-bit NIfTI on their own grids, `image_size` the largest side of a slice.
        intensity: what the stored values 0 and 1 mean, for example ``{"kind": "window_hu", "0": -1350, "1": 150}``.
        created_by: medaug version, command, config_sha256, seed.
        fit_on: fit sha256 -> sorted groups: what the generators, guides and filters behind the synthetic cases saw.
        notes: warnings that travel with the data, such as the leak indicator.
    """

    name: str
    modality: str
    classes: tuple[str, ...]
    ordinal: bool
    image_size: int
    channels: int = 1
    intensity: Mapping[str, Any] = field(default_factory=dict)
    created_by: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    training: tuple[Case, ...] = ()
    validation: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()
    fit_on: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    content_sha256: str = ""
    spatial_dims: int = 2
    root: Path | None = field(default=None, compare=False)

    def split(self, name: str) -> tuple[Case, ...]:
        """Cases of one split: "training", "validation" or "test"."""
        if name not in SPLITS:
            raise DataError("split-unknown", f"A split must be one of {', '.join(SPLITS)}, got {name!r}.")
        return getattr(self, name)

    def cases(self) -> tuple[Case, ...]:
        """All cases, training first."""
        return self.training + self.validation + self.test

    def groups(self, split: str) -> set[str]:
        """The groups of a split."""
        return {case.group for case in self.split(split)}

    def class_counts(self, split: str) -> list[int]:
        """Number of cases per class, in class order."""
        counts = Counter(case.label for case in self.split(split))
        return [counts[index] for index in range(len(self.classes))]

    def path(self, case: Case) -> Path:
        """Absolute path of a case's image."""
        if self.root is None:
            raise DataError("cohort-unrooted", "This cohort was not read from a folder; read it with `read_cohort`.")
        return self.root / case.image

    def with_cases(self, **splits: Iterable[Case]) -> Cohort:
        """A copy with other cases in the named splits."""
        return replace(self, **{name: tuple(cases) for name, cases in splits.items()})  # type: ignore[arg-type]


def fit_sha256(groups: Iterable[str]) -> str:
    """sha256 of the sorted groups that a generator, guide or filter was trained on: the `fit_on` of a lineage."""
    return storage.sha256_json(sorted(set(groups)))


def created_by(command: str, config: Any, seed: int) -> dict[str, Any]:
    """The header entry that says what made a cohort. `command` must not hold paths."""
    return {"version": __version__, "command": command, "config_sha256": storage.sha256_json(config), "seed": seed}


def validate(cohort: Cohort) -> Cohort:
    """Check everything a cohort promises by itself; returns it unchanged.

    Raises:
        DataError: duplicate ids or ids that no file can be named after, labels outside the classes, paths that leave the
            folder, empty groups.
        LeakageError: a group in two splits, a synthetic case outside training, or a synthetic case whose generator,
            guide or filter was fitted on a group of this cohort's validation or test split.
    """
    if len(set(cohort.classes)) != len(cohort.classes) or not cohort.classes:
        raise DataError("classes-invalid", f"A cohort needs distinct class names, got {list(cohort.classes)}.")
    seen: set[str] = set()
    for case in cohort.cases():
        _validate_case(case, cohort, seen)
    _refuse_crossing_groups(cohort)
    for split in ("validation", "test"):
        synthetic = [case.id for case in cohort.split(split) if case.is_synthetic]
        if synthetic:
            raise LeakageError(
                "synthetic-outside-training",
                f"The {split} split must hold real images only, got {len(synthetic)} synthetic ({_some(synthetic)}); move them to training.",
            )
    held_out = cohort.groups("validation") | cohort.groups("test")
    for case in cohort.training:
        # Where nothing is held out nothing can leak yet: `check_against` asks again where the images are used.
        if case.lineage is not None and (held_out or not case.lineage.get("untrusted")):
            check_lineage(cohort, case)
    check_fit(cohort.fit_on, held_out)
    return cohort


def _validate_case(case: Case, cohort: Cohort, seen: set[str]) -> None:
    if not case.id or case.id in seen:
        raise DataError("case-id-duplicate", f"Every case needs an id of its own, got {case.id!r} twice or empty.")
    if not case.id.isprintable() or "/" in case.id or "\\" in case.id:  # files are named after it
        raise DataError("case-id-invalid", f"A case's id must hold no slash and no control character, got {ascii(case.id[:40])}.")
    seen.add(case.id)
    if isinstance(case.label, bool) or not isinstance(case.label, int) or not 0 <= case.label < len(cohort.classes):
        raise DataError(
            "label-out-of-range", f"Case {case.id} has label {case.label!r}; expected 0 to {len(cohort.classes) - 1}."
        )
    path = PurePosixPath(case.image)
    if path.is_absolute() or ".." in path.parts or "\\" in case.image or not case.image:
        raise DataError("path-outside-cohort", f"The image path of case {case.id} must stay inside the cohort folder.")
    if not case.group:
        raise DataError("group-missing", f"Case {case.id} has no group; every case needs one, the unit of splitting.")


def _refuse_crossing_groups(cohort: Cohort) -> None:
    home: dict[str, str] = {}
    crossing: set[str] = set()
    for split in SPLITS:
        for group in cohort.groups(split):
            if home.setdefault(group, split) != split:
                crossing.add(group)
    if crossing:
        raise LeakageError(
            "group-in-two-splits",
            f"{len(crossing)} group(s) are in more than one split ({_some(crossing)}); split again by group.",
        )
    for what in ("patient", "image"):
        _refuse_shared(cohort, what)


def _refuse_shared(cohort: Cohort, what: str) -> None:
    home: dict[str, str] = {}
    for split in SPLITS:
        for case in cohort.split(split):
            value = getattr(case, what)
            if value and home.setdefault(value, split) != split:
                raise LeakageError(
                    f"{what}-in-two-splits",
                    f"Case {case.id} of {split} shares its {what} with a case of {home[value]}; split again by group.",
                )


def check_lineage(cohort: Cohort, case: Case) -> None:
    """Check that a synthetic case's `fit_on` names groups that the header lists.

    Raises:
        LeakageError: the fit is missing or its groups do not hash to it, so nothing shows what the generator saw.
    """
    fit = (case.lineage or {}).get("fit_on")
    groups = cohort.fit_on.get(str(fit)) if fit else None
    if groups is None or fit_sha256(groups) != fit:
        raise LeakageError(
            "fit-unknown",
            f"Synthetic case {case.id} does not say which groups its generator and filter were trained on; generate it again with medaug, "
            "import it with --fit-on, or take it on trust with --allow-untrusted where that is offered.",
        )


def check_fit(fit_on: Mapping[str, Sequence[str]], held_out: set[str]) -> None:
    """Refuse any fit that includes a held-out group.

    Raises:
        LeakageError: names the groups.
    """
    for groups in fit_on.values():
        leaked = held_out & set(groups)
        if leaked:
            raise LeakageError(
                "fit-on-held-out",
                f"The generator, guide or filter was trained on {len(leaked)} validation or test group(s) ({_some(leaked)}); "
                "train it again on the training split of this cohort.",
            )


def check_against(synthetic: Cohort, real: Cohort, *, allow_untrusted: bool = False) -> None:
    """Check that synthetic cases may train a network that is judged on `real`'s validation and test splits.

    Args:
        synthetic: cohort whose training cases carry lineage.
        real: the cohort that holds validation and test.
        allow_untrusted: accept cases whose fit is unknown (images made elsewhere).

    Raises:
        DataError: class lists, image sizes or the meaning of the stored values differ.
        LeakageError: a fit includes a held-out group or one this cohort does not know, or a case inherits a held-out group.
    """
    if synthetic.classes != real.classes or synthetic.image_size != real.image_size or synthetic.channels != real.channels:
        raise DataError(
            "cohorts-differ",
            f"Classes, image size and channels must match: real has {list(real.classes)}, {real.image_size} px, {real.channels} channel(s); "
            f"synthetic has {list(synthetic.classes)}, {synthetic.image_size} px, {synthetic.channels}.",
        )
    windows = [dict(cohort.intensity) for cohort in (real, synthetic) if isinstance(cohort.intensity.get("0"), int | float)]
    if len(windows) == 2 and windows[0] != windows[1]:
        raise DataError(
            "cohorts-differ",
            f"The same grey value must mean the same in both: real images are stored as {windows[0]}, synthetic ones as {windows[1]}; make "
            "them from, or import them like, this cohort.",
        )
    held_out = real.groups("validation") | real.groups("test")
    inherited = {case.group for case in synthetic.training} & held_out
    home = {case.id: case.group for case in real.validation + real.test}
    inherited |= {home[reference] for case in synthetic.training if (reference := (case.lineage or {}).get("reference")) in home}
    if inherited:
        raise LeakageError(
            "reference-held-out",
            f"Cases to train on are, or were made from, validation or test groups ({_some(inherited)}); generate from training images.",
        )
    check_fit(synthetic.fit_on, held_out)
    known = real.groups("training")
    for case in synthetic.training:
        if not case.is_synthetic or (allow_untrusted and not (case.lineage or {}).get("fit_on")):
            continue
        check_lineage(synthetic, case)
    for groups in synthetic.fit_on.values():
        unknown = set(groups) - known
        if unknown and not allow_untrusted:
            raise LeakageError(
                "fit-unknown",
                f"The generator or filter was trained on {len(unknown)} group(s) that are not in this cohort's training split ({_some(unknown)}); "
                "use the cohort it was trained on.",
            )


def _some(names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


def content_sha256(cohort: Cohort, root: Path) -> str:
    """sha256 over every case's id, label, group, split and image bytes: changes when the data change."""
    return storage.sha256_rows(
        [split, case.id, case.label, case.group, storage.sha256_file(root / case.image)]
        for split in SPLITS
        for case in sorted(cohort.split(split), key=lambda case: case.id)
    )


def write_cohort(cohort: Cohort, root: Path) -> Cohort:
    """Validate and write ``cohort.json``; the images must already be in `root`. Returns the cohort as read back.

    Raises:
        LeakageError, DataError: see `validate`.  StorageError: the disk is full or the folder cannot be written.
    """
    root = Path(root)
    missing = [case.id for case in cohort.cases() if not (root / case.image).is_file()]
    if missing:
        raise DataError("image-missing", f"{len(missing)} case(s) have no image file ({_some(missing)}).")
    validate(cohort)
    cohort = replace(cohort, content_sha256=content_sha256(cohort, root), root=root)
    storage.write_json(root / FILE_NAME, _to_json(cohort), default=_case_to_json)
    return cohort


def read_cohort(root: Path, *, verify: bool = False, spatial_dims: int | None = 2) -> Cohort:
    """Read and validate a cohort folder.

    Args:
        root: the folder, or its ``cohort.json``.
        verify: also check every image against `content_sha256`.
        spatial_dims: what the caller can work with; None takes pictures and volumes.

    Raises:
        DataError: `cohort-dimensions` for volumes where pictures are needed,
            missing or malformed file, absent images, changed content.  LeakageError: see `validate`.
    """
    root = Path(root)
    root = root.parent if root.name == FILE_NAME else root
    if not (root / FILE_NAME).is_file():
        raise DataError("cohort-missing", f"{root.name} is not a cohort (no {FILE_NAME}); make one with `medaug intake`.")
    cohort = validate(_from_json(storage.read_json(root / FILE_NAME), root))
    if spatial_dims is not None and cohort.spatial_dims != spatial_dims:
        raise DataError(
            "cohort-dimensions",
            f"{root.name} holds {cohort.spatial_dims}-D images and this step works on {spatial_dims}-D ones; "
            f"take the source in again with --dimensions {spatial_dims}.",
        )
    missing = [case.id for case in cohort.cases() if not (root / case.image).is_file()]
    if missing:
        raise DataError("image-missing", f"{len(missing)} case(s) of {root.name} have no image file ({_some(missing)}).")
    if verify and content_sha256(cohort, root) != cohort.content_sha256:
        raise DataError(
            "cohort-changed", f"The images of {root.name} are not the ones its header was written for; run intake again."
        )
    return cohort


def _to_json(cohort: Cohort) -> dict[str, Any]:
    """The content of the file, its cases as they are: `_case_to_json` takes one at a time."""
    header = {
        "format": FORMAT,
        "name": cohort.name,
        "description": f"medaug cohort {cohort.name}",
        "modality": cohort.modality,
        "classes": list(cohort.classes),
        "labels": {str(index): name for index, name in enumerate(cohort.classes)},
        "ordinal": cohort.ordinal,
        "image_size": cohort.image_size,
        "channels": cohort.channels,
        "intensity": dict(cohort.intensity),
        "created_by": dict(cohort.created_by),
        "source": cohort.source,
        "content_sha256": cohort.content_sha256,
        "fit_on": {sha: list(groups) for sha, groups in cohort.fit_on.items()},
        "notes": dict(cohort.notes),
    }
    if cohort.spatial_dims != 2:
        header["spatial_dims"] = cohort.spatial_dims
    return header | {split: cohort.split(split) for split in SPLITS}


def _case_to_json(case: Case) -> dict[str, Any]:
    row = {entry.name: getattr(case, entry.name) for entry in fields(case)}
    row["acquisition"] = dict(case.acquisition)
    if case.lineage is None:
        del row["lineage"]
    else:
        row["lineage"] = dict(case.lineage)
    return row


def _case_from_json(row: Mapping[str, Any]) -> Case:
    case = Case(**row)
    texts = (case.id, case.image, case.group, case.source, case.patient, case.name)
    if not all(isinstance(text, str) for text in texts) or not isinstance(case.acquisition, Mapping):
        raise TypeError("a case holds text for id, image, group, source, patient and name")
    if case.lineage is not None and not isinstance(case.lineage, Mapping):
        raise TypeError("the lineage of a case holds names and values")
    return case


def _from_json(data: Any, root: Path) -> Cohort:
    with well_formed("cohort-malformed", f"{FILE_NAME} of {root.name}", "make the cohort again"):
        if data["format"] != FORMAT:
            raise DataError(
                "cohort-format",
                f"{FILE_NAME} has format {data['format']!r}, this medaug reads {FORMAT}; use the matching release.",
            )
        splits = {split: tuple(_case_from_json(row) for row in data.get(split, [])) for split in SPLITS}
        return Cohort(
            name=str(data["name"]),
            modality=str(data["modality"]),
            classes=tuple(str(name) for name in data["classes"]),
            ordinal=bool(data["ordinal"]),
            image_size=int(data["image_size"]),
            channels=int(data["channels"]),
            intensity=dict(data["intensity"]),
            created_by=dict(data["created_by"]),
            source=str(data["source"]),
            fit_on={str(sha): tuple(groups) for sha, groups in data.get("fit_on", {}).items()},
            notes=dict(data.get("notes", {})),
            content_sha256=str(data["content_sha256"]),
            spatial_dims=int(data.get("spatial_dims", 2)),
            root=root,
            **splits,
        )
