"""`medaug feedback`: rounds of generation where the grader doubts, under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medaug.cli.options import CohortOption, JsonOption, OutOption, OverlayOption, ProfileOption, SeedOption, SetOption, app, show


@app.command()
def feedback(
    bundle: Annotated[str, typer.Argument(help="Bundle name or folder.")],
    cohort: CohortOption,
    run: Annotated[Path, typer.Option("--run", help="Folder of `medaug train`.")],
    out: OutOption,
    budget: Annotated[int, typer.Option(help="Images generated in all.")],
    per_round: Annotated[int, typer.Option(help="Images generated in a round.")],
    overlay: OverlayOption = None,
    profile: ProfileOption = None,
    grading_profile: Annotated[str, typer.Option(help="Recipe of the grader.")] = "cpu32",
    network: Annotated[str, typer.Option(help="Grader.")] = "simple_cnn",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the grader.")] = 3,
    least_gain: Annotated[float, typer.Option(help="Gain on validation that a round needs.")] = 0.0,
    patience: Annotated[int, typer.Option(min=1, help="Rounds without help before it stops.")] = 1,
    one_shot: Annotated[bool, typer.Option("--one-shot/--no-one-shot", help="Compare with the whole budget at once.")] = True,
    settings: SetOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate more of the classes that a grader doubts on validation, keep what helps there, stop otherwise; the test split is not read.

    Example: medaug feedback uncertainty_guidance --overlay disturbance --cohort runs/cohort --run runs/run --out runs/feedback --budget 300 --per-round 100
    """
    from medaug.feedback import FeedbackOptions, run_feedback
    from medaug.generation.feedback import saving_text
    from medaug.workflow import parse_overrides

    options = FeedbackOptions(
        budget,
        per_round,
        least_gain=least_gain,
        patience=patience,
        network=network,
        grading_profile=grading_profile,
        seeds=seeds,
        one_shot=one_shot,
    )
    result = run_feedback(
        bundle,
        cohort,
        run,
        out,
        options,
        overlay=overlay,
        profile=profile,
        overrides=parse_overrides(settings or []),
        seed=seed,
    )
    lines = [f"Without synthetic images: {result['metric']} {result['baseline']:.3f} on validation."]
    for entry in result["rounds"]:
        before, after = (sum(entry[name]) / len(entry[name]) for name in ("before", "after"))
        verdict = "kept" if entry["kept"] else "dropped"
        lines.append(f"Round {entry['number']}: {entry['accepted']} accepted, {before:.3f} -> {after:.3f}, {verdict}.")
    lines.append(saving_text(result["saving"]))
    show(result, as_json, "\n".join(lines))
