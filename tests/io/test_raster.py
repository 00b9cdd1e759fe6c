from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medaug import storage
from medaug.errors import DataError
from medaug.io.picture import Picture
from medaug.io.raster import read_raster, read_unit_png, write_unit_png

RAMP = (np.arange(12 * 16).reshape(12, 16)).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)


def save(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_grey_in_any_mode_is_grey(tmp_path, mode):
    image = Image.fromarray(RAMP)
    if mode == "P":
        image.putpalette([level for grey in range(256) for level in (grey, grey, grey)])
    else:
        image = image.convert(mode)
    picture = read_raster(save(tmp_path, image))
    assert picture.unit == "uint8" and not picture.is_colour
    np.testing.assert_array_equal(picture.pixels, RAMP)
    assert picture.acquisition["original_size"] == [12, 16]
    assert "spacing_mm" not in picture.acquisition


def test_one_bit_is_black_and_white(tmp_path):
    picture = read_raster(save(tmp_path, Image.fromarray(RAMP > 90)))
    np.testing.assert_array_equal(picture.pixels, (RAMP > 90) * 255)


def test_sixteen_bit_grey_is_exact(tmp_path):
    values = (RAMP.astype(np.uint16) * 257) + 3
    for name in ("a.png", "a.tif"):
        picture = read_raster(save(tmp_path, Image.fromarray(values), name))
        assert picture.unit == "uint16"
        np.testing.assert_array_equal(picture.pixels, values)


def test_big_endian_sixteen_bit_tiff(tmp_path):
    values = (RAMP.astype(np.uint16) * 250) + 3
    picture = read_raster(save(tmp_path, Image.frombytes("I;16B", (16, 12), values.astype(">u2").tobytes()), "a.tif"))
    np.testing.assert_array_equal(picture.pixels, values)


def test_float_tiff_is_stored_and_must_be_finite(tmp_path):
    values = RAMP.astype(np.float32) - 1000.5
    picture = read_raster(save(tmp_path, Image.fromarray(values), "a.tif"))
    assert picture.unit == "stored"
    np.testing.assert_array_equal(picture.pixels, values)
    values[0, 0] = np.nan
    with pytest.raises(DataError, match="image-not-finite"):
        read_raster(save(tmp_path, Image.fromarray(values), "b.tif"))


def test_alpha_is_dropped_not_blended(tmp_path):
    rgba = np.dstack([COLOUR, np.zeros_like(RAMP)])
    picture = read_raster(save(tmp_path, Image.fromarray(rgba)))
    assert picture.is_colour
    np.testing.assert_array_equal(picture.pixels, COLOUR)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned 90 degrees clockwise
    picture = read_raster(save(tmp_path, Image.fromarray(RAMP), exif=exif))
    np.testing.assert_array_equal(picture.pixels, np.rot90(RAMP, -1))
    assert picture.acquisition["original_size"] == [16, 12]


def test_extension_means_nothing(tmp_path):
    path = save(tmp_path, Image.fromarray(RAMP)).rename(tmp_path / "picture.jpg")
    np.testing.assert_array_equal(read_raster(path).pixels, RAMP)
    assert read_raster(path).source == storage.sha256_file(path)


def test_several_pages_are_refused(tmp_path):
    pages = [Image.fromarray(RAMP), Image.fromarray(RAMP)]
    with pytest.raises(DataError, match="multi-frame-unsupported"):
        read_raster(save(tmp_path, pages[0], "a.tif", save_all=True, append_images=pages[1:]))


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 60000])
def test_png_bomb_is_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(side, side))
    with pytest.raises(DataError) as caught:
        read_raster(path)
    assert caught.value.code == "image-too-large"


def test_text_is_unreadable(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match="image-unreadable"):
        read_raster(tmp_path / "a.png")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]), st.booleans(), st.integers(0, 255))
def test_damaged_bytes_give_a_data_error_or_a_picture(tmp_path_factory, position, kind, cut, value):
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, format=kind)
    data = bytearray(buffer.getvalue())
    position = position % len(data)
    if cut:
        data = data[:position]
    else:
        data[position] = value
    path = tmp_path_factory.mktemp("fuzz") / "x.png"
    path.write_bytes(data)
    try:
        assert isinstance(read_raster(path), Picture)
    except DataError as error:
        assert error.code


def test_truncated_png_is_named_so(tmp_path):
    path = save(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="image-truncated"):
        read_raster(path)


@pytest.mark.parametrize(("shape", "levels"), [((9, 9), 65535), ((9, 9, 3), 255)])
def test_unit_png_round_trip(tmp_path, shape, levels):
    unit = np.random.default_rng(0).random(shape).astype(np.float32)
    write_unit_png(tmp_path / "a.png", unit)
    again = read_unit_png(tmp_path / "a.png")
    assert again.dtype == np.float32 and again.shape == shape
    assert np.abs(again - unit).max() <= 0.5001 / levels
    first = (tmp_path / "a.png").read_bytes()
    write_unit_png(tmp_path / "a.png", again)
    assert (tmp_path / "a.png").read_bytes() == first


@pytest.mark.parametrize("bad", [np.full((4, 4), 1.1), np.full((4, 4), np.nan), np.zeros((4, 4, 2)), np.zeros((0, 4))])
def test_write_unit_png_refuses(tmp_path, bad):
    with pytest.raises(DataError):
        write_unit_png(tmp_path / "a.png", bad)
    assert not list(tmp_path.iterdir())
