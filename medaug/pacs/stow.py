"""What a STOW-RS service says of an instance: the Store Instances Response Module in JSON or XML (PS3.18 10.5.3, I.2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from medaug.pacs.association import Refused

FAILED_SEQUENCE, REFERENCED_SEQUENCE = "00081198", "00081199"
REFERENCED_INSTANCE, FAILURE_REASON = "00081155", "00081197"


def outcome(body: bytes, status: int, sop: str) -> tuple[str, str]:
    """What became of the one instance of a request: it was stored only if the answer names it among the stored.

    Args:
        body: of the answer.
        status: 200, 202 or 409.
        sop: SOP Instance UID.

    Returns:
        ("sent", "") or ("failed", code).

    Raises:
        Refused: `send-failed`: the answer is no store response.
    """
    try:
        stored, failed = _read(body)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, ElementTree.ParseError):
        if status == 409:
            return "failed", "http-409"
        raise Refused(
            "send-failed",
            f"HTTP {status} and a DICOM store response (PS3.18 10.5.3) were expected, something else came; check the URL given with "
            "--dicomweb, and whether the service asks for credentials.",
        ) from None
    if status == 409 or sop in failed:
        reason = failed.get(sop)
        return "failed", f"0x{reason:04X}" if reason else f"http-{status}"
    return ("sent", "") if sop in stored else ("failed", "not-confirmed")


def _read(body: bytes) -> tuple[set[str], dict[str, int]]:
    """Instances stored, and instances refused with their reasons.

    Raises:
        ValueError and others: it is no store response.
    """
    text = body.decode("utf-8-sig").lstrip()
    entries = list(_xml(text) if text.startswith("<") else _json(text))
    if not any(name in (REFERENCED_SEQUENCE, FAILED_SEQUENCE) for name, _, _ in entries):
        raise ValueError("neither stored nor refused instances")
    stored = {sop for name, sop, _ in entries if name == REFERENCED_SEQUENCE}
    return stored, {sop: reason for name, sop, reason in entries if name == FAILED_SEQUENCE}


def _json(text: str) -> Iterator[tuple[str, str, int]]:
    """Sequence, instance and reason of each item (PS3.18 F.2); some services put the data set into a list."""
    answer = json.loads(text)
    for dataset in answer if isinstance(answer, list) else [answer]:
        for name in (REFERENCED_SEQUENCE, FAILED_SEQUENCE):
            for item in dataset.get(name, {}).get("Value", []):
                yield name, str(item[REFERENCED_INSTANCE]["Value"][0]), _number(item.get(FAILURE_REASON, {}).get("Value", [0])[0])


def _xml(text: str) -> Iterator[tuple[str, str, int]]:
    """The same of the Native DICOM Model (PS3.19 A.1)."""
    if "<!DOCTYPE" in text:
        raise ValueError("a document type")  # the model has none, and entities can grow
    root = ElementTree.fromstring(text)
    for name in (REFERENCED_SEQUENCE, FAILED_SEQUENCE):
        for item in root.findall(f"{{*}}DicomAttribute[@tag='{name}']/{{*}}Item"):
            values = {
                tag: item.findtext(f"{{*}}DicomAttribute[@tag='{tag}']/{{*}}Value")
                for tag in (REFERENCED_INSTANCE, FAILURE_REASON)
            }
            yield name, (values[REFERENCED_INSTANCE] or "").strip(), _number(values[FAILURE_REASON] or 0)


def _number(value: Any) -> int:
    number = int(value)
    return number if 0 <= number < 1 << 16 else 0
