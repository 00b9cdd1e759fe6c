"""`medaug readers`: can a person tell the synthetic images from real ones? A blinded test, and its score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medaug.cli.options import CohortOption, JsonOption, OutOption, SeedOption, app, show

readers = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Blinded reader test: make one, score its answers.")
app.add_typer(readers, name="readers")


@readers.command()
def make(
    cohort: CohortOption,
    synthetic: Annotated[Path, typer.Option("--synthetic", help="Accepted cohort of `medaug gate`.")],
    out: OutOption,
    n: Annotated[int, typer.Option("--n", help="Images of either kind, real and synthetic.")] = 50,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write blinded.html, real (training and validation, never test) and synthetic images in one shuffled page, and its key.json.

    Example: medaug readers make --cohort runs/cohort --synthetic runs/accepted --out runs/readers --n 50
    """
    from medaug.quality.reader_test import make_reader_test

    made = make_reader_test(cohort, synthetic, out, n=n, seed=seed)
    text = f"{made['images']} images in {out / 'blinded.html'}: give readers this file alone, key.json tells which are which."
    show(made, as_json, text)


@readers.command()
def score(
    test: Annotated[Path, typer.Argument(help="Folder of `medaug readers make`.")],
    answers: Annotated[list[Path], typer.Argument(help="CSV files that readers exported from blinded.html.")],
    as_json: JsonOption = False,
) -> None:
    """Sensitivity, specificity, AUC and accuracy against chance of every reader, and kappa between readers, with intervals.

    Example: medaug readers score runs/readers answers-ann.csv answers-bob.csv
    """
    from medaug.quality.reader_score import score_readers

    result = score_readers(test, answers)
    lines = [_line(name, metrics) for name, metrics in result["readers"].items()]
    lines += [f"kappa of {' and '.join(row['readers'])}: {_number(row)}" for row in result["kappa"]]
    show(result, as_json, "\n".join([*lines, f"Scores: {test / 'scores.json'}"]))


def _line(name: str, metrics: dict[str, Any]) -> str:
    parts = [f"{key} {_number(metrics[key])}" for key in ("sensitivity", "specificity", "auc", "accuracy")]
    missing = f"; {metrics['missing']} images without an answer" if metrics["missing"] else ""
    return f"{name}: {', '.join(parts)}, p against chance {metrics['accuracy']['p_value']:.3g}{missing}"


def _number(row: dict[str, Any]) -> str:
    value = "undefined" if row["value"] is None else f"{row['value']:.2f}"
    return value if row["low"] is None else f"{value} ({row['low']:.2f} to {row['high']:.2f})"
