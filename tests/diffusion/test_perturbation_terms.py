"""Where and when a perturbation acts, and what the two terms of the step see of it."""

import pytest
import torch
from gaussian_toy import no_noise, seeded

from medaug.diffusion import (
    DDIM,
    LOCATIONS,
    Perturbation,
    PerturbedState,
    Prediction,
    ddim_step,
    make_schedule,
    sample,
    x_0_from_noise,
)
from medaug.errors import ConfigError

SCHEDULE = make_schedule("linear_beta", 1000)
PAIRS = [(999, 700), (700, 300), (300, 0), (0, -1)]


def predictions(x_t, e, e_tilde, abar):
    return Prediction(x_0_from_noise(x_t, e, abar), e), Prediction(x_0_from_noise(x_t, e_tilde, abar), e_tilde)


@pytest.mark.parametrize("terms", ["x0_only", "both"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("t", "p"), PAIRS)
def test_p3_2_equal_predictions_give_the_plain_step(t, p, eta, terms):
    x_t, e, z = (seeded((2, 1, 4, 4), i) for i in range(3))
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(p)
    plain, same = predictions(x_t, e, e.clone(), abar_t)
    got = DDIM(eta)(
        Perturbation(terms=terms).combine(plain, same), x_t, t, p, schedule=SCHEDULE, noise=lambda t: z, previous=None
    )
    torch.testing.assert_close(got, ddim_step(x_t, e, e, abar_t, abar_p, eta, z), atol=1e-12, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t", "p"), PAIRS)
def test_p3_3_the_response_of_the_step_is_the_formula(t, p, eta):
    """x_p(e~) - x_p(e) = -sqrt(abar_p (1 - abar_t) / abar_t) (e~ - e); with both terms sqrt(1 - abar_p - sigma^2) is added."""
    x_t, e, e_tilde, z = (seeded((2, 1, 4, 4), i) for i in range(4))
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(p)
    plain, perturbed = predictions(x_t, e, e_tilde, abar_t)

    def step(prediction):
        return DDIM(eta)(prediction, x_t, t, p, schedule=SCHEDULE, noise=lambda t: z, previous=None)

    sigma2 = eta**2 * (1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)
    s = -(abar_p * (1 - abar_t) / abar_t).sqrt()
    d = (1 - abar_p - sigma2).clamp(min=0).sqrt()
    for terms, response in (("x0_only", s), ("both", s + d)):
        got = step(Perturbation(terms=terms).combine(plain, perturbed)) - step(plain)
        torch.testing.assert_close(got, response * (e_tilde - e), atol=1e-11, rtol=1e-11)


def test_both_terms_nearly_cancel():
    """The reason for eq. 6: with 100 steps, eta 1 and the schedule of latent diffusion the single term is 8 to 15 times stronger."""
    schedule = make_schedule("scaled_linear_beta", 1000, beta_start=0.00085, beta_end=0.012)
    for t, single, both in ((900, 1.05, 0.10), (500, 0.87, 0.056), (100, 0.33, 0.042)):
        abar_t, abar_p = float(schedule.abar(t)), float(schedule.abar(t - 10))
        s = -((abar_p * (1 - abar_t) / abar_t) ** 0.5)
        sigma2 = (1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)
        assert abs(s) == pytest.approx(single, rel=0.1)
        assert abs(s + (1 - abar_p - sigma2) ** 0.5) == pytest.approx(both, rel=0.15)


def test_when_it_acts():
    assert [Perturbation().acts(*pair) for pair in PAIRS] == [True, True, True, False]
    assert [Perturbation(skip_last=False).acts(*pair) for pair in PAIRS] == [True] * 4
    assert [Perturbation(window=(700, 300)).acts(*pair) for pair in PAIRS] == [False, True, True, False]
    assert not any(Perturbation(scale=0.0, skip_last=False).acts(*pair) for pair in PAIRS)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_scale_is_that_of_each_image(mode):
    value = seeded((3, 2, 5, 5)) * torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1, 1)
    perturbation = Perturbation(scale=0.5, mode=mode)
    sigma = perturbation.sigma(value).expand(3, 1, 1, 1).flatten()
    wanted = 0.5 * value.flatten(1).std(dim=1, correction=0) if mode == "relative" else torch.full((3,), 0.5).double()
    torch.testing.assert_close(sigma, wanted)
    draw = seeded(value.shape, 9)
    torch.testing.assert_close(perturbation.add(value, draw), value + sigma.reshape(3, 1, 1, 1) * draw)


def test_the_state_is_perturbed_after_the_step():
    x_T, states = seeded((1, 1, 4, 4)), []

    def denoiser(x_t, t):
        return Prediction(torch.zeros_like(x_t), x_t)

    perturbation = Perturbation(scale=2.0, mode="absolute", location="xt")
    one = seeded(x_T.shape, 5)
    step = PerturbedState(DDIM(), perturbation, lambda t: one)
    options = {"schedule": SCHEDULE, "noise": no_noise, "on_step": lambda t, x, prediction: states.append(x)}
    sample(denoiser, x_T, [900, 500, 100], step, **options)
    plain = []
    sample(denoiser, x_T, [900, 500, 100], DDIM(), **options | {"on_step": lambda t, x, prediction: plain.append(x)})
    torch.testing.assert_close(states[0], plain[0] + 2 * one)
    assert torch.equal(states[2], torch.zeros_like(x_T))  # skip_last: x_0 = 0 is left alone


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"location": "middle"}, "perturbation-location.*" + ", ".join(LOCATIONS)),
        ({"terms": "direction"}, "perturbation-terms.*x0_only, both"),
        ({"cfg_noise": "half"}, "perturbation-cfg-noise"),
        ({"mode": "loud"}, "perturbation-mode"),
        ({"scale": -0.1}, "perturbation-scale"),
        ({"scale": float("nan")}, "perturbation-scale"),
        ({"scale": True}, "perturbation-scale"),
        ({"window": (100, 200)}, "perturbation-window"),
        ({"window": (100, -1)}, "perturbation-window"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ConfigError, match=match):
        Perturbation(**options)
