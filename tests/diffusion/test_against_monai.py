"""Where MONAI's schedulers are right, ours agree with them; where they are not, this file says how."""

import pytest
import torch
from gaussian_toy import gaussian_denoiser, seeded, step_noise

from medaug.diffusion import DDIM, Ancestral, Prediction, add_noise, make_schedule, sample
from medaug.diffusion.parameterisation import velocity, x_0_from_noise

SHAPE = (4, 1, 3, 3)


@pytest.fixture(scope="module")
def schedulers():
    from monai.networks import schedulers

    return schedulers


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("name", ["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"])
def test_schedules_agree(schedulers, kind, name):
    theirs = getattr(schedulers, kind)(num_train_timesteps=1000, schedule=name)
    ours = make_schedule(name, 1000).alphas_cumprod
    # float32 products of 1000 factors; cosine: float32 cos^2 near 0, where abar is 1e-9
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours, rtol=1e-3, atol=1e-7)


def test_the_ends_of_the_betas_can_be_given(schedulers):
    theirs = schedulers.DDPMScheduler(num_train_timesteps=100, schedule="linear_beta", beta_start=0.001, beta_end=0.2)
    ours = make_schedule("linear_beta", 100, beta_start=0.001, beta_end=0.2)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-4, atol=0)


def test_add_noise_and_velocity_agree(schedulers):
    theirs, ours = schedulers.DDPMScheduler(num_train_timesteps=1000), make_schedule("linear_beta", 1000)
    x_0, noise, t = seeded(SHAPE, 0, torch.float32), seeded(SHAPE, 1, torch.float32), torch.tensor([0, 200, 700, 999])
    torch.testing.assert_close(
        add_noise(x_0, noise, ours.abar(t)), theirs.add_noise(original_samples=x_0, noise=noise, timesteps=t), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        velocity(x_0, noise, ours.abar(t)), theirs.get_velocity(sample=x_0, noise=noise, timesteps=t), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [999, 500, 1])
def test_one_ancestral_step_to_the_next_timestep_agrees(schedulers, t, variance):
    theirs = schedulers.DDPMScheduler(num_train_timesteps=1000, variance_type=variance, clip_sample=False)
    schedule = make_schedule("linear_beta", 1000)
    x_t, e = seeded(SHAPE, 0, torch.float32), seeded(SHAPE, 1, torch.float32)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    wanted, _ = theirs.step(e, t, x_t, generator=torch.Generator().manual_seed(5))
    prediction = Prediction(x_0_from_noise(x_t, e, schedule.abar(t)), e)
    got = Ancestral(variance)(prediction, x_t, t, t - 1, schedule=schedule, noise=lambda _: z, previous=None)
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)  # x_0 is 157 times as large as x_t at t = 999


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_one_ddim_step_on_monais_own_grid_agrees(schedulers, eta):
    theirs = schedulers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    theirs.set_timesteps(20)  # its step goes from t to t - 50, whatever its grid says
    schedule = make_schedule("linear_beta", 1000)
    x_t, e = seeded(SHAPE, 0, torch.float32), seeded(SHAPE, 1, torch.float32)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    wanted, _ = theirs.step(e, 700, x_t, eta=eta, generator=torch.Generator().manual_seed(5))
    prediction = Prediction(x_0_from_noise(x_t, e, schedule.abar(700)), e)
    got = DDIM(eta)(prediction, x_t, 700, 650, schedule=schedule, noise=lambda _: z, previous=None)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_the_respaced_chain_is_right_where_monais_is_not(schedulers):
    """50 of 1000 steps on N(0.2, 0.3^2): MONAI's DDPMScheduler takes abar of t - 1 instead of the next visited step."""
    theirs, schedule = schedulers.DDPMScheduler(num_train_timesteps=1000, clip_sample=False), make_schedule("linear_beta", 1000)
    theirs.set_timesteps(50)
    denoiser, x_T = gaussian_denoiser(schedule), seeded((2048, 1), 0, torch.float32)
    timesteps = [int(t) for t in theirs.timesteps]
    x, generator = x_T, torch.Generator().manual_seed(1)
    for t in timesteps:
        x, _ = theirs.step(denoiser(x, t).noise, t, x, generator=generator)
    ours = sample(denoiser, x_T, timesteps, Ancestral(), schedule=schedule, noise=step_noise(x_T))
    assert ours.std() == pytest.approx(0.3, abs=0.06)
    assert x.std() > 0.6
