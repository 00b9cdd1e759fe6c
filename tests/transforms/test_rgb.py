from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from medaug.draws import randn
from medaug.errors import ConfigError
from medaug.transforms.prepare import square
from medaug.transforms.rgb import from_rgb, resized, to_rgb


def test_shrinking_is_that_of_intake() -> None:
    image = (randn((1, 1, 40, 40), "rgb") * 0.2 + 0.5).clamp(0, 1)
    expected, _ = square(image[0, 0].numpy(), 12)
    assert np.abs(resized(image, 12)[0, 0].numpy() - expected).max() < 1e-5  # float32 sums in another order


def test_grey_is_pillows_luminance() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
    grey = from_rgb(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), 1, 8)
    assert grey.shape == (1, 1, 8, 8)
    assert np.abs(grey[0, 0].numpy() - expected).max() <= 1  # Pillow rounds to whole levels


@pytest.mark.parametrize("channels", [1, 3])
def test_there_and_back_is_the_same_image(channels: int) -> None:
    images = randn((2, channels, 16, 16), "there")
    assert torch.allclose(from_rgb(to_rgb(images, 16), channels, 16), images, atol=1e-6)


def test_other_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 or 3 channels, got 2"):
        from_rgb(torch.zeros(1, 3, 4, 4), 2, 4)
