"""Send a folder of DICOM files to an archive: C-STORE (PS3.4 B) or STOW-RS (PS3.18 10.5), each file once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.errors import DataError, StorageError
from medaug.pacs.association import Lost, association
from medaug.pacs.outbox import Journal, Letter, collect
from medaug.pacs.peers import DicomPeer, Patience, WebPeer
from medaug.pacs.quiet import load, quiet
from medaug.pacs.syntaxes import IMPLICIT_LITTLE, MAX_CONTEXTS, UNCOMPRESSED
from medaug.progress import progress

SENT, FAILED, WAITING = "sent", "failed", "waiting"


def send(
    folder: Path,
    peer: DicomPeer | WebPeer,
    *,
    state: Path | None = None,
    patience: Patience | None = None,
    allow_real: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Send every DICOM file of `folder` that this peer has not taken yet.

    Args:
        folder: an export; files that are not DICOM are left out.
        peer: the PACS, by DICOM's own protocol or DICOMweb.
        state: folder of the journal; default `folder`/.medaug.
        patience: timeout and retries; failures are counted from the last file that was taken.
        allow_real: also send images that do not say (0008,001C) SyntheticData YES.
        dry_run: only check and count.

    Returns:
        Summary: `files`, `already` (sent by an earlier run), `sent`, `failed`, `codes` (status -> number), `others`.

    Raises:
        DataError: `not-synthetic`, and see `outbox.collect`.  ConfigError: rejected or unsupported.
        StorageError: `pacs-unreachable`, `send-incomplete`: some files were not taken; a second run tries them again.
    """
    load("pynetdicom" if isinstance(peer, DicomPeer) else "dicomweb_client")
    patience = patience or Patience()
    with quiet():
        letters, others = collect(folder)
        _refuse_real(letters, allow_real)
        folder_of_state = Path(state) if state is not None else Path(folder) / ".medaug"
        path = folder_of_state / f"sent-{_key(peer)}.jsonl"
        if dry_run:
            sent = _sent_before(path, letters)
            return _counts(letters, others) | {"dry_run": True, "already": sent, "to_send": len(letters) - sent}
        with storage.locked(folder_of_state), Journal(path) as journal:
            waiting = [letter for letter in letters if journal.status.get(letter.sha256) != SENT]
            codes: Counter[str] = Counter()
            failure = _send_all(peer, waiting, journal, codes, patience)
            left = sum(journal.status.get(letter.sha256) != SENT for letter in waiting)
    result = _counts(letters, others) | {"already": len(letters) - len(waiting), "sent": len(waiting) - left, "failed": left}
    if left:
        why = f" ({failure.message})" if failure else f" (answers: {', '.join(f'{code} x {n}' for code, n in codes.items())})"
        raise StorageError(
            "send-incomplete", f"{left} of {len(letters)} files were not taken{why}; run the same command again to go on."
        )
    return result | {"codes": dict(sorted(codes.items()))}


def _refuse_real(letters: Sequence[Letter], allow_real: bool) -> None:
    real = sum(not letter.synthetic for letter in letters)
    if real and not allow_real:
        raise DataError(
            "not-synthetic",
            f"{real} of {len(letters)} images do not say (0008,001C) SyntheticData YES; nothing was sent. "
            "Send a folder of `medaug export`, or pass --allow-real if these are meant.",
        )


def _key(peer: DicomPeer | WebPeer) -> str:
    text = ["web", peer.url] if isinstance(peer, WebPeer) else ["dicom", peer.host, peer.port, peer.called]
    return storage.sha256_json(text)[:16]


def _counts(letters: Sequence[Letter], others: int) -> dict[str, Any]:
    return {"files": len(letters), "others": others, "synthetic": sum(letter.synthetic for letter in letters)}


def _sent_before(path: Path, letters: Sequence[Letter]) -> int:
    if not path.exists():
        return 0
    with Journal(path) as journal:
        return sum(journal.status.get(letter.sha256) == SENT for letter in letters)


def _send_all(
    peer: DicomPeer | WebPeer, waiting: Sequence[Letter], journal: Journal, codes: Counter[str], patience: Patience
) -> StorageError | None:
    """Send until nothing is left or `retries` tries in a row brought nothing; refused files are not tried again in this run."""
    queue = list(waiting)
    failures = 0
    failure: StorageError | None = None
    with progress("sending", len(queue)) as advance:
        while queue and failures <= patience.retries:
            if failures:
                patience.wait(failures)
            before = len(queue)

            def done(letter: Letter, status: str, code: str, queue: list[Letter] = queue) -> None:
                journal.note(letter.sha256, status, code)
                codes[code or "0x0000"] += 1
                if status != WAITING:
                    queue.remove(letter)
                    advance(1)

            try:
                failure = None
                _send_some(peer, list(queue), done, patience.timeout)
            except Lost as error:
                failure = error
            failures = failures + 1 if len(queue) == before else int(bool(queue))
    return failure


def _send_some(
    peer: DicomPeer | WebPeer, letters: Sequence[Letter], done: Callable[[Letter, str, str], None], timeout: float
) -> None:
    if isinstance(peer, WebPeer):
        from medaug.pacs.web import WebArchive

        with WebArchive(peer, timeout) as archive:
            for letter in letters:
                done(letter, *archive.store(letter.path))
        return
    for batch, contexts in _batches(letters):
        with association(peer, contexts, timeout) as link, _from_disk():
            for letter in batch:
                status, code = _store_one(link, letter)
                done(letter, status, code)


def _batches(letters: Sequence[Letter]) -> Iterator[tuple[list[Letter], list[Any]]]:
    """Files that fit into the presentation contexts of one association, with these contexts."""
    build = load("pynetdicom").build_context
    batch: list[Letter] = []
    pairs: dict[tuple[str, str], None] = {}
    for letter in letters:
        wanted = {(letter.sop_class, letter.syntax): None}
        if letter.syntax in UNCOMPRESSED:
            wanted[letter.sop_class, IMPLICIT_LITTLE] = None  # which every peer has to accept (PS3.5 10.1)
        if len(pairs | wanted) > MAX_CONTEXTS:
            yield batch, [build(*pair) for pair in pairs]
            batch, pairs = [], {}
        batch.append(letter)
        pairs |= wanted
    yield batch, [build(*pair) for pair in pairs]


@contextmanager
def _from_disk() -> Iterator[None]:
    """Let pynetdicom send a file in chunks from disk, not decoded."""
    config: Any = load("pynetdicom._config")
    before = config.STORE_SEND_CHUNKED_DATASET
    config.STORE_SEND_CHUNKED_DATASET = True
    try:
        yield
    finally:
        config.STORE_SEND_CHUNKED_DATASET = before


def _store_one(link: Any, letter: Letter) -> tuple[str, str]:
    """One C-STORE: status and code. 0xA7xx (out of resources) is tried again, 0xBxxx is a warning and stored."""
    if not link.is_established:
        raise Lost("pacs-lost", "The PACS went away in mid-transfer; run the same command again to go on.")
    accepted = {(str(context.abstract_syntax), str(context.transfer_syntax[0])) for context in link.accepted_contexts}
    if (letter.sop_class, letter.syntax) in accepted:
        answer = link.send_c_store(letter.path)
    elif letter.syntax in UNCOMPRESSED and (letter.sop_class, IMPLICIT_LITTLE) in accepted:
        from pydicom import dcmread

        answer = link.send_c_store(dcmread(letter.path))  # encoded anew as implicit VR; the values stay
    else:
        return FAILED, "not-accepted"
    if "Status" not in answer:
        raise Lost("pacs-lost", "The PACS went away in mid-transfer; run the same command again to go on.")
    code = int(answer.Status)
    if code == 0 or code >> 12 == 0xB:
        return SENT, "" if code == 0 else f"0x{code:04X}"
    return WAITING if code >> 8 == 0xA7 else FAILED, f"0x{code:04X}"
