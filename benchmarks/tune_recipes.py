"""The search behind the graders' recipes: validation scores of real images alone, for every network, learning rate and number of steps.

Only training and validation splits are read. A score is the mean of the last three macro-F1 on validation of a training run at
`medaug.grading.recipe`'s settings for the profile but for what is searched; runs go side by side with one thread each and are written
as they come, so that a killed search goes on. Example:

    python benchmarks/tune_recipes.py --cohort runs/ct --cohort runs/pneumonia --rates 3e-4 1e-3 --steps 150
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rows import WORK, WorkFolder, command_of, environment, record, settings_of

NAME = "tune_recipes"


def score(folder: Path, network: str, rate: float, steps: int, precision: str, profile: str, seed: int) -> dict[str, Any]:
    """One training run: its last and its best macro-F1 on validation."""
    import torch

    from medaug.cohort import read_cohort
    from medaug.grading.recipe import grading_recipe
    from medaug.networks.grading import build_network
    from medaug.training.classifier import LabelledImages, fit_classifier, seeded
    from medaug.training.data import CaseImages

    torch.set_num_threads(1)
    cohort = read_cohort(folder)
    changes = {"learning_rate": rate, "num_steps": steps, "evaluate_every": max(steps // 10, 1), "precision": precision}
    recipe = grading_recipe(profile, network, changes)
    with seeded(NAME, network, seed):
        module = build_network(network, len(cohort.classes), cohort.channels, cohort.image_size)
    splits = [LabelledImages(CaseImages(cohort, cases)) for cases in (cohort.training, cohort.validation)]
    fitted = fit_classifier(module.to(memory_format=torch.channels_last), *splits, recipe, key=(NAME, network, seed))  # type: ignore[call-overload]
    last = statistics.fmean(entry["macro_f1"] for entry in fitted.history[-3:])
    return {"cohort": cohort.content_sha256[:12], "last": round(last, 4), "best": round(fitted.best_macro_f1 or 0.0, 4)}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    from medaug.networks.grading import NETWORKS

    parser = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cohort", type=Path, action="append", default=[], help="folder of `medaug intake`; repeatable")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--steps", nargs="+", type=int, default=[150])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--profile", default="cpu32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=WORK / NAME)
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    return parser


def main() -> None:
    """Search, print and record a row with every run and the mean over cohorts and seeds."""
    parser = make_parser()
    options = parser.parse_args()
    work = WorkFolder(options.work, {"precision": options.precision, "profile": options.profile})
    runs = list(itertools.product(options.cohort, options.networks, options.rates, options.steps, options.seeds))
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {}
        for run in runs:
            folder, network, rate, steps, seed = run
            if (known := work.read(name_of(run))) is not None:
                found[run] = known
            else:
                waiting[pool.submit(score, folder, network, rate, steps, options.precision, options.profile, seed)] = run
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            work.write(name_of(waiting[future]), future.result())
            print(*map(str, waiting[future][1:]), future.result(), flush=True)
    lines = [{"network": n, "rate": r, "steps": s, "seed": seed, **found[(c, n, r, s, seed)]} for c, n, r, s, seed in runs]
    means: dict[str, dict[str, float]] = {}
    for network, rate, steps in itertools.product(options.networks, options.rates, options.steps):
        chosen = [e["last"] for e in lines if (e["network"], e["rate"], e["steps"]) == (network, rate, steps)]
        means.setdefault(network, {})[f"{rate:g} x {steps}"] = round(statistics.fmean(chosen), 4)
    settings = {key: value for key, value in settings_of(options).items() if key != "cohort"}  # runs name it by its content
    row = {"command": command_of(parser, options), "settings": settings, "means": means, "runs": lines}
    print(*(f"{network}: {entry}" for network, entry in means.items()), sep="\n")
    if not options.no_record:  # the runs are kept for a wider search
        record(row | environment(), NAME)


def name_of(run: tuple[Any, ...]) -> str:
    """File name of a finished run."""
    folder, network, rate, steps, seed = run
    return f"{folder.name}-{network}-{rate:g}-{steps}-{seed}"


if __name__ == "__main__":
    main()
