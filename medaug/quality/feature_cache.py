"""Features of images, computed once per image: a gate that is run again with other thresholds looks them up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from medaug import storage
from medaug.cohort import Case, Cohort
from medaug.errors import DataError
from medaug.quality.images import image_batches

_log = logging.getLogger(__name__)

__all__ = ["FeatureCache", "NamedExtractor", "cached_features"]


class NamedExtractor(Protocol):
    """Images (B, C, H, W) in [-1, 1] -> features (B, D), with a name that says all that decides them."""

    name: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images."""


class FeatureCache:
    """Features by the content of the image file; one file per extractor, whole or absent.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.computed = 0  # images that went through an extractor, for those who want to know

    def features(self, extractor: NamedExtractor, cohort: Cohort, cases: Sequence[Case]) -> np.ndarray:
        """Features (N, D) float64 of cases, in order.

        Raises:
            DataError: no cases.
        """
        path = self.folder / f"{storage.sha256_json([extractor.name, cohort.channels])[:16]}.safetensors"
        known = _read(path, extractor.name)
        keys = [storage.sha256_file(cohort.path(case)) for case in cases]
        missing = {key: case for key, case in zip(keys, cases, strict=True) if key not in known}
        if missing:
            made = _compute(extractor, cohort, list(missing.values()))
            self.computed += len(missing)
            known |= dict(zip(missing, made, strict=True))
            _write(path, known, extractor.name)
        if not keys:
            raise DataError("features-empty", "Features need at least one image, got none.")
        return np.stack([known[key] for key in keys]).astype(np.float64)


def cached_features(cache: FeatureCache | None, extractor: NamedExtractor, cohort: Cohort, cases: Sequence[Case]) -> np.ndarray:
    """Features (N, D) float64 of cases, from the cache where there is one."""
    if cache is not None:
        return cache.features(extractor, cohort, cases)
    if not cases:
        raise DataError("features-empty", "Features need at least one image, got none.")
    return _compute(extractor, cohort, cases).astype(np.float64)


def _compute(extractor: NamedExtractor, cohort: Cohort, cases: Sequence[Case]) -> np.ndarray:
    return np.concatenate([extractor(batch).float().numpy() for batch in image_batches(cohort, cases)])


def _read(path: Path, name: str) -> dict[str, np.ndarray]:
    """Known features by sha256; nothing if the file is absent or damaged (they are then made again)."""
    try:
        content = load(path.read_bytes())
        digests, rows = content["images"].numpy(), content["features"].numpy()
        if rows.ndim != 2 or digests.shape != (len(rows), 32) or not np.isfinite(rows).all():
            raise ValueError("shapes that do not fit")
        return {bytes(digest).hex(): row for digest, row in zip(digests, rows, strict=True)}
    except FileNotFoundError:
        return {}
    except (SafetensorError, KeyError, ValueError, OSError):
        _log.warning("The cached features of %s are damaged; they are made again.", name)
        return {}


def _write(path: Path, known: dict[str, np.ndarray], name: str) -> None:
    keys = sorted(known)  # the file depends on the images alone, not on their order
    digests = torch.from_numpy(np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, 32).copy())
    rows = torch.from_numpy(np.stack([known[key] for key in keys]))
    storage.write_bytes(path, save({"images": digests, "features": rows}, {"extractor": name}))
