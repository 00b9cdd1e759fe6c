"""`medaug receive`, `retrieve` and `send`: to and from a PACS."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medaug.cli.options import JsonOption, OutOption, app, show
from medaug.errors import ConfigError

if TYPE_CHECKING:
    from medaug.pacs.peers import DicomPeer, Patience, WebPeer

PacsOption = Annotated[str | None, typer.Option("--pacs", metavar="HOST:PORT", help="The PACS, over DICOM's own protocol.")]
WebOption = Annotated[
    str | None,
    typer.Option("--dicomweb", metavar="URL", help="Its DICOMweb service; credentials: MEDAUG_DICOMWEB_USER, _PASSWORD, _TOKEN."),
]
CalledOption = Annotated[str | None, typer.Option("--called", help="AE title of the PACS.")]
CallingOption = Annotated[str, typer.Option("--calling", help="Our AE title, as the PACS knows it.")]
TimeoutOption = Annotated[
    float,
    typer.Option("--timeout", min=0.1, help="Seconds without an answer before giving up; DICOMweb: 5 times it for a request."),
]
RetriesOption = Annotated[int, typer.Option("--retries", min=0, help="Further tries when nothing came, with growing pauses.")]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Allow credentials over http to another machine.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check and count, transfer nothing.")]


@app.command()
def receive(
    out: OutOption,
    port: Annotated[int, typer.Option(help="TCP port to listen on.")] = 11112,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    ae_title: Annotated[str, typer.Option("--ae-title", help="Our AE title; requests for another are rejected.")] = "MEDAUG",
    allow: Annotated[list[str] | None, typer.Option("--allow", help="AE title that may send; repeatable.")] = None,
    max_pdu: Annotated[int, typer.Option("--max-pdu", help="Largest PDU in bytes.")] = 1 << 18,
    limit: Annotated[int | None, typer.Option(help="Stop after this many new files.")] = None,
    idle: Annotated[float | None, typer.Option(help="Stop after this many seconds without a file.")] = None,
    timeout: TimeoutOption = 60.0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take in the images that a PACS sends (storage SCP), until --limit, --idle or Ctrl-C.

    Example: medaug receive --out export --allow ORTHANC --idle 60
    """
    from medaug.pacs.receive import ReceiveOptions
    from medaug.pacs.receive import receive as run

    options = ReceiveOptions(host, port, ae_title, tuple(allow or ()), max_pdu, limit, idle, timeout)

    def on_ready(bound: int) -> None:
        typer.echo(f"Listening on {host} port {bound} as {ae_title}.", err=True)

    result = run(out, options, dry_run=dry_run, on_ready=on_ready)
    if dry_run:
        allowed = ", ".join(result["allow"]) or "anyone on this machine"
        text = (
            f"{result['ae_title']} could listen on {host} port {result['port']} for {allowed}; {result['files']} files are here."
        )
    else:
        text = _received(result)
    show(result, as_json, text)
    if result.get("interrupted") and (limit is not None or idle is not None):
        raise KeyboardInterrupt  # it was to wait for more; without a limit, an interrupt is the way to stop


@app.command()
def retrieve(
    out: OutOption,
    pacs: PacsOption = None,
    dicomweb: WebOption = None,
    called: CalledOption = None,
    calling: CallingOption = "MEDAUG",
    level: Annotated[str, typer.Option(help="Fetch whole studies, or series with conditions of their own.")] = "study",
    query: Annotated[list[str] | None, typer.Option("--query", metavar="KEY=VALUE", help="Condition; repeatable.")] = None,
    table: Annotated[Path | None, typer.Option(help="Label table, CSV or XLSX, whose keys are fetched.")] = None,
    key: Annotated[str, typer.Option(help="What its key column holds: accession, patient or study.")] = "accession",
    key_column: Annotated[str | None, typer.Option("--key-column", help="Name of the key column.")] = None,
    sheet: Annotated[str | None, typer.Option(help="Sheet of an XLSX table.")] = None,
    method: Annotated[str, typer.Option(help="get, or move to a receiver that this command starts.")] = "get",
    host: Annotated[str, typer.Option(help="For --method move: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="For --method move: port to listen on.")] = 11112,
    timeout: TimeoutOption = 60.0,
    retries: RetriesOption = 5,
    insecure: InsecureOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch studies or series from a PACS; a second run fetches only what is missing.

    Example: medaug retrieve --pacs 127.0.0.1:4242 --called ORTHANC --table labels.csv --key accession --out export
    """
    from medaug.pacs.query import parse_queries
    from medaug.pacs.retrieve import Destination
    from medaug.pacs.retrieve import retrieve as run

    peer, patience = _peer(pacs, dicomweb, called, calling, insecure), _patience(timeout, retries)
    values = table_keys(table, key, key_column, sheet) if table is not None else []
    queries = parse_queries(level, query or [], key if table is not None else "", values)
    result = run(peer, out, queries, method=method, destination=Destination(host, port), patience=patience, dry_run=dry_run)
    show(result, as_json, _retrieved(result))


@app.command()
def send(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM files, such as `medaug export` writes.")],
    pacs: PacsOption = None,
    dicomweb: WebOption = None,
    called: CalledOption = None,
    calling: CallingOption = "MEDAUG",
    state: Annotated[Path | None, typer.Option(help="Where to remember what was sent; default FOLDER/.medaug.")] = None,
    allow_real: Annotated[bool, typer.Option("--allow-real", help="Also send images not marked synthetic.")] = False,
    timeout: TimeoutOption = 60.0,
    retries: RetriesOption = 5,
    insecure: InsecureOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send synthetic images to a PACS; a second run sends only what was not taken.

    Example: medaug send exported --pacs 127.0.0.1:4242 --called ORTHANC
    """
    from medaug.pacs.send import send as run

    peer, patience = _peer(pacs, dicomweb, called, calling, insecure), _patience(timeout, retries)
    result = run(folder, peer, state=state, patience=patience, allow_real=allow_real, dry_run=dry_run)
    if dry_run:
        text = f"{result['to_send']} of {result['files']} files would be sent, {result['already']} were sent before."
    else:
        text = f"{result['sent']} of {result['files']} files sent, {result['already']} were sent before."
    show(result, as_json, text)


def _peer(pacs: str | None, dicomweb: str | None, called: str | None, calling: str, insecure: bool) -> DicomPeer | WebPeer:
    from medaug.pacs.peers import DicomPeer, WebPeer

    if (pacs is None) == (dicomweb is None):
        raise ConfigError("option-malformed", "Give the PACS as --pacs HOST:PORT or as --dicomweb URL, one of the two.")
    if dicomweb is not None:
        return WebPeer.parse(dicomweb, os.environ, insecure)
    if called is None:
        raise ConfigError("option-malformed", "--pacs needs --called, the AE title of the PACS.")
    return DicomPeer.parse(str(pacs), called, calling)


def _patience(timeout: float, retries: int) -> Patience:
    from medaug.pacs.peers import Patience

    return Patience(timeout, retries)


def table_keys(path: Path, key: str, column: str | None = None, sheet: str | None = None) -> list[tuple[int, str]]:
    """The key column of a label table: row number, 1 below the header, and value; rows without a key are left out.

    Raises:
        ConfigError: `option-malformed`, `column-missing`, `sheet-missing`.  DataError: the table cannot be read.
    """
    from medaug.errors import DataError
    from medaug.intake.labels import describe_columns
    from medaug.intake.tables import USUAL_NAMES, read_cells

    if key not in ("accession", "patient", "study"):
        raise ConfigError("option-malformed", "--key takes accession, patient or study.")
    if not path.is_file():
        raise DataError("file-missing", "The label table is not there.")
    cells = read_cells(path, sheet)
    header = [text.strip() for text in cells[0]]
    plain = [re.sub(r"[^a-z]", "", name.casefold()) for name in header]
    if column is not None:
        hits = [index for index, name in enumerate(header) if name.casefold() == column.strip().casefold()]
    else:
        hits = next((found for name in USUAL_NAMES[key] if (found := _places(plain, name))), [])
    if len(hits) != 1:
        raise ConfigError(
            "column-missing",
            f"The label table needs exactly one column for --key {key}, got {len(hits)}; name it with --key-column. "
            f"{describe_columns(header)}",
        )
    rows = ((number, line[hits[0]].strip() if hits[0] < len(line) else "") for number, line in enumerate(cells[1:], start=1))
    keys = [(number, value) for number, value in rows if value]
    if not keys:
        raise DataError("table-empty", "The key column of the label table is empty.")
    return keys


def _places(names: list[str], wanted: str) -> list[int]:
    return [index for index, name in enumerate(names) if name == wanted]


def _received(result: dict[str, Any]) -> str:
    refused = dict(result["refused"])
    aborted = refused.pop("transfer-aborted", 0)
    codes = f" ({', '.join(f'{code} x {number}' for code, number in refused.items())})" if refused else ""
    return (
        f"{result['received']} received, {result['already']} sent twice, {sum(refused.values())} refused{codes}, "
        f"{aborted} broken off; {result['files']} files are here."
    )


def _retrieved(result: dict[str, Any]) -> str:
    lines = [f"{result['studies']} studies, {result['series']} series, {result['images']} images found."]
    if result.get("dry_run"):
        lines.append(f"{result['images'] - result['present']} would be fetched, {result['present']} are here.")
    else:
        lines.append(f"{result['received']} fetched, {result['present']} were here, {result['missing']} missing.")
    if result["unmatched_rows"]:
        rows = ", ".join(map(str, result["unmatched_rows"][:20]))
        lines.append(
            f"The PACS has nothing for {len(result['unmatched_rows'])} rows of the table ({rows}"
            f"{' ...' if len(result['unmatched_rows']) > 20 else ''}); lost leading zeros are the usual reason."
        )
    if result["unconfirmed"]:
        lines.append(f"{result['unconfirmed']} answers did not hold what was asked for and were left out.")
    return "\n".join(lines)
