"""Training that goes on from weights of an earlier run, without what they saw slipping past the split."""

from __future__ import annotations

from pathlib import Path

from medaug import storage
from medaug.cohort import Cohort
from medaug.errors import LeakageError
from medaug.generation.generate import check_run
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.weights import load_weights
from medaug.training.run_folder import RUN_FILE, read_run


def start_from(network: GuidedUNet, checkpoint: str | None, cohort: Cohort, trusted: bool = False) -> GuidedUNet:
    """Load a checkpoint into a fresh network; returns it.

    Args:
        network: of the bundle; must have the checkpoint's tensors.
        checkpoint: a safetensors file that medaug wrote; None leaves the network as it is. The ``run.json`` beside it says
            what it was trained on.
        cohort: what will be trained on.
        trusted: the user vouches that a checkpoint without a record, or of other data, saw no validation or test image.

    Raises:
        ConfigError: no such file, another network, another number of classes or, with a record, other classes or sizes.
        LeakageError: it saw a group that this cohort holds out, or nothing shows what it saw.
    """
    if checkpoint is None:
        return network
    path = Path(checkpoint)
    load_weights(path, network, {"num_classes": str(len(cohort.classes))})
    if trusted:
        return network
    record = read_run(path.parent) if (path.parent / RUN_FILE).is_file() else None
    if record is None or record.weights_sha256 != storage.sha256_file(path):
        raise LeakageError(
            "fit-unknown",
            f"Nothing beside {path.name} shows which images it was trained on, so a held-out patient may be among them; name the "
            "model.safetensors of a run folder, or set checkpoint_trusted if you know that none is.",
        )
    check_run(record, cohort)
    return network


def digest(checkpoint: str | None) -> str | None:
    """sha256 of a checkpoint, for the record of the run; None for none or a missing file, which `start_from` refuses."""
    return storage.sha256_file(Path(checkpoint)) if checkpoint is not None and Path(checkpoint).is_file() else None
