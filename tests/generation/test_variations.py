"""Variations of seed images by a network whose every weight was moved, so that its zero start hides nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from random_run import DIFFUSION
from tiny_run import BACKBONE, randomised
from torch import Tensor, nn

from medaug.diffusion.parameterisation import noise_from_x_0
from medaug.diffusion.perturbation import LOCATIONS, Perturbation
from medaug.draws import randn
from medaug.errors import ConfigError
from medaug.generation import variations
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.generation.inversions import INVERSIONS
from medaug.generation.variations import make_variation_sampler
from medaug.networks.build import build_guided_unet
from medaug.networks.guided_unet import Encoded
from medaug.training.diffusion import build_objective

GRID: dict[str, Any] = {"num_inference_steps": 6, "spacing": "karras", "sigma_min": 0.02, "sigma_max": 80.0}
LINEAR = {"parameterisation": "epsilon", "schedule": "linear_beta", "num_train_timesteps": 1000}
MONAI = {"channels": [8, 8], "norm_num_groups": 8, "num_head_channels": 8}
NETWORKS = {"lean": BACKBONE, "monai": MONAI}


def new_network(backbone: str = "lean", seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"backbone": backbone, "class_conditional": True, "backbone_options": NETWORKS[backbone]}
        return randomised(build_guided_unet(settings, 1, 3), seed).eval().to(dtype)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.set_num_threads(1)
    return new_network()


def seed_image(n: int) -> Tensor:
    return torch.tanh(randn((1, 16, 16), "seed-image", n)).double()


def request(names: list[tuple[int, int]]) -> dict[str, Any]:
    """Inputs for variations (seed image, number)."""
    return {
        "id": [f"v{n}-{k}" for n, k in names],
        "label": torch.tensor([n % 3 for n, _ in names]),
        "reference_id": [f"c{n}" for n, _ in names],
        "reference": lambda i: seed_image(names[i][0]),
        "shape": (16, 16),
    }


def vary(
    network: Any, names: list[tuple[int, int]], seed: int = 0, diffusion: dict[str, Any] = DIFFUSION, **settings: Any
) -> Tensor:
    return make_variation_sampler(diffusion, GRID | settings, None, seed)(request(names), network)


def seeds_of(names: list[tuple[int, int]]) -> Tensor:
    return torch.stack([seed_image(n) for n, _ in names])


THREE = [(0, 0), (1, 0), (2, 0)]
OF_ONE = [(0, k) for k in range(4)]


# --- P3.1: a scale of 0 is the seed image -----------------------------------------------------------------------------


@pytest.mark.parametrize("location", LOCATIONS)
def test_p3_1_scale_0_reproduces_the_seed_wherever_it_would_act(network: Any, location: str) -> None:
    got = vary(network, THREE, scale=0.0, location=location, skip_last=False)
    torch.testing.assert_close(got, seeds_of(THREE), atol=1e-10, rtol=0)


@pytest.mark.parametrize("backbone", ["lean", "monai"])
@pytest.mark.parametrize("parameterisation", ["epsilon", "sample", "v_prediction", "edm"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_p3_1_for_every_parameterisation_with_guidance(backbone: str, parameterisation: str, guidance_scale: float) -> None:
    diffusion = LINEAR | {"parameterisation": parameterisation}
    grid = {"num_inference_steps": 8, "spacing": "linspace", "sigma_min": None, "sigma_max": None}
    got = vary(new_network(backbone), THREE, diffusion=diffusion, scale=0.0, guidance_scale=guidance_scale, **grid)
    torch.testing.assert_close(got, seeds_of(THREE), atol=1e-8, rtol=0)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_p3_1_at_every_strength_and_eta(network: Any, strength: float, eta: float) -> None:
    got = vary(network, THREE, scale=0.0, strength=strength, inversion_options={"eta": eta})
    torch.testing.assert_close(got, seeds_of(THREE), atol=1e-10, rtol=0)


def test_p3_1_with_ddim_inversion_up_to_its_round_trip(network: Any) -> None:
    errors = {}
    for steps, refinements in ((10, 0), (100, 0), (10, 6)):
        settings = {"inversion": "ddim", "inversion_options": {"refinements": refinements}, "num_inference_steps": steps}
        got = vary(network, THREE, scale=0.0, strength=1.0, **settings)
        errors[steps, refinements] = float((got - seeds_of(THREE)).abs().mean())
    assert errors[100, 0] < 0.3 * errors[10, 0]
    assert errors[10, 6] < 0.3 * errors[10, 0]
    assert errors[100, 0] < 0.05


def test_a_seed_image_is_inverted_with_its_own_label(network: Any) -> None:
    sampler = make_variation_sampler(DIFFUSION, GRID | {"scale": 0.0})
    for labels in ([0, 1, 2], [1, 2, 0]):  # the second request must not meet the inversion of the first
        inputs = request(THREE) | {"label": torch.tensor(labels)}
        torch.testing.assert_close(sampler(inputs, network), seeds_of(THREE), atol=1e-10, rtol=0)


# --- P3.4, P3.5: what the scale and the draws do ----------------------------------------------------------------------


@pytest.mark.parametrize("location", LOCATIONS)
def test_p3_4_the_distance_to_the_seed_grows_with_the_scale(network: Any, location: str) -> None:
    distances = [
        float((vary(network, THREE, scale=scale, location=location) - seeds_of(THREE)).square().mean())
        for scale in (0.0, 0.05, 0.2, 0.8)
    ]
    assert distances[0] < 1e-15 < distances[1] < distances[2] < distances[3]


@pytest.mark.parametrize("location", LOCATIONS)
def test_p3_5_variations_differ_pairwise_and_the_same_seed_gives_the_same_image(network: Any, location: str) -> None:
    images = vary(network, OF_ONE, location=location)
    for i in range(4):
        for j in range(i):
            assert (images[i] - images[j]).abs().max() > 1e-4
    torch.manual_seed(5)
    assert torch.equal(vary(network, OF_ONE, location=location), images)
    assert (vary(network, OF_ONE, location=location, seed=1) - images).abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings",
    [{}, {"inversion": "ddim"}, {"inversion": "none"}, {"guidance_scale": 2.0}, *({"location": name} for name in LOCATIONS)],
)
def test_a_variation_does_not_depend_on_its_batch(network: Any, settings: dict[str, Any]) -> None:
    names = [(n, k) for n in (0, 1, 2) for k in (0, 1)]
    whole = vary(network, names, **settings)
    alone = torch.cat([vary(network, [name], **settings) for name in names])
    torch.testing.assert_close(alone, whole, atol=1e-9, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 1e-5


def test_locations_terms_and_noise_of_guidance_are_different_things(network: Any) -> None:
    variants = [vary(network, THREE, location=location) for location in LOCATIONS]
    variants += [vary(network, THREE, terms="both"), vary(network, THREE, mode="absolute"), vary(network, THREE, skip_last=False)]
    variants += [vary(network, THREE, guidance_scale=2.0, cfg_noise=noise) for noise in ("shared", "independent")]
    for i, one in enumerate(variants):
        assert all((one - other).abs().max() > 1e-6 for other in variants[:i])


def test_x0_noise_lies_on_the_reconstruction_and_xT_noise_on_the_start(network: Any) -> None:
    got = vary(network, OF_ONE, location="x0", scale=0.3, mode="absolute") - seeds_of(OF_ONE)
    assert float(got.std()) == pytest.approx(0.3, rel=0.1)
    sampler = make_variation_sampler(DIFFUSION, GRID | {"location": "x0", "scale": 0.3, "mode": "absolute", "strength": 0.0})
    assert torch.equal(sampler(request(OF_ONE), network).std(dim=0) > 0, torch.ones(1, 16, 16, dtype=torch.bool))


def test_a_window_outside_the_grid_leaves_the_seed(network: Any) -> None:
    grid = make_variation_sampler(DIFFUSION, GRID).timesteps
    torch.testing.assert_close(vary(network, THREE, window=[999, grid[0] + 1]), seeds_of(THREE), atol=1e-10, rtol=0)
    assert (vary(network, THREE, window=[grid[0], grid[0]]) - seeds_of(THREE)).abs().max() > 1e-6


# --- P3.2, P3.3 with a network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_p3_3_one_perturbed_step_of_a_network_responds_by_the_formula(network: Any, guidance_scale: float) -> None:
    objective = build_objective(LINEAR)
    ids, settings = ["a", "b"], {"num_inference_steps": 8, "strength": 1.0, "scale": 0.7}
    t, p = make_variation_sampler(LINEAR, settings).timesteps[3:5]
    conditional = ConditionalDenoiser(network, objective, torch.tensor([0, 2]), guidance_scale=guidance_scale)
    x_t = torch.stack([randn((1, 16, 16), "x", name) for name in ids]).double()
    abar_t, abar_p = (float(objective.schedule.abar(level)) for level in (t, p))
    plain = conditional(x_t, t)
    results, tilde = {}, {}
    for terms in ("x0_only", "both"):
        sampler = make_variation_sampler(LINEAR, settings | {"terms": terms})
        used = sampler._denoiser(conditional, ids, sampler.perturbation)(x_t, t)
        tilde[terms] = noise_from_x_0(x_t, used.x_0, objective.schedule.abar(t))
        results[terms] = abar_p**0.5 * used.x_0 + (1 - abar_p) ** 0.5 * used.noise  # eta = 0
    before = abar_p**0.5 * plain.x_0 + (1 - abar_p) ** 0.5 * plain.noise
    torch.testing.assert_close(tilde["x0_only"], tilde["both"], atol=1e-10, rtol=0)
    change = tilde["both"] - plain.noise
    assert change.abs().max() > 1e-3
    single = -((abar_p * (1 - abar_t) / abar_t) ** 0.5)
    torch.testing.assert_close(results["x0_only"] - before, single * change, atol=1e-10, rtol=0)
    torch.testing.assert_close(results["both"] - before, (single + (1 - abar_p) ** 0.5) * change, atol=1e-10, rtol=0)


# --- P3.6: noise and guidance -----------------------------------------------------------------------------------------


class Transparent(nn.Module):
    """A network whose output is its bottleneck and does not know the class: e_u = e_c, and the noise comes out as it went in."""

    num_classes, in_channels = 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def encode(self, x: Tensor, *conditions: Any) -> Encoded:
        return Encoded(self.gain * x, [], x)

    def decode(self, encoded: Encoded, h: Tensor | None = None, after_block: Any = None) -> Tensor:
        return encoded.h if h is None else h


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_p3_6_shared_noise_is_the_same_for_every_guidance_scale_and_independent_noise_grows(mode: str) -> None:
    ids, x_t = [f"i{n}" for n in range(400)], torch.stack([randn((1, 16, 16), "x", n) for n in range(400)]).double()
    transparent: Any = Transparent()

    def response(w: float, cfg_noise: str) -> Tensor:
        sampler = make_variation_sampler(
            LINEAR, {"num_inference_steps": 2, "strength": 1.0, "mode": mode, "scale": 0.5, "cfg_noise": cfg_noise}
        )
        conditional = ConditionalDenoiser(transparent, sampler.objective, torch.zeros(400, dtype=torch.long), guidance_scale=w)  # type: ignore[arg-type]
        used = sampler._denoiser(conditional, ids, sampler.perturbation)(x_t, 999)
        return noise_from_x_0(x_t, used.x_0, conditional.objective.schedule.abar(999)) - used.noise

    alone = response(1.0, "shared")
    sigma = 0.5 if mode == "absolute" else 0.5 * 0.5 * float(x_t.flatten(1).std(dim=1, correction=0).mean())
    assert float(alone.std()) == pytest.approx(sigma, rel=0.02)
    for w in (0.0, 2.0, 7.5):
        torch.testing.assert_close(response(w, "shared"), alone, atol=1e-8, rtol=0)
        assert float(response(w, "independent").std()) == pytest.approx(sigma * (w**2 + (w - 1) ** 2) ** 0.5, rel=0.02)


# --- P3.7 and the cost: what is called how often ----------------------------------------------------------------------


def counted(network: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    calls: dict[str, list[Any]] = {"encode": [], "middle": [], "decode": []}
    for name, seen in calls.items():
        original: Callable[..., Any] = getattr(network.unet, name)
        keep = (lambda h, skips, *more: (len(h), skips)) if name == "decode" else (lambda x, *more: (len(x), None))
        monkeypatch.setattr(
            network.unet, name, lambda *a, _o=original, _s=seen, _k=keep, **k: (_s.append(_k(*a)), _o(*a, **k))[1]
        )
    return calls


@pytest.mark.parametrize(("guidance_scale", "passes"), [(1.0, 1), (2.0, 2)])
def test_encoder_and_middle_run_once_per_step_and_the_decoder_twice(
    network: Any, monkeypatch: pytest.MonkeyPatch, guidance_scale: float, passes: int
) -> None:
    calls = counted(network, monkeypatch)
    vary(network, OF_ONE, strength=1.0, guidance_scale=guidance_scale)
    inversion, steps = 6, 6  # one seed image is inverted once, for all of its four variations
    sizes = [passes] * inversion + [4 * passes] * steps
    assert [size for size, _ in calls["encode"]] == sizes == [size for size, _ in calls["middle"]]
    decoded = [size for size, _ in calls["decode"]]
    assert decoded == [passes] * inversion + [4 * passes] * (2 * steps - 1)  # the last step is left alone
    pairs_of_decodes = [skips for _, skips in calls["decode"][inversion:-1]]
    for plain, perturbed in zip(pairs_of_decodes[::2], pairs_of_decodes[1::2], strict=True):  # P3.7
        assert all(one is other for one, other in zip(plain, perturbed, strict=True))


@pytest.mark.parametrize(("location", "encodes", "decodes"), [("encoder", 2, 2), ("decoder", 1, 2), ("xt", 1, 1), ("x0", 1, 1)])
def test_what_other_locations_cost(
    network: Any, monkeypatch: pytest.MonkeyPatch, location: str, encodes: int, decodes: int
) -> None:
    calls = counted(network, monkeypatch)
    vary(network, THREE, strength=1.0, location=location, skip_last=False, inversion="none")
    assert (len(calls["encode"]), len(calls["decode"])) == (6 * encodes, 6 * decodes)


def test_an_inversion_serves_the_next_batch_of_the_same_seed_image(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_variation_sampler(DIFFUSION, GRID | {"strength": 1.0})
    calls = counted(network, monkeypatch)
    first = sampler(request(OF_ONE[:2]), network)
    second = sampler(request(OF_ONE[2:]), network)
    assert len(calls["encode"]) == 6 + 6 + 6
    sampler(request([(1, 0)]), network)
    assert len(calls["encode"]) == 6 + 6 + 6 + 12
    torch.testing.assert_close(torch.cat([first, second]), vary(network, OF_ONE, strength=1.0), atol=1e-9, rtol=0)


# --- an inversion is met again only by what it was made for ------------------------------------------------------------


def reconstructed(sampler: Any, network: Any, names: list[tuple[int, int]] = THREE, **inputs: Any) -> None:
    wanted = torch.stack([(inputs.get("reference") or (lambda i: seed_image(names[i][0])))(i) for i in range(len(names))])
    torch.testing.assert_close(sampler(request(names) | inputs, network), wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("how", ["in place", "behind autograd", "new storage"])
def test_changed_weights_are_inverted_anew(how: str) -> None:
    network, sampler = new_network(), make_variation_sampler(DIFFUSION, GRID | {"scale": 0.0})
    reconstructed(sampler, network)
    with torch.no_grad():
        for parameter in network.parameters():
            if how == "in place":
                parameter.mul_(1.1)
            elif how == "behind autograd":
                parameter.data.mul_(1.1)
            else:
                parameter.data = parameter.data * 1.1
    reconstructed(sampler, network)


def test_a_network_at_the_place_of_a_dead_one_is_not_taken_for_it() -> None:
    sampler = make_variation_sampler(DIFFUSION, GRID | {"scale": 0.0})
    for seed in range(3):
        network = new_network(seed=seed)
        reconstructed(sampler, network)
        del network
        gc.collect()


def test_other_pixels_under_the_same_id_are_inverted_anew(network: Any) -> None:
    sampler = make_variation_sampler(DIFFUSION, GRID | {"scale": 0.0})
    reconstructed(sampler, network)
    reconstructed(sampler, network, reference=lambda i: seed_image(i + 7))


@pytest.mark.parametrize(
    "change", [{"guidance_scale": 3.0}, {"strength": 0.5}, {"seed": 1}, {"inversion_options": {"eta": 0.3}}, {"sigma_max": 40.0}]
)
def test_other_settings_are_inverted_anew(network: Any, change: dict[str, Any]) -> None:
    sampler = make_variation_sampler(DIFFUSION, GRID | {"scale": 0.0})
    reconstructed(sampler, network)
    other = replace(sampler, **change)
    reconstructed(other, network)
    fresh = make_variation_sampler(
        DIFFUSION, GRID | {k: v for k, v in change.items() if k != "seed"}, None, change.get("seed", 0)
    )
    assert torch.equal(replace(other, scale=0.25)(request(THREE), network), fresh(request(THREE), network))


def test_another_scale_meets_the_same_inversion(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(network, monkeypatch)
    sampler = make_variation_sampler(DIFFUSION, GRID | {"strength": 1.0, "scale": 0.0})
    for scale in (0.0, 0.1, 0.5):
        replace(sampler, scale=scale)(request(THREE), network)
    assert len(calls["encode"]) == 6 + 3 * 6


def test_one_seed_image_under_two_labels_is_inverted_with_each(network: Any) -> None:
    names = [(0, 0), (0, 1), (0, 2), (1, 0)]
    sampler = make_variation_sampler(DIFFUSION, GRID | {"scale": 0.0})
    reconstructed(sampler, network, names, label=torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("name", ["scale", "guidance_scale", "terms", "seed", "timesteps"])
def test_a_sampler_cannot_be_changed_behind_its_lineage(name: str) -> None:
    sampler = make_variation_sampler(DIFFUSION, GRID)
    with pytest.raises(FrozenInstanceError):
        setattr(sampler, name, getattr(sampler, name))


def test_options_are_those_of_the_moment_it_was_made() -> None:
    options: dict[str, Any] = {"step": "ddim", "step_options": {"eta": 0.5}}
    sampler = make_variation_sampler(DIFFUSION, GRID | {"inversion": "none", "inversion_options": options})
    options["step_options"]["eta"] = 1.0
    assert sampler.settings()["inversion_options"] == {"step": "ddim", "step_options": {"eta": 0.5}}


def test_a_step_that_cannot_split_is_refused_when_the_scale_comes_later() -> None:
    calm = make_variation_sampler(
        DIFFUSION, GRID | {"inversion": "none", "inversion_options": {"step": "dpm_solver_pp_2m"}, "scale": 0.0}
    )
    with pytest.raises(ConfigError, match="perturbation-step"):
        replace(calm, scale=0.5)
    assert replace(calm, scale=0.5, terms="both").scale == 0.5


# --- every draw has a key of its own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 2.0, "cfg_noise": "independent"}])
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_no_draw_is_used_twice(
    network: Any, monkeypatch: pytest.MonkeyPatch, inversion: str, location: str, guidance: dict[str, Any]
) -> None:
    """Step noise, the inversion's posterior draws and the perturbation are independent over steps, blocks and images."""
    used: list[tuple[Any, ...]] = []
    bytes_of: dict[bytes, tuple[Any, ...]] = {}
    original = variations.randn_batch

    def spy(shape: Any, keys: Any, *what: Any) -> Tensor:
        drawn = original(shape, keys, *what)
        for key, value in zip(keys, drawn, strict=True):
            used.append((*what, key))
            assert bytes_of.setdefault(value.numpy().tobytes(), used[-1]) is used[-1]
        return drawn

    monkeypatch.setattr(variations, "randn_batch", spy)
    options = {"cycle": {"eta": 1.0}, "ddim": {"eta": 1.0}, "none": {"step_options": {"eta": 1.0}}}[inversion]
    settings = GRID | {"inversion": inversion, "inversion_options": options, "location": location, "strength": 1.0} | guidance
    sampler = make_variation_sampler(DIFFUSION, settings)
    sampler(request([(0, 0), (0, 1), (1, 0)]), network)
    assert len(used) == len(set(used))
    steps = set(sampler.timesteps[:-1])  # the last step draws nothing

    def levels(purpose: str, name: str) -> set[int]:
        return {what[2] for what in used if what[1] == purpose and what[-1] == name}

    variation_draws = {"cycle": set(), "ddim": steps, "none": steps}[inversion]
    assert all(levels("step", name) == variation_draws for name in ("v0-0", "v0-1", "v1-0"))
    assert all(levels("inversion-step", name) == (steps if inversion == "cycle" else set()) for name in ("c0", "c1"))
    inside = location in ("bottleneck", "encoder", "decoder")
    for purpose, expected in (("perturbation", inside), ("perturbation-null", inside and len(guidance) > 1)):
        assert all(levels(purpose, name) == (steps if expected else set()) for name in ("v0-0", "v0-1", "v1-0"))
    assert all(levels("perturbation-xt", name) == (steps if location == "xt" else set()) for name in ("v0-0", "v0-1", "v1-0"))


class ByClass(Transparent):
    """Its bottleneck has another spread with a class (2 for class 0, 3 for class 1) than with the NULL class (11)."""

    def encode(self, x: Tensor, time: Tensor, labels: Tensor, *conditions: Any) -> Encoded:
        return Encoded(torch.tensor([2.0, 3.0, 5.0, 11.0]).double()[labels].reshape(-1, 1, 1, 1) * x, [], x)


def test_shared_noise_has_the_spread_of_the_pass_with_the_conditions() -> None:
    """eps_h = rho std(h_cond) draw in both passes; independent noise has the spread of its own pass."""
    x_t, labels = torch.stack([randn((1, 16, 16), "x", n) for n in range(2)]).double(), torch.tensor([0, 1])
    spread = x_t.flatten(1).std(dim=1, correction=0).reshape(-1, 1, 1, 1)
    decoded: list[Tensor] = []

    class Watched(ByClass):
        def decode(self, encoded: Encoded, h: Tensor | None = None, after_block: Any = None) -> Tensor:
            if h is not None:
                decoded.append(h - encoded.h)
            return super().decode(encoded, h)

    watched: Any = Watched()
    for cfg_noise in ("shared", "independent"):
        sampler = make_variation_sampler(
            LINEAR, {"num_inference_steps": 2, "scale": 0.5, "cfg_noise": cfg_noise, "strength": 1.0}
        )
        conditional = ConditionalDenoiser(watched, sampler.objective, labels, guidance_scale=3.0)  # type: ignore[arg-type]
        sampler._denoiser(conditional, ["a", "b"], sampler.perturbation)(x_t, 999)
    shared, independent = decoded
    draw = torch.stack([randn((1, 16, 16), 0, "perturbation", 999, 0, name) for name in ("a", "b")]).double()
    wanted = 0.5 * torch.tensor([2.0, 3.0]).double().reshape(-1, 1, 1, 1) * spread * draw
    torch.testing.assert_close(shared, wanted.repeat(2, 1, 1, 1), atol=1e-9, rtol=0)
    torch.testing.assert_close(independent[:2], wanted, atol=1e-9, rtol=0)
    null = independent[2:].flatten(1).std(dim=1) / (0.5 * 11 * spread.flatten())
    torch.testing.assert_close(null, torch.ones(2).double(), atol=0.12, rtol=0)


# --- the ends and the refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inversion", ["cycle", "ddim", "none"])
def test_strength_0_gives_the_seed_back_and_says_so(network: Any, inversion: str, caplog: pytest.LogCaptureFixture) -> None:
    assert torch.equal(vary(network, THREE, strength=0.0, inversion=inversion), seeds_of(THREE))
    assert "seed images" in caplog.text


def test_strength_1_without_inversion_forgets_the_seed(network: Any) -> None:
    """From pure noise only the class is left; at little strength the image stays."""
    far, near = (vary(network, THREE, inversion="none", scale=0.0, strength=strength) for strength in (1.0, 0.2))
    assert (near - seeds_of(THREE)).abs().mean() < 0.2 * (far - seeds_of(THREE)).abs().mean()
    names = [(n, 0) for n in (0, 3)]  # same class, same id scheme
    inputs = request(names) | {"id": ["same", "same"]}
    both = make_variation_sampler(DIFFUSION, GRID | {"inversion": "none", "scale": 0.0, "strength": 1.0})(inputs, network)
    assert (both[0] - both[1]).abs().mean() < 0.2 * (seed_image(0) - seed_image(3)).abs().mean()


@pytest.mark.parametrize("step", ["ddim", "ancestral", "dpm_solver_pp_2m"])
def test_sdedit_takes_every_step(network: Any, step: str) -> None:
    image = vary(network, THREE, inversion="none", inversion_options={"step": step}, scale=0.0)
    assert bool(torch.isfinite(image).all()) and (image - seeds_of(THREE)).abs().max() > 1e-3


def test_clip_bounds_what_the_way_back_predicts(network: Any) -> None:
    loud = vary(network, THREE, scale=5.0, clip=True, inversion="none", inversion_options={"step_options": {"eta": 0.0}})
    assert float(loud.abs().max()) <= 1 + 1e-9


def test_grid_and_guidance_come_from_the_run_unless_given() -> None:
    trained = {"num_inference_steps": 9, "guidance_scale": 1.5, "step": "ddim", "bottleneck_scale": 0.1}
    sampler = make_variation_sampler(DIFFUSION, {"guidance_scale": None, "scale": 0.5}, trained)
    assert (sampler.num_inference_steps, sampler.guidance_scale, sampler.scale) == (9, 1.5, 0.5)
    assert make_variation_sampler(DIFFUSION, {"guidance_scale": 3.0}, trained).guidance_scale == 3.0


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"rho": 1}, "setting-unknown.*scale"),
        ({"inversion": "null_text"}, "inversion-unknown.*cycle, ddim, none"),
        ({"inversion_options": {"refinements": 1}}, "setting-unknown"),
        ({"inversion": "ddim", "inversion_options": {"refinements": -1}}, "refinements-range"),
        ({"inversion_options": {"eta": 1.5}}, "eta-range"),
        ({"inversion": "none", "inversion_options": {"step": "euler"}}, "step-unknown"),
        ({"inversion": "none", "inversion_options": {"step": "dpm_solver_pp_2m"}}, "perturbation-step"),
        ({"clip": True}, "clip-inversion"),
        ({"strength": 1.2}, "strength-range"),
        ({"strength": -0.2}, "strength-range"),
        ({"location": "middle"}, "perturbation-location"),
        ({"scale": -1.0}, "perturbation-scale"),
        ({"num_inference_steps": 0}, "num-inference-steps"),
    ],
)
def test_bad_settings_are_refused_before_sampling(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        make_variation_sampler(DIFFUSION, GRID | settings)


def test_settings_name_all_that_decides_an_image() -> None:
    settings = make_variation_sampler(DIFFUSION, GRID | {"window": (900, 100)}).settings()
    assert settings["window"] == [900, 100] and settings["inversion"] == "cycle"
    assert set(settings) >= set(Perturbation.__dataclass_fields__) | {
        "strength",
        "guidance_scale",
        "seed",
        "clip",
    }
