import pytest
import torch
from gaussian_toy import gaussian_denoiser, no_noise, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.diffusion import (
    DDIM,
    GradientGuidance,
    Prediction,
    classifier_free,
    classifier_free_noise,
    make_schedule,
    sample,
    score_guided_noise,
    spaced_timesteps,
    x_0_from_noise,
)

SCHEDULE = make_schedule("linear_beta", 1000)
SHAPE = (3, 1, 4, 4)


def test_scale_1_is_conditional_and_scale_0_unconditional():
    cond, uncond = seeded(SHAPE, 0, torch.float32), seeded(SHAPE, 1, torch.float32)
    assert torch.equal(classifier_free_noise(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_noise(cond, uncond, 0.0), uncond)


@settings(deadline=None, max_examples=25)
@given(scale=st.floats(-3, 15))
def test_guidance_is_linear_in_the_scale(scale):
    cond, uncond = seeded(SHAPE, 0), seeded(SHAPE, 1)
    torch.testing.assert_close(classifier_free_noise(cond, uncond, scale), uncond + scale * (cond - uncond))


def test_one_scale_per_image():
    cond, uncond = seeded(SHAPE, 0), seeded(SHAPE, 1)
    whole = classifier_free_noise(cond, uncond, torch.tensor([0.0, 1.0, 7.5]))
    for i, scale in enumerate((0.0, 1.0, 7.5)):
        torch.testing.assert_close(whole[i], classifier_free_noise(cond[i : i + 1], uncond[i : i + 1], scale)[0])


def test_guided_predictions_still_explain_x_t():
    x_t, abar = seeded(SHAPE, 0), SCHEDULE.abar(400)
    cond, uncond = (Prediction(x_0_from_noise(x_t, e, abar), e) for e in (seeded(SHAPE, 1), seeded(SHAPE, 2)))
    guided = classifier_free(cond, uncond, 3.0)
    torch.testing.assert_close(guided.x_0, x_0_from_noise(x_t, guided.noise, abar))


def test_scale_0_is_the_identity_and_a_doubled_scale_doubles_the_shift():
    noise, gradient, abar = seeded(SHAPE, 0), seeded(SHAPE, 1), SCHEDULE.abar(400)
    assert torch.equal(score_guided_noise(noise, gradient, abar, 0.0), noise)
    once, twice = (score_guided_noise(noise, gradient, abar, s) - noise for s in (1.5, 3.0))
    torch.testing.assert_close(twice, 2 * once)


def test_gradient_is_that_of_the_measure_at_x_t():
    x_t, noise = seeded(SHAPE, 0), seeded(SHAPE, 1)
    guide = GradientGuidance(lambda x, t: x.pow(3).flatten(1).sum(dim=1) * t, 0.5, SCHEDULE)
    with torch.no_grad():
        guided = guide(noise, x_t, 400)
    torch.testing.assert_close(guided, noise - 0.5 * (1 - SCHEDULE.abar(400)).sqrt() * 400 * 3 * x_t**2)
    assert not guided.requires_grad and not x_t.requires_grad


def test_a_classifier_gets_no_gradient():
    classifier = torch.nn.Linear(16, 2).double()
    guide = GradientGuidance(lambda x, t: classifier(x.flatten(1)).log_softmax(dim=1)[:, 0], 1.0, SCHEDULE)
    guide(seeded(SHAPE, 0), seeded(SHAPE, 1), 10)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize(("num_inference_steps", "abs_std"), [(1000, 0.02), (50, 0.06)])
def test_guidance_with_the_exact_energy_tilts_the_distribution(num_inference_steps, abs_std):
    """N(0, 1) tilted by exp(s a x) is N(s a, 1); the diffused energy is M_t = a sqrt(abar_t) x."""
    a, scale = 0.5, 2.0
    guide = GradientGuidance(lambda x, t: a * SCHEDULE.abar(t).sqrt() * x.flatten(1).sum(dim=1), scale, SCHEDULE)
    x_T = seeded((4096, 1), 0)
    x_T = (x_T - x_T.mean()) / x_T.std()
    x_0 = sample(
        gaussian_denoiser(SCHEDULE, mean=0.0, std=1.0),
        x_T,
        spaced_timesteps(SCHEDULE, num_inference_steps),
        DDIM(),
        schedule=SCHEDULE,
        noise=no_noise,
        guide=guide,
    )
    assert x_0.mean() == pytest.approx(scale * a, abs=0.02)
    assert x_0.std() == pytest.approx(1.0, abs=abs_std)
