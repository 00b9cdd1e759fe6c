from __future__ import annotations

import zlib

import numpy as np
import pytest

from medaug.errors import DataError
from medaug.io import limits


def test_check_file_refuses_what_is_no_file_of_fair_size(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"12345")
    assert limits.check_file(tmp_path / "full") == 5
    for name, cap, code in (
        ("absent", 10, "file-missing"),
        (".", 10, "file-missing"),
        ("empty", 10, "image-empty"),
        ("full", 4, "image-too-large"),
    ):
        with pytest.raises(DataError) as caught:
            limits.check_file(tmp_path / name, cap)
        assert caught.value.code == code
        assert tmp_path.name not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "code"),
    [((0, 3), "shape-invalid"), ((-2, 3), "shape-invalid"), ((), "shape-invalid"), ((2**31, 2**31), "image-too-large")],
)
def test_check_shape_refuses(shape, code):
    with pytest.raises(DataError) as caught:
        limits.check_shape(shape)
    assert caught.value.code == code


def test_inflate_gives_the_data_back_and_stops_a_bomb():
    data = np.random.default_rng(0).bytes(3_000_000)
    assert b"".join(limits.inflate(iter([zlib.compress(data)]), 15)) == data
    bomb = zlib.compress(bytes(50_000_000))
    yielded = 0
    with pytest.raises(DataError, match="image-too-large"):
        for piece in limits.inflate(iter([bomb]), 15, max_bytes=2_000_000):
            yielded += len(piece)
    assert yielded <= 2_000_000


def test_inflate_of_a_cut_stream_is_truncated():
    with pytest.raises(DataError, match="image-truncated"):
        list(limits.inflate(iter([zlib.compress(b"abc" * 1000)[:-5]]), 15))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EOFError(), "image-truncated"),
        (OSError("image file is truncated"), "image-truncated"),
        (MemoryError(), "image-too-large"),
        (ValueError("DOE^JANE"), "image-unreadable"),
    ],
)
def test_decoding_hides_the_text_of_a_decoder(error, code):
    with pytest.raises(DataError) as caught, limits.decoding("test"):
        raise error
    assert caught.value.code == code
    assert "DOE" not in str(caught.value)
    assert caught.value.__suppress_context__
