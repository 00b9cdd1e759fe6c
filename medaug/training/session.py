"""A training run from its first iteration to its weights: lock, resume, track, preview, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events

from medaug import storage
from medaug.cohort import Cohort
from medaug.draws import key_seed
from medaug.errors import ConfigError
from medaug.networks.build import build_guided_unet, refuse_blind_levels
from medaug.networks.guided_unet import GuidedUNet
from medaug.progress import progress
from medaug.tracking import Run, track
from medaug.training import distributed
from medaug.training.checkpoint import FILE_NAME, TrainingState, load_checkpoint, save_checkpoint
from medaug.training.data import KeyedBatches
from medaug.training.run_folder import RUN_FILE, WEIGHTS_FILE, RunRecord, new_record, read_run, write_run

Preview = Callable[[Any], np.ndarray]
Measure = Callable[[Any], Mapping[str, float | None]]


@dataclass
class TrainingSession:
    """Runs a MONAI trainer so that a killed run, started again, ends with the same bytes.

    Of several processes (`medaug.training.distributed`) all train and read the same folder, and the first one alone writes. A run may go on
    with another number of them.

    Attributes:
        trainer: `monai.engines.SupervisedTrainer` whose iteration is keyed (see `GuidedIteration`).
        state: network, EMA, optimiser and schedule of that trainer.
        batches: the batch sampler of the trainer's data loader.
        cohort: real cohort; only its training split was given to the trainer.
        output_dir: the run folder.
        bundle: its name.
        settings: literal settings, written to ``run.json`` and hashed.
        seed: first part of every key.
        checkpoint_every: epochs between checkpoints; 0 is only at the end.
        preview: draws a sheet of samples of the averaged network beside their references.
        preview_every: epochs between previews, the first before training and one at the end; 0 is never.
        measure: figures of the averaged network; the first decides which one is kept, if the state has a `best`.
        measure_every: epochs between measurements; 0 is never, and the last network is kept.
        tracking: keyword arguments of `medaug.tracking.track`.
    """

    trainer: Any
    state: TrainingState
    batches: KeyedBatches
    cohort: Cohort
    output_dir: Path
    bundle: str
    settings: Mapping[str, Any]
    seed: int = 0
    checkpoint_every: int = 1
    preview: Preview | None = None
    preview_every: int = 0
    measure: Measure | None = None
    measure_every: int = 0
    tracking: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> RunRecord:
        """Train, or go on training, or return at once when the run is finished.

        Raises:
            StorageError: the folder is in use, or the disk is full.
            ConfigError: the folder holds a run with other settings; the loss is not finite; processes that differ.
        """
        if min(self.trainer.state.max_epochs, self.trainer.state.epoch_length) < 1:
            raise ConfigError(
                "training-length-invalid",
                f"max_epochs and epoch_length must be at least 1, got {self.trainer.state.max_epochs} and {self.trainer.state.epoch_length}.",
            )
        folder, is_main = Path(self.output_dir), distributed.is_main()
        record = new_record(self.bundle, self.cohort, self.settings, self.seed)
        with storage.locked(folder) if is_main else nullcontext():
            distributed.barrier()  # behind the lock
            if (folder / RUN_FILE).is_file():
                found = self._finished(read_run(folder), record)
                weights = folder / WEIGHTS_FILE
                if weights.is_file() and storage.sha256_file(weights) == found.weights_sha256:
                    return found  # else: write them again from the last checkpoint
            epoch, iteration = self._resume(record)
            distributed.refuse_difference([record.config_sha256, iteration])
            tracking = dict(self.tracking) | ({} if is_main else {"enabled": False})
            with track("training", name=f"training {self.bundle} {record.config_sha256[:8]}", **tracking) as run:
                self._describe(run, record)
                self._train(run, record, epoch, iteration)
                if is_main:
                    record = write_run(folder, record, self.state.chosen, int(self.trainer.state.iteration))
                    run.log_model(folder / WEIGHTS_FILE, self.bundle, {"weights_sha256": record.weights_sha256})
            distributed.barrier()
        return record if is_main else read_run(folder)

    def _finished(self, found: RunRecord, wanted: RunRecord) -> RunRecord:
        if found.config_sha256 != wanted.config_sha256:
            raise ConfigError(
                "run-other-config",
                "The output folder holds a finished run with other settings or another cohort; choose another output folder.",
            )
        return found

    def _resume(self, record: RunRecord) -> tuple[int, int]:
        path = Path(self.output_dir) / "checkpoint" / FILE_NAME
        if not path.is_file():
            return 0, 0
        epoch, iteration = load_checkpoint(path, self.state, config_sha256=record.config_sha256)
        self.batches.next_iteration = iteration + 1
        return epoch, iteration

    def _describe(self, run: Run, record: RunRecord) -> None:
        run.log_params(
            {
                "bundle": self.bundle,
                "seed": self.seed,
                "cohort_sha256": self.cohort.content_sha256,
                "config_sha256": record.config_sha256,
            }
        )
        run.log_params(flatten(self.settings))
        run.log_dict({"bundle": self.bundle, "settings": dict(self.settings), "seed": self.seed}, "config.json")
        run.log_cohort(self.cohort, "training")

    def _train(self, run: Run, record: RunRecord, epoch: int, iteration: int) -> None:
        state, length = self.trainer.state, self.trainer.state.epoch_length
        total = state.max_epochs * length
        if epoch >= state.max_epochs:
            state.iteration = iteration
            return
        if iteration == 0 and distributed.is_main():
            self._show(run, 0)  # the start to compare with; and MLflow opens the samples at step 0
        shown = progress("training", total, completed=iteration) if distributed.is_main() else nullcontext(lambda steps: None)
        with shown as advance, distributed.joined_batch():
            means = EpochMeans()
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: means.add(engine.state.output))
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: advance(1))
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: self._end_of_epoch(engine, run, record, means))
            if iteration:
                self.trainer.load_state_dict({"epoch": epoch, "max_epochs": state.max_epochs, "epoch_length": length})
            self.trainer.run()

    def _end_of_epoch(self, engine: Any, run: Run, record: RunRecord, means: EpochMeans) -> None:
        epoch, iteration = engine.state.epoch, engine.state.iteration
        run.log_metrics(means.take(), step=iteration)
        if not distributed.is_main():
            return
        last = epoch == engine.state.max_epochs
        if last or (self.preview_every and epoch % self.preview_every == 0):
            self._show(run, epoch)
        self._measure(run, epoch, iteration, last)
        if last or (self.checkpoint_every and epoch % self.checkpoint_every == 0):
            path = Path(self.output_dir) / "checkpoint" / FILE_NAME
            save_checkpoint(path, self.state, epoch=epoch, iteration=iteration, config_sha256=record.config_sha256)

    def _show(self, run: Run, epoch: int) -> None:
        """The sheet of samples after so many epochs, as a file and in MLflow."""
        if self.preview is None or not self.preview_every:
            return
        from medaug.io.raster import write_unit_png

        sheet = self.preview(self.state.ema.network)
        write_unit_png(Path(self.output_dir) / "samples" / f"epoch_{epoch:04d}.png", sheet)
        run.log_image(sheet, "samples", step=epoch)

    def _measure(self, run: Run, epoch: int, iteration: int, last: bool) -> None:
        """Measure the averaged network when it is time, and keep it if it is the best."""
        figures: dict[str, float | None] = {}
        if self.measure is not None and self.measure_every and (last or epoch % self.measure_every == 0):
            figures = dict(self.measure(self.state.ema.network))
        if self.state.best is not None and (figures or last):
            self.state.best.offer(self.state.ema.network, next(iter(figures.values()), None), iteration)
            figures["best_iteration"] = float(self.state.best.iteration)
        run.log_metrics(figures, step=iteration)


class EpochMeans:
    """Means of the losses since they were last taken; of a value that not every iteration, or process, has, over those that have it."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def add(self, row: Mapping[str, float]) -> None:
        """Add one iteration's values."""
        self.rows.append(row)

    def take(self) -> dict[str, float]:
        """The means, over the processes' means; empties the list."""
        rows, self.rows = self.rows, []
        return mean_row(distributed.gather(mean_row(rows)))


def mean_row(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every column over the rows that have it."""
    found = {name: [row[name] for row in rows if name in row] for name in dict.fromkeys(name for row in rows for name in row)}
    return {name: sum(values) / len(values) for name, values in found.items()}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, the form MLflow's parameters take."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def new_network(settings: Mapping[str, Any], cohort: Cohort, seed: int, text_encoder_dir: str | Path | None = None) -> GuidedUNet:
    """A network with random weights that depend on the seed alone; see `build_guided_unet` for `settings` and `text_encoder_dir`.

    Raises:
        ConfigError: settings that cannot be built, or with a level that sees neither noise level nor class.
    """
    refuse_blind_levels(settings)
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(key_seed(seed, "weights"))
        return build_guided_unet(settings, cohort.channels, len(cohort.classes), text_encoder_dir)


def choose_device(name: str = "auto") -> torch.device:
    """ "auto": CUDA, then MPS, then the CPU; any other name as torch understands it.

    Raises:
        ConfigError: torch does not know the name.
    """
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ConfigError("device-unknown", f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}.") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
