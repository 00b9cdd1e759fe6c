"""Send a folder of DICOM files to an archive: C-STORE (PS3.4 B) or STOW-RS (PS3.18 10.5), each file once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medaug import storage
from medaug.errors import DataError, StorageError
from medaug.pacs.association import Lost, Refused, association, gone
from medaug.pacs.outbox import Journal, Letter, collect
from medaug.pacs.peers import DicomPeer, Patience, WebPeer
from medaug.pacs.quiet import load, quiet
from medaug.pacs.store import make_private
from medaug.pacs.syntaxes import IMPLICIT_LITTLE, MAX_CONTEXTS, UNCOMPRESSED
from medaug.pacs.whole import pixel_fault
from medaug.progress import progress

SENT, FAILED, WAITING = "sent", "failed", "waiting"
TAKEN = "0x0000"
MAX_LOSSES = 2  # of the connection with the same file on its way
MAX_REFUSALS = 5  # files without a store response before the first that has one: nobody stores anything there
BLAMELESS = ("pacs-unreachable", "pacs-busy")  # says nothing of the file that was to be sent


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
        patience: timeout and retries; failures are counted from the last file that was taken. A file with which the
            connection was lost comes last, and has failed when it is lost again.
        allow_real: also send images that do not say (0008,001C) SyntheticData YES.
        dry_run: only check and count.

    Returns:
        Summary: `files`, `already` (sent by an earlier run), `sent`, `failed`, `codes` (status -> number), `others`.

    Raises:
        DataError: `not-synthetic`, and see `outbox.collect`.  ConfigError: rejected or unsupported.
        StorageError: `pacs-unreachable`: nobody was there at any time; `send-failed`: what is there stores nothing;
            `send-incomplete`: some files were not taken; a second run tries them again.
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
        make_private(folder_of_state)
        with storage.locked(folder_of_state), Journal(path) as journal:
            waiting = [letter for letter in letters if journal.status.get(letter.sha256) != SENT]
            with progress("sending", len(waiting)) as advance:
                run = _Run(waiting, journal, advance)
                _send_all(peer, run, patience)
            left = sum(journal.status.get(letter.sha256) != SENT for letter in waiting)
    if left:
        raise _incomplete(run, left, len(letters))
    result = _counts(letters, others) | {"already": len(letters) - len(waiting), "sent": len(waiting), "failed": 0}
    return result | {"codes": dict(sorted(run.codes.items()))}


def _incomplete(run: _Run, left: int, total: int) -> StorageError:
    nobody = run.failure is not None and run.failure.code == "pacs-unreachable" and not run.codes and not run.losses
    if nobody and run.failure is not None:
        return run.failure
    if run.refusal is not None and not run.codes[TAKEN]:
        return run.refusal
    reasons = [f"{code} x {number}" for code, number in run.codes.items() if code != TAKEN]
    reasons += [run.failure.message.rstrip(".")] if run.failure is not None and run.queue else []
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return StorageError("send-incomplete", f"{left} of {total} files were not taken{why}; run the same command again to go on.")


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


class _Run:
    """The files that wait, in the order of their turns, and what became of the others.

    Attributes:
        queue: files to send; those that an earlier run tried in vain come last.
        codes: answers -> number.
        losses: sha256 -> how often the connection was lost with the file on its way.
        failure: why the last try ended early.
        refusal: the last answer that was no store response.
    """

    def __init__(self, waiting: Sequence[Letter], journal: Journal, advance: Callable[[int], None]) -> None:
        self.queue = sorted(waiting, key=lambda letter: letter.sha256 in journal.status)
        self.codes: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.failure: Lost | None = None
        self.refusal: Refused | None = None
        self._journal, self._advance = journal, advance

    def done(self, letter: Letter, status: str, code: str) -> None:
        """Note an answer."""
        self._journal.note(letter.sha256, status, code)
        self.codes[code or TAKEN] += 1
        if status != WAITING:
            self.queue.remove(letter)
            self._advance(1)

    def lost(self, letter: Letter, error: Lost) -> None:
        """Note that the connection was lost with this file on its way: the others go first, and a second time it has failed."""
        self.losses[letter.sha256] += 1
        if self.losses[letter.sha256] >= MAX_LOSSES:
            self.done(letter, FAILED, error.code)
            return
        self._journal.note(letter.sha256, WAITING, error.code)
        self.queue.remove(letter)
        self.queue.append(letter)

    def refused(self, letter: Letter, error: Refused) -> None:
        """Note an answer that was no store response.

        Raises:
            Refused: none of the first files got one.
        """
        self.refusal = error
        self.done(letter, FAILED, error.code)
        if self.codes.total() == self.codes[error.code] >= MAX_REFUSALS:
            raise error


def _send_all(peer: DicomPeer | WebPeer, run: _Run, patience: Patience) -> None:
    """Send until nothing is left or `retries` tries in a row brought nothing; refused files are not tried again in this run."""
    failures = 0
    while run.queue and failures <= patience.retries:
        if failures:
            patience.wait(failures)
        before = len(run.queue)
        run.failure = None
        try:
            _send_some(peer, run, patience.timeout)
        except Lost as error:
            run.failure = error
        except Refused:
            return
        failures = failures + 1 if len(run.queue) == before else int(bool(run.queue))


def _send_some(peer: DicomPeer | WebPeer, run: _Run, timeout: float) -> None:
    if isinstance(peer, WebPeer):
        _store_by_web(peer, run, timeout)
        return
    for batch, contexts in _batches(list(run.queue)):
        with association(peer, contexts, timeout) as link, _from_disk():
            for letter in batch:
                if not link.is_established:
                    raise gone("between two files")
                try:
                    status, code = _store_one(link, letter)
                except Lost as error:
                    run.lost(letter, error)
                    raise
                run.done(letter, status, code)


def _store_by_web(peer: WebPeer, run: _Run, timeout: float) -> None:
    from medaug.pacs.web import WebArchive

    with WebArchive(peer, timeout) as archive:
        for letter in list(run.queue):
            fault = pixel_fault(letter.path, letter.syntax)
            if fault:
                run.done(letter, FAILED, fault)
                continue
            try:
                status, code = archive.store(letter.path, letter.sop)
            except Lost as error:
                if error.code not in BLAMELESS:
                    run.lost(letter, error)
                raise
            except Refused as error:
                run.refused(letter, error)
            else:
                run.done(letter, status, code)


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
    fault = pixel_fault(letter.path, letter.syntax)
    if fault:
        return FAILED, fault
    accepted = {(str(context.abstract_syntax), str(context.transfer_syntax[0])) for context in link.accepted_contexts}
    as_it_is = (letter.sop_class, letter.syntax) in accepted
    if not as_it_is and (letter.syntax not in UNCOMPRESSED or (letter.sop_class, IMPLICIT_LITTLE) not in accepted):
        return FAILED, "not-accepted"
    try:
        if as_it_is:
            answer = link.send_c_store(letter.path)
        else:
            from pydicom import dcmread

            answer = link.send_c_store(dcmread(letter.path))  # encoded anew as implicit VR; the values stay
    except RuntimeError:
        raise gone("before a file") from None
    except Exception:  # noqa: BLE001 - pydicom raises anything on a file that it cannot read or encode
        return FAILED, "image-unreadable"
    if "Status" not in answer:
        raise gone("in mid-transfer")
    code = int(answer.Status)
    if code == 0 or code >> 12 == 0xB:
        return SENT, "" if code == 0 else f"0x{code:04X}"
    return WAITING if code >> 8 == 0xA7 else FAILED, f"0x{code:04X}"
