import math

import pytest
import torch
from gaussian_toy import posterior_mean, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.diffusion import (
    EDM,
    P2,
    PARAMETERISATIONS,
    EDMWeight,
    Epsilon,
    Level,
    MinSNR,
    Prediction,
    Sample,
    Uniform,
    Velocity,
    add_noise,
    make_level,
    make_schedule,
    noise_from_x_0,
    x_0_from_noise,
)
from medaug.diffusion.parameterisation import velocity, with_noise, with_x_0
from medaug.errors import ConfigError

ALL = [Epsilon(), Sample(), Velocity(), EDM()]
SCHEDULE = make_schedule("linear_beta", 1000)
SHAPE = (6, 2, 4, 4)


def mixed_level(parameterisation, timesteps=(0, 10, 100, 400, 700, 999)):
    abar = [float(SCHEDULE.abar(t)) for t in timesteps]
    return make_level([(a, parameterisation.time(t, a)) for t, a in zip(timesteps, abar, strict=True)])


def perfect(parameterisation, x_0, noise, abar):
    return lambda x_in, time: parameterisation.target(x_0, noise, abar)


@pytest.mark.parametrize("parameterisation", ALL, ids=lambda p: type(p).__name__)
@settings(deadline=None, max_examples=25)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**31), volume=st.booleans())
def test_the_perfect_output_gives_back_x_0_and_noise(parameterisation, t, seed, volume):
    shape = (3, 1, 2, 3, 2) if volume else (3, 2, 4, 4)
    x_0, noise = seeded(shape, seed), seeded(shape, seed + 1)
    level = parameterisation.level(SCHEDULE, t, len(x_0))
    x_t = add_noise(x_0, noise, level.abar)
    prediction = parameterisation.denoise(perfect(parameterisation, x_0, noise, level.abar), x_t, level)
    torch.testing.assert_close(prediction.x_0, x_0, atol=1e-10, rtol=0)
    torch.testing.assert_close(prediction.noise, noise, atol=1e-10, rtol=0)


@pytest.mark.parametrize("parameterisation", ALL, ids=lambda p: type(p).__name__)
def test_round_trip_in_float32(parameterisation):
    x_0, noise = seeded(SHAPE, 0, torch.float32), seeded(SHAPE, 1, torch.float32)
    level = mixed_level(parameterisation, (50, 100, 200, 300, 400, 500))
    prediction = parameterisation.denoise(
        perfect(parameterisation, x_0, noise, level.abar), add_noise(x_0, noise, level.abar), level
    )
    assert prediction.x_0.dtype == prediction.noise.dtype == torch.float32
    torch.testing.assert_close(prediction.x_0, x_0, atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction.noise, noise, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**31))
def test_x_0_noise_and_velocity_round_trips(t, seed):
    x_0, noise, abar = seeded(SHAPE, seed), seeded(SHAPE, seed + 1), SCHEDULE.abar(t)
    x_t = add_noise(x_0, noise, abar)
    torch.testing.assert_close(x_0_from_noise(x_t, noise, abar), x_0, atol=1e-10, rtol=0)
    torch.testing.assert_close(noise_from_x_0(x_t, x_0, abar), noise, atol=1e-10, rtol=0)
    v = velocity(x_0, noise, abar)
    torch.testing.assert_close(abar.sqrt() * x_t - (1 - abar).sqrt() * v, x_0, atol=1e-10, rtol=0)


@pytest.mark.parametrize("parameterisation", ALL, ids=lambda p: type(p).__name__)
def test_both_estimates_explain_x_t_whatever_the_network_says(parameterisation):
    x_t, level = seeded(SHAPE, 0), mixed_level(parameterisation)
    prediction = parameterisation.denoise(lambda x, time: torch.sin(3 * x) + time.reshape(-1, 1, 1, 1) / 1000, x_t, level)
    torch.testing.assert_close(add_noise(*prediction, level.abar), x_t, atol=1e-10, rtol=0)


def test_changes_by_a_guide_or_a_clip_keep_x_t_explained():
    x_t, abar = seeded(SHAPE, 0), SCHEDULE.abar(300)
    noise = seeded(SHAPE, 1)
    prediction = Prediction(x_0_from_noise(x_t, noise, abar), noise)
    guided = with_noise(prediction, noise + 0.3, abar)
    torch.testing.assert_close(guided.x_0, x_0_from_noise(x_t, noise + 0.3, abar))
    clipped = with_x_0(prediction, prediction.x_0.clamp(-1, 1), abar)
    torch.testing.assert_close(clipped.noise, noise_from_x_0(x_t, clipped.x_0, abar))
    assert torch.equal(with_noise(prediction, noise, abar).x_0, prediction.x_0)


@pytest.mark.parametrize("parameterisation", ALL, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("weighting", [None, Uniform(), P2(), MinSNR(), EDMWeight()])
def test_the_perfect_network_has_no_loss(parameterisation, weighting):
    x_0, noise, level = seeded(SHAPE, 0), seeded(SHAPE, 1), mixed_level(parameterisation)
    loss = parameterisation.training_loss(perfect(parameterisation, x_0, noise, level.abar), x_0, noise, level, weighting)
    assert loss.shape == (6,) and torch.equal(loss, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("weighting", [Uniform(), P2(1.0, 0.5), MinSNR(5.0), EDMWeight(0.5)])
def test_one_weighting_weighs_the_same_prediction_alike(weighting):
    """The same wrong x_0, said in each of the four languages, costs the same; P2 and MSE of the noise by hand."""
    x_0, noise = seeded(SHAPE, 0), seeded(SHAPE, 1)
    wrong_x_0 = x_0 + 0.1 * seeded(SHAPE, 2)
    losses = []
    for parameterisation in ALL:
        level = mixed_level(parameterisation)
        wrong_noise = noise_from_x_0(add_noise(x_0, noise, level.abar), wrong_x_0, level.abar)
        said = parameterisation.target(wrong_x_0, wrong_noise, level.abar)
        losses.append(parameterisation.training_loss(lambda x, time, said=said: said, x_0, noise, level, weighting))
    snr = level.abar / (1 - level.abar)
    by_hand = weighting(snr) * (wrong_noise - noise).square().mean(dim=(1, 2, 3))
    for loss in losses:
        torch.testing.assert_close(loss, by_hand, rtol=1e-8, atol=0)


def test_the_plain_losses_are_those_of_the_papers():
    x_0, noise, output = seeded(SHAPE, 0), seeded(SHAPE, 1), seeded(SHAPE, 2)
    for parameterisation, target in [(Epsilon(), noise), (Sample(), x_0)]:
        loss = parameterisation.training_loss(lambda x, time: output, x_0, noise, mixed_level(parameterisation))
        torch.testing.assert_close(loss, (output - target).square().mean(dim=(1, 2, 3)))


def test_edm_plain_loss_is_karras_weight_on_the_denoiser():
    """lambda(s) |D(x_0 + s eps; s) - x_0|^2 with D of eq. 7 written out (Karras et al. 2022)."""
    edm = EDM(sigma_data=0.5)
    x_0, noise, level = seeded(SHAPE, 0), seeded(SHAPE, 1), mixed_level(edm)
    s = (1 / level.abar - 1).sqrt().reshape(-1, 1, 1, 1)

    def network(x_in, time):
        return torch.tanh(x_in) + time.reshape(-1, 1, 1, 1) / 1000

    noisy = x_0 + s * noise
    root = (s**2 + 0.25).sqrt()
    f = network(noisy / root, 1000 * (s.log() / 4).float().flatten())
    d = 0.25 / root**2 * noisy + s * 0.5 / root * f
    by_hand = ((s**2 + 0.25) / (0.5 * s) ** 2 * (d - x_0).square()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(edm.training_loss(network, x_0, noise, level), by_hand, rtol=1e-6, atol=0)
    torch.testing.assert_close(edm.training_loss(network, x_0, noise, level, EDMWeight(0.5)), by_hand, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        edm.denoise(network, noisy * level.abar.sqrt().reshape(-1, 1, 1, 1), level).x_0, d, rtol=1e-6, atol=1e-6
    )


def test_edm_keeps_input_and_target_at_unit_variance():
    """What c_in and c_out are made for (appendix B.6), for data of std sigma_data."""
    edm, n = EDM(sigma_data=0.5), 20000
    for t in (0, 100, 400, 999):
        level = edm.level(SCHEDULE, t, n)
        x_0, noise = 0.5 * seeded((n, 1), t), seeded((n, 1), t + 1)
        assert edm.network_input(add_noise(x_0, noise, level.abar), level.abar).std() == pytest.approx(1, abs=0.02)
        assert edm.target(x_0, noise, level.abar).std() == pytest.approx(1, abs=0.02)


def test_edm_loses_no_precision_at_small_noise():
    """At s = 0.002 the naive (x_t - sqrt(abar) x_0) / sqrt(1 - abar) is off by 1e-4 in float32."""
    edm, schedule = EDM(), make_schedule("karras", 1000)
    x_0, noise = seeded(SHAPE, 0, torch.float32), seeded(SHAPE, 1, torch.float32)
    level = edm.level(schedule, 0, len(x_0))
    prediction = edm.predict(edm.target(x_0, noise, level.abar), add_noise(x_0, noise, level.abar), level.abar)
    torch.testing.assert_close(prediction.noise, noise, atol=1e-5, rtol=0)


def test_the_time_the_network_is_told():
    assert Epsilon().level(SCHEDULE, 37, 2).time.tolist() == [37.0, 37.0]
    level = EDM().level(SCHEDULE, 37, 2)
    assert level.time.dtype == torch.float32 and level.abar.dtype == torch.float64
    assert level.time[0].item() == pytest.approx(1000 * math.log(float(SCHEDULE.sigma(37))) / 4, rel=1e-6)


@pytest.mark.parametrize("parameterisation", ALL, ids=lambda p: type(p).__name__)
def test_drawn_levels_depend_on_the_generator_alone(parameterisation):
    first = [parameterisation.draw_level(SCHEDULE, torch.Generator().manual_seed(i)) for i in range(5)]
    again = [parameterisation.draw_level(SCHEDULE, torch.Generator().manual_seed(i)) for i in range(5)]
    assert first == again and len(set(first)) == 5
    assert make_level(first).abar.tolist() == [abar for abar, _ in first]


def test_timesteps_are_drawn_uniformly_and_reach_both_ends():
    schedule, generator = make_schedule("linear_beta", 4), torch.Generator().manual_seed(0)
    drawn = [Velocity().draw_level(schedule, generator) for _ in range(4000)]
    counts = torch.bincount(torch.tensor([int(time) for _, time in drawn]), minlength=4)
    assert len(counts) == 4 and (counts - 1000).abs().max() < 120  # 4.4 standard deviations
    assert all(abar == schedule.abar(int(time)) for abar, time in drawn)


def test_edm_draws_a_log_normal_sigma():
    generator = torch.Generator().manual_seed(0)
    drawn = [EDM(p_mean=-0.8, p_std=1.1).draw_level(SCHEDULE, generator) for _ in range(4000)]
    log_s = torch.tensor([0.5 * math.log((1 - abar) / abar) for abar, _ in drawn])
    assert log_s.mean() == pytest.approx(-0.8, abs=0.08) and log_s.std() == pytest.approx(1.1, abs=0.06)
    assert [time for _, time in drawn] == pytest.approx((250 * log_s).tolist(), abs=1e-3)


def test_a_level_of_one_image_does_not_reach_another():
    parameterisation, network = EDM(), lambda x, time: torch.tanh(x) * time.reshape(-1, 1, 1, 1) / 100
    level, x_t = mixed_level(parameterisation), seeded(SHAPE, 0)
    whole = parameterisation.denoise(network, x_t, level)
    alone = parameterisation.denoise(network, x_t[2:3], Level(level.abar[2:3], level.time[2:3]))
    torch.testing.assert_close(whole.x_0[2:3], alone.x_0)


def test_the_optimal_denoiser_has_less_loss_than_its_neighbours():
    """For N(0.2, 0.3^2) the posterior mean is the minimiser; the sampled loss must see it."""
    parameterisation, n = Sample(), 4096
    x_0, noise = 0.2 + 0.3 * seeded((n, 1), 0), seeded((n, 1), 1)
    level = parameterisation.level(SCHEDULE, 300, n)

    def loss(offset):
        return parameterisation.training_loss(lambda x, t: posterior_mean(x, level.abar) + offset, x_0, noise, level).mean()

    assert loss(0.0) < min(loss(0.05), loss(-0.05))


def test_the_names_of_the_parameterisations():
    assert {"epsilon": Epsilon, "sample": Sample, "v_prediction": Velocity, "edm": EDM} == PARAMETERISATIONS


def test_refusals():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"must return the shape of its input, \(2, 1, 4, 4\), got \(2, 2, 4, 4\)"):
        Epsilon().denoise(lambda x, t: x.repeat(1, 2, 1, 1), x, Epsilon().level(SCHEDULE, 5, 2))
    for options in ({"sigma_data": 0.0}, {"p_std": -1.0}, {"p_mean": math.nan}):
        with pytest.raises(ConfigError, match="sigma_data and p_std must be positive"):
            EDM(**options)
