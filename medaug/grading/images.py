"""The decoded images of a comparison: each cohort decoded once into a file that all processes map into their memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from medaug.cohort import Case, Cohort
from medaug.storage import storage_errors
from medaug.training.classifier import LabelledImages, image_levels
from medaug.training.data import read_case

CACHE_FOLDER = "cache"
Pair = tuple[Cohort, Case]

__all__ = ["CACHE_FOLDER", "GradedImages", "StoredImages", "decoded"]


def decoded(cohort: Cohort, folder: Path) -> np.ndarray:
    """All images of a cohort, decoded and prepared: (N, C, H, W) uint16, in the order of their ids, mapped and read-only.

    The file ``<content sha256>.npy`` appears whole or not at all; processes that make it at the same time make the same bytes.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    cases = sorted(cohort.cases(), key=lambda case: case.id)
    shape = (len(cases), cohort.channels, cohort.image_size, cohort.image_size)
    path = folder / f"{cohort.content_sha256}.npy"
    if not path.is_file():
        _decode(cohort, cases, shape, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _decode(cohort: Cohort, cases: Sequence[Case], shape: tuple[int, ...], path: Path) -> None:
    with storage_errors(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        try:
            stored = open_memmap(name, mode="w+", dtype=np.uint16, shape=shape)
            for place, case in enumerate(cases):
                stored[place] = image_levels(read_case(cohort, case))
            stored.flush()
            with open(name, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class StoredImages(LabelledImages):
    """Labelled images that lie in arrays of `decoded`; only the batch that is asked for is read.

    Args:
        arrays: (N_a, C, H, W) uint16 each.
        owners: (N,) which array an image is in.  rows: (N,) its place there.  labels: (N,).
    """

    def __init__(self, arrays: Sequence[np.ndarray], owners: Sequence[int], rows: Sequence[int], labels: Sequence[int]) -> None:
        self._arrays = list(arrays)
        self._owners, self._rows = np.asarray(owners, dtype=np.int64), np.asarray(rows, dtype=np.int64)
        self._labels = np.asarray(labels, dtype=np.int64)
        self._positions = np.arange(len(self._labels))

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and labels (B,) int64 of these indices."""
        positions = self._positions[np.asarray(indices, dtype=np.int64)]
        pixels = np.empty((len(positions), *self._arrays[0].shape[1:]), dtype=np.uint16)
        for owner, array in enumerate(self._arrays):
            own = np.flatnonzero(self._owners[positions] == owner)
            pixels[own] = array[self._rows[positions[own]]]
        return self.network_values(pixels), torch.from_numpy(self._labels[positions])

    def labels(self) -> np.ndarray:
        """All labels, (N,)."""
        return self._labels[self._positions]


class GradedImages:
    """The images of a comparison, from one folder of decoded cohorts.

    Args:
        cohort: the real one.
        folder: of the decoded cohorts.
    """

    def __init__(self, cohort: Cohort, folder: Path) -> None:
        self.cohort = cohort
        self._folder = folder
        self._known: dict[str, tuple[np.ndarray, dict[str, int]]] = {}

    def _array(self, cohort: Cohort) -> tuple[np.ndarray, dict[str, int]]:
        """The decoded images and the place of every case among them."""
        sha = cohort.content_sha256
        if sha not in self._known:
            names = sorted(case.id for case in cohort.cases())
            self._known[sha] = decoded(cohort, self._folder), {name: place for place, name in enumerate(names)}
        return self._known[sha]

    def split(self, name: str) -> LabelledImages | None:
        """The real images of a split, None if it is empty."""
        cases = self.cohort.split(name)
        return self.training([(self.cohort, case) for case in cases]) if cases else None

    def unlabelled(self, cohort: Cohort | None) -> LabelledImages | None:
        """The training images of a further cohort."""
        return None if cohort is None else self.training([(cohort, case) for case in cohort.training])

    def training(self, pairs: Sequence[Pair]) -> LabelledImages:
        """Images of several cohorts, in the order of the pairs, repeats allowed."""
        owners = list({cohort.content_sha256: cohort for cohort, _ in pairs}.values())
        place = {cohort.content_sha256: index for index, cohort in enumerate(owners)}
        return StoredImages(
            [self._array(cohort)[0] for cohort in owners],
            [place[cohort.content_sha256] for cohort, _ in pairs],
            [self._array(cohort)[1][case.id] for cohort, case in pairs],
            [case.label for _, case in pairs],
        )
