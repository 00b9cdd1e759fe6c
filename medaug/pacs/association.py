"""Associations that we ask for (PS3.8): opened, or refused with a reason a user can act on."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from medaug import __implementation_uid__, __version__
from medaug.errors import ConfigError, StorageError
from medaug.pacs.peers import DicomPeer
from medaug.pacs.quiet import load

MAX_PDU = 1 << 18
_CALLING_UNKNOWN, _CALLED_UNKNOWN = 0x03, 0x07  # reasons of the service user (PS3.8 9.3.4)


class Lost(StorageError):
    """The peer cannot be reached, or went away, or was too busy: worth another try."""


class Refused(StorageError):
    """One image or file was not delivered or not taken; another try would end alike, and the others go on."""


def gone(when: str) -> Lost:
    """The error for an association that ended without an answer."""
    return Lost(
        "pacs-lost",
        f"The PACS went away {when}; run the same command again to go on. If it does so every time, register our AE title there or "
        "change --calling.",
    )


@contextmanager
def association(
    peer: DicomPeer,
    contexts: Sequence[Any],
    timeout: float,
    roles: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
) -> Iterator[Any]:
    """An established association with `peer`, released at the end of the block.

    Raises:
        Lost: `pacs-unreachable`, `pacs-busy`.
        ConfigError: `pacs-rejected`: the peer does not accept the AE titles or anything that we propose.
    """
    entity = load("pynetdicom").AE(ae_title=peer.calling)
    identify(entity)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = timeout
    host = _address(peer)
    link = entity.associate(
        host,
        peer.port,
        contexts=list(contexts),
        ae_title=peer.called,
        max_pdu=MAX_PDU,
        ext_neg=list(roles),
        evt_handlers=list(handlers),
    )
    if not link.is_established:
        raise _refusal(peer, link)
    try:
        yield link
    finally:
        if link.is_established:
            link.release()


def identify(entity: Any) -> None:
    """Let an application entity name the same implementation as our files do (PS3.7 D.3.3.2)."""
    entity.implementation_class_uid = __implementation_uid__
    entity.implementation_version_name = f"MEDAUG {__version__}"[:16]


def _address(peer: DicomPeer) -> str:
    try:
        found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except OSError:
        raise Lost("pacs-unreachable", f"The name of the PACS {peer.host} cannot be resolved; check --pacs.") from None
    return str(sorted(found, key=lambda entry: entry[0] != socket.AF_INET)[0][4][0])


def _refusal(peer: DicomPeer, link: Any) -> StorageError | ConfigError:
    if link.is_rejected:
        answer = link.acceptor.primitive
        permanent, source, reason = answer.result == 0x01, answer.result_source, answer.diagnostic
        if permanent and source == 0x01 and reason == _CALLING_UNKNOWN:
            return ConfigError(
                "pacs-rejected",
                f"The PACS does not know the calling AE title {peer.calling}; register it there or change --calling.",
            )
        if permanent and source == 0x01 and reason == _CALLED_UNKNOWN:
            return ConfigError("pacs-rejected", f"The PACS does not answer to the AE title {peer.called}; check --called.")
        if permanent:
            return ConfigError("pacs-rejected", f"The PACS rejected the association (source {source}, reason {reason}).")
        return Lost("pacs-busy", "The PACS is too busy for another association; run the same command again later.")
    if link.rejected_contexts and not link.accepted_contexts:
        return ConfigError("service-unsupported", "The PACS offers none of the services or image classes asked for.")
    return Lost(
        "pacs-unreachable", f"No DICOM association with {peer.host} port {peer.port}; check the address and that the PACS is up."
    )
