"""Cases as batches of tensors: the memory that judging needs does not grow with the cohort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medaug.cohort import Case, Cohort
from medaug.training.data import read_case

BATCH_SIZE = 128

__all__ = ["image_batches"]


def image_batches(cohort: Cohort, cases: Sequence[Case], batch_size: int = BATCH_SIZE) -> Iterator[Tensor]:
    """Images (B, C, H, W) in [-1, 1] of `cases`, in order, decoded one batch at a time."""
    for start in range(0, len(cases), batch_size):
        yield torch.stack([read_case(cohort, case) for case in cases[start : start + batch_size]])
