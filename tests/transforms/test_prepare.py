from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import gaussian_filter

from medaug.errors import ConfigError, DataError
from medaug.io.picture import Picture
from medaug.transforms.prepare import prepare, restore, square, to_unit, unsquare

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda shape: st.sampled_from([shape, (*shape, 3)]))
UNIT_IMAGES = SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32)))


def smooth(shape: tuple[int, ...], sigma: float = 6) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(0).standard_normal(shape), (sigma, sigma, 0)[: len(shape)])
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def test_lung_window_is_the_default_for_hounsfield_units():
    picture = Picture(np.array([[-2000.0, -1350, -600, 150, 3000]], np.float32), "hu")
    unit, intensity = to_unit(picture)
    np.testing.assert_allclose(unit, [[0, 0, 0.5, 1, 1]], atol=1e-7)
    assert intensity == {"kind": "window_hu", "0": -1350.0, "1": 150.0}
    unit, intensity = to_unit(picture, (-600, 3000))
    np.testing.assert_allclose(unit, [[0, 0, 0, 750 / 3600, 1]], atol=1e-7)
    assert intensity == {"kind": "window_hu", "0": -600.0, "1": 3000.0}


def test_eight_bits_map_to_their_range():
    unit, intensity = to_unit(Picture(np.array([[0, 51, 255]], np.float32), "uint8"))
    np.testing.assert_allclose(unit, [[0, 0.2, 1]], atol=1e-7)
    assert intensity == {"kind": "uint8", "0": 0.0, "1": 255.0}
    with pytest.raises(ConfigError, match="window-not-hu"):
        to_unit(Picture(np.zeros((2, 2), np.float32), "uint8"), (0, 1))


def test_percentiles_for_the_rest():
    pixels = np.linspace(100, 300, 1001, dtype=np.float32).reshape(7, 143)
    unit, intensity = to_unit(Picture(pixels, "stored"))
    assert intensity["kind"] == "percentile"
    assert (intensity["0"], intensity["1"]) == (pytest.approx(101), pytest.approx(299))
    np.testing.assert_allclose(unit, np.clip((pixels - 101) / 198, 0, 1), atol=1e-5)
    assert to_unit(Picture(pixels, "uint16"), (100, 300))[1]["kind"] == "window_stored"


def test_flat_image_and_lone_mark():
    unit, intensity = to_unit(Picture(np.full((5, 5), 7e30, np.float32), "stored"))
    assert not unit.any() and intensity["0"] < intensity["1"]
    lone = np.zeros((100, 100), np.float32)
    lone[3, 4] = 9
    assert to_unit(Picture(lone, "stored"))[0][3, 4] == 1


@pytest.mark.parametrize("window", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_bad_window(window):
    with pytest.raises(ConfigError, match="window-invalid"):
        to_unit(Picture(np.zeros((2, 2), np.float32), "hu"), window)


def test_nan_is_refused():
    with pytest.raises(DataError, match="image-not-finite"):
        to_unit(Picture(np.array([[np.nan]], np.float32), "hu"))


@settings(deadline=None, max_examples=25)
@given(UNIT_IMAGES)
def test_restore_inverts_prepare(unit_image):
    tensor = prepare(unit_image)
    assert tensor.dtype == torch.float32 and tensor.shape[1:] == unit_image.shape[:2]
    assert tensor.shape[0] == (1 if unit_image.ndim == 2 else 3)
    assert float(tensor.min()) >= -1 and float(tensor.max()) <= 1
    np.testing.assert_allclose(restore(tensor), unit_image, atol=1e-6)


def test_restore_clips_and_refuses():
    assert restore(torch.tensor([[[-3.0, 3.0]]])).tolist() == [[0, 1]]
    with pytest.raises(DataError, match="shape-invalid"):
        restore(torch.zeros(2, 4, 4))
    with pytest.raises(DataError, match="image-not-finite"):
        restore(torch.full((1, 2, 2), torch.nan))


@settings(deadline=None, max_examples=25)
@given(UNIT_IMAGES, st.integers(1, 40))
def test_unsquare_gives_the_shape_back(unit_image, size):
    squared, geometry = square(unit_image, size)
    assert squared.shape == (size, size, *unit_image.shape[2:]) and squared.dtype == np.float32
    assert squared.min() >= 0 and squared.max() <= 1
    assert unsquare(squared, geometry).shape == unit_image.shape
    largest = max(unit_image.shape[:2])
    padded, geometry = square(unit_image, largest)
    np.testing.assert_array_equal(unsquare(padded, geometry), unit_image)


@pytest.mark.parametrize("shape", [(96, 64), (61, 90), (90, 61, 3), (64, 64)])
def test_unsquare_is_close_for_smooth_images(shape):
    image = smooth(shape)
    back = unsquare(*square(image, 48))
    # the padding's edge is sharp, so stay away from it
    np.testing.assert_allclose(back[4:-4, 4:-4], image[4:-4, 4:-4], atol=0.04)


def test_square_keeps_the_aspect_ratio_and_pads_with_the_border_minimum():
    image = np.full((40, 80), 0.25, np.float32)
    image[0, 0] = 0.125
    y, x = np.mgrid[:40, :80]
    image[np.hypot(y - 19.5, x - 39.5) < 12] = 1
    squared, geometry = square(image, 40)
    assert geometry == {"original_size": [40, 80], "padding": [20, 20, 0, 0], "size": 40}
    assert squared[0, 0] == pytest.approx(0.125) and squared[-1, -1] == pytest.approx(0.125)
    rows, columns = np.nonzero(squared > 0.6)
    assert np.ptp(rows) == np.ptp(columns) == 11


def test_shrinking_is_antialiased():
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2).astype(np.float32)
    squared, _ = square(checkerboard, 16)
    np.testing.assert_allclose(squared, 0.5, atol=0.02)


@pytest.mark.parametrize("bad", [np.zeros((3,)), np.zeros((3, 3, 2)), np.zeros((0, 3))])
def test_other_shapes_are_refused(bad):
    with pytest.raises(DataError, match="shape-invalid"):
        square(bad, 8)
    with pytest.raises(ConfigError, match="image-size-invalid"):
        square(np.zeros((3, 3)), 0)
