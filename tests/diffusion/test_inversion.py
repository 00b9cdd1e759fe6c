"""Inversion: known answers for an oracle and a Gaussian, exact reconstruction for any network, all in float64."""

import pytest
import torch
from gaussian_toy import gaussian_denoiser, no_noise, seeded, step_noise

from medaug.diffusion import (
    DDIM,
    PARAMETERISATIONS,
    Prediction,
    Replay,
    add_noise,
    classifier_free,
    cycle_inversion,
    ddim_inversion,
    make_schedule,
    noise_from_x_0,
    sample,
    spaced_timesteps,
    start_timesteps,
    x_0_from_noise,
)
from medaug.draws import randn_batch
from medaug.errors import ConfigError

SCHEDULE = make_schedule("linear_beta", 1000)


def of_noise(noise_of):
    """A denoiser from a function (x_t, t) -> eps."""

    def denoise(x_t, t):
        noise = noise_of(x_t, t)
        return Prediction(x_0_from_noise(x_t, noise, SCHEDULE.abar(t)), noise)

    return denoise


def wild(x_t, t):
    """A random nonlinear network: nothing about it is a good denoiser."""
    weights = seeded((x_t[0].numel(), x_t[0].numel()), 7)
    return torch.sin(x_t.flatten(1) @ weights / 8).reshape(x_t.shape) + 0.3 * x_t**2 / (1 + x_t**2) + t / 1000


def back(denoiser, x_T, timesteps):
    return sample(denoiser, x_T, timesteps, DDIM(), schedule=SCHEDULE, noise=no_noise)


# --- P1.5 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_inference_steps", [1, 3, 17])
@pytest.mark.parametrize("top", [200, 999])
def test_p1_5_a_perfect_oracle_returns_x_0_from_anywhere_in_any_number_of_steps(num_inference_steps, top):
    x_0 = seeded((2, 1, 4, 4))
    timesteps = [t for t in spaced_timesteps(SCHEDULE, num_inference_steps) if t < top] or [0]
    x_t = add_noise(x_0, seeded(x_0.shape, 1), SCHEDULE.abar(timesteps[0]))
    got = back(of_noise(lambda x, t: noise_from_x_0(x, x_0, SCHEDULE.abar(t))), x_t, timesteps)
    torch.testing.assert_close(got, x_0, atol=1e-11, rtol=0)


@pytest.mark.parametrize("num_inference_steps", [1, 10, 100])
def test_p1_5_with_one_fixed_noise_inversion_and_sampling_are_exact(num_inference_steps):
    x_0, eps = seeded((2, 1, 4, 4)), seeded((2, 1, 4, 4), 1)
    timesteps, denoiser = spaced_timesteps(SCHEDULE, num_inference_steps), of_noise(lambda x, t: eps)
    x_T = ddim_inversion(denoiser, x_0, timesteps, schedule=SCHEDULE)
    torch.testing.assert_close(x_T, add_noise(x_0, eps, SCHEDULE.abar(timesteps[0])), atol=1e-10, rtol=0)
    torch.testing.assert_close(back(denoiser, x_T, timesteps), x_0, atol=1e-11, rtol=0)


# --- P1.6 -------------------------------------------------------------------------------------------------------------


def gaussian_round_trip(num_inference_steps, refinements=0):
    """Relative error for N(0, 1) data, whose perfect network is eps = sqrt(1 - abar) x."""
    x_0, denoiser = seeded((64, 1)), of_noise(lambda x, t: (1 - SCHEDULE.abar(t)).sqrt() * x)
    timesteps = spaced_timesteps(SCHEDULE, num_inference_steps, "leading")
    x_T = ddim_inversion(denoiser, x_0, timesteps, schedule=SCHEDULE, refinements=refinements)
    return float((back(denoiser, x_T, timesteps) - x_0).norm() / x_0.norm())


@pytest.mark.parametrize(("steps", "error"), [(10, 0.31), (50, 0.072), (250, 0.015), (1000, 0.0037)])
def test_p1_6_the_round_trip_errs_by_one_over_n(steps, error):
    """The figures were worked out apart from this code, by the recurrence of scalar factors."""
    assert gaussian_round_trip(steps) == pytest.approx(error, rel=0.05)


def test_p1_6_by_hand():
    """Each step up and down scales x by a number: the round trip is their product."""
    timesteps, factor = spaced_timesteps(SCHEDULE, 10, "leading"), 1.0
    levels = [-1, *reversed(timesteps)]
    for c, n in zip(levels[:-1], levels[1:], strict=True):
        abar_c, abar_n = float(SCHEDULE.abar(c)), float(SCHEDULE.abar(n))
        e = (1 - float(SCHEDULE.abar(max(c, 0)))) ** 0.5
        up = (abar_n / abar_c) ** 0.5 * (1 - (1 - abar_c) ** 0.5 * e) + (1 - abar_n) ** 0.5 * e
        e = (1 - abar_n) ** 0.5
        down = (abar_c / abar_n) ** 0.5 * (1 - e * e) + (1 - abar_c) ** 0.5 * e
        factor *= up * down
    assert gaussian_round_trip(10) == pytest.approx(abs(factor - 1), rel=1e-9)


def test_refinement_makes_the_inversion_the_inverse():
    errors = [gaussian_round_trip(50, refinements) for refinements in (0, 1, 3)]
    assert errors[2] < 0.1 * errors[1] < 0.1 * errors[0]


def test_the_inversion_asks_at_its_own_levels():
    asked = []

    def denoiser(x_t, t):
        asked.append(t)
        return gaussian_denoiser(SCHEDULE)(x_t, t)

    ddim_inversion(denoiser, seeded((1, 1)), [900, 400, 3], schedule=SCHEDULE)
    assert asked == [0, 3, 400]
    asked.clear()
    ddim_inversion(denoiser, seeded((1, 1)), [900, 3], schedule=SCHEDULE, refinements=2)
    assert asked == [0, 3, 3, 3, 900, 900]


# --- P1.7 -------------------------------------------------------------------------------------------------------------


def cycled(denoiser, x_0, timesteps, eta=1.0):
    found = cycle_inversion(
        denoiser, x_0, timesteps, schedule=SCHEDULE, start=seeded(x_0.shape, 1), noise=step_noise(x_0), eta=eta
    )
    return found, sample(denoiser, found.start, timesteps, Replay(found.noise, eta), schedule=SCHEDULE, noise=no_noise)


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("timesteps", [[999], [700, 3], spaced_timesteps(SCHEDULE, 40), list(range(799, -1, -50))])
def test_p1_7_cycle_reconstructs_x_0_for_any_network(timesteps, eta):
    """Up to rounding, which the chain itself amplifies: 1 / sqrt(abar) is 157 at the top."""
    x_0 = seeded((3, 1, 4, 4))
    _, got = cycled(of_noise(wild), x_0, timesteps, eta)
    torch.testing.assert_close(got, x_0, atol=1e-10, rtol=0)


def test_p1_7_a_mild_network_is_exact_to_the_last_digits():
    x_0 = seeded((3, 1, 4, 4))
    _, got = cycled(of_noise(lambda x, t: torch.tanh(x)), x_0, spaced_timesteps(SCHEDULE, 20))
    torch.testing.assert_close(got, x_0, atol=1e-13, rtol=0)


def test_another_network_on_the_way_back_does_not_reconstruct():
    """The tests above are no tautology: the network's own step does matter."""
    x_0, timesteps = seeded((3, 1, 4, 4)), spaced_timesteps(SCHEDULE, 10)
    found, _ = cycled(of_noise(lambda x, t: torch.tanh(x)), x_0, timesteps)
    other = of_noise(lambda x, t: torch.tanh(x) + 0.01)
    got = sample(other, found.start, timesteps, Replay(found.noise), schedule=SCHEDULE, noise=no_noise)
    assert (got - x_0).abs().min() > 1e-3


@pytest.mark.parametrize("name", PARAMETERISATIONS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cycle_and_refined_inversion_reconstruct_for_every_parameterisation_with_guidance(name, scale):
    parameterisation, x_0, timesteps = PARAMETERISATIONS[name](), seeded((2, 1, 4, 4)), spaced_timesteps(SCHEDULE, 12)

    def denoiser(x_t, t):
        level = parameterisation.level(SCHEDULE, t, len(x_t))
        cond, uncond = (
            parameterisation.denoise(lambda x, time, k=k: k * torch.tanh(x) * 0.1 + 0.02 * k, x_t, level) for k in (1.0, 0.7)
        )
        return classifier_free(cond, uncond, scale)

    _, got = cycled(denoiser, x_0, timesteps)
    torch.testing.assert_close(got, x_0, atol=1e-10, rtol=0)


def test_recovered_noise_of_the_true_denoiser_is_the_noise_that_was_drawn():
    """With the oracle the network's step is the posterior itself, so z is the u of the source."""
    x_0, timesteps = seeded((2, 1, 4, 4)), [900, 500, 100]
    noise = step_noise(x_0)
    oracle = of_noise(lambda x, t: noise_from_x_0(x, x_0, SCHEDULE.abar(t)))
    found, _ = cycled(oracle, x_0, timesteps)
    for t in (900, 500):
        torch.testing.assert_close(found.noise[t], noise(t), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.noise[100], torch.zeros_like(x_0), atol=1e-12, rtol=0)  # the residual of the last step


def test_one_image_is_inverted_alike_in_any_batch_and_repeats_serve_variations():
    keys, timesteps = [f"image-{i}" for i in range(4)], [900, 500, 100]

    def run(keys):
        x_0 = randn_batch((1, 4, 4), keys, "x_0").double()

        def noise(t):
            return randn_batch((1, 4, 4), keys, "u", t).double()

        start = randn_batch((1, 4, 4), keys, "start").double()
        return cycle_inversion(of_noise(wild), x_0, timesteps, schedule=SCHEDULE, start=start, noise=noise)

    whole, alone = run(keys), run(keys[2:3])
    twice = whole.select(torch.tensor([2, 2]))
    for t in timesteps:
        torch.testing.assert_close(alone.noise[t][0], whole.noise[t][2], atol=1e-10, rtol=0)
        assert torch.equal(twice.noise[t][0], whole.noise[t][2]) and torch.equal(twice.noise[t][1], whole.noise[t][2])
    assert twice.start.shape[0] == 2


# --- the ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "visited"), [(1.0, 100), (0.8, 80), (0.29, 29), (0.005, 0), (0.0, 0), (0.999, 99)])
def test_strength_counts_steps_from_the_bottom(strength, visited):
    grid = spaced_timesteps(SCHEDULE, 100)
    assert start_timesteps(grid, strength) == grid[100 - visited :]


def test_no_step_leaves_the_image():
    x_0 = seeded((1, 1))
    assert torch.equal(ddim_inversion(of_noise(wild), x_0, [], schedule=SCHEDULE), x_0)
    found = cycle_inversion(of_noise(wild), x_0, [], schedule=SCHEDULE, start=x_0, noise=no_noise)
    assert torch.equal(found.start, x_0) and not found.noise


def test_refusals():
    x_0 = seeded((1, 1))
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="strength-range"):
            start_timesteps([5, 3], strength)
    with pytest.raises(ConfigError, match="refinements-range"):
        ddim_inversion(of_noise(wild), x_0, [5], schedule=SCHEDULE, refinements=-1)
    for timesteps, match in (([3, 5], "descend"), ([1000], "999")):
        with pytest.raises(ConfigError, match=match):
            ddim_inversion(of_noise(wild), x_0, timesteps, schedule=SCHEDULE)
        with pytest.raises(ConfigError, match=match):
            cycle_inversion(of_noise(wild), x_0, timesteps, schedule=SCHEDULE, start=x_0, noise=no_noise)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_every_step_of_the_source_has_a_draw_of_its_own(eta):
    x_0, timesteps, asked = seeded((1, 1, 4, 4)), spaced_timesteps(SCHEDULE, 7), []

    def noise(t):
        asked.append(t)
        return seeded(x_0.shape, t)

    cycle_inversion(of_noise(wild), x_0, timesteps, schedule=SCHEDULE, start=seeded(x_0.shape, 1), noise=noise, eta=eta)
    assert asked == list(timesteps[:-1])
