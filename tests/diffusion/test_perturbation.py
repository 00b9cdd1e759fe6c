import pytest
import torch
from gaussian_toy import seeded

from medaug.diffusion import bottleneck_noise
from medaug.errors import ConfigError

SHAPE = (4, 8, 5, 5)
SPREAD = torch.tensor([0.1, 1.0, 3.0, 20.0], dtype=torch.float64).reshape(4, 1, 1, 1)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_scale_0_is_the_identity(mode):
    h = seeded(SHAPE, 0)
    assert torch.equal(bottleneck_noise(h, seeded(SHAPE, 1), 0.0, mode), h)


def test_the_same_draw_gives_the_same_result():
    h = seeded(SHAPE, 0)
    once, again = (bottleneck_noise(h, seeded(SHAPE, 1), 0.3) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, bottleneck_noise(h, seeded(SHAPE, 2), 0.3))


@pytest.mark.parametrize(("mode", "scale"), [("relative", 0.25), ("absolute", 3.0)])
def test_mean_and_variance_over_draws(mode, scale):
    """Over draws h' - h has mean 0 and std sigma; in relative mode sigma follows the spread of each image."""
    h = 5 + SPREAD * seeded(SHAPE, 0)
    change = torch.stack([bottleneck_noise(h, seeded(SHAPE, 100 + i), scale, mode) - h for i in range(500)])
    per_image = change.permute(1, 0, 2, 3, 4).flatten(1)  # 100000 numbers per image
    sigma = scale * (h.flatten(1).std(dim=1, correction=0) if mode == "relative" else torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(per_image.std(dim=1) / sigma, torch.ones(4, dtype=torch.float64), atol=0.01, rtol=0)
    assert (per_image.mean(dim=1) / sigma).abs().max() < 0.015


def test_an_image_does_not_depend_on_its_neighbours():
    h, draw = SPREAD * seeded(SHAPE, 0), seeded(SHAPE, 1)
    torch.testing.assert_close(bottleneck_noise(h, draw, 0.5)[2:3], bottleneck_noise(h[2:3], draw[2:3], 0.5))


def test_a_single_activation_is_finite():
    assert bottleneck_noise(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), 0.5).tolist() == torch.ones(2, 1, 1, 1).tolist()


def test_refusals():
    h = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match="relative, absolute, got 'per_channel'"):
        bottleneck_noise(h, h, 0.1, "per_channel")
    for scale in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="at least 0"):
            bottleneck_noise(h, h, scale)
    with pytest.raises(ConfigError, match=r"shape \(2, 3, 4, 4\) of h, got \(3, 4, 4\)"):
        bottleneck_noise(h, h[0], 0.1)
