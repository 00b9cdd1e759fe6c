"""MedMNIST archives (.npz), read as a stream so that memory does not grow with the archive."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from medaug import storage
from medaug.errors import DataError
from medaug.io import limits
from medaug.io.picture import Picture

SPLITS = {"train": "training", "val": "validation", "test": "test"}


def read_medmnist(path: Path) -> Iterator[tuple[str, int, Picture]]:
    """Read the images of a 2-D MedMNIST archive with one label each.

    The archive holds ``{train,val,test}_images``, uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), and
    ``{train,val,test}_labels``, integers of shape (N,) or (N, 1); splits may be absent. Nothing is unpickled.

    Returns:
        (split, label, picture) with split "training", "validation" or "test"; labels and headers are checked first.
        A picture's `source` is the sha256 of its array bytes.

    Raises:
        DataError: `archive-unreadable`, `archive-malformed`, `image-too-large`, `label-invalid`.
    """
    path = Path(path)
    limits.check_file(path, limits.MAX_ARCHIVE_BYTES)
    if not zipfile.is_zipfile(path):
        raise DataError("archive-unreadable", "The file is no .npz archive; download it again.")
    labels: dict[str, np.ndarray] = {}
    with limits.decoding("npz"), zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for split in SPLITS:
            pair = {f"{split}_images.npy", f"{split}_labels.npy"} & names
            if len(pair) == 1:
                raise DataError("archive-malformed", f"The archive holds {pair.pop()} alone; images and labels come in pairs.")
            if pair:
                labels[split] = _read_labels(archive, split)
                _check_images(archive, split, len(labels[split]))
    if not labels:
        raise DataError("archive-malformed", "The archive holds none of train_images, val_images, test_images as MedMNIST does.")
    return _pictures(path, labels)


def _pictures(path: Path, labels: dict[str, np.ndarray]) -> Iterator[tuple[str, int, Picture]]:
    with limits.decoding("npz"), zipfile.ZipFile(path) as archive:
        for split, split_labels in labels.items():
            with archive.open(f"{split}_images.npy") as stream:
                shape, _ = _header(stream)
                for index, label in enumerate(split_labels):
                    yield SPLITS[split], int(label), _picture(_read_exactly(stream, prod(shape[1:])), shape[1:], index)


def _picture(data: bytes, shape: tuple[int, ...], index: int) -> Picture:
    array = np.frombuffer(data, dtype=np.uint8).reshape(shape)
    if array.ndim == 3 and (array[..., :1] == array).all():
        array = array[..., 0]
    acquisition = {
        "original_size": list(shape[:2]),
        "bits": 8,
        "photometric": "RGB" if array.ndim == 3 else "MONOCHROME2",
        "format": "MedMNIST",
        "index": index,
    }
    return Picture(array.astype(np.float32), "uint8", acquisition=acquisition, source=storage.sha256_bytes(data))


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the .npy member, leaving the stream at its data."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(
            "archive-malformed", "The arrays must be in .npy format 1.0 or 2.0; save the archive again with numpy.savez."
        )
    shape, fortran_order, dtype = readers[version](stream)
    if dtype.hasobject:
        raise DataError("archive-malformed", "The archive holds Python objects, which are never unpickled; save plain arrays.")
    if fortran_order and len(shape) > 1:
        raise DataError("archive-malformed", "The arrays must be in C order; save them again after numpy.ascontiguousarray.")
    return shape, dtype


def _read_labels(archive: zipfile.ZipFile, split: str) -> np.ndarray:
    with archive.open(f"{split}_labels.npy") as stream:
        shape, dtype = _header(stream)
        if dtype.kind not in "iu" or len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
            raise DataError(
                "label-invalid",
                f"{split}_labels must be integers of shape (N,) or (N, 1), got {dtype} {shape}; one label per image.",
            )
        limits.check_shape((max(shape[0], 1),))
        labels = np.frombuffer(_read_exactly(stream, shape[0] * dtype.itemsize), dtype=dtype)
    if labels.size and labels.min() < 0:
        raise DataError("label-invalid", f"{split}_labels must be 0 or more, got {labels.min()}.")
    return labels


def _check_images(archive: zipfile.ZipFile, split: str, num_labels: int) -> None:
    name = f"{split}_images.npy"
    with archive.open(name) as stream:
        shape, dtype = _header(stream)
        start = stream.tell()
    if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        raise DataError(
            "archive-malformed",
            f"{split}_images must be uint8 (N, H, W) or (N, H, W, 3), got {dtype} {shape}; 3-D sets are not supported.",
        )
    if shape[0] != num_labels:
        raise DataError(
            "archive-malformed", f"{split} holds {shape[0]} images and {num_labels} labels; there must be one label per image."
        )
    limits.check_shape(shape[1:])
    if archive.getinfo(name).file_size < start + prod(shape):
        raise DataError("image-truncated", f"{split}_images is shorter than its header says; download the archive again.")


def _read_exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise DataError("image-truncated", "The archive ends in the middle of an array; download it again.")
    return data
