"""A budget for parsing untrusted data sets: eight bytes of a file become up to 1.3 kB of objects, and deflated files hold few bytes.

Counted are the reads that pydicom makes of a stream: one to three for an element, three or four for an item of a sequence,
each of which costs at most about 250 bytes and 5 microseconds. Honest headers are far below, and short ones are not counted.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

from pydicom import DataElement, Dataset
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_sequence
from pydicom.hooks import raw_element_vr
from pydicom.sequence import Sequence

from medaug.errors import DataError

MAX_READS = 1_000_000  # 2,000 frames with 150 elements each; 250 MB of objects
SHORT = 1 << 21  # bytes, of which no more can be made than a budget allows
PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})


class _Counted:
    """A stream that counts its reads and ends them with the budget."""

    def __init__(self, stream: BinaryIO, budget: Budget) -> None:
        self._read, self.seek, self.tell = stream.read, stream.seek, stream.tell
        self._budget = budget

    def read(self, size: int = -1) -> bytes:
        self._budget.left -= 1
        if self._budget.left < 0:
            raise OSError  # pydicom turns some errors into this one; `Budget.parse` says what it means
        return self._read(size)


class Budget:
    """Reads that are left for one file."""

    def __init__(self, reads: int = MAX_READS) -> None:
        self.reads = self.left = reads

    def parse(self, parse: Callable[[BinaryIO], Dataset], stream: BinaryIO, size: int) -> Dataset:
        """What `parse` makes of a stream of so many bytes, sequences of long headers included.

        Raises:
            DataError: `image-too-large`.
        """
        if size <= SHORT:
            return parse(stream)
        try:
            dataset = parse(_Counted(stream, self))  # type: ignore[arg-type]
            self._expand(dataset)
            return dataset
        except Exception:
            if self.left < 0:
                raise DataError(
                    "image-too-large",
                    f"The header holds more than about {self.reads // 3} elements and items; take private elements and "
                    "sequences out of it, or split the file.",
                ) from None
            raise

    def _expand(self, top: Dataset) -> None:
        """Parse sequences of defined length now, which pydicom would do when they are asked for, without a budget."""
        waiting = [top] if _is_long(top) else []
        while waiting:
            dataset = waiting.pop()
            for tag in list(dataset.keys()):
                element = dataset.get_item(tag)
                if isinstance(element, RawDataElement) and _is_sequence(element, dataset):
                    dataset[tag] = element = self._sequence(element, dataset)
                if isinstance(element, DataElement) and isinstance(element.value, Sequence):
                    waiting += element.value

    def _sequence(self, raw: RawDataElement, dataset: Dataset) -> DataElement:
        stream = _Counted(io.BytesIO(raw.value or b""), self)
        encoding = dataset.original_character_set or "iso8859"
        value = read_sequence(
            stream,  # type: ignore[arg-type]
            raw.is_implicit_VR,
            raw.is_little_endian,
            len(raw.value or b""),
            encoding,
            raw.value_tell,
        )
        return DataElement(raw.tag, "SQ", value, raw.value_tell, already_converted=True)


def _is_long(dataset: Dataset) -> bool:
    """True if more could be made of the sequences of a data set than a budget allows."""
    elements = [dataset.get_item(tag) for tag in dataset.keys() if tag not in PIXELS]  # noqa: SIM118 - iterating converts
    raw = [element for element in elements if isinstance(element, RawDataElement)]
    # Those of undefined length are parsed already, but may hold others that are not.
    return len(raw) < len(elements) or sum(len(element.value or b"") for element in raw) > SHORT


def _is_sequence(raw: RawDataElement, dataset: Dataset) -> bool:
    if raw.VR not in (None, "SQ", "UN") or raw.tag in PIXELS:
        return False
    found: dict[str, str] = {}
    raw_element_vr(raw, found, ds=dataset)
    return found["VR"] == "SQ"
