"""A cohort as a Croissant data set: `croissant.json`, and `cases.json` with the list of cases it points to.

Croissant 1.1 (MLCommons, 2026) with the Responsible-AI vocabulary 1.0 (MLCommons, 2024), both documented at
docs.mlcommons.org/croissant. The two files belong beside the folder of images that they name: paths in them are relative to
themselves. A case is published with its id, image, sha256 of that image, label, split and whether it is synthetic; groups,
pseudonyms, hashes of source files and acquisition facts stay behind.

Images are named, not loaded: generic readers of PNG, mlcroissant's among them, turn 16-bit grey into 8 bits and lose it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from medaug import storage
from medaug.cohort import SPLITS
from medaug.errors import DataError
from medaug.evidence import data_facts, set_facts
from medaug.evidence.cards import GENERATOR_LIMITS, USE
from medaug.evidence.records import Records

CASES_NAME = "cases.json"
FOR_AUTHORS = ("citeAs", "creator", "datePublished", "license", "url", "version")  # Croissant wants them, no record knows them
CONFORMS_TO = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
ENCODINGS = {".png": "image/png", ".nii.gz": "https://nifti.nimh.nih.gov/nifti-1", ".nii": "https://nifti.nimh.nih.gov/nifti-1"}

# Field -> (type, what it holds).
FIELDS = {
    "id": ("sc:Text", "Name of the case, unique in the set."),
    "image": ("sc:Text", "Path of the image, relative to this file."),
    "sha256": ("sc:Text", "sha256 of the image file."),
    "label": ("sc:Text", "Class of the image."),
    "rank": ("sc:Integer", "Place of the class in the list of classes, from 0."),
    "split": ("sc:Text", "training, validation or test."),
    "synthetic": ("sc:Boolean", "True for an image made by a generative model."),
}
_RAI: dict[str, Callable[[Records], str | None]] = {
    "rai:dataCollection": lambda records: _joined(records, set_facts.statement, set_facts.generator, data_facts.source_cohort),
    "rai:dataCollectionMissingData": lambda records: _joined(records, data_facts.taken_in, data_facts.missing_data),
    "rai:dataPreprocessingProtocol": lambda records: _joined(records, data_facts.preprocessing, set_facts.gate_checks),
    "rai:dataAnnotationProtocol": lambda records: _joined(records, data_facts.label_source, set_facts.gate_labels),
    "rai:dataAnnotationAnalysis": data_facts.rater_agreement,
    "rai:machineAnnotationTools": set_facts.gate_labels,
    "rai:dataBiases": data_facts.leak,
    "rai:dataLimitations": lambda records: " ".join(GENERATOR_LIMITS) if records.synthetic else None,
    "rai:dataUseCases": lambda records: USE,
    "rai:personalSensitiveInformation": data_facts.deidentification,
}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
} | {
    name: f"cr:{name}"
    for name in (
        "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileObject", "fileProperty",
        "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet",
        "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
    )
}  # fmt: skip

__all__ = ["CASES_NAME", "FIELDS", "FOR_AUTHORS", "cases_json", "croissant_json"]


def cases_json(records: Records) -> str:
    """The text of ``cases.json``: one object for each case, in the order of the cohort.

    Raises:
        DataError: `cohort-unrooted`.
    """
    data = records.described
    rows = [
        {
            "id": case.id,
            "image": case.image,
            "sha256": storage.sha256_file(data.path(case)),
            "label": data.classes[case.label],
            "rank": case.label,
            "split": split,
            "synthetic": case.is_synthetic,
        }
        for split in SPLITS
        for case in data.split(split)
    ]
    return _text({"cases": rows})


def croissant_json(records: Records, cases: str) -> str:
    """The text of ``croissant.json``.

    Args:
        cases: the text of ``cases.json``.

    Raises:
        DataError: `image-format` for files that are neither PNG nor NIfTI.
    """
    data = records.described
    content: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": data.name,
        "description": f"{set_facts.statement(records)} {set_facts.described_set(records)}",
        "keywords": [*filter(None, [data.modality]), "medical imaging", *(["synthetic"] if records.synthetic else [])],
    }
    content |= {key: text for key, fact in _RAI.items() if (text := fact(records)) is not None}
    content["distribution"] = [_cases_file(cases), *_image_sets(records)]
    content["recordSet"] = [_classes(records), _case_records()]
    return _text(content)


def _joined(records: Records, *facts: Callable[[Records], str | None]) -> str | None:
    return " ".join(text for fact in facts if (text := fact(records)) is not None) or None


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _cases_file(cases: str) -> dict[str, Any]:
    data = cases.encode()
    return {
        "@type": "cr:FileObject",
        "@id": CASES_NAME,
        "name": CASES_NAME,
        "description": "The cases, one object for each.",
        "contentUrl": CASES_NAME,
        "contentSize": f"{len(data)} B",
        "encodingFormat": "application/json",
        "sha256": storage.sha256_bytes(data),
    }


def _image_sets(records: Records) -> list[dict[str, Any]]:
    """One set of files for each folder and ending that the cases name."""
    kinds = sorted({_kind(PurePosixPath(case.image)) for case in records.described.cases()})
    return [
        {
            "@type": "cr:FileSet",
            "@id": f"images-{number}",
            "name": f"images-{number}",
            "description": f"The images; {CASES_NAME} lists the sha256 of each.",
            "encodingFormat": ENCODINGS[ending],
            "includes": f"{folder}/*{ending}",
        }
        for number, (folder, ending) in enumerate(kinds, start=1)
    ]


def _kind(image: PurePosixPath) -> tuple[str, str]:
    ending = next((ending for ending in ENCODINGS if image.name.endswith(ending)), None)
    if ending is None:
        raise DataError("image-format", f"Images must be {', '.join(ENCODINGS)}, got one that ends with {image.suffix!r}.")
    return str(image.parent), ending


def _classes(records: Records) -> dict[str, Any]:
    """The classes in their order, their data in the file itself."""
    data = records.described
    order = "in their order" if data.ordinal else "which have no order"
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": f"The classes, {order}.",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/name"},
        "field": [
            {"@type": "cr:Field", "@id": "classes/name", "name": "name", "dataType": "sc:Text"},
            {"@type": "cr:Field", "@id": "classes/rank", "name": "rank", "dataType": "sc:Integer"},
        ],
        "data": [{"classes/name": name, "classes/rank": rank} for rank, name in enumerate(data.classes)],
    }


def _case_records() -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "cases",
        "name": "cases",
        "description": "One record for each image.",
        "key": {"@id": "cases/id"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"cases/{name}",
                "name": name,
                "description": text,
                "dataType": kind,
                "source": {"fileObject": {"@id": CASES_NAME}, "extract": {"jsonPath": f"$.cases[*].{name}"}},
            }
            for name, (kind, text) in FIELDS.items()
        ],
    }
