"""Working by blocks changes no bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from medaug.errors import DataError
from medaug.io import blocks
from medaug.io.picture import Picture
from medaug.transforms import prepare


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    monkeypatch.setattr(blocks.row_blocks, "__defaults__", (1000,))


@pytest.mark.parametrize("shape", [(91, 90), (3, 40, 50), (1, 9000), (9000, 1)])
def test_percentiles_are_numpys_to_the_last_bit(shape):
    rng = np.random.default_rng(0)
    kinds = (
        rng.normal(0, 100, shape),
        rng.integers(-1000, 3000, shape),
        rng.normal(0, 1e30, shape),
        np.where(rng.random(shape) < 0.5, -0.0, 0.0),
        -5.0 * (rng.random(shape) < 0.003),
    )
    for kind in kinds:
        values = kind.astype(np.float32)
        for wanted in ((0.5, 99.5), (12.34, 100.0), (0.0, 77.7)):
            assert blocks.percentiles(values, wanted) == tuple(np.percentile(values.astype(np.float64), wanted))


@pytest.mark.parametrize("shape", [(110, 140), (140, 110), (150, 150), (300, 4), (4, 300), (120, 90, 3), (205, 1)])
@pytest.mark.parametrize("size", [16, 33, 400])
def test_squares_are_those_of_the_whole_picture(shape, size):
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    result, geometry = prepare.square(image, size)
    top, bottom, left, right = geometry["padding"]
    for channel in range(3 if image.ndim == 3 else 1):
        plane = image[..., channel] if image.ndim == 3 else image
        border = min(edge.min() for edge in (plane[0], plane[-1], plane[:, 0], plane[:, -1]))
        padded = np.pad(plane, ((top, bottom), (left, right)), constant_values=border)
        whole = np.asarray(Image.fromarray(padded).resize((size, size), Image.Resampling.BILINEAR)).clip(0, 1)
        np.testing.assert_array_equal(result[..., channel] if image.ndim == 3 else result, whole)


@pytest.mark.parametrize("unit", ["hu", "stored", "uint16"])
@pytest.mark.parametrize("shape", [(60, 70), (5, 30, 40)])
def test_unit_images_are_those_of_the_whole_picture(unit, shape):
    pixels = np.random.default_rng(0).normal(0, 300, shape).astype(np.float32)
    before = pixels.copy()
    result, ends = prepare.to_unit(Picture(pixels, unit))
    whole = np.clip((pixels.astype(np.float64) - ends["0"]) / (ends["1"] - ends["0"]), 0, 1).astype(np.float32)
    np.testing.assert_array_equal(result, whole)
    np.testing.assert_array_equal(pixels, before)
    overwritten, _ = prepare.to_unit(Picture(pixels, unit), overwrite=True)
    assert overwritten is pixels
    np.testing.assert_array_equal(pixels, whole)


def test_a_strip_whose_square_cannot_be_is_refused():
    with pytest.raises(DataError, match="image-too-large"):
        prepare.square(np.zeros((1, prepare.MAX_SIDE + 1), np.float32), 64)
