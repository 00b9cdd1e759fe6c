"""Which synthetic cases are exported, as which patients, studies and series."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError, DataError
from medaug.export.dicom import CLASS_OF_MODALITY, SOP_CLASSES, lacks
from medaug.export.facts import (
    ImageFacts,
    hounsfield_range,
    lineage_summary,
    lossy_of,
    new_uid,
    patient_id,
    pixels_checked,
)
from medaug.export.geometry import geometry_of

_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
COPY_REASONS = ("near-copy", "seed-copy")  # what the gate says of a copy of a patient's image
_MODALITY = re.compile(r"[A-Z0-9 _]{1,16}")  # VR CS


@dataclass(frozen=True)
class PlannedImage:
    """A synthetic case and all that is said about it."""

    case: Case
    facts: ImageFacts

    def path(self, suffix: str) -> str:
        """Where the file goes, relative to the output folder."""
        name = self.case.id if _SAFE_NAME.fullmatch(self.case.id) else storage.sha256_bytes(self.case.id.encode())[:16]
        return f"images/{self.facts.patient_id}/{name}{suffix}"


def check_exportable(cohort: Cohort, allow_ungated: bool) -> None:
    """Refuse real images and images that no gate accepted.

    Raises:
        DataError: `not-synthetic`, `export-empty`, `export-copy` (whatever is allowed) or `not-gated`.
    """
    real = sum(not case.is_synthetic for case in cohort.cases())
    if real:
        raise DataError(
            "not-synthetic",
            f"The cohort holds {real} real image(s), which medaug never exports; give the accepted cohort of `medaug gate`.",
        )
    if not cohort.training:
        raise DataError("export-empty", "The cohort holds no image; generate more, or look at the report of the gate.")
    copied = sum(any(code in COPY_REASONS for code in (case.lineage or {}).get("reasons") or ()) for case in cohort.training)
    if copied:
        raise DataError(
            "export-copy",
            f"{copied} of {len(cohort.training)} synthetic image(s) are near-copies of patients' images by the verdict of the gate, and "
            "such images never leave; export the accepted cohort of `medaug gate`.",
        )
    ungated = sum((case.lineage or {}).get("verdict") != "accept" for case in cohort.training)
    if ungated and not allow_ungated:
        raise DataError(
            "not-gated",
            f"{ungated} of {len(cohort.training)} synthetic image(s) were not accepted by a gate; run `medaug gate` first, "
            "or add --allow-ungated.",
        )


def plan_images(
    cohort: Cohort, origin: Cohort | None, settings: Mapping[str, Any], study_uid: str | None, date: str
) -> list[PlannedImage]:
    """Every image of the export with its facts, sorted by patient, series and instance.

    One study per group (a synthetic patient), or the one that is given, then with one synthetic patient for all. A
    series holds what could lie in one volume: at most one image per reference, references of one source series. So
    several images made from one slice never share a position within a series.

    Args:
        cohort: checked by `check_exportable`.
        origin: the real cohort, whose references' geometry is inherited where a case has none; None leaves it unknown.
        settings: all that decides the bytes; part of the key of every new UID.
        study_uid: the study to link to, or None.
        date: YYYYMMDD or "".
    """
    references = {} if origin is None else {case.id: case for case in origin.training}
    if origin is not None:
        _check_origin(cohort, origin, references)
    key = storage.sha256_json(dict(settings))
    shared = {
        "modality": cohort.modality if _MODALITY.fullmatch(cohort.modality) else "",
        "hounsfield": hounsfield_range(cohort),
        "pixels_checked": pixels_checked(cohort, origin),
        "date": date,
    }
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cohort.training:
        groups["" if study_uid else case.group].append(case)
    planned = []
    for group in sorted(groups):
        patient = patient_id("study", study_uid) if study_uid else patient_id("group", group)
        study = study_uid or new_uid("study", key, patient)
        for number, (name, members) in enumerate(_series(groups[group], references), start=1):
            for instance, (case, acquisition) in enumerate(members, start=1):
                facts = ImageFacts(
                    case_id=case.id,
                    label=case.label,
                    label_name=cohort.classes[case.label],
                    lineage=lineage_summary(case),
                    patient_id=patient,
                    study_uid=study,
                    series_uid=new_uid("series", key, patient, *name),
                    frame_uid=new_uid("frame", key, patient, *name),
                    sop_uid=new_uid("sop", key, case.id, lineage_summary(case)),
                    series_number=number,
                    instance_number=instance,
                    geometry=geometry_of(acquisition, cohort.image_size),
                    lossy=lossy_of(acquisition),
                    **shared,  # type: ignore[arg-type]
                )
                planned.append(PlannedImage(case, facts))
    return sorted(planned, key=lambda image: (image.facts.patient_id, image.facts.series_number, image.facts.instance_number))


def _check_origin(cohort: Cohort, origin: Cohort, references: Mapping[str, Case]) -> None:
    same = (cohort.image_size, cohort.channels, cohort.classes) == (origin.image_size, origin.channels, origin.classes)
    unknown = sum((case.lineage or {}).get("reference") not in references for case in cohort.training)
    if not same or unknown:
        raise DataError(
            "reference-unknown",
            f"{unknown} of {len(cohort.training)} image(s) were made from references that are not in the training split of the "
            "cohort given with --cohort, or size, channels and classes differ; give the cohort that the generator was trained on.",
        )


def _series(
    cases: Sequence[Case], references: Mapping[str, Case]
) -> Iterator[tuple[tuple[str, int], list[tuple[Case, Mapping[str, Any]]]]]:
    """Name and members of each series of one study, in a fixed order."""
    copies: dict[str, int] = defaultdict(int)
    series: dict[tuple[str, int], list[tuple[Case, Mapping[str, Any]]]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.id):
        reference = str((case.lineage or {}).get("reference", ""))
        inherited = references[reference].acquisition if reference in references else {}
        acquisition = {**inherited, **case.acquisition}
        placed = bool(acquisition.get("position_mm"))
        # Images without a place claim no volume and share one series.
        name = (str(acquisition.get("series") or f"reference {reference}"), copies[reference]) if placed else ("", 0)
        copies[reference] += 1
        series[name].append((case, acquisition))
    for name in sorted(series):
        yield name, sorted(series[name], key=lambda member: (_place(member[1]), member[0].id))


def _place(acquisition: Mapping[str, Any]) -> float:
    index = acquisition.get("slice_index")
    return float(index) if isinstance(index, int | float) else 0.0


def choose_class(cohort: Cohort, images: Sequence[PlannedImage], wanted: str | None) -> tuple[str, list[str]]:
    """The storage class of an export, and notes about the choice.

    Without a wish the modality decides, and Secondary Capture stands in where its class demands what is not known.

    Raises:
        ConfigError: `storage-class-unknown`.
        DataError: `geometry-unknown`: the wished class demands what is not known.
    """
    modality = images[0].facts.modality
    if wanted is not None and wanted not in SOP_CLASSES:
        raise ConfigError("storage-class-unknown", f"--storage-class is one of {', '.join(SOP_CLASSES)}, got {wanted!r}.")
    chosen = wanted or CLASS_OF_MODALITY.get(modality, "sc")
    usual = CLASS_OF_MODALITY.get(modality, chosen)
    notes = [f"The images are {modality}; they were written as {chosen} by choice."] if chosen not in (usual, "sc") else []
    missing = [text for image in images if (text := lacks(chosen, image.facts, cohort.channels))]
    if not missing:
        return chosen, notes
    if wanted:
        raise DataError(
            "geometry-unknown",
            f"Storage class {wanted} demands {missing[0]}, which {len(missing)} of {len(images)} image(s) do not give and medaug does "
            "not invent; use --storage-class sc, or give the real cohort with --cohort.",
        )
    text = f"Secondary Capture instead of {chosen}: {len(missing)} of {len(images)} image(s) do not give {missing[0]}."
    return "sc", [text]


def notes_of(images: Sequence[PlannedImage], storage_class: str | None, study_uid: str | None) -> list[str]:
    """Warnings that travel with the export."""
    notes = []
    if study_uid:
        notes.append(
            "The images were linked to a study given by the user. Its real patient has another identifier than these files, so an "
            "archive may refuse or split the study, and readers may take synthetic images for the patient's: keep such a study out of "
            "clinical systems."
        )
    if not all(image.facts.pixels_checked for image in images):
        words = (
            "PatientIdentityRemoved and BurnedInAnnotation NO were not written" if storage_class else "the files do not claim it"
        )
        notes.append(f"Nothing shows that the training images were searched for burned-in text: {words}.")
    ungated = sum((image.case.lineage or {}).get("verdict") != "accept" for image in images)
    if ungated:
        notes.append(f"{ungated} image(s) were not accepted by a gate.")
    return notes
