"""`medaug intake`: an export or a folder of images becomes a cohort."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import JsonOption, OutOption, SeedOption, TrackingOption, app, named, numbers, show, tracked_at


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
    training_images: Annotated[
        int | None, typer.Option(help="Keep so many training images, by class: what would a small set give?")
    ] = None,
    window: Annotated[str | None, typer.Option(help="Lower and upper value, e.g. -1350,150 HU.")] = None,
    ordinal: Annotated[bool | None, typer.Option("--ordinal/--nominal", help="Whether the classes are grades.")] = None,
    class_names: Annotated[str | None, typer.Option(help="Names for labels, e.g. 0=normal,1=pneumonia.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Take in these classes only, by their names, e.g. normal,pneumonia.")
    ] = None,
    modality: Annotated[str, typer.Option(help="CT, CR ... where the files do not say.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the cohort.")] = None,
    sheet: Annotated[str | None, typer.Option(help="Sheet of an XLSX table.")] = None,
    conflicts: Annotated[
        str, typer.Option(help="When readers disagree: quarantine, majority, senior, mean (of ordered grades).")
    ] = "quarantine",
    reader_column: Annotated[str | None, typer.Option(help="Column that says who read.")] = None,
    senior: Annotated[str | None, typer.Option(help="The reader whose grade decides, for --conflicts senior.")] = None,
    burned_in: Annotated[str, typer.Option(help="Text in the pixels: quarantine, mask or keep.")] = "quarantine",
    dimensions: Annotated[int, typer.Option(help="2: every image is a slice. 3: volumes stay whole.")] = 2,
    slices: Annotated[
        str, typer.Option(help="Of a volume: every slice, those of the table, the one with the largest lesion.")
    ] = ("every"),
    slice_column: Annotated[str | None, typer.Option(help="Column of the slice: 0-based index, or z in mm.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of lesion masks named like the volumes.")] = None,
    strict: Annotated[bool, typer.Option("--strict/--lenient", help="Refuse series with gaps, or report them.")] = False,
    pseudonym_key: Annotated[
        Path | None, typer.Option(help="Key file of the pseudonyms, made if absent. Default: in your configuration folder.")
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="Write the table pseudonym -> identifier here; keep it secret.")] = None,
    keep_dicom: Annotated[Path | None, typer.Option(help="Folder for de-identified copies of the accepted DICOM files.")] = None,
    keep_names: Annotated[
        bool, typer.Option("--keep-names", help="File names hold no identity: write them. Default: only names that count.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read. Default: processors, at most 8.")] = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and report, write nothing.")] = False,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a cohort from an export or a folder of labelled images.

    No name, identifier or date of a patient leaves the intake: cases carry pseudonyms by keyed hash. The key lies in
    $MEDAUG_PSEUDONYM_KEY, else in medaug/pseudonym.key of your configuration folder ($XDG_CONFIG_HOME, ~/.config).

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
        training_images=training_images,
        window=None if window is None else numbers(window, 2, "--window"),  # type: ignore[arg-type]
        ordinal=ordinal,
        class_names=None if class_names is None else tuple(named(class_names.split(","), "--class-names").items()),
        classes=None if classes is None else tuple(part.strip() for part in classes.split(",")),
        modality=modality,
        name=name,
        sheet=sheet,
        conflicts=conflicts,
        reader_column=reader_column,
        senior=senior,
        burned_in=burned_in,
        dimensions=dimensions,
        slices=slices,
        slice_column=slice_column,
        masks=masks,
        strict=strict,
        pseudonym_key=pseudonym_key,
        mapping=mapping,
        keep_dicom=keep_dicom,
        keep_names=keep_names,
        workers=min(os.cpu_count() or 1, 8) if workers is None else workers,
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
    summary |= {key: result.report[key] for key in ("join", "agreement", "burned_in_text", "copies") if result.report.get(key)}
    summary |= {"quarantine": result.quarantine, "notes": result.notes, "dry_run": dry_run}
    show(summary, as_json, _intake_text(result, out, dry_run))


def _intake_text(result: Any, out: Path, dry_run: bool) -> str:
    cohort = result.cohort
    sizes = ", ".join(f"{split} {len(cohort.split(split))}" for split in ("training", "validation", "test"))
    lines = [f"{len(cohort.cases())} images in {len(cohort.classes)} classes ({sizes}); {len(result.quarantine)} left out."]
    lines += (
        [f"Left out: {', '.join(f'{count} {code}' for code, count in result.counts['quarantine'].items())}."]
        if result.quarantine
        else []
    )
    lines += [result.leak["warning"]] if result.leak.get("warning") else []
    end = "Dry run: nothing was written." if dry_run else f"Report: {out / 'report.html'}"
    return "\n".join([*lines, *result.notes, end])
