"""Wall time to quality: when does the guided DDPM reach the KID that MONAI's own recipe has after its whole budget?

MONAI's recipe: `DiffusionModelUNet` (32, 64, 64) with attention at the deepest level, `DiffusionInferer` with `DDPMScheduler`
(noise prediction, linear betas, T = 1000), Adam, sampled without classes by `DDIMScheduler` with 50 steps. Ours: the bundle
guided_ddpm with a profile, judged by its averaged weights. Both train in one process in turns, so that what the machine does
meanwhile hits both; the clock of each runs during its own training steps (data, forward, backward, average), never during
sampling, KID or checkpoints. Started again after a kill it goes on from the last turn. Example:

    python benchmarks/time_to_kid.py --cohort runs/ct --minutes 15
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from rows import WorkFolder, command_of, environment, make_parser, open_work, settings_of
from ruler import BATCH_SIZE, Ruler, guided_samples, make_ruler, write_sheet
from torch import Tensor, nn

from medaug.cohort import Cohort, read_cohort
from medaug.diffusion.parameterisation import Epsilon
from medaug.diffusion.sampler import sample
from medaug.diffusion.schedule import NoiseSchedule, spaced_timesteps
from medaug.diffusion.steps import DDIM
from medaug.draws import randn, torch_generator
from medaug.generation.sampler import make_sampler
from medaug.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from medaug.training.classifier import seeded
from medaug.training.data import KeyedBatches, read_case
from medaug.training.diffusion import warmup_constant
from medaug.training.ema import ExponentialMovingAverage
from medaug.workflow import load_config, parse_overrides

NAME = "time_to_kid"
NUM_TRAIN_TIMESTEPS = 1000
SCHEDULER: dict[str, Any] = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "schedule": "linear_beta", "prediction_type": "epsilon"}
MONAI_BATCH_SIZE = 16
MONAI_SAMPLER, EXPLICIT_PAIRS = "monai_ddim", "explicit_pairs_ddim"
OURS_SAMPLER = "averaged_weights"


@dataclass
class Contestant:
    """A training run that can be stopped by the clock.

    Attributes:
        name: "monai" or "ours".
        state: what a checkpoint holds.
        step: takes training step number i, counted from 1.
        draws: sampler name -> function that draws samples (N, C, H, W) of the present weights.
        last: number of its last step; None for no end but the budget's.
        turn: seconds of training per turn.
        evaluate_every: turns between evaluations.
        iteration, seconds: how far it is.
        evaluations: what was measured so far.
    """

    name: str
    state: TrainingState
    step: Callable[[int], None]
    draws: Mapping[str, Callable[[], Tensor]]
    turn: float
    evaluate_every: int = 1
    last: int | None = None
    iteration: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def finished(self, budget: float) -> bool:
        """Whether the budget of seconds or the run's own end is reached."""
        return self.seconds >= budget or (self.last is not None and self.iteration >= self.last)

    def train(self, until: float) -> None:
        """Take steps until the own clock shows `until` seconds."""
        while not self.finished(until):
            start = perf_counter()
            self.step(self.iteration + 1)
            self.seconds += perf_counter() - start
            self.iteration += 1

    def evaluate(self, ruler: Ruler, folder: Path) -> None:
        """Measure the KID of samples from each of its samplers."""
        entry: dict[str, Any] = {"seconds": self.seconds, "iteration": self.iteration}
        for name, draw in self.draws.items():
            images = draw()
            write_sheet(folder / f"{self.name}-{name}-{round(self.seconds):05d}s.png", images)
            entry[name] = ruler(images)
        self.evaluations.append(entry)
        print(f"{self.name:5s} {self.seconds:6.0f} s, step {self.iteration:5d}: {entry}", flush=True)


def monai_contestant(cohort: Cohort, options: argparse.Namespace) -> Contestant:
    """MONAI's recipe; the images lie in memory, scaled to [-1, 1], where its schedulers clip."""
    seed = options.seed
    with seeded(NAME, "monai", seed):
        network = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=cohort.channels,
            out_channels=cohort.channels,
            channels=(32, 64, 64),
            attention_levels=(False, False, True),
            num_res_blocks=1,
            num_head_channels=64,
        )
    images = torch.stack([read_case(cohort, case) for case in cohort.training])
    batches = KeyedBatches(len(images), MONAI_BATCH_SIZE, seed)
    inferer = DiffusionInferer(DDPMScheduler(**SCHEDULER))
    optimizer = torch.optim.Adam(network.parameters(), lr=options.monai_learning_rate)
    state = TrainingState(network, ExponentialMovingAverage(network, 0.0), optimizer, warmup_constant(optimizer, 1, 0))

    def step(iteration: int) -> None:
        generator = torch_generator(NAME, "monai", seed, iteration)
        clean = images[[index for *_, index in batches.batch(iteration)]]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, NUM_TRAIN_TIMESTEPS, (len(clean),), generator=generator)
        network.train()
        optimizer.zero_grad(set_to_none=True)
        noise_pred = inferer(inputs=clean, diffusion_model=network, noise=noise, timesteps=timesteps)
        nn.functional.mse_loss(noise_pred, noise).backward()
        optimizer.step()

    shape = (options.num_images, cohort.channels, cohort.image_size, cohort.image_size)
    start = randn(shape, NAME, "monai", seed, "start")
    draws = {
        MONAI_SAMPLER: partial(sample_monai, network, inferer, start, options.monai_sampling_steps),
        EXPLICIT_PAIRS: partial(sample_explicit_pairs, network, start, options.monai_sampling_steps),
    }
    turn = 60 * options.minutes / options.monai_turns
    every = max(1, options.monai_turns // options.monai_evaluations)
    return Contestant("monai", state, step, draws, turn, every)


def sample_monai(network: DiffusionModelUNet, inferer: DiffusionInferer, start: Tensor, num_inference_steps: int) -> Tensor:
    """Samples as MONAI's tutorials draw them: `DDIMScheduler` inside `DiffusionInferer.sample`."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(num_inference_steps)
    network.eval()
    draw = partial(inferer.sample, diffusion_model=network, scheduler=scheduler, verbose=False)
    return torch.cat([torch.as_tensor(draw(input_noise=noise)) for noise in start.split(BATCH_SIZE)])


def sample_explicit_pairs(network: nn.Module, start: Tensor, num_inference_steps: int) -> Tensor:
    """The same weights, start and number of steps through our DDIM, whose steps end where the next one begins.

    MONAI's pairs a rounded grid with a fixed jump; this tells how much of its KID is owed to that and not to training.
    """
    schedule = NoiseSchedule(DDPMScheduler(**SCHEDULER).alphas_cumprod)
    timesteps = spaced_timesteps(schedule, num_inference_steps)
    parameterisation = Epsilon()
    network.eval()

    def denoiser(x_t: Tensor, t: int) -> Any:
        return parameterisation.denoise(network, x_t, parameterisation.level(schedule, t, len(x_t), x_t.device))

    def unneeded(t: int) -> Tensor:
        raise RuntimeError(f"DDIM with eta 0 asked for noise at timestep {t}.")

    draw = partial(sample, timesteps=timesteps, step=DDIM(), schedule=schedule, noise=unneeded, clip=True)
    return torch.cat([draw(denoiser, noise) for noise in start.split(BATCH_SIZE)])


def our_contestant(cohort: Cohort, options: argparse.Namespace) -> Contestant:
    """The guided DDPM as its bundle builds it: the trainer's own iteration, data loader, optimiser and average."""
    parser = ConfigParser(load_config("guided_ddpm", "training", options.profile))
    overrides = {"dataset_dir": str(options.cohort), "seed": options.seed, "device_name": "cpu"} | parse_overrides(options.set)
    for key, value in overrides.items():
        if key not in parser:
            raise SystemExit(f"--set: {key} is no configuration id of the bundle.")
        parser[key] = value
    parser.parse()
    trainer, iteration_update = parser.get_parsed_content("train#trainer"), parser.get_parsed_content("train#iteration")
    session = parser.get_parsed_content("session")
    loader: Iterator[dict[str, Any]] | None = None

    def step(iteration: int) -> None:
        nonlocal loader
        if loader is None:
            session.batches.next_iteration = iteration
            loader = iter(trainer.data_loader)
        iteration_update(trainer, next(loader))

    settings = load_config("guided_ddpm", "generating", options.profile)["sampler_settings"]
    sampler = make_sampler(parser.get_parsed_content("objective"), settings, seed=options.seed)
    draws = {OURS_SAMPLER: lambda: guided_samples(session.state.ema.network, cohort, sampler, options.num_images, options.seed)}
    last = trainer.state.max_epochs * trainer.state.epoch_length
    return Contestant("ours", session.state, step, draws, options.our_turn, last=last)


def compete(contestants: Sequence[Contestant], ruler: Ruler, work: WorkFolder, budget: float) -> None:
    """Train in turns until both are finished; after every turn all is on disk."""
    turn = restore(contestants, work)
    while not all(contestant.finished(budget) for contestant in contestants):
        turn += 1
        for contestant in contestants[:: 1 if turn % 2 else -1]:
            if contestant.finished(budget):
                continue
            contestant.train(min(budget, turn * contestant.turn))
            if contestant.finished(budget) or turn % contestant.evaluate_every == 0:
                contestant.evaluate(ruler, work.folder)
        keep(contestants, work, turn)


def restore(contestants: Sequence[Contestant], work: WorkFolder) -> int:
    """Go back to the end of the last turn that is on disk; returns its number."""
    part = work.read("turn")
    if part is None:
        return 0
    for contestant in contestants:
        load_checkpoint(_checkpoint(work, contestant, part["turn"]), contestant.state, config_sha256=work.identity)
        for name, value in part[contestant.name].items():
            setattr(contestant, name, value)
    return int(part["turn"])


def keep(contestants: Sequence[Contestant], work: WorkFolder, turn: int) -> None:
    """Write both states, then the file that names the turn they belong to, then drop the older states."""
    part: dict[str, Any] = {"turn": turn}
    for contestant in contestants:
        path = _checkpoint(work, contestant, turn)
        save_checkpoint(path, contestant.state, epoch=0, iteration=contestant.iteration, config_sha256=work.identity)
        part[contestant.name] = {name: getattr(contestant, name) for name in ("iteration", "seconds", "evaluations")}
    work.write("turn", part)
    for path in work.folder.glob("*.safetensors"):
        if not path.stem.endswith(f"-turn{turn}"):
            path.unlink()


def _checkpoint(work: WorkFolder, contestant: Contestant, turn: int) -> Path:
    return work.folder / f"{contestant.name}-turn{turn}.safetensors"


def reached(evaluations: Sequence[Mapping[str, Any]], target: float, seconds_of_monai: float) -> dict[str, Any]:
    """When ours was first at or below `target`, and from when on it stayed there; ratios to MONAI's seconds."""
    below = [entry[OURS_SAMPLER]["kid"] <= target for entry in evaluations]
    first = next((entry["seconds"] for entry, is_below in zip(evaluations, below, strict=True) if is_below), None)
    tail = next((index for index in range(len(below)) if all(below[index:])), None)
    stays = None if tail is None else evaluations[tail]["seconds"]
    result: dict[str, Any] = {"target_kid": target}
    for name, seconds in (("first", first), ("stays", stays)):
        result |= {f"{name}_seconds": seconds, f"{name}_ratio": None if seconds is None else seconds / seconds_of_monai}
    return result


def verdict(monai: Contestant, ours: Contestant) -> dict[str, Any]:
    """Against MONAI's KID at the end of its budget, and against the best its weights gave at any time with either sampler."""
    final = monai.evaluations[-1][MONAI_SAMPLER]["kid"]
    best = min(entry[name]["kid"] for entry in monai.evaluations for name in monai.draws)
    return {
        "against_final": reached(ours.evaluations, final, monai.seconds),
        "against_best": reached(ours.evaluations, best, monai.seconds),
    }


def main() -> None:
    """Measure, write a row to benchmarks/results/time_to_kid.json, and print it."""
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="training time of MONAI's recipe and limit of ours")
    parser.add_argument("--profile", default="cpu32", help="of the guided DDPM")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of ours; repeatable")
    parser.add_argument("--our-turn", type=float, default=20.0, help="seconds of our training between two evaluations")
    parser.add_argument("--monai-turns", type=int, default=15, help="turns that MONAI's training is cut into")
    parser.add_argument("--monai-evaluations", type=int, default=3, help="about so many, the last at the end; each samples twice")
    parser.add_argument("--monai-learning-rate", type=float, default=1e-4)
    parser.add_argument("--monai-sampling-steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=256, help="samples per evaluation")
    parser.add_argument("--subset-size", type=int, default=100, help="images per KID subset")
    parser.add_argument("--ruler-steps", type=int, default=500, help="training steps of the feature extractor")
    options = parser.parse_args()

    cohort = read_cohort(options.cohort)
    around = environment()
    facts = {"cohort": cohort.name, "cohort_sha256": cohort.content_sha256, "image_size": cohort.image_size}
    facts |= {"torch_threads": torch.get_num_threads()}
    work = open_work(options, facts, around)
    ruler = make_ruler(cohort, options.ruler_steps, options.subset_size, options.seed)
    monai, ours = monai_contestant(cohort, options), our_contestant(cohort, options)
    compete([monai, ours], ruler, work, 60 * options.minutes)
    result = verdict(monai, ours)
    row = {
        "command": command_of(parser, options),
        "settings": settings_of(options),
        **facts,
        "ruler": ruler.facts,
        "parameters": {"monai": count_parameters(monai.state.network), "ours": count_parameters(ours.state.network)},
        "monai": monai.evaluations,
        "ours": ours.evaluations,
        "reached": result,
        **around,
    }
    work.finish(row, NAME, not options.no_record)
    print("reached:", result)


def count_parameters(network: nn.Module) -> int:
    """Number of weights, those of the reference encoder included."""
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    main()
