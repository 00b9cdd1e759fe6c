"""Classifiers that come from a file: what they were fitted on, and a teacher made of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medaug import storage
from medaug.cohort import Cohort, check_fit, fit_sha256
from medaug.errors import LeakageError
from medaug.networks.amst import load_backbone
from medaug.networks.grading import build_network
from medaug.training.classifier import seeded

__all__ = ["Teacher", "check_origin", "teacher_from_checkpoint"]


def check_origin(groups: Sequence[str] | None, cohort: Cohort, name: str, trusted: bool = False) -> bool:
    """Refuse a network that saw a held-out group of `cohort`, or of which nobody can say that it did not.

    Args:
        groups: what it was fitted on, as its file says; None if it does not say.
        cohort: holds validation and test.
        name: of the network, for the message; no path.
        trusted: the user vouches that a network of unknown origin, or of other data, saw no validation or test image. It does
            not excuse a group that is known to be held out.

    Returns:
        True if only that word speaks for the network.

    Raises:
        LeakageError: `fit-on-held-out`, or `fit-unknown` without the user's word.
    """
    if groups is not None:
        check_fit({fit_sha256(groups): groups}, cohort.groups("validation") | cohort.groups("test"))
        unknown = set(groups) - cohort.groups("training")
        if not unknown:
            return False
        what = f"{name} was fitted on {len(unknown)} group(s) that are not in this cohort's training split"
    else:
        what = f"{name} does not say which groups it was fitted on"
    if not trusted:
        raise LeakageError(
            "fit-unknown",
            f"{what}, so a held-out patient may be among them; use one that medaug trained on this cohort, or set weights_trusted "
            "(`trusted` of a teacher) if you know that none is.",
        )
    return True


@dataclass(frozen=True)
class Teacher:
    """Any classifier in the place of the auxiliary heads.

    Attributes:
        predict: images (B, C, H, W) in [-1, 1] -> class probabilities (B, K).
        fit_groups: groups it was trained on; an empty tuple says that it was trained on no image, None that nobody knows.
        sha256: what it is, for content addressing.
        trusted: see `check_origin`; needed where `fit_groups` is None or names other groups than the cohort's.
    """

    predict: Callable[[Tensor], Tensor]
    fit_groups: tuple[str, ...] | None = None
    sha256: str = ""
    trusted: bool = False

    def content(self) -> dict[str, Any]:
        """Plain values for reports: what it is, and the sorted groups it saw (None: unknown)."""
        known = self.fit_groups
        return {
            "sha256": self.sha256,
            "fit_groups": None if known is None else sorted(known),
            "fit_on": None if known is None else fit_sha256(known),
            "trusted": self.trusted,
        }


def teacher_from_checkpoint(path: Path, network: str, cohort: Cohort, *, trusted: bool = False) -> Teacher:
    """A teacher from a classifier's safetensors file.

    Args:
        path: the file.
        network: its architecture, of `build_network`.
        cohort: gives classes and size, and must not have its held-out groups in the teacher.
        trusted: see `check_origin`.

    Raises:
        LeakageError: see `check_origin`.
        ConfigError: other classes, another network, unreadable.
    """
    with seeded("teacher"):
        module = build_network(network, len(cohort.classes), cohort.channels, cohort.image_size)
    groups = load_backbone(path, module)
    check_origin(groups, cohort, Path(path).name, trusted)
    module.eval()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return torch.softmax(module.to(images.device)(images), dim=1)

    return Teacher(predict, groups, storage.sha256_file(Path(path)), trusted)
