"""The stages of the main job, one by one and in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import (
    CohortOption,
    JsonOption,
    OutOption,
    OverlayOption,
    ProfileOption,
    SeedOption,
    SetOption,
    TrackingOption,
    amounts,
    app,
    named,
    show,
    tracked_at,
    whole_numbers,
)


@app.command()
def train(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder, see `medaug bundles`.")],
    cohort: CohortOption,
    out: OutOption,
    profile: ProfileOption = None,
    overlay: OverlayOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a bundle on the training split of a cohort; what its method needs besides is trained inside the run's folder.

    Example: medaug train guided_ddpm --cohort runs/cohort --out runs/run --profile cpu32
    """
    from medaug.workflow import parse_overrides, run_training

    paths = {"dataset_dir": str(cohort), "output_dir": str(out), "seed": seed, "tracking": tracked_at(tracking_uri)}
    record = run_training(bundle, profile, paths | parse_overrides(settings or []), overlay)
    summary = {
        "out": out.name,
        "iterations": record.iterations,
        "weights_sha256": record.weights_sha256,
        "config_sha256": record.config_sha256,
    }
    show(summary, as_json, f"Trained {record.iterations} iterations; weights {record.weights_sha256[:12]} in {out}.")


@app.command()
def generate(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder.")],
    cohort: CohortOption,
    out: OutOption,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of `medaug train`; Stable Diffusion as it is needs none.")
    ] = None,
    per_real: Annotated[float | None, typer.Option(help="Synthetic images per real training image.")] = None,
    allocation: Annotated[str | None, typer.Option(help="proportional, balance or fixed.")] = None,
    counts: Annotated[str | None, typer.Option(help="Images per class, in class order, e.g. 10,20,30.")] = None,
    profile: ProfileOption = None,
    overlay: OverlayOption = None,
    settings: SetOption = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a synthetic cohort from a trained run; images carry labels that the gate has yet to check.

    Example: medaug generate guided_ddpm --cohort runs/cohort --run runs/run --out runs/synthetic --per-real 2.5 --profile cpu32
    """
    from medaug.workflow import parse_overrides, run_setting, run_stage

    overrides: dict[str, Any] = {"dataset_dir": str(cohort), "output_dir": str(out), "seed": seed}
    overrides |= run_setting(run, bundle, overlay) | {"tracking": tracked_at(tracking_uri)}
    if per_real is not None:
        overrides["synthetic_per_real"] = per_real
    if allocation is not None:
        overrides["allocation"] = allocation
    if counts is not None:
        overrides["counts"] = whole_numbers(counts)
    overrides |= parse_overrides(settings or [])
    made = run_stage(bundle, "generating", profile, overrides, **({} if overlay is None else {"overlay": overlay}))
    per_class = dict(zip(made.classes, made.class_counts("training"), strict=True))
    summary = {"out": out.name, "cases": len(made.training), "per_class": per_class, "content_sha256": made.content_sha256}
    show(summary, as_json, f"{len(made.training)} synthetic images in {out}: {per_class}. Check them with `medaug gate`.")


@app.command()
def gate(
    synthetic: Annotated[Path, typer.Argument(help="Synthetic cohort of `medaug generate`.")],
    cohort: CohortOption,
    out: OutOption,
    checks: Annotated[
        str | None,
        typer.Option(
            help="Names separated by commas: usable, pseudo_label, copies (the default), judge, outliers, real_fake, fidelity."
        ),
    ] = None,
    gate_file: Annotated[
        str | None,
        typer.Option("--gate", help="Checks with their settings: default, strict, or a YAML file; in place of --checks."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Least confidence of the pseudo-label; default: the gate's, 0.8.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Scale the filter's confidence by a temperature fitted on validation first.")
    ] = False,
    label: Annotated[
        str, typer.Option(help="filter: a CNN must confirm the label; amst: heads that agree give the label.")
    ] = "filter",
    network: Annotated[
        str,
        typer.Option(
            help="Network that confirms the label, one of `medaug grade --networks`; gate.json says how often it is right."
        ),
    ] = "simple_cnn",
    weights: Annotated[Path | None, typer.Option(help="Checkpoint that the backbone of --label amst starts from.")] = None,
    weights_trusted: Annotated[
        bool, typer.Option("--weights-trusted", help="Your word that these weights saw no held-out image.")
    ] = False,
    allow_short: Annotated[bool, typer.Option("--allow-short", help="Do not fail when a class has no accepted image.")] = False,
    run: Annotated[
        Path | None, typer.Option(help="Training run of the generator: report whether its loss knows its training images.")
    ] = None,
    review: Annotated[
        list[Path] | None,
        typer.Option(help="CSV that review.html exported: apply a reader's decisions; repeatable, see docs/review.md."),
    ] = None,
    seed: SeedOption = 0,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accept, quarantine or reject every synthetic image, with a reason and a number.

    Example: medaug gate runs/synthetic --cohort runs/cohort --out runs/accepted
    """
    from medaug.stages import gate_synthetic

    result = gate_synthetic(
        synthetic,
        cohort,
        out,
        checks=_checks(checks, gate_file),
        threshold=threshold,
        network=network,
        calibrate=calibrate,
        label=label,
        weights=weights,
        weights_trusted=weights_trusted,
        seed=seed,
        allow_short=allow_short,
        run_dir=run,
        review=review or [],
        tracking=tracked_at(tracking_uri),
    )
    lines = [f"{entry.name}: {entry.accepted} of {entry.generated} accepted" for entry in result.acceptance]
    show(
        result.summary,
        as_json,
        "\n".join([*lines, f"Report: {out / 'report.html'}", f"Look at the images: {out / 'review.html'}"]),
    )


def _checks(names: str | None, gate_file: str | None) -> list[Any] | None:
    """What --checks or --gate asks for; None for neither."""
    from medaug import assets
    from medaug.errors import ConfigError
    from medaug.quality.gate_config import checks_of
    from medaug.workflow import read_yaml

    if names is not None and gate_file is not None:
        raise ConfigError("option-conflict", "--checks and --gate both say which checks run; give one of them.")
    if gate_file is not None:
        return list(checks_of(read_yaml(assets.gate_path(gate_file))))
    return None if names is None else [name.strip() for name in names.split(",")]


@app.command()
def grade(
    cohort: CohortOption,
    out: OutOption,
    arm: Annotated[
        list[str],
        typer.Option(
            help="none, crop_rotate, randaugment, cutmix, random_erasing, weak, oversample, NAME=FOLDER of accepted images, "
            "NAME=FOLDER:amst, 'NAME=FOLDER + FOLDER', a cell such as orig50+syn1_50; repeatable. {seed} in a FOLDER stands for the grader's "
            "seed, so that each trains on images of its own."
        ),
    ],
    networks: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "simple_cnn,resnet18",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    profile: Annotated[str, typer.Option("--profile", help="Training recipe, the same for every arm.")] = "cpu32",
    per_real: Annotated[
        str | None,
        typer.Option(help="Synthetic images per real one; default: all. Of several, such as 0.5,1,2.5, validation chooses."),
    ] = None,
    allocation: Annotated[str, typer.Option(help="Their classes: as_generated, proportional or balance.")] = "as_generated",
    source: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of synthetic images that cells and mixed arms call NAME; repeatable.")
    ] = None,
    real_fraction: Annotated[
        str,
        typer.Option(
            help="Part of the real training images that every arm keeps, in (0, 1]; stratified, whole groups. Several, such as "
            "0.25,0.5,1, give a learning curve; the verdict is that of the largest."
        ),
    ] = "1",
    allow_untrusted: Annotated[
        bool, typer.Option("--allow-untrusted", help="Accept images whose maker may have seen the test patients.")
    ] = False,
    head: Annotated[str, typer.Option(help="Last layer: linear, or coral for ordered classes.")] = "linear",
    pretrained: Annotated[
        list[str] | None, typer.Option(help="NETWORK=FILE, safetensors weights to start from; repeatable.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16: mixed, faster where the processor has it; the same for every arm.")
    ] = "float32",
    executor: Annotated[str, typer.Option(help="local or ray; both give the same rows.")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Training runs side by side, each with one thread. Default: the cores, if it is worth it."),
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to use; default: one on this machine.")] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what each arm does to classifiers on real test images, with intervals and a verdict.

    A mixed arm is NAME=TERM + TERM, with blanks around the plus. A term is a folder, the NAME of a --source, rot or vflip (turned
    or mirrored copies of the real images), real, or no-real. Options follow a question mark: real?fraction=0.5&share=0.5,
    FOLDER?per_real=1&allocation=balance&share=0.25&weight=0.5, FOLDER?counts=10/20/30. share is of every batch, weight is in the
    loss. Without the term real all real images are there. The cells orig100, orig+syn1, orig+syn2, orig+syn1+syn2, orig50,
    orig50+syn1_50, orig50+syn2_50, syn1, syn2, orig50+rot, orig50+vflip need --source syn1=FOLDER and --source syn2=FOLDER.

    With several --per-real the ratio is chosen on validation, and the verdict is that of the chosen one; the report shows all.

    Example: medaug grade --cohort runs/cohort --out runs/mix --arm none --arm "half=real?fraction=0.5 + runs/accepted?per_real=1"

    Example: medaug grade --cohort runs/cohort --out runs/bench --arm none --arm oversample --arm guided_ddpm=runs/accepted
    """
    from medaug.grading.options import GradingOptions
    from medaug.stages import grade_arms

    options = GradingOptions(
        networks,
        seeds,
        profile,
        overrides={"head": head, "precision": precision},
        synthetic_per_real=None if per_real is None else amounts(per_real, "--per-real"),
        allocation=allocation,
        real_fraction=amounts(real_fraction, "--real-fraction"),
        sources=source or [],
        allow_untrusted=allow_untrusted,
        pretrained={name: Path(path) for name, path in named(pretrained or [], "--pretrained").items()},
    )
    result = grade_arms(
        cohort,
        out,
        arm,
        options,
        executor=executor,
        workers=workers,
        ray_address=ray_address,
        tracking=tracked_at(tracking_uri),
    )
    show(result, as_json, _verdict_text(result, out))


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
        tracking=tracked_at(tracking_uri),
    )
    show(result, as_json, _short_text(result) + _verdict_text(result, out / "benchmark"))


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

    result = run_quickstart(out, seed=seed, tracking=tracked_at(tracking_uri))
    show(result, as_json, _short_text(result) + _verdict_text(result, out / "job" / "benchmark"))


def _short_text(result: dict[str, Any]) -> str:
    short = [entry for entry in result["acceptance"] if entry["name"] in result["short"]]
    return "".join(
        f'Too few images of class "{row["name"]}" passed the gate: {row["accepted"]} of {row["quota"]} wanted.\n' for row in short
    )


def _verdict_text(result: dict[str, Any], folder: Path) -> str:
    verdicts = list(result["verdict"].values())
    warnings = dict.fromkeys(warning for entry in verdicts for warning in entry["warnings"])
    return "\n".join([*warnings, *(entry["sentence"] for entry in verdicts), f"Report: {folder / 'report.html'}"])
