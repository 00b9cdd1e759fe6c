"""What the records say of the real data behind a set: one sentence a fact, None where no record says it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from medaug.cohort import SPLITS, Case
from medaug.evidence.records import Records
from medaug.evidence.shown import counted, figure, listed, unknown_patients

_WORD = re.compile(r"[A-Za-z0-9_ ]{1,24}")
_KEYS = {
    "accession": "accession number",
    "file": "file name",
    "patient": "patient ID",
    "series": "Series Instance UID",
    "sop": "SOP Instance UID",
    "study": "Study Instance UID",
}
_INTENSITY = {
    "uint8": "0 and 1 are the values 0 and 255 of 8-bit pictures",
    "window_hu": "0 and 1 are {0:g} and {1:g} Hounsfield units, values outside are cut off",
    "window_stored": "0 and 1 are the stored values {0:g} and {1:g}, values outside are cut off",
    "percentile": "0 and 1 are the 0.5 and 99.5 percentile of each image, so intensities of two images cannot be compared",
    "mixed": "images were scaled in different ways",
}


def source_cohort(records: Records) -> str | None:
    """Name, modality, classes and hash of the real cohort."""
    real = records.real
    if real is None:
        return (
            f"Real cohort with content sha256 {records.real_sha256}; its folder was not given." if records.real_sha256 else None
        )
    order = "ordered classes" if real.ordinal else "unordered classes"
    modality = f", modality {real.modality}" if real.modality else ""
    return f"Cohort {real.name!r}{modality}, {order} {listed(real.classes)}; content sha256 {real.content_sha256}."


def sizes(records: Records) -> str | None:
    """Images and groups of every split of the real cohort."""
    real = records.real
    if real is None:
        return None
    parts = [
        f"{split} {counted(len(real.split(split)), 'image')} of {counted(len(real.groups(split)), 'group')}"
        for split in SPLITS
        if real.split(split)
    ]
    return f"Real data: {', '.join(parts)}."


def class_counts(records: Records) -> str | None:
    """Real images per class and split."""
    real = records.real
    if real is None:
        return None
    parts = []
    for split in SPLITS:
        counts = zip(real.classes, real.class_counts(split), strict=True)
        parts += [f"{split} " + listed(f"{name}: {count}" for name, count in counts)] if real.split(split) else []
    return f"Real images per class: {'; '.join(parts)}."


def patients(records: Records) -> str | None:
    """How many patients each split has, where they are known."""
    real = records.real
    if real is None or not any(case.patient for case in real.cases()):
        return None
    parts = []
    for split in SPLITS:
        known = {case.patient for case in real.split(split)} - {""}
        parts += [f"{split} {len(known)}"] if real.split(split) else []
    unknown = sum(not case.patient for case in real.cases())
    return f"Known patients: {', '.join(parts)}" + (f"; {counted(unknown, 'image')} without a known patient." if unknown else ".")


def test_set(records: Records) -> str | None:
    """The size of the test split."""
    real = records.real
    if real is None or not real.test:
        return None
    images, groups = counted(len(real.test), "image"), counted(len(real.groups("test")), "group")
    return f"The test split holds {images} of {groups}, real ones only."


def split_level(records: Records) -> str | None:
    """What the splits are disjoint by."""
    real = records.real
    if real is None:
        return None
    origins = (real.notes.get("groups") or {}).get("images_by_origin") or {}
    words = {"patient": "by patient", "column": "by the group column of the label table", "automatic": "by similarity of pixels"}
    how = ", ".join(f"{counted(int(count), 'image')} {words[name]}" for name, count in origins.items() if name in words)
    grouped = f" Groups were formed: {how}." if how else ""
    doubt = unknown_patients(origins or {"automatic": sum(not case.patient for case in real.cases())})
    grouped += f" {doubt}" if doubt else ""
    return f"Splits are disjoint by group (a patient, or images too alike to part); no group is in two splits.{grouped}"


def split_assignment(records: Records) -> str | None:
    """Shares of the splits, and what reproduces them."""
    real = records.real
    if real is None:
        return None
    total = len(real.cases())
    shares = listed(f"{split} {len(real.split(split)) / total:.0%}" for split in SPLITS if real.split(split))
    made = real.created_by
    by = (
        f" Intake: settings sha256 {made['config_sha256']}, seed {made['seed']}."
        if {"config_sha256", "seed"} <= set(made)
        else ""
    )
    return f"No group is in two splits; they hold {shares} of the images. {_split_origin(real.notes.get('drawn_splits'))}{by}"


def _split_origin(drawn: Sequence[str] | None) -> str:
    """Who drew the splits; `drawn` are those that intake drew, None where an earlier version did not say."""
    if drawn is None:
        return "Whether they are the source's own or were drawn by intake is not recorded."
    if "training" in drawn:
        return "They were drawn by chance, group by group."
    own = f", but for {listed(drawn)}, drawn by chance from its training groups" if drawn else ""
    return f"They are the source's own{own}; how it drew them is not recorded."


def taken_in(records: Records) -> str | None:
    """Files that were used and left out, with the codes of the reasons."""
    counts = (records.intake or {}).get("counts")
    if not counts:
        return None
    codes = listed(f"{code} {count}" for code, count in sorted(counts["quarantine"].items()))
    out = f" ({codes})" if codes else ""
    taken = f"{counted(counts['used'], 'image')} taken in from {counted(counts['files'], 'file')}"  # an archive holds many images
    return f"{taken}, {counts['quarantined']} left out{out}."


def missing_data(records: Records) -> str | None:
    """Images without a label and labels without an image."""
    join = (records.intake or {}).get("join") or {}
    if not join.get("key"):
        return None
    return (
        f"Nothing was imputed. Of {join['rows']} rows of labels {join['rows_without_image']} had no image, and "
        f"{counted(join['images_without_row'], 'image')} had no row; both were left out."
    )


def preprocessing(records: Records) -> str | None:
    """Size, channels and intensities of the images."""
    data = records.real or records.described
    side = (
        f"{data.image_size} x {data.image_size} px" if data.spatial_dims == 2 else f"volumes of up to {data.image_size} px a side"
    )
    depth = "8-bit colour" if data.channels == 3 else "16-bit grey"
    kind = str(data.intensity.get("kind", ""))
    meaning = _INTENSITY.get(kind, "").format(data.intensity.get("0"), data.intensity.get("1"))
    return f"Images are {side}, {depth}" + (f"; {meaning}." if meaning else ".")


def acquisition(records: Records) -> str | None:
    """Ranges of the acquisition facts that intake kept of the real images."""
    cases = () if records.real is None else records.real.cases()
    parts = [
        text
        for key, name in (("spacing_mm", "pixel spacing"), ("slice_thickness_mm", "slice thickness"))
        if (text := _range(cases, key, name))
    ]
    for key in ("format", "photometric"):
        words = Counter(str(word) for case in cases if (word := case.acquisition.get(key)) and _WORD.fullmatch(str(word)))
        parts += [f"{key} " + listed(f"{word} ({count})" for word, count in sorted(words.items()))] if words else []
    return f"Recorded of the source images: {'; '.join(parts)}." if parts else None


def _range(cases: Iterable[Case], key: str, name: str) -> str:
    numbers: list[float] = []
    for case in cases:
        value: Any = case.acquisition.get(key)
        values = value if isinstance(value, list | tuple) else [value]
        numbers += [float(entry) for entry in values if isinstance(entry, int | float)]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return f"{name} {low:g} mm" if low == high else f"{name} {low:g} to {high:g} mm"


def deidentification(records: Records) -> str | None:
    """Pseudonyms and the search for text in the pixels."""
    data = records.real or records.described
    text = data.notes.get("burned_in") or {}
    parts = []
    if "pseudonym_key" in data.notes:
        parts.append("Patients and series carry keyed pseudonyms; names, identifiers and dates were not taken over.")
    if text.get("checked"):
        parts.append(f"All images were searched for text in the pixels: {counted(int(text['suspects']), 'suspect')} stayed in.")
    elif text:
        parts.append("Not every image was searched for text in the pixels.")
    return " ".join(parts) or None


def label_source(records: Records) -> str | None:
    """Where the labels of the real images come from, as far as intake knows."""
    join = (records.intake or {}).get("join") or {}
    if not join:
        return None
    if join.get("key"):
        key = _KEYS.get(join["key"], join["key"])
        return f"Labels were delivered in a table and joined with the images by {key}."
    return "Labels were delivered with the files (folder names or the data set's own)."


def rater_agreement(records: Records) -> str | None:
    """Agreement of readers where some images were read more than once."""
    found = (records.intake or {}).get("agreement") or {}
    if "read_twice" not in found:
        return None
    if not found["read_twice"]:
        return "The labels hold one reading each, so agreement between readers cannot be computed."
    weights = f" ({found['weights']} weights)" if found.get("weights") not in (None, "none") else ""
    return (
        f"{found['read_twice']} were read more than once, {found['disagreed']} of them differently; agreement of pairs "
        f"{figure(found['percent_agreement'])}, kappa{weights} {figure(found['kappa'])}."
    )


def leak(records: Records) -> str | None:
    """How much a mere memory of the training split tells about the test split."""
    data = records.real or records.described
    found = data.notes.get("leak") or {}
    if not found.get("n"):
        return None
    return (
        f"Leak indicator {found['level']}: the nearest training image gives the label of a test image with balanced accuracy "
        f"{figure(found['balanced_accuracy'])} (chance {figure(found['chance'])}, classifier without memory {figure(found['memoryless'])})."
    )


def data_version(records: Records) -> str | None:
    """The medaug that made the real cohort."""
    made = (records.real or records.described).created_by
    return f"Cohort made with medaug {made['version']}." if "version" in made else None
