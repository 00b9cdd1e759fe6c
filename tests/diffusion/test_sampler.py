import math

import pytest
import torch
from gaussian_toy import exact_flow, gaussian_denoiser, no_noise, posterior_mean, seeded, step_noise

import medaug.diffusion
from medaug.diffusion import (
    DDIM,
    EDM,
    PARAMETERISATIONS,
    Ancestral,
    DPMSolverPP2M,
    Epsilon,
    Prediction,
    make_schedule,
    noise_from_x_0,
    sample,
    spaced_timesteps,
)
from medaug.draws import randn_batch
from medaug.errors import ConfigError

SCHEDULE = make_schedule("linear_beta", 1000)


def run_gaussian(step, timesteps, schedule=SCHEDULE, num_samples=4096):
    x_T = seeded((num_samples, 1), 0)
    return sample(gaussian_denoiser(schedule), x_T, timesteps, step, schedule=schedule, noise=step_noise(x_T))


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("num_inference_steps", [1000, 250, 50])
def test_ancestral_sampling_recovers_the_gaussian(num_inference_steps, spacing):
    x_0 = run_gaussian(Ancestral(), spaced_timesteps(SCHEDULE, num_inference_steps, spacing))
    assert x_0.mean() == pytest.approx(0.2, abs=0.02)
    assert x_0.std() == pytest.approx(0.3, abs=0.06)  # the small posterior variance narrows at 50 steps


def spread_by_hand(sigmas, second_order, std=0.3):
    """Std of x_0 from x_T ~ N(0, 1): in sigma space every step scales x - mean by a number (Lu et al. 2022, algorithm 2)."""
    scale, last = math.sqrt(1 + sigmas[0] ** 2), None
    for i, (s, s_next) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        x_0 = d = std**2 / (std**2 + s**2) * scale
        if second_order and last is not None and s_next > 0:
            r = math.log(sigmas[i - 1] / s) / math.log(s / s_next)
            d = (1 + 1 / (2 * r)) * x_0 - last / (2 * r)
        scale, last = s_next / s * scale + (1 - s_next / s) * d, x_0
    return scale


@pytest.mark.parametrize("name", ["linear_beta", "cosine", "karras"])
@pytest.mark.parametrize(("step", "abs_std"), [(DDIM(), 0.06), (DPMSolverPP2M(), 0.02)])
def test_15_deterministic_steps_recover_the_gaussian(name, step, abs_std):
    """The tolerance is the truncation error of 15 steps (0.246 and 0.315), which the recurrence by hand has too."""
    schedule = make_schedule(name, 1000)
    timesteps = spaced_timesteps(schedule, 15, "karras", sigma_min=0.02)
    x_0, x_T = run_gaussian(step, timesteps, schedule), seeded((4096, 1), 0)
    assert x_0.mean() == pytest.approx(0.2, abs=0.02)
    assert x_0.std() == pytest.approx(0.3, abs=abs_std)
    by_hand = spread_by_hand([float(schedule.sigma(t)) for t in timesteps], second_order=isinstance(step, DPMSolverPP2M))
    assert x_0.std() / x_T.std() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("num_train_timesteps", [50, 100])
def test_a_short_schedule_recovers_the_gaussian(num_train_timesteps):
    schedule = make_schedule("linear_beta", num_train_timesteps)
    x_0 = run_gaussian(Ancestral(), spaced_timesteps(schedule, num_train_timesteps), schedule)
    assert x_0.mean() == pytest.approx(0.2, abs=0.02)
    assert x_0.std() == pytest.approx(0.3, abs=0.06)


def test_deterministic_samplers_approach_the_exact_flow():
    """1000 DDIM steps and 100 of DPM-Solver++ end at the same image as the probability flow."""
    x_T = seeded((16, 1), 0)
    exact = exact_flow(x_T, SCHEDULE.abar(999), SCHEDULE.abar(-1))
    denoiser = gaussian_denoiser(SCHEDULE)
    ddim = sample(denoiser, x_T, list(range(999, -1, -1)), DDIM(), schedule=SCHEDULE, noise=no_noise)
    grid = spaced_timesteps(SCHEDULE, 100, "karras", sigma_max=200.0)
    dpm = sample(denoiser, x_T, grid, DPMSolverPP2M(), schedule=SCHEDULE, noise=no_noise)
    torch.testing.assert_close(ddim, exact, atol=5e-3, rtol=0)
    torch.testing.assert_close(dpm, exact, atol=5e-3, rtol=0)


def test_dpm_solver_beats_ddim_at_equal_steps():
    x_T = seeded((64, 1), 0)
    grid = spaced_timesteps(SCHEDULE, 15, "karras", sigma_max=200.0)
    exact = exact_flow(x_T, SCHEDULE.abar(999), SCHEDULE.abar(-1))
    errors = [
        (sample(gaussian_denoiser(SCHEDULE), x_T, grid, step, schedule=SCHEDULE, noise=no_noise) - exact).abs().mean()
        for step in (DDIM(), DPMSolverPP2M())
    ]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("timesteps", [[999], [700, 3], list(range(400, -1, -40))])
def test_a_perfect_denoiser_returns_x_0(timesteps):
    x_0, noise = seeded((2, 1, 3, 3), 0), seeded((2, 1, 3, 3), 1)
    abar = SCHEDULE.abar(timesteps[0])
    x_T = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise

    def oracle(x_t, t):
        return Prediction(x_0, noise_from_x_0(x_t, x_0, SCHEDULE.abar(t)))

    for step in (DDIM(), DDIM(1.0), Ancestral(), DPMSolverPP2M()):
        got = sample(oracle, x_T, timesteps, step, schedule=SCHEDULE, noise=step_noise(x_T))
        torch.testing.assert_close(got, x_0, atol=1e-10, rtol=0)


def analytic_network(edm, mean=0.2, std=0.3):
    """F of the perfect EDM denoiser, from its input and the time it is told alone."""

    def network(x_in, time):
        s = (time.double() / 250).exp().reshape(-1, 1)
        c_in = 1 / (s**2 + edm.sigma_data**2).sqrt()
        x = x_in / c_in
        d = (std**2 * x + s**2 * mean) / (std**2 + s**2)
        return (d - edm.sigma_data**2 * c_in**2 * x) / (s * edm.sigma_data * c_in)

    return network


def edm_ode(x, sigmas, heun, mean=0.2, std=0.3):
    """dx/ds = (x - D)/s in sigma space (Karras et al. 2022, algorithm 1), an own loop without abar."""

    def slope(x, s):
        return (x - (std**2 * x + s**2 * mean) / (std**2 + s**2)) / s

    for s, s_next in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        d = slope(x, s)
        x_next = x + (s_next - s) * d
        x = x + (s_next - s) * (d + slope(x_next, s_next)) / 2 if heun and s_next > 0 else x_next
    return x


@pytest.mark.parametrize("name", ["karras", "linear_beta", "cosine"])
def test_edm_behind_variance_preserving_x_t_is_edm_in_sigma_space(name):
    """DDIM with eta 0 over abar is Euler over sigma, step for step; only the float32 of `time` differs."""
    schedule, edm = make_schedule(name, 1000), EDM()
    timesteps = spaced_timesteps(schedule, 18, "karras", sigma_min=0.02)
    sigmas = [float(schedule.sigma(t)) for t in timesteps]
    x_T = seeded((32, 1), 0)
    network = analytic_network(edm)

    def denoiser(x_t, t):
        return edm.denoise(network, x_t, edm.level(schedule, t, len(x_t)))

    start = x_T / schedule.abar(timesteps[0]).sqrt()
    got = sample(denoiser, x_T, timesteps, DDIM(), schedule=schedule, noise=no_noise)
    torch.testing.assert_close(got, edm_ode(start, sigmas, heun=False), atol=1e-5, rtol=0)


def test_edm_with_dpm_solver_agrees_with_heun_in_sigma_space():
    schedule, edm = make_schedule("karras", 1000), EDM()
    timesteps = spaced_timesteps(schedule, 112)  # 111 jumps of 9: even in Karras' ramp
    x_T, network = seeded((32, 1), 0), analytic_network(edm)

    def denoiser(x_t, t):
        return edm.denoise(network, x_t, edm.level(schedule, t, len(x_t)))

    got = sample(denoiser, x_T, timesteps, DPMSolverPP2M(), schedule=schedule, noise=no_noise)
    heun = edm_ode(x_T / schedule.abar(999).sqrt(), [float(schedule.sigma(t)) for t in timesteps], heun=True)
    torch.testing.assert_close(got, heun, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_the_perfect_network_of_every_parameterisation_samples_alike(name):
    """What the sampler sees does not depend on what the network predicts."""
    parameterisation = PARAMETERISATIONS[name]()
    x_T, timesteps = seeded((8, 1), 0), spaced_timesteps(SCHEDULE, 20)

    def denoiser(x_t, t):
        level = parameterisation.level(SCHEDULE, t, len(x_t))
        x_0 = posterior_mean(x_t, level.abar)
        said = parameterisation.target(x_0, noise_from_x_0(x_t, x_0, level.abar), level.abar)
        return parameterisation.denoise(lambda x, time: said, x_t, level)

    for step in (Ancestral(), DPMSolverPP2M()):
        got = sample(denoiser, x_T, timesteps, step, schedule=SCHEDULE, noise=step_noise(x_T))
        wanted = sample(gaussian_denoiser(SCHEDULE), x_T, timesteps, step, schedule=SCHEDULE, noise=step_noise(x_T))
        torch.testing.assert_close(got, wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("step", [Ancestral(), DDIM(eta=0.7), DPMSolverPP2M()], ids=lambda s: type(s).__name__)
def test_an_image_does_not_depend_on_its_neighbours(step):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    timesteps, keys = spaced_timesteps(SCHEDULE, 10), [f"image-{i}" for i in range(8)]

    def run(keys):
        def denoiser(x_t, t):
            return Epsilon().denoise(lambda x, time: torch.tanh(network(x)), x_t, Epsilon().level(SCHEDULE, t, len(x_t)))

        def noise(t):
            return randn_batch((1, 8, 8), keys, "step", t)

        return sample(denoiser, randn_batch((1, 8, 8), keys, "x_T"), timesteps, step, schedule=SCHEDULE, noise=noise, clip=True)

    whole = run(keys)
    assert torch.equal(whole, run(keys))
    for i in (0, 5):
        torch.testing.assert_close(run(keys[i : i + 1])[0], whole[i], atol=1e-5, rtol=0)
    assert not torch.allclose(whole[0], whole[1])


def test_guide_sees_the_noise_and_moves_x_0_with_it():
    x_T, seen = seeded((4, 1), 0), []

    def guide(noise_pred, x_t, t):
        seen.append(t)
        return noise_pred + 0.1

    def guided_denoiser(x_t, t):
        noise = gaussian_denoiser(SCHEDULE)(x_t, t).noise + 0.1
        abar = SCHEDULE.abar(t)
        return Prediction((x_t - (1 - abar).sqrt() * noise) / abar.sqrt(), noise)

    for step in (Ancestral(), DDIM(), DPMSolverPP2M()):
        seen.clear()
        got = sample(gaussian_denoiser(SCHEDULE), x_T, [800, 400, 0], step, schedule=SCHEDULE, noise=step_noise(x_T), guide=guide)
        wanted = sample(guided_denoiser, x_T, [800, 400, 0], step, schedule=SCHEDULE, noise=step_noise(x_T))
        torch.testing.assert_close(got, wanted)
        assert seen == [800, 400, 0]


def wild_denoiser(x_t, t):
    x_0 = 5 * torch.sin(10 * x_t)
    return Prediction(x_0, noise_from_x_0(x_t, x_0, SCHEDULE.abar(t)))


@pytest.mark.parametrize(("clip", "clip_after_guidance"), [(False, False), (True, False), (False, True), (True, True)])
def test_clipping_before_and_after_guidance(clip, clip_after_guidance):
    x_T, states, used = seeded((4, 1), 0), [], []

    def on_step(t, x, prediction):
        states.append((t, x))
        used.append(prediction)

    sample(
        wild_denoiser,
        x_T,
        [800, 400, 0],
        DDIM(),
        schedule=SCHEDULE,
        noise=no_noise,
        guide=lambda noise, x, t: noise - 2.0,
        clip=clip,
        clip_after_guidance=clip_after_guidance,
        on_step=on_step,
    )
    starts = [x_T, *(x for _, x in states[:-1])]
    for (t, _), x_t, prediction in zip(states, starts, used, strict=True):
        torch.testing.assert_close(prediction.noise, noise_from_x_0(x_t, prediction.x_0, SCHEDULE.abar(t)))
        raw = wild_denoiser(x_t, t).x_0
        guided = (raw.clamp(-1, 1) if clip else raw) + 2.0 * SCHEDULE.sigma(t)
        torch.testing.assert_close(prediction.x_0, guided.clamp(-1, 1) if clip_after_guidance else guided)


def test_x_0_gives_s_and_noise_gives_d():
    """A denoiser may hand over estimates from two noise predictions, as bottleneck perturbation in one term does."""
    x_T, e_s, e_d = seeded((2, 1), 0), seeded((2, 1), 1), seeded((2, 1), 2)
    abar = SCHEDULE.abar(600)

    def denoiser(x_t, t):
        return Prediction((x_t - (1 - abar).sqrt() * e_s) / abar.sqrt(), e_d)

    states = []
    sample(
        denoiser,
        x_T,
        [600, 300],
        DDIM(),
        schedule=SCHEDULE,
        noise=no_noise,
        guide=lambda noise, x, t: noise,
        on_step=lambda t, x, prediction: states.append(x),
    )
    torch.testing.assert_close(states[0], medaug.diffusion.ddim_step(x_T, e_s, e_d, abar, SCHEDULE.abar(300)))


def test_sampling_keeps_dtype_and_needs_no_gradient():
    network = torch.nn.Conv2d(1, 1, 1)
    x_T = seeded((2, 1, 4, 4), 0, torch.float32)

    def denoiser(x_t, t):
        return Epsilon().denoise(lambda x, time: network(x), x_t, Epsilon().level(SCHEDULE, t, len(x_t)))

    x_0 = sample(denoiser, x_T, [900, 500, 0], Ancestral(), schedule=SCHEDULE, noise=step_noise(x_T))
    assert x_0.dtype == torch.float32 and not x_0.requires_grad


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run_gaussian(Ancestral(), [900, 500, 0], num_samples=4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("timesteps", "match"),
    [([], "got none"), ([1000, 0], r"\[0, 999\]"), ([5, 5], "descend strictly"), ([0, 5], "descend strictly")],
)
def test_refusals(timesteps, match):
    with pytest.raises(ConfigError, match=match):
        sample(gaussian_denoiser(SCHEDULE), seeded((1, 1)), timesteps, DDIM(), schedule=SCHEDULE, noise=no_noise)


def test_public_names_import():
    assert all(hasattr(medaug.diffusion, name) for name in medaug.diffusion.__all__)
