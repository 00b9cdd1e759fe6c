"""Checklists for a paper, as Markdown and as one HTML page: what records answer is answered, the rest stays blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

from medaug.evidence.checklist_items import STATES, Answer, answer
from medaug.evidence.claim import CLAIM
from medaug.evidence.records import Records, missing
from medaug.evidence.shown import listed, markdown
from medaug.evidence.tripod import TRIPOD

CHECKLISTS = (CLAIM, TRIPOD)
NOTE = (
    "Answers are taken from the records of medaug and are true of the records, not of the paper. What an item asks is put in short words "
    "here; the published checklist decides. Blanks are for the authors, and every answer is theirs to check."
)

__all__ = ["CHECKLISTS", "answers_of", "counts_of", "html_page", "markdown_page"]

Answers = Mapping[str, Sequence[Answer]]


def answers_of(records: Records) -> dict[str, list[Answer]]:
    """Every item of every checklist, answered or blank."""
    return {checklist.name: [answer(item, records) for item in checklist.items] for checklist in CHECKLISTS}


def counts_of(answers: Answers) -> dict[str, dict[str, int]]:
    """Per checklist, how many items are in which state."""
    return {
        name: {state: sum(entry.state == state for entry in entries) for state in STATES} for name, entries in answers.items()
    }


def markdown_page(records: Records, answers: Answers) -> str:
    """``checklists.md``."""
    blocks = [f"# Checklists: {markdown(records.described.name)}", NOTE]
    if missing(records):
        blocks.append(f"Without: {listed(missing(records))}.")
    for checklist in CHECKLISTS:
        counts = listed(f"{state} {count}" for state, count in counts_of(answers)[checklist.name].items())
        rows = ["| item | topic | asks | answer |", "|---|---|---|---|", *map(_row, answers[checklist.name])]
        blocks += [f"## {checklist.name}", f"{checklist.source}. Items: {counts}.", "\n".join(rows)]
    return "\n\n".join(blocks) + "\n"


def _row(entry: Answer) -> str:
    blank = [f"**{markdown(entry.blank)}**"] if entry.blank else []
    cells = [entry.item.number, entry.item.topic, entry.item.asks, " ".join([*map(markdown, entry.texts), *blank])]
    return f"| {' | '.join(cells)} |"


def html_page(records: Records, answers: Answers) -> str:
    """``checklists.html``: self-contained, one section for each checklist."""
    import jinja2

    template = resources.files("medaug.evidence").joinpath("checklists.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=records.described.name,
        note=NOTE,
        missing=missing(records),
        checklists=[(checklist, answers[checklist.name], counts_of(answers)[checklist.name]) for checklist in CHECKLISTS],
    )
