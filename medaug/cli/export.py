"""`medaug export`: synthetic images as DICOM, NIfTI or PNG files that say they are synthetic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import JsonOption, app, show


@app.command()
def export(
    accepted: Annotated[Path | None, typer.Argument(help="Synthetic cohort of `medaug gate`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder; run again with the same arguments to go on.")] = None,
    format: Annotated[str, typer.Option("--format", help="dicom, nifti or png.")] = "dicom",
    storage_class: Annotated[str | None, typer.Option(help="DICOM: ct, dx, cr or sc (Secondary Capture); by modality.")] = None,
    study: Annotated[str, typer.Option(help="DICOM: new studies, or linked: all images in the study --study-uid.")] = "new",
    study_uid: Annotated[str | None, typer.Option(help="DICOM: Study Instance UID to link to.")] = None,
    bits: Annotated[int | None, typer.Option(help="8 or 16 per sample; 16 for grey, 8 for colour.")] = None,
    date: Annotated[str, typer.Option(help="DICOM: StudyDate as YYYYMMDD, for archives that demand one; empty.")] = "",
    cohort: Annotated[Path | None, typer.Option("--cohort", help="Real cohort, for the geometry of the references.")] = None,
    allow_ungated: Annotated[bool, typer.Option("--allow-ungated", help="Export images that no gate accepted.")] = False,
    verify: Annotated[Path | None, typer.Option("--verify", help="Check this export against its manifest; nothing else.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write synthetic images as DICOM, NIfTI or PNG with a manifest, or check an earlier export.

    Example: medaug export runs/accepted --out runs/export --format dicom --cohort runs/cohort
    """
    from medaug.errors import ConfigError

    if verify is not None:
        if accepted is not None or out is not None:
            raise ConfigError("option-unused", "--verify checks an export and writes nothing; leave the cohort and --out away.")
        _verify(verify, as_json)
        return
    if accepted is None or out is None:
        raise ConfigError("option-missing", "`medaug export` needs a cohort and --out DIR, or --verify DIR.")
    from medaug.export.export import export_cohort

    summary = export_cohort(
        accepted,
        out,
        format=format,
        storage_class=storage_class,
        study=study,
        study_uid=study_uid,
        bits=bits,
        date=date,
        reference_cohort=cohort,
        allow_ungated=allow_ungated,
    )
    show(summary, as_json, _text(summary, out))


def _verify(folder: Path, as_json: bool) -> None:
    from medaug.export.manifest import verify_export

    result = verify_export(folder)
    show(result, as_json, f"{result['files']} files of {folder} are as they were written, {_number(result['images'], 'image')}.")


def _text(summary: dict[str, Any], out: Path) -> str:
    kind = f"DICOM ({summary['storage_class']})" if summary["storage_class"] else summary["format"]
    first = f"{_number(summary['images'], 'image')} of {_number(summary['patients'], 'patient')} as {kind} in {out}."
    return "\n".join([first, *summary["notes"], f"Manifest: {out / 'manifest.json'}"])


def _number(count: int, what: str) -> str:
    return f"{count} synthetic {what}" + ("" if count == 1 else "s")
