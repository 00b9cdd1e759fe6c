from __future__ import annotations

from typing import Any

import pytest
import torch
from random_run import DIFFUSION, new_network
from torch import Tensor

from medaug.errors import ConfigError
from medaug.generation.sampler import ReferenceCache, make_sampler
from medaug.networks.build import build_guided_unet

SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "spacing": "karras", "sigma_min": 0.01, "sigma_max": 80.0}


@pytest.fixture(scope="module")
def network() -> Any:
    torch.set_num_threads(1)
    return new_network()


def request(count: int, start: int = 0, size: int = 16) -> dict[str, Any]:
    """Inputs of images start ... start + count - 1: three references, three classes."""
    names = range(start, start + count)
    images = {n: torch.linspace(-1, 1, size * size).roll(37 * n).reshape(1, size, size) for n in range(3)}
    return {
        "id": [f"s{n}" for n in names],
        "label": torch.tensor([n % 3 for n in names]),
        "reference_id": [f"r{n % 3}" for n in names],
        "reference": lambda i: images[(start + i) % 3],
        "shape": (size, size),
    }


def draw(network: Any, count: int = 2, *, start: int = 0, seed: int = 0, **settings: Any) -> Tensor:
    return make_sampler(DIFFUSION, SETTINGS | settings, seed)(request(count, start), network)


@pytest.mark.parametrize(
    "settings", [{}, {"step": "ancestral"}, {"step": "ddim", "step_options": {"eta": 1.0}}, {"guidance_scale": 2.0}]
)
def test_sample_does_not_depend_on_its_batch(network: Any, settings: dict[str, Any]) -> None:
    whole = draw(network, 8, **settings)
    alone = torch.cat([draw(network, 1, start=n, **settings) for n in range(8)])
    assert whole.shape == (8, 1, 16, 16)
    assert torch.allclose(whole, alone, atol=1e-4)
    assert float((whole[0] - whole[3]).abs().max()) > 0.01  # same class and reference, other noise


def test_same_key_same_image_other_seed_other_image(network: Any) -> None:
    torch.manual_seed(0)
    first = draw(network)
    torch.manual_seed(1)
    assert torch.equal(draw(network), first)
    assert not torch.allclose(draw(network, seed=1), first, atol=1e-3)


def test_bottleneck_noise_changes_the_image_and_zero_leaves_it_out(network: Any) -> None:
    calm = draw(network, bottleneck_scale=0.0)
    assert torch.equal(draw(network, bottleneck_scale=0.0), calm)
    distances = [float((draw(network, bottleneck_scale=scale) - calm).abs().mean()) for scale in (1e-5, 0.1, 1.0)]
    assert distances[0] < 1e-3 < distances[1] < distances[2]
    assert not torch.allclose(
        draw(network, bottleneck_scale=0.1, bottleneck_mode="absolute"), draw(network, bottleneck_scale=0.1), atol=1e-4
    )


def test_image_follows_its_reference_and_its_class(network: Any) -> None:
    sampler = make_sampler(DIFFUSION, SETTINGS)
    base, other = request(1), request(1)
    image = sampler(base, network)
    other["reference_id"], other["reference"] = ["r1"], lambda i: torch.ones(1, 16, 16)
    assert not torch.allclose(sampler(other, network), image, atol=1e-3)
    assert not torch.allclose(sampler(base | {"label": torch.tensor([1])}, network), image, atol=1e-3)


def test_guidance_at_scale_one_is_the_plain_sample(network: Any) -> None:
    plain = draw(network, 3)
    near = draw(network, 3, guidance_scale=1.0 + 1e-6)  # both passes, weight of the second all but 0
    assert torch.allclose(near, plain, atol=1e-4)
    assert not torch.allclose(draw(network, 3, guidance_scale=3.0), plain, atol=1e-3)


def test_guidance_at_scale_zero_is_the_unconditional_sample(network: Any) -> None:
    conditions = request(2)
    null = conditions | {"label": torch.tensor([3, 3])}
    sampler = make_sampler(DIFFUSION, SETTINGS | {"guidance_scale": 0.0})
    assert torch.allclose(sampler(conditions, network), sampler(null, network), atol=1e-4)
    changed = conditions | {"reference_id": ["x", "x"], "reference": lambda i: torch.zeros(1, 16, 16)}
    assert torch.allclose(sampler(conditions, network), sampler(changed, network), atol=1e-4)


def test_encoder_runs_once_per_reference(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    features = network.reference_features
    monkeypatch.setattr(network, "reference_features", lambda images: calls.append(len(images)) or features(images))
    sampler = make_sampler(DIFFUSION, SETTINGS | {"guidance_scale": 2.0})
    sampler(request(8), network)
    assert sum(calls) == 3  # three references, whatever the steps and the images
    sampler(request(4, start=8), network)
    assert sum(calls) == 3


def test_features_are_the_same_to_the_bit_whatever_else_is_new(network: Any) -> None:
    images = {f"r{n}": torch.full((1, 16, 16), n / 5) for n in range(5)}
    with torch.no_grad():
        together = ReferenceCache()(network, list(images), lambda i: images[f"r{i}"])
        cache = ReferenceCache()
        alone = torch.cat([cache(network, [name], lambda i, name=name: images[name]) for name in images])
    assert torch.equal(together, alone)


def test_cache_is_bounded_and_still_right(network: Any) -> None:
    images = {f"r{n}": torch.full((1, 16, 16), n / 5) for n in range(5)}
    with torch.no_grad():
        wanted = ReferenceCache()(network, list(images), lambda i: images[f"r{i}"])
        small = ReferenceCache(max_bytes=2 * wanted[0].numel() * 4)
        assert torch.equal(small(network, list(images), lambda i: images[f"r{i}"]), wanted)
    assert list(small.features) == ["r3", "r4"]


def test_network_without_reference_or_classes_is_sampled() -> None:
    plain = build_guided_unet({"backbone": "lean", "backbone_options": {"channels": [8, 8], "patch": 2}}, 1, 3).eval()
    image = make_sampler(DIFFUSION, SETTINGS)(request(2), plain)
    assert image.shape == (2, 1, 16, 16) and bool(torch.isfinite(image).all())


def test_clip_keeps_the_range(network: Any) -> None:
    assert float(draw(network, 4, clip=True).abs().max()) <= 1


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"steps": 1}, "setting-unknown.*num_inference_steps"),
        ({"seed": 1}, "setting-unknown"),
        ({"step": "euler"}, "step-unknown"),
        ({"step_options": {"eta": 1}}, "setting-unknown"),
        ({"step": "ddim", "step_options": {"eta": 2}}, "eta-range"),
        ({"spacing": "even"}, "spacing"),
        ({"num_inference_steps": 0}, "inference|steps"),
        ({"bottleneck_mode": "loud"}, "mode"),
        ({"bottleneck_scale": -1.0}, "bottleneck"),
    ],
)
def test_bad_settings_are_refused_before_sampling(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        make_sampler(DIFFUSION, SETTINGS | settings)
