from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from medaug.errors import ConfigError
from medaug.networks.dagan import DaganCritic, DaganGenerator, build_critic, build_generator

SMALL: dict[str, Any] = {"channels": (4, 6, 8), "num_res_blocks": 1, "latent_dim": 5, "latent_channels": 2, "latent_scales": 2}


def seeded_generator(channels: int = 1, size: int = 32, **more: Any) -> DaganGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DaganGenerator(channels, size, **(SMALL | more))


def seeded_critic(channels: int = 1, size: int = 32, **more: Any) -> DaganCritic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DaganCritic(channels, size, channels=(4, 6, 8), num_res_blocks=1, **more)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "patch"), [(32, 1), (48, 2), (64, 4), (12, 1)])
def test_images_keep_their_shape_and_range(channels: int, size: int, patch: int) -> None:
    generator = seeded_generator(channels, size, patch=patch)
    x = draw(3, channels, size, size).clamp(-1, 1)
    for training in (True, False):
        made = generator.train(training)(100 * x, 100 * draw(3, 5))
        assert made.shape == x.shape
        assert bool((made.abs() <= 1).all())


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_the_output_depends_on_image_and_latent_vector(scales: int) -> None:
    generator = seeded_generator(latent_scales=scales).eval()
    assert len(generator.projections) == scales
    x, z = draw(2, 1, 32, 32), draw(2, 5)
    made = generator(x, z)
    assert torch.equal(made, generator(x, z))
    assert not torch.allclose(made, generator(x, draw(2, 5, seed=1)))
    assert not torch.allclose(made, generator(draw(2, 1, 32, 32, seed=1), z))


def test_z_reaches_every_scale_that_it_is_given_to() -> None:
    generator = seeded_generator(latent_scales=3).eval()
    x, z = draw(1, 1, 32, 32), draw(1, 5)
    made = generator(x, z)
    for projection in generator.projections.values():
        with torch.no_grad():
            kept = projection[0].weight.clone()
            projection[0].weight.zero_()
            assert not torch.allclose(made, generator(x, z))
            projection[0].weight.copy_(kept)
    assert torch.equal(made, generator(x, z))


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    generator, critic = seeded_generator().eval(), seeded_critic().train()
    x, other, z = draw(4, 1, 32, 32), draw(4, 1, 32, 32, seed=1), draw(4, 5)
    torch.testing.assert_close(generator(x, z)[:1], generator(x[:1], z[:1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(critic(x, other)[:1], critic(x[:1], other[:1]), atol=1e-5, rtol=0)


def test_the_critic_scores_ordered_pairs() -> None:
    critic = seeded_critic()
    x, other = draw(4, 1, 32, 32), draw(4, 1, 32, 32, seed=1)
    assert critic(x, other).shape == (4,)
    assert not torch.allclose(critic(x, other), critic(other, x))
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in critic.modules())


def test_dropout_acts_in_training_only() -> None:
    generator, x, z = seeded_generator(dropout=0.5), draw(2, 1, 32, 32), draw(2, 5)
    assert not torch.allclose(generator.train()(x, z), generator(x, z))
    assert torch.equal(generator.eval()(x, z), generator(x, z))


def test_the_default_reaches_8_pixels_from_256() -> None:
    sides = [256 // 2**level for level in range(len(DaganGenerator(1, 256, num_res_blocks=1).encoder.levels))]
    assert sides[-1] == 8


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"channels": []}, "network-config"),
        ({"channels": [4, 0]}, "network-config"),
        ({"patch": 0}, "network-config"),
        ({"dropout": 1.0}, "network-config"),
        ({"latent_dim": 0}, "network-config"),
        ({"channels": [4, 4], "latent_scales": 3}, "network-config"),
        ({"channels": [4] * 7}, "image-size.*multiple of 64"),
        ({"patch": 3}, "image-size"),
        ({"width": 4}, "setting-unknown"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(settings: Mapping[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        build_generator(settings, 1, 32)


def test_critic_settings_that_cannot_be_built_are_refused() -> None:
    for settings, code in (({"dropout": 0.5}, "setting-unknown"), ({"num_res_blocks": 0}, "network-config")):
        with pytest.raises(ConfigError, match=code):
            build_critic(settings, 1, 32)


@pytest.mark.parametrize(("x", "z"), [((2, 1, 16, 16), (2, 5)), ((2, 3, 32, 32), (2, 5)), ((2, 1, 32, 32), (1, 5))])
def test_other_shapes_are_refused(x: tuple[int, ...], z: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="image-size"):
        seeded_generator()(draw(*x), draw(*z))
