"""What is negotiated: storage SOP classes (PS3.4 B.5) and the transfer syntaxes (PS3.5 A) that can be decoded here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from medaug.pacs.quiet import load

# PS3.5 A.1 to A.5: what needs no codec.
UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
IMPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED = UNCOMPRESSED[1], UNCOMPRESSED[2], UNCOMPRESSED[3]
COMPRESSED = (
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K lossless RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
)
# Proposed when a PACS does not say which SOP classes a series holds: CT, enhanced CT, MR, enhanced MR, CR, DX for
# presentation and processing, mammography likewise, secondary capture with its multi-frame kinds, US, NM, PET, XA, RF.
COMMON_IMAGES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{tail}"
    for tail in (
        *("2", "2.1", "4", "4.1", "1", "1.1", "1.1.1", "1.2", "1.2.1", "7", "7.1", "7.2", "7.3", "7.4"),
        *("6.1", "3.1", "20", "128", "12.1", "12.2", "13.1.3"),
    )
)
MAX_CONTEXTS = 128  # PS3.8 9.3.2.2: odd identifiers from 1 to 255


def readable_syntaxes() -> list[str]:
    """Transfer syntaxes whose pixels the installed decoders read; a peer that has others can convert while it sends."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    return [*UNCOMPRESSED, *(uid for uid in COMPRESSED if get_decoder(UID(uid)).is_available)]


def storage_classes() -> list[str]:
    """Every storage SOP class that pynetdicom knows."""
    return [str(context.abstract_syntax) for context in load("pynetdicom").AllStoragePresentationContexts]


def storage_contexts(classes: Sequence[str], room: int = MAX_CONTEXTS) -> list[Any]:
    """Presentation contexts to ask for: one per class and transfer syntax, so that the peer can send what it holds.

    One context with many transfer syntaxes would make the peer choose one of them for every image. Only when they
    would be more than `room`, each class gets a single context.
    """
    build = load("pynetdicom").build_context
    syntaxes = readable_syntaxes()
    classes = list(dict.fromkeys(classes))
    if len(classes) * len(syntaxes) <= room:
        return [build(sop_class, syntax) for sop_class in classes for syntax in syntaxes]
    return [build(sop_class, syntaxes) for sop_class in classes[:room]]


def provider_roles(classes: Iterable[str]) -> list[Any]:
    """Role selection (PS3.7 D.3.3.4) that lets the peer store into this association, as C-GET needs."""
    build = load("pynetdicom").build_role
    return [build(sop_class, scp_role=True) for sop_class in dict.fromkeys(classes)]
