"""The command line. Each command reads its options and calls one function; heavy imports happen inside it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from medaug import __version__
from medaug.errors import ConfigError, MedaugError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
bundles_app = typer.Typer(no_args_is_help=False, invoke_without_command=True)
app.add_typer(bundles_app, name="bundles")

EXIT_INTERRUPTED = 130
INTERRUPTED = "Stopped; run the same command again to go on.\n"

CohortOption = Annotated[Path, typer.Option("--cohort", help="Cohort folder made by `medaug intake`.")]
OutOption = Annotated[Path, typer.Option("--out", help="Output folder; run again with the same arguments to go on.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="tiny, cpu32, cpu64, or a YAML file; none: the paper's values.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the bundle's config; repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")]
TrackingOption = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow; else MLFLOW_TRACKING_URI, else ./mlflow.db.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Decides every random draw.")]


def _show(summary: dict[str, Any], as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else sentence)


def _numbers(text: str, count: int, option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise ConfigError("option-malformed", f"{option} takes {count} numbers separated by commas, got {text!r}.")
    return values


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError("option-malformed", f"--counts takes whole numbers separated by commas, got {text!r}.")
    return [int(part) for part in parts]


def _tracking(uri: str | None) -> dict[str, Any]:
    return {"enabled": True, "uri": uri, "experiment": "medaug"}


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Labelled medical images: generate, check, and measure whether they help. Research use only, not for diagnosis.

    Example: medaug quickstart --out runs/quickstart
    """


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
        split=None if split is None else _numbers(split, 3, "--split"),  # type: ignore[arg-type]
        window=None if window is None else _numbers(window, 2, "--window"),  # type: ignore[arg-type]
        ordinal=ordinal,
        modality=modality,
        name=name,
        sheet=sheet,
        seed=seed,
        dry_run=dry_run,
    )
    result = take_in(options, tracking=_tracking(tracking_uri))
    summary: dict[str, Any] = {
        "out": out.name,
        "content_sha256": result.cohort.content_sha256,
        "counts": result.counts,
        "leak": result.leak,
    }
    summary |= {"quarantine": result.quarantine, "notes": result.notes, "dry_run": dry_run}
    _show(summary, as_json, _intake_text(result, out))


@app.command()
def train(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder, see `medaug bundles`.")],
    cohort: CohortOption,
    out: OutOption,
    profile: ProfileOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a bundle on the training split of a cohort.

    Example: medaug train guided_ddpm --cohort runs/cohort --out runs/run --profile cpu32
    """
    from medaug.workflow import parse_overrides, run_stage

    paths = {"dataset_dir": str(cohort), "output_dir": str(out), "seed": seed, "tracking": _tracking(tracking_uri)}
    record = run_stage(bundle, "training", profile, paths | parse_overrides(settings or []))
    summary = {
        "out": out.name,
        "iterations": record.iterations,
        "weights_sha256": record.weights_sha256,
        "config_sha256": record.config_sha256,
    }
    _show(summary, as_json, f"Trained {record.iterations} iterations; weights {record.weights_sha256[:12]} in {out}.")


@app.command()
def generate(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder.")],
    cohort: CohortOption,
    run: Annotated[Path, typer.Option("--run", help="Folder of `medaug train`.")],
    out: OutOption,
    per_real: Annotated[float | None, typer.Option(help="Synthetic images per real training image.")] = None,
    allocation: Annotated[str | None, typer.Option(help="proportional, balance or fixed.")] = None,
    counts: Annotated[str | None, typer.Option(help="Images per class, in class order, e.g. 10,20,30.")] = None,
    profile: ProfileOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a synthetic cohort from a trained run; images carry labels that the gate has yet to check.

    Example: medaug generate guided_ddpm --cohort runs/cohort --run runs/run --out runs/synthetic --per-real 2.5 --profile cpu32
    """
    from medaug.workflow import parse_overrides, run_stage

    overrides: dict[str, Any] = {"dataset_dir": str(cohort), "run_dir": str(run), "output_dir": str(out), "seed": seed}
    overrides |= {"tracking": _tracking(tracking_uri)}
    if per_real is not None:
        overrides["synthetic_per_real"] = per_real
    if allocation is not None:
        overrides["allocation"] = allocation
    if counts is not None:
        overrides["counts"] = _counts(counts)
    made = run_stage(bundle, "generating", profile, overrides | parse_overrides(settings or []))
    per_class = dict(zip(made.classes, made.class_counts("training"), strict=True))
    summary = {"out": out.name, "cases": len(made.training), "per_class": per_class, "content_sha256": made.content_sha256}
    _show(summary, as_json, f"{len(made.training)} synthetic images in {out}: {per_class}. Check them with `medaug gate`.")


@app.command()
def gate(
    synthetic: Annotated[Path, typer.Argument(help="Synthetic cohort of `medaug generate`.")],
    cohort: CohortOption,
    out: OutOption,
    checks: Annotated[str | None, typer.Option(help="Names separated by commas; default: all.")] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least confidence of the pseudo-label.")] = 0.8,
    allow_short: Annotated[bool, typer.Option("--allow-short", help="Do not fail when a class has no accepted image.")] = False,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accept, quarantine or reject every synthetic image, with a reason and a number.

    Example: medaug gate runs/synthetic --cohort runs/cohort --out runs/accepted
    """
    from medaug.stages import gate_synthetic

    names = None if checks is None else [name.strip() for name in checks.split(",")]
    tracking = _tracking(tracking_uri)
    result = gate_synthetic(
        synthetic, cohort, out, checks=names, threshold=threshold, seed=seed, allow_short=allow_short, tracking=tracking
    )
    lines = [f"{entry.name}: {entry.accepted} of {entry.generated} accepted" for entry in result.acceptance]
    _show(result.summary, as_json, "\n".join([*lines, f"Report: {out / 'report.html'}"]))


@app.command()
def grade(
    cohort: CohortOption,
    out: OutOption,
    arm: Annotated[list[str], typer.Option(help="none, crop_rotate, oversample, or NAME=FOLDER of accepted images; repeatable.")],
    networks: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "simple_cnn,resnet18",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    profile: Annotated[str, typer.Option("--profile", help="Training recipe, the same for every arm.")] = "cpu32",
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what each arm does to classifiers on real test images, with intervals and a verdict.

    Example: medaug grade --cohort runs/cohort --out runs/bench --arm none --arm oversample --arm guided_ddpm=runs/accepted
    """
    from medaug.stages import grade_arms

    result = grade_arms(cohort, out, arm, networks=networks, seeds=seeds, profile=profile, tracking=_tracking(tracking_uri))
    _show({"rows": result["rows"], "verdict": result["verdict"]}, as_json, _verdict_text(result, out))


@app.command()
def augment(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder.")],
    cohort: CohortOption,
    out: OutOption,
    profile: ProfileOption = None,
    settings: SetOption = None,
    allow_short: Annotated[
        bool, typer.Option("--allow-short", help="Go on when a class misses its quota of accepted images.")
    ] = False,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, generate, gate and grade in one go; resumable.

    Example: medaug augment guided_ddpm --cohort runs/cohort --out runs/job --profile cpu32
    """
    from medaug.augment import run_augment
    from medaug.workflow import parse_overrides

    result = run_augment(
        bundle,
        cohort,
        out,
        profile=profile,
        overrides=parse_overrides(settings or []),
        allow_short=allow_short or None,
        seed=seed,
        tracking=_tracking(tracking_uri),
    )
    _show(result, as_json, _short_text(result) + _verdict_text(result, out / "benchmark"))


@app.command()
def quickstart(
    out: OutOption = Path("runs/quickstart"),
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Walk the whole way on an embedded phantom: DICOM export, intake, training, generation, gate, grading, report.

    Example: medaug quickstart --out runs/quickstart
    """
    from medaug.augment import run_quickstart

    result = run_quickstart(out, seed=seed, tracking=_tracking(tracking_uri))
    _show(result, as_json, _short_text(result) + _verdict_text(result, out / "job" / "benchmark"))


@bundles_app.callback()
def bundles(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the bundles that came with medaug.

    Example: medaug bundles copy guided_ddpm my_bundle
    """
    if context.invoked_subcommand is None:
        from medaug.assets import list_bundles

        names = list_bundles()
        _show({"bundles": names}, as_json, "\n".join(names))


@bundles_app.command("copy")
def bundles_copy(
    name: Annotated[str, typer.Argument(help="Bundle to copy.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a bundle to edit it.

    Example: medaug bundles copy guided_ddpm my_bundle
    """
    from medaug.assets import copy_bundle

    copied = copy_bundle(name, folder)
    _show({"copied": name, "to": copied.name}, as_json, f"Copied {name} to {copied}.")


def _short_text(result: dict[str, Any]) -> str:
    short = [entry for entry in result["acceptance"] if entry["name"] in result["short"]]
    return "".join(
        f"Too few images of {row['name']} passed the gate: {row['accepted']} of {row['quota']} wanted.\n" for row in short
    )


def _intake_text(result: Any, out: Path) -> str:
    cohort = result.cohort
    sizes = ", ".join(f"{split} {len(cohort.split(split))}" for split in ("training", "validation", "test"))
    lines = [f"{len(cohort.cases())} images in {len(cohort.classes)} classes ({sizes}); {len(result.quarantine)} left out."]
    lines += [result.leak["warning"]] if result.leak.get("warning") else []
    return "\n".join([*lines, *result.notes, f"Report: {out / 'report.html'}"])


def _verdict_text(result: dict[str, Any], folder: Path) -> str:
    verdicts = list(result["verdict"].values())
    warnings = dict.fromkeys(warning for entry in verdicts for warning in entry["warnings"])
    return "\n".join([*warnings, *(entry["sentence"] for entry in verdicts), f"Report: {folder / 'report.html'}"])


def _on_terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(run: Callable[[], Any] = app) -> None:
    """Entry point: runs the command and turns errors into a sentence and an exit code."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        run()
    except MedaugError as error:
        _fail(error)
    except SystemExit as stop:  # typer has turned Ctrl-C into an exit of its own
        if stop.code == EXIT_INTERRUPTED:
            sys.stderr.write(INTERRUPTED)
        raise
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os._exit(0)


def _fail(error: MedaugError) -> None:
    sys.stderr.write(f"medaug: {error}\n")
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
