"""The folder a training run leaves behind: weights, and all that generation needs to know about them.

``model.safetensors`` (averaged weights), ``run.json`` (plain data, never code), ``checkpoint/``, ``samples/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from medaug import __version__, storage
from medaug.cohort import Cohort, fit_sha256
from medaug.errors import ConfigError, DataError
from medaug.networks.amst import fit_metadata
from medaug.networks.build import build_guided_unet
from medaug.networks.weights import load_weights, save_weights

RUN_FILE = "run.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class RunRecord:
    """What a trained generator is: written beside its weights.

    Attributes:
        bundle: name of the bundle.
        classes, ordinal, image_size, channels: of the cohort it was trained on.
        fit_groups: sorted groups of the training split; `fit_on` is their sha256.
        settings: the literal settings of network, diffusion and training.
        config_sha256: sha256 of `settings`, seed and cohort content.
    """

    bundle: str
    classes: tuple[str, ...]
    ordinal: bool
    image_size: int
    channels: int
    fit_groups: tuple[str, ...]
    fit_on: str
    cohort_sha256: str
    settings: Mapping[str, Any]
    seed: int
    config_sha256: str
    weights_sha256: str = ""
    iterations: int = 0
    version: str = __version__

    @property
    def sampler(self) -> Mapping[str, Any]:
        """The sampler settings the run was trained for; none fall back to the sampler's own."""
        found: Mapping[str, Any] = self.settings.get("sampler") or {}
        return found


def new_record(bundle: str, cohort: Cohort, settings: Mapping[str, Any], seed: int) -> RunRecord:
    """The record of a run that is about to start on the training split of `cohort`.

    Synthetic training cases hand on what their own generators and filters saw.
    """
    groups = tuple(sorted(cohort.groups("training").union(*cohort.fit_on.values())))
    return RunRecord(
        bundle=bundle,
        classes=cohort.classes,
        ordinal=cohort.ordinal,
        image_size=cohort.image_size,
        channels=cohort.channels,
        fit_groups=groups,
        fit_on=fit_sha256(groups),
        cohort_sha256=cohort.content_sha256,
        settings=settings,
        seed=seed,
        config_sha256=storage.sha256_json([bundle, settings, seed, cohort.content_sha256]),
    )


def write_run(folder: Path, record: RunRecord, network: nn.Module, iterations: int) -> RunRecord:
    """Write weights, then the record that names their sha256; the record's presence means the run is finished."""
    metadata = {
        "bundle": record.bundle,
        "num_classes": str(len(record.classes)),
        "image_size": str(record.image_size),
        "medaug": __version__,
    } | fit_metadata(record.fit_groups)
    sha = save_weights(folder / WEIGHTS_FILE, network, metadata)
    record = replace(record, weights_sha256=sha, iterations=iterations)
    storage.write_json(folder / RUN_FILE, asdict(record))
    return record


def read_run(folder: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        DataError: the folder holds no finished run.  ConfigError: the file lacks a field.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise DataError(
            "run-missing", f"{folder.name} holds no finished training run (no {RUN_FILE}); train first with `medaug train`."
        )
    data = storage.read_json(folder / RUN_FILE)
    try:
        record = RunRecord(**data)
        return replace(record, classes=tuple(record.classes), fit_groups=tuple(record.fit_groups))
    except TypeError as error:
        raise ConfigError(
            "run-malformed", f"{RUN_FILE} of {folder.name} is not one this medaug wrote ({str(error)[:100]}); train again."
        ) from error


def load_network(
    folder: Path,
    record: RunRecord,
    expected_classes: Sequence[str] | None = None,
    text_encoder_dir: str | Path | None = None,
) -> nn.Module:
    """The trained network of a run, in evaluation mode; `text_encoder_dir` as for `build_guided_unet`.

    Raises:
        ConfigError: other classes than expected; weights that are truncated, pickled, not finite, of another network
            or not the ones the record names.
    """
    refuse_other_classes(record, expected_classes)
    settings = dict(record.settings.get("network") or {})
    if not settings:
        raise ConfigError("run-malformed", f"{RUN_FILE} does not say how its network is built; train again.")
    if settings.get("reference"):  # the start weights are in the trained ones; their file may be gone
        settings["reference"] = {**settings["reference"], "pretrained_path": None}
    network = build_guided_unet(settings, record.channels, len(record.classes), text_encoder_dir)
    load_run_weights(folder, record, network)
    return network.eval()


def refuse_other_classes(record: RunRecord, expected_classes: Sequence[str] | None) -> None:
    """Refuse a run for other classes than expected; None expects nothing.

    Raises:
        ConfigError: code `class-mismatch`.
    """
    if expected_classes is not None and tuple(expected_classes) != tuple(record.classes):
        raise ConfigError(
            "class-mismatch",
            f"The run was trained for {len(record.classes)} classes {list(record.classes)}, the cohort has {list(expected_classes)}.",
        )


def load_run_weights(folder: Path, record: RunRecord, network: nn.Module) -> None:
    """Load the weights of a run into a network that was built from its settings.

    Raises:
        DataError: no weights.  ConfigError: weights that are truncated, pickled, not finite, of another network or not the ones the
            record names.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise DataError("weights-missing", f"{WEIGHTS_FILE} is missing from {Path(folder).name}; train again.")
    load_weights(path, network, {"num_classes": str(len(record.classes))})
    if storage.sha256_file(path) != record.weights_sha256:
        raise ConfigError(
            "weights-changed",
            f"{WEIGHTS_FILE} is not the file that {RUN_FILE} names (sha256 differs); restore it or train again.",
        )
