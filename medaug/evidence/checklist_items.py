"""What an item of a checklist is, and how it is answered from records."""

from __future__ import annotations

from dataclasses import dataclass

from medaug.evidence.grading_facts import Fact
from medaug.evidence.records import Records

BLANK = "-- fill in --"
STATES = ("from records", "in part", "blank")

__all__ = ["BLANK", "STATES", "Answer", "Checklist", "Item", "answer"]


@dataclass(frozen=True)
class Item:
    """One item: its number, its topic, what it asks in our words, the facts that answer, and what only the authors know."""

    number: str
    topic: str
    asks: str
    facts: tuple[Fact, ...] = ()
    authors: str = ""


@dataclass(frozen=True)
class Checklist:
    """A published checklist: short name, where it is published, items in its order."""

    name: str
    source: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Answer:
    """The answer to an item.

    Attributes:
        texts: what the records say, a sentence or two each.
        blank: what is left to fill in; empty if nothing is.
    """

    item: Item
    texts: tuple[str, ...]
    blank: str

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return STATES[2] if not self.texts else STATES[1] if self.blank else STATES[0]


def answer(item: Item, records: Records) -> Answer:
    """Fill an item; a fact without a record leaves a blank, as does what only the authors can know."""
    found = [fact(records) for fact in item.facts]
    blank = f"{BLANK} {item.authors}".strip() if item.authors or None in found or not found else ""
    return Answer(item, tuple(text for text in found if text is not None), blank)
