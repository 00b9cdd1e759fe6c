"""The dataset card of a cohort and the model card of a training run, in Markdown.

A card is a table of headings, labels and facts. A fact that no record holds reads "not recorded".
"""

from __future__ import annotations

from collections.abc import Sequence

from medaug.cohort import SPLITS
from medaug.evidence import data_facts, grading_facts, set_facts
from medaug.evidence.records import Records
from medaug.evidence.shown import NOT_RECORDED, markdown, table

Line = tuple[str, grading_facts.Fact]

USE = (
    "Research on the augmentation of small labelled sets of medical images: training of classifiers that are judged on real images. "
    "Not for diagnosis, treatment or any other clinical use, and not as a test set."
)
GENERATOR_LIMITS = (
    "A generator learns what its training images hold, their gaps and biases too, and adds no finding that they lack.",
    "A generator can reproduce training images; the gate's search for copies finds those that lie near in its feature spaces, not all.",
    "Labels of synthetic images are those of a model or a plan, not of a reader.",
    "Another run of the same method makes other images; figures for one set do not carry over.",
)

__all__ = ["dataset_card", "model_card"]

_DATASET: Sequence[tuple[str, Sequence[Line]]] = (
    (
        "Origin",
        (
            ("described set", set_facts.described_set),
            ("real data", data_facts.source_cohort),
            ("sizes", data_facts.sizes),
            ("patients", data_facts.patients),
            ("taken in", data_facts.taken_in),
            ("splits", data_facts.split_level),
            ("acquisition", data_facts.acquisition),
            ("format", data_facts.preprocessing),
            ("identity", data_facts.deidentification),
        ),
    ),
    (
        "Generator",
        (
            ("origin", set_facts.generator),
            ("sampling", set_facts.sampling),
            ("what it saw", set_facts.held_out),
            ("software", set_facts.set_version),
        ),
    ),
    (
        "Gate",
        (
            ("checks", set_facts.gate_checks),
            ("acceptance", set_facts.gate_acceptance),
            ("copies found", set_facts.gate_copies),
            ("fidelity", set_facts.fidelity),
            ("memory of training images", set_facts.membership),
        ),
    ),
    (
        "Labels",
        (
            ("real images", data_facts.label_source),
            ("agreement of readers", data_facts.rater_agreement),
            ("synthetic images", set_facts.gate_labels),
        ),
    ),
    (
        "Does it help",
        (
            ("graded as", grading_facts.graded_as),
            ("result", grading_facts.comparisons),
            ("warnings", grading_facts.warnings),
        ),
    ),
)
_SYNTHETIC_ONLY = ("Generator", "Gate", "Does it help")

_MODEL: Sequence[tuple[str, Sequence[Line]]] = (
    (
        "Model",
        (
            ("network and process", set_facts.model),
            ("identity", set_facts.run_identity),
            ("sampling", set_facts.sampling),
            ("software", set_facts.set_version),
        ),
    ),
    ("Data", (("trained on", set_facts.training_data), ("real data", data_facts.source_cohort), ("sizes", data_facts.sizes))),
    ("Training", (("settings", set_facts.training), ("final loss", lambda records: None))),
    (
        "Evaluation",
        (
            ("samples", set_facts.evaluation),
            ("gate", set_facts.gate_acceptance),
            ("copies found", set_facts.gate_copies),
            ("memory of training images", set_facts.membership),
            ("use in training", grading_facts.own_comparisons),
        ),
    ),
)


def dataset_card(records: Records) -> str:
    """The card of the described cohort."""
    synthetic = bool(records.synthetic)
    sections = [section for section in _DATASET if synthetic or section[0] not in _SYNTHETIC_ONLY]
    limits = [*(GENERATOR_LIMITS if synthetic else ()), *_leak(records), *grading_facts.warning_texts(records)]
    blocks = [
        f"# {markdown(records.described.name)}",
        f"> {markdown(set_facts.statement(records))}",
        "## Counts",
        _counts(records),
        *_sections(records, sections),
        "## Intended use",
        USE,
        "## Known limits",
        _bullets(limits),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def model_card(records: Records) -> str:
    """The card of the training run.

    Raises:
        KeyError: the run lacks a field.
    """
    assert records.run is not None
    limits = [*GENERATOR_LIMITS, *_leak(records)]
    blocks = [
        f"# {markdown(str(records.run['bundle']))}, trained on {markdown(_trained_on(records))}",
        f"> Images from this model are synthetic. {set_facts.NOT_CLINICAL}",
        *_sections(records, _MODEL),
        "## Intended use",
        USE,
        "## Known limits",
        _bullets(limits),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _leak(records: Records) -> list[str]:
    text = data_facts.leak(records)
    return [] if text is None else [text]


def _trained_on(records: Records) -> str:
    assert records.run is not None
    return f"{records.real.name}" if records.real is not None else f"cohort {str(records.run['cohort_sha256'])[:12]}"


def _counts(records: Records) -> str:
    """Images per class: real and synthetic ones of training, validation, test."""
    data = records.described
    rows = []
    for label, name in enumerate(data.classes):
        own = [case for case in data.training if case.label == label]
        made = sum(case.is_synthetic for case in own)
        held_out = [data.class_counts(split)[label] for split in SPLITS[1:]]
        rows.append([name, len(own) - made, made, *held_out, len(own) + sum(held_out)])
    rows.append(["all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))])
    return table(["class", "training, real", "training, synthetic", *SPLITS[1:], "all"], rows)


def _sections(records: Records, sections: Sequence[tuple[str, Sequence[Line]]]) -> list[str]:
    blocks = []
    for heading, lines in sections:
        blocks += [f"## {heading}", "\n".join(f"- **{label}:** {_shown(fact(records))}" for label, fact in lines)]
    return blocks


def _shown(text: str | None) -> str:
    return NOT_RECORDED if text is None else markdown(text)


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {markdown(text)}" for text in texts) or NOT_RECORDED
