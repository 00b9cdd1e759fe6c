"""`medaug import`: images made elsewhere become a synthetic cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medaug.cli.options import JsonOption, OutOption, app, show


@app.command("import")
def import_images(
    source: Annotated[Path, typer.Argument(help="Folder of images: PNG, JPEG, TIFF, DICOM, NIfTI.")],
    labels: Annotated[Path, typer.Option(help="Label table, CSV or XLSX; its labels are classes of --like.")],
    like: Annotated[Path, typer.Option(help="Real cohort that they belong to: classes, size, channels, intensity.")],
    out: OutOption,
    fit_on: Annotated[
        Path | None, typer.Option("--fit-on", help="Real cohort on whose training split their generator was trained.")
    ] = None,
    allow_untrusted: Annotated[
        bool, typer.Option("--allow-untrusted", help="Nobody knows what the generator saw; the images stay marked.")
    ] = False,
    key: Annotated[str, typer.Option(help="What its key column holds: file, sop, series, study, patient, accession.")] = "file",
    key_column: Annotated[str | None, typer.Option(help="Name of the key column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Name of the label column.")] = None,
    reference_column: Annotated[
        str | None, typer.Option(help="Column of the training case, by id or name, that an image was made from.")
    ] = None,
    sheet: Annotated[str | None, typer.Option(help="Sheet of an XLSX table.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the cohort.")] = None,
    burned_in: Annotated[str, typer.Option(help="Text in the pixels: quarantine, mask or keep.")] = "quarantine",
    as_json: JsonOption = False,
) -> None:
    """Make a synthetic cohort of images made elsewhere, for `medaug gate` and `medaug grade`.

    Exactly one of --fit-on and --allow-untrusted says what their generator was trained on. Their file names are written.

    Example: medaug import made/ --labels made.csv --label-column grade --like runs/cohort --fit-on runs/cohort --out runs/imported
    """
    from medaug.intake.imported import ImportOptions, run_import
    from medaug.progress import progress

    options = ImportOptions(
        source=source,
        labels=labels,
        like=like,
        out=out,
        fit_on=fit_on,
        allow_untrusted=allow_untrusted,
        key=key,
        key_column=key_column,
        label_column=label_column,
        sheet=sheet,
        reference_column=reference_column,
        name=name,
        burned_in=burned_in,
    )
    result = run_import(options, progress)
    report = result.report
    left = ", ".join(f"{count} {code}" for code, count in report["left_out"].items())
    lines = [f"{report['cases']} images in {out}: {report['per_class']}." + (f" Left out: {left}." if left else "")]
    if not report["trusted"]:
        lines.append("Nothing shows what their generator saw; `medaug grade` needs --allow-untrusted for them.")
    summary = {"out": out.name, **report, "reused": result.reused}
    show(summary, as_json, "\n".join([*lines, f"Check them with `medaug gate {out} --cohort {like}`."]))
