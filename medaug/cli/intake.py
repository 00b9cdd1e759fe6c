"""`medaug intake`: an export or a folder of images becomes a cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import JsonOption, OutOption, SeedOption, TrackingOption, app, numbers, show, tracked_at


@app.command()
def intake(
    source: Annotated[Path, typer.Argument(help="Folder, DICOMDIR, MedMNIST .npz or MONAI datalist.")],
    out: OutOption,
    labels: Annotated[Path | None, typer.Option(help="Label table, CSV or XLSX.")] = None,
    key: Annotated[str, typer.Option(help="What its key column holds: file, sop, series, study, patient, accession.")] = "file",
    key_column: Annotated[str | None, typer.Option(help="Name of the key column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Name of the label column.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Column of groups that must not be split.")] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column of patients.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column that fixes the split.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 64,
    split: Annotated[str | None, typer.Option(help="Shares of training, validation, test, e.g. 0.7,0.1,0.2.")] = None,
    window: Annotated[str | None, typer.Option(help="Lower and upper value, e.g. -1350,150 HU.")] = None,
    ordinal: Annotated[bool | None, typer.Option("--ordinal/--nominal", help="Whether the classes are grades.")] = None,
    modality: Annotated[str, typer.Option(help="CT, CR ... where the files do not say.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the cohort.")] = None,
    sheet: Annotated[str | None, typer.Option(help="Sheet of an XLSX table.")] = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and report, write nothing.")] = False,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a cohort from an export or a folder of labelled images.

    Example: medaug intake images/ --labels labels.csv --label-column grade --image-size 32 --out runs/cohort
    """
    from medaug.intake.records import IntakeOptions
    from medaug.stages import take_in

    options = IntakeOptions(
        source=source,
        out=out,
        labels=labels,
        key=key,
        key_column=key_column,
        label_column=label_column,
        group_column=group_column,
        patient_column=patient_column,
        split_column=split_column,
        image_size=image_size,
        split=None if split is None else numbers(split, 3, "--split"),  # type: ignore[arg-type]
        window=None if window is None else numbers(window, 2, "--window"),  # type: ignore[arg-type]
        ordinal=ordinal,
        modality=modality,
        name=name,
        sheet=sheet,
        seed=seed,
        dry_run=dry_run,
    )
    result = take_in(options, tracking=tracked_at(tracking_uri))
    summary: dict[str, Any] = {
        "out": out.name,
        "content_sha256": result.cohort.content_sha256,
        "counts": result.counts,
        "leak": result.leak,
    }
    summary |= {"quarantine": result.quarantine, "notes": result.notes, "dry_run": dry_run}
    show(summary, as_json, _intake_text(result, out))


def _intake_text(result: Any, out: Path) -> str:
    cohort = result.cohort
    sizes = ", ".join(f"{split} {len(cohort.split(split))}" for split in ("training", "validation", "test"))
    lines = [f"{len(cohort.cases())} images in {len(cohort.classes)} classes ({sizes}); {len(result.quarantine)} left out."]
    lines += [result.leak["warning"]] if result.leak.get("warning") else []
    return "\n".join([*lines, *result.notes, f"Report: {out / 'report.html'}"])
