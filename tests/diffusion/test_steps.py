import numpy as np
import pytest
import torch
from gaussian_toy import exact_flow, no_noise, posterior_mean, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.diffusion import DDIM, STEPS, Ancestral, DPMSolverPP2M, Prediction, ddim_step, ddpm_step, make_schedule
from medaug.diffusion import dpm_solver_pp_2m_step as dpm_step
from medaug.diffusion.parameterisation import noise_from_x_0, x_0_from_noise
from medaug.diffusion.steps import ddim_sigma, ddpm_mean, ddpm_variance
from medaug.errors import ConfigError

SCHEDULE = make_schedule("linear_beta", 1000)
JUMPS = [(999, 998), (999, 500), (700, 3), (500, 499), (20, 0), (1, 0), (999, 0)]
SHAPE = (3, 1, 4, 4)


def condition_on_x_t(x_0, x_t, abar_t, abar_p):
    """Mean and variance of x_p given x_t (and x_0), from the joint normal of the two, by numpy.linalg."""
    a = np.sqrt(abar_t / abar_p)
    mean = np.array([np.sqrt(abar_p) * x_0, np.sqrt(abar_t) * x_0])
    var_p = 1 - abar_p
    cov = np.array([[var_p, a * var_p], [a * var_p, a**2 * var_p + 1 - a**2]])
    gain = np.linalg.solve(cov[1:, 1:], cov[1:, :1])[0, 0]
    return mean[0] + gain * (x_t - mean[1]), cov[0, 0] - gain * cov[0, 1]


@pytest.mark.parametrize(("t", "p"), JUMPS)
def test_ancestral_step_is_the_conditional_of_the_joint_gaussian(t, p):
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(p)
    x_0, x_t, z = 0.3, -1.7, 0.8
    mean, variance = condition_on_x_t(x_0, x_t, float(abar_t), float(abar_p))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(ddpm_step(x_t * one, x_0 * one, abar_t, abar_p)) == pytest.approx(mean, abs=1e-9)
    assert float(ddpm_step(x_t * one, x_0 * one, abar_t, abar_p, z * one)) == pytest.approx(
        mean + np.sqrt(variance) * z, abs=1e-9
    )


@pytest.mark.parametrize(("t", "p"), [*JUMPS, (0, -1), (40, -1)])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_eq_12_and_16_of_song(t, p, eta):
    a_t, a_p = float(SCHEDULE.abar(t)), float(SCHEDULE.abar(p))
    x, e_s, e_d, z = -1.7, 0.4, 0.6, 0.8
    sigma = eta * np.sqrt((1 - a_p) / (1 - a_t)) * np.sqrt(1 - a_t / a_p)
    by_hand = np.sqrt(a_p) * (x - np.sqrt(1 - a_t) * e_s) / np.sqrt(a_t) + np.sqrt(max(1 - a_p - sigma**2, 0)) * e_d + sigma * z
    one = torch.ones(1, 1, dtype=torch.float64)
    got = ddim_step(x * one, e_s * one, e_d * one, SCHEDULE.abar(t), SCHEDULE.abar(p), eta, z * one)
    assert float(got) == pytest.approx(by_hand, abs=1e-7)  # sqrt near 0 amplifies rounding at (1, 0)


@settings(deadline=None, max_examples=25)
@given(t=st.integers(1, 999), fraction=st.floats(0, 0.999), seed=st.integers(0, 2**31))
def test_ddim_with_eta_1_is_the_ancestral_step(t, fraction, seed):
    """Variance and mean, for every jump (t, p)."""
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(int(fraction * t))
    torch.testing.assert_close(ddim_sigma(abar_t, abar_p, 1.0) ** 2, ddpm_variance(abar_t, abar_p), rtol=1e-9, atol=0)
    x_t, noise = seeded(SHAPE, seed), seeded(SHAPE, seed + 1)
    mean = ddpm_mean(x_t, x_0_from_noise(x_t, noise, abar_t), abar_t, abar_p)
    torch.testing.assert_close(ddim_step(x_t, noise, noise, abar_t, abar_p, 1.0), mean, atol=1e-8, rtol=0)


@settings(deadline=None, max_examples=25)
@given(t=st.integers(1, 999), fraction=st.floats(0, 0.999), eta=st.floats(0, 1))
def test_ddim_keeps_the_marginal_of_the_forward_process(t, fraction, eta):
    """With the true noise, x_p given x_0 has variance 1 - abar_p for every eta."""
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(int(fraction * t))
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    from_noise = ddim_step((1 - abar_t).sqrt() * one, one, one, abar_t, abar_p, eta)  # x_0 = 0, eps = 1
    from_z = ddim_step(zero, zero, zero, abar_t, abar_p, eta, one)
    assert float(from_noise**2 + from_z**2) == pytest.approx(float(1 - abar_p), rel=1e-6)


def test_the_perfect_noise_gives_x_0_back_from_any_t_in_any_number_of_steps():
    x_0, noise = seeded(SHAPE, 0), seeded(SHAPE, 1)
    for timesteps in ([999], [999, 0], [800, 500, 3], [5], [999, 998, 997]):
        x = SCHEDULE.abar(timesteps[0]).sqrt() * x_0 + (1 - SCHEDULE.abar(timesteps[0])).sqrt() * noise
        for t, p in zip(timesteps, [*timesteps[1:], -1], strict=True):
            e = noise_from_x_0(x, x_0, SCHEDULE.abar(t))
            x = ddim_step(x, e, e, SCHEDULE.abar(t), SCHEDULE.abar(p))
        torch.testing.assert_close(x, x_0, atol=1e-10, rtol=0)


def test_two_noise_predictions_move_the_step_as_eq_6_says():
    """The x_0 term answers with -sqrt(abar_p (1 - abar_t) / abar_t) times the change of its noise."""
    abar_t, abar_p = SCHEDULE.abar(600), SCHEDULE.abar(500)
    x_t, e, change = seeded(SHAPE, 0), seeded(SHAPE, 1), seeded(SHAPE, 2)
    moved = ddim_step(x_t, e + change, e, abar_t, abar_p) - ddim_step(x_t, e, e, abar_t, abar_p)
    torch.testing.assert_close(moved, -(abar_p * (1 - abar_t) / abar_t).sqrt() * change)


def test_per_image_levels_equal_single_steps():
    x_t, x_0, z = seeded(SHAPE, 0), seeded(SHAPE, 1), seeded(SHAPE, 2)
    abar_t, abar_p = SCHEDULE.abar(torch.tensor([900, 500, 20])), SCHEDULE.abar(torch.tensor([700, 0, -1]))
    whole = ddpm_step(x_t, x_0, abar_t, abar_p, z, "fixed_large")
    alone = [ddpm_step(x_t[i : i + 1], x_0[i : i + 1], abar_t[i], abar_p[i], z[i : i + 1], "fixed_large") for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))


def test_fixed_large_has_the_variance_of_the_jump_and_none_at_the_end():
    abar_t, abar_p = SCHEDULE.abar(600), SCHEDULE.abar(500)
    assert ddpm_variance(abar_t, abar_p, "fixed_large") == 1 - abar_t / abar_p
    assert ddpm_variance(abar_t, abar_p, "fixed_small") < ddpm_variance(abar_t, abar_p, "fixed_large")
    assert ddpm_variance(SCHEDULE.abar(0), SCHEDULE.abar(-1), "fixed_large") == 0


@pytest.mark.parametrize("t", [0, 30, 999])
@pytest.mark.parametrize("step", [Ancestral(), Ancestral("fixed_large"), DDIM(), DDIM(eta=1.0), DPMSolverPP2M()])
def test_the_last_step_returns_the_predicted_x_0_and_draws_nothing(step, t):
    prediction = Prediction(seeded(SHAPE, 0), seeded(SHAPE, 1))
    previous = (t + 1, Prediction(seeded(SHAPE, 2), seeded(SHAPE, 3))) if t < 999 else None
    got = step(prediction, seeded(SHAPE, 4), t, -1, schedule=SCHEDULE, noise=no_noise, previous=previous)
    torch.testing.assert_close(got, prediction.x_0)


def test_noise_is_drawn_once_at_the_timestep_that_is_left():
    seen = []

    def noise(t):
        seen.append(t)
        return seeded(SHAPE, t)

    prediction, x_t = Prediction(seeded(SHAPE, 0), seeded(SHAPE, 1)), seeded(SHAPE, 2)
    for step in (Ancestral(), DDIM(eta=0.5)):
        step(prediction, x_t, 700, 600, schedule=SCHEDULE, noise=noise, previous=None)
    assert seen == [700, 700]
    for step in (DDIM(), DPMSolverPP2M()):
        step(prediction, x_t, 700, 600, schedule=SCHEDULE, noise=no_noise, previous=None)


def test_the_first_dpm_step_is_ddim():
    """DPM-Solver++ of order one and DDIM are the same map (Lu et al. 2022, section 4)."""
    x_t, noise = seeded(SHAPE, 0), seeded(SHAPE, 1)
    abar_t, abar_p = SCHEDULE.abar(700), SCHEDULE.abar(500)
    first = dpm_step(x_t, x_0_from_noise(x_t, noise, abar_t), abar_t, abar_p)
    torch.testing.assert_close(first, ddim_step(x_t, noise, noise, abar_t, abar_p))


def test_dpm_step_is_algorithm_2_by_hand():
    a_t, a_p, a_last = (float(SCHEDULE.abar(t)) for t in (600, 450, 800))
    lam_t, lam_p, lam_last = (np.log(np.sqrt(a) / np.sqrt(1 - a)) for a in (a_t, a_p, a_last))
    x, x_0, x_0_last = -0.7, 0.4, 0.1
    h, h_last = lam_p - lam_t, lam_t - lam_last
    r = h_last / h
    d = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_last
    by_hand = np.sqrt(1 - a_p) / np.sqrt(1 - a_t) * x - np.sqrt(a_p) * (np.exp(-h) - 1) * d
    one = torch.ones(1, 1, dtype=torch.float64)
    got = dpm_step(x * one, x_0 * one, SCHEDULE.abar(600), SCHEDULE.abar(450), x_0_last * one, SCHEDULE.abar(800))
    assert float(got) == pytest.approx(by_hand, rel=1e-12)
    step = DPMSolverPP2M()
    previous = (800, Prediction(x_0_last * one, one))
    same = step(Prediction(x_0 * one, one), x * one, 600, 450, schedule=SCHEDULE, noise=no_noise, previous=previous)
    assert torch.equal(same, got)


def end_error(num_steps, second_order):
    """Error against the exact flow of N(0.2, 0.3^2), steps even in lambda from SNR e^-6 to e^5."""
    abars = torch.sigmoid(torch.linspace(-6, 5, num_steps + 1, dtype=torch.float64))
    start = x = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    last = None
    for abar_t, abar_p in zip(abars[:-1], abars[1:], strict=True):
        x_0 = posterior_mean(x, abar_t)
        x = dpm_step(x, x_0, abar_t, abar_p, *(last if last and second_order else (None, None)))
        last = (x_0, abar_t)
    return float((x - exact_flow(start, abars[0], abars[-1])).abs().max())


@pytest.mark.parametrize(("second_order", "low", "high"), [(False, 1.8, 2.2), (True, 3.5, 4.6)])
def test_order_of_convergence(second_order, low, high):
    """Halving the steps divides the error by 2 for DDIM and by 4 for DPM-Solver++(2M)."""
    errors = [end_error(n, second_order) for n in (40, 80, 160, 320)]
    assert all(low < a / b < high for a, b in zip(errors[:-1], errors[1:], strict=True))
    assert end_error(40, True) < end_error(40, False) / 4


def test_score_form_shifts_the_posterior_mean_by_the_effective_beta():
    """e - sqrt(1 - abar) s g moves the mean by b / sqrt(abar_t / abar_p) s g; the mean form with fixed_large by b s g."""
    abar_t, abar_p = SCHEDULE.abar(600), SCHEDULE.abar(500)
    x_t, noise, shift = seeded(SHAPE, 0), seeded(SHAPE, 1), seeded(SHAPE, 2)
    guided = noise - (1 - abar_t).sqrt() * shift
    moved = ddpm_mean(x_t, x_0_from_noise(x_t, guided, abar_t), abar_t, abar_p) - ddpm_mean(
        x_t, x_0_from_noise(x_t, noise, abar_t), abar_t, abar_p
    )
    b = ddpm_variance(abar_t, abar_p, "fixed_large")
    torch.testing.assert_close(moved, b / (abar_t / abar_p).sqrt() * shift)


def test_refusals():
    assert set(STEPS) == {"ancestral", "ddim", "dpm_solver_pp_2m"}
    with pytest.raises(ConfigError, match="fixed_small, fixed_large, got 'learned_range'"):
        Ancestral("learned_range")
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"eta must lie in \[0, 1\]"):
            DDIM(eta)
