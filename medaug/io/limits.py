"""Size caps for untrusted files, and one way to turn any decoder's failure into a coded error.

Messages name no file: a file name can hold a patient's name. The caller knows which file it asked for.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import numpy as np

from medaug.errors import DataError, MedaugError
from medaug.io.blocks import row_blocks

MAX_FILE_BYTES = 1 << 29  # one image or volume file; the largest mammograms take 60 MB
MAX_ARCHIVE_BYTES = 1 << 34  # an .npz of many images, read as a stream
MAX_PIXELS = 1 << 26  # one picture, all channels: five times a 13-megapixel mammogram
MAX_INFLATED_BYTES = 1 << 30  # what a gzip or deflate stream may grow to
MAX_VOXELS = 1 << 28  # a volume: 512 x 512 x 1024
MAX_FRAMES = 1 << 14  # of one file: a slice list or a long cine loop
CHUNK_BYTES = 1 << 20


def check_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> int:
    """Size in bytes of a regular, non-empty file within the cap.

    Raises:
        DataError: `file-missing`, `image-empty`, `image-too-large`, `image-unreadable` (no permission, not a file).
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError("file-missing", "An image file was expected, got a path that is not there or is no regular file.")
        with open(path, "rb"):
            size = path.stat().st_size
    except OSError as error:
        raise DataError("image-unreadable", f"The file cannot be opened ({error.strerror}); check its permissions.") from None
    if size == 0:
        raise DataError("image-empty", "The file has 0 bytes; copy it again from its origin.")
    if size > max_bytes:
        raise DataError(
            "image-too-large", f"The file has {size} bytes, more than the cap of {max_bytes}; crop or split it first."
        )
    return size


def check_shape(shape: Sequence[int], max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a declared shape with a size below 1 or more than `max_pixels` values, before anything is decoded.

    Raises:
        DataError: `shape-invalid` or `image-too-large`.
    """
    sizes = [int(size) for size in shape]
    text = " x ".join(map(str, sizes))
    if not sizes or min(sizes) < 1:
        raise DataError("shape-invalid", f"The header declares {text or 'no'} pixels; every size must be at least 1.")
    if prod(sizes) > max_pixels:
        raise DataError(
            "image-too-large", f"The header declares {text} pixels, more than the cap of {max_pixels}; crop or shrink it first."
        )


def check_finite(pixels: np.ndarray) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: `image-not-finite`.
    """
    if not all(np.isfinite(pixels[block]).all() for block in row_blocks(pixels)):
        raise DataError("image-not-finite", "The image holds NaN or infinite values; replace them with a real intensity first.")


_silencing = threading.Lock()
_silenced = 0
_real_stderr = -1


@contextmanager
def silenced() -> Iterator[None]:
    """Keep what C libraries write to the standard error (file descriptor 2) from it: they quote the bytes of the file.

    The descriptor belongs to the whole process, so the last thread that leaves restores it.
    """
    _silence(1)
    try:
        yield
    finally:
        _silence(-1)


def _silence(step: int) -> None:
    global _silenced, _real_stderr  # of the process, like the descriptor
    with _silencing, suppress(OSError):  # closed, or no descriptors left: then it stays as it is
        if step > 0 and _silenced == 0:
            _real_stderr = os.dup(2)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 2)
            os.close(nothing)
        elif step < 0 and _silenced == 1 and _real_stderr >= 0:
            os.dup2(_real_stderr, 2)
            os.close(_real_stderr)
            _real_stderr = -1
    with _silencing:
        _silenced += step


@contextmanager
def decoding(kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises on hostile bytes into a DataError that names only the kind of fault.

    The original text is dropped on purpose: pydicom quotes element values, which may be a patient's.
    """
    try:
        yield
    except MedaugError:
        raise
    except MemoryError:
        raise DataError("image-too-large", f"The {kind} image does not fit into memory; crop or shrink it first.") from None
    except EOFError:
        raise DataError(
            "image-truncated", f"The {kind} image ends before its pixels do; copy it again from its origin."
        ) from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything on arbitrary bytes
        code = "image-truncated" if "truncated" in str(error).lower() else "image-unreadable"
        raise DataError(
            code, f"The {kind} image cannot be decoded ({type(error).__name__}); copy it again from its origin."
        ) from None


def inflate(stream: Iterator[bytes], wbits: int, max_bytes: int = MAX_INFLATED_BYTES) -> Iterator[bytes]:
    """Decompress zlib data in pieces and stop at the cap, so that a bomb costs neither memory nor much time.

    Args:
        stream: compressed pieces.
        wbits: as in `zlib.decompressobj`: 31 for gzip, -15 for the raw deflate of DICOM (PS3.5 A.5).
        max_bytes: cap on the sum of what is yielded.

    Raises:
        DataError: `image-too-large` or `image-truncated`.  zlib.error: broken data.
    """
    total = 0
    decompressor = zlib.decompressobj(wbits)
    for piece in stream:
        while piece and not decompressor.eof:
            data = decompressor.decompress(piece, CHUNK_BYTES)
            piece = decompressor.unconsumed_tail
            total += len(data)
            if total > max_bytes:
                raise DataError(
                    "image-too-large",
                    f"The compressed data grow beyond the cap of {max_bytes} bytes; crop or split the file first.",
                )
            yield data
    if not decompressor.eof:
        raise DataError("image-truncated", "The compressed data end too early; copy the file again from its origin.")


def pieces(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The bytes of a file from `offset` in chunks."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
