"""What guidance does to a distribution, where the answer is known: one Gaussian, two classes, exact classifiers; in float64."""

from functools import cache

import pytest
import torch
from gaussian_toy import gaussian_denoiser, no_noise, seeded, step_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from two_gaussians import MEAN, STD, class_means, clean_entropy, conditional, guide, unconditional

from medaug.diffusion import (
    DDIM,
    P2,
    Ancestral,
    Epsilon,
    Extrapolation,
    GradientGuidance,
    MeanGuided,
    Prediction,
    SqrtAbar,
    Together,
    add_noise,
    classifier_free_noise,
    ddim_inversion,
    disturb,
    make_level,
    make_schedule,
    noise_from_x_0,
    sample,
    score_guided_noise,
    spaced_timesteps,
    two_stage,
)
from medaug.diffusion.steps import ddpm_mean
from medaug.errors import ConfigError, DataError

SCHEDULE = make_schedule("linear_beta", 1000)
STEPS = st.tuples(st.integers(0, 999), st.integers(-1, 998)).filter(lambda pair: pair[0] > pair[1])


def standard(count, seed=0):
    """Start values with mean exactly 0 and standard deviation exactly 1, so that only the chain can move them."""
    x = seeded((count, 1), seed)
    return (x - x.mean()) / x.std()


def ddim(denoiser, x_T, num_inference_steps, guide=None, **options):
    timesteps = spaced_timesteps(SCHEDULE, num_inference_steps)
    return sample(denoiser, x_T, timesteps, DDIM(), schedule=SCHEDULE, noise=no_noise, guide=guide, **options)


# --- P1.8, P1.9 -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(scales=st.lists(st.floats(-3, 15), min_size=3, max_size=3))
def test_p1_8_classifier_free_guidance_has_its_ends_and_is_linear_also_per_image(scales):
    cond, uncond = seeded((3, 1, 4, 4)), seeded((3, 1, 4, 4), 1)
    w = torch.tensor(scales, dtype=torch.float64)
    assert torch.equal(classifier_free_noise(cond, uncond, torch.ones(3)), cond)
    assert torch.equal(classifier_free_noise(cond, uncond, torch.zeros(3)), uncond)
    expected = uncond + w.reshape(3, 1, 1, 1) * (cond - uncond)
    torch.testing.assert_close(classifier_free_noise(cond, uncond, w), expected)


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(-20, 20), t=st.integers(0, 999))
def test_p1_9_scale_0_is_the_identity_and_a_doubled_scale_doubles_the_shift(scale, t):
    noise, x = seeded((3, 1, 4, 4)), seeded((3, 1, 4, 4), 1)

    def guided(s):
        return GradientGuidance(lambda x, t: x.sin().flatten(1).sum(dim=1), s, SCHEDULE)(noise, x, t)

    assert torch.equal(guided(0.0), noise)
    torch.testing.assert_close(guided(2 * scale) - noise, 2 * (guided(scale) - noise), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(guided(-scale) - noise, -(guided(scale) - noise), atol=1e-12, rtol=1e-9)


# --- P1.10 ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(pair=STEPS, scale=st.floats(0.1, 10))
def test_p1_10_score_form_and_mean_form_differ_by_the_square_root_of_the_jump(pair, scale):
    t, p = pair
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(p)
    b, jump = 1 - abar_t / abar_p, abar_t / abar_p
    x_t, x_0, gradient = seeded((2, 1, 3, 3)), 0.5 * seeded((2, 1, 3, 3), 1), seeded((2, 1, 3, 3), 2)

    def mean(noise):
        return ddpm_mean(x_t, (x_t - (1 - abar_t).sqrt() * noise) / abar_t.sqrt(), abar_t, abar_p)

    noise = noise_from_x_0(x_t, x_0, abar_t)
    score_shift = mean(score_guided_noise(noise, gradient, abar_t, scale)) - mean(noise)
    torch.testing.assert_close(score_shift, b / jump.sqrt() * scale * gradient, atol=1e-9, rtol=1e-7)

    if p < 0:
        return
    measure = GradientGuidance(lambda x, t: (x * gradient).flatten(1).sum(dim=1), scale, SCHEDULE)
    step = Ancestral("fixed_large")
    options = {"schedule": SCHEDULE, "noise": step_noise(x_t), "previous": None}
    plain = step(Prediction(x_0, noise), x_t, t, p, **options)
    mean_shift = MeanGuided(step, [measure])(Prediction(x_0, noise), x_t, t, p, **options) - plain
    torch.testing.assert_close(mean_shift, b * scale * gradient, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(score_shift, mean_shift / jump.sqrt(), atol=1e-9, rtol=1e-7)


def test_the_mean_form_moves_by_the_small_variance_of_its_step_and_adds_guidances_up():
    t, p, x_t = 600, 400, seeded((2, 1))
    abar_t, abar_p = SCHEDULE.abar(t), SCHEDULE.abar(p)
    options = {"schedule": SCHEDULE, "noise": step_noise(x_t), "previous": None}
    prediction = gaussian_denoiser(SCHEDULE)(x_t, t)
    guides = [GradientGuidance(lambda x, t, a=a: a * x.flatten(1).sum(dim=1), 2.0, SCHEDULE) for a in (1.0, 0.25)]
    moved = MeanGuided(Ancestral(), guides)(prediction, x_t, t, p, **options) - Ancestral()(prediction, x_t, t, p, **options)
    small = (1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)
    torch.testing.assert_close(moved, (small * 2.5).expand_as(moved))
    last = MeanGuided(Ancestral(), guides)(prediction, x_t, t, -1, **options)
    assert torch.equal(last, Ancestral()(prediction, x_t, t, -1, **options))  # no variance, no shift


# --- P1.11 ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(t=st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_p1_11_p2_off_is_the_plain_error_and_half_is_the_square_root_of_one_minus_abar(t):
    x_0, noise = seeded((3, 1, 4, 4)), seeded((3, 1, 4, 4), 1)
    abar = SCHEDULE.abar(torch.tensor(t))
    level = make_level([(float(a), float(step)) for a, step in zip(abar, t, strict=True)])

    def loss(weighting):
        return Epsilon().training_loss(lambda x, time: x.sin(), x_0, noise, level, weighting)

    plain = (add_noise(x_0, noise, abar).sin() - noise).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss(P2(k=1.0, gamma=0.0)), plain)
    torch.testing.assert_close(loss(P2(k=1.0, gamma=0.5)), (1 - abar).sqrt() * plain)


# --- P1.12, P4.6: N(0, 1) tilted by exp(s a x) is N(s a, 1) ---------------------------------------------------------------


def linear_energy(a, scale_schedule=None, diffused=False):
    """M_0 = a x with s = 2, or its diffused energy M_t = a sqrt(abar_t) x."""
    options = {} if scale_schedule is None else {"scale_schedule": scale_schedule}

    def measure(x, t):
        return a * (SCHEDULE.abar(t).sqrt() if diffused else 1.0) * x.flatten(1).sum(dim=1)

    return GradientGuidance(measure, 2.0, SCHEDULE, **options)


def tilted_by_hand(num_inference_steps, slope):
    """Mean and standard deviation after DDIM from N(0, 1): every step maps x to a number times x, plus a number."""
    timesteps, mean, std = spaced_timesteps(SCHEDULE, num_inference_steps), 0.0, 1.0
    for t, p in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, q = float(SCHEDULE.abar(t)), float(SCHEDULE.abar(p))
        kept, pushed = (1 - a) ** 0.5, -((1 - a) ** 0.5) * slope * a**0.5  # eps = kept x + pushed
        factor = (q / a) ** 0.5 * (1 - (1 - a) ** 0.5 * kept) + (1 - q) ** 0.5 * kept
        shift = (-((q / a) ** 0.5) * (1 - a) ** 0.5 + (1 - q) ** 0.5) * pushed
        mean, std = factor * mean + shift, factor * std
    return mean, std


@pytest.mark.parametrize(("num_inference_steps", "abs_std"), [(1000, 0.003), (50, 0.04)])
@pytest.mark.parametrize("way", ["diffused energy", "clean energy with sqrt_abar"])
def test_p1_12_p4_6_the_exact_energy_tilts_the_distribution(way, num_inference_steps, abs_std):
    exact = linear_energy(0.5, diffused=True) if way == "diffused energy" else linear_energy(0.5, SqrtAbar())
    x_0 = ddim(gaussian_denoiser(SCHEDULE, mean=0.0, std=1.0), standard(64), num_inference_steps, exact)
    assert float(x_0.mean()) == pytest.approx(1.0, abs=0.007)
    assert float(x_0.std()) == pytest.approx(1.0, abs=abs_std)  # few steps narrow also without guidance
    assert (float(x_0.mean()), float(x_0.std())) == pytest.approx(tilted_by_hand(num_inference_steps, 1.0), rel=1e-9)


def test_p4_6_the_clean_energy_at_every_t_overshoots_five_times():
    x_0 = ddim(gaussian_denoiser(SCHEDULE, mean=0.0, std=1.0), standard(64), 1000, linear_energy(0.5))
    assert float(x_0.mean()) == pytest.approx(5.07, abs=0.006)


def test_p1_12_the_mean_form_tilts_alike():
    """Ancestral noise leaves 1/sqrt(4096) = 0.016 of standard error in the mean."""
    step = MeanGuided(Ancestral(), [linear_energy(0.5, diffused=True)])
    x_T = standard(4096)
    denoiser, timesteps = gaussian_denoiser(SCHEDULE, mean=0.0, std=1.0), spaced_timesteps(SCHEDULE, 1000)
    x_0 = sample(denoiser, x_T, timesteps, step, schedule=SCHEDULE, noise=step_noise(x_T))
    assert float(x_0.mean()) == pytest.approx(1.0, abs=0.06)
    assert float(x_0.std()) == pytest.approx(1.0, abs=0.05)


def test_two_tilts_add_up():
    both = Together([linear_energy(0.25, diffused=True), linear_energy(0.5, diffused=True)])
    denoiser = gaussian_denoiser(SCHEDULE, mean=0.0, std=1.0)
    torch.testing.assert_close(
        ddim(denoiser, standard(64), 50, both), ddim(denoiser, standard(64), 50, linear_energy(0.75, diffused=True))
    )


def test_the_exact_classifier_at_scale_1_makes_the_class_of_the_mixture():
    """p(x) p(y | x) / p(y) = p(x | y): the theorem's other worked case, with a classifier that is not linear."""
    x_T = standard(4096)
    x_0 = ddim(unconditional(SCHEDULE), x_T, 400, guide(SCHEDULE, "classifier", 1.0, torch.ones(4096, dtype=torch.long)))
    alone = ddim(conditional(SCHEDULE, torch.ones(4096, dtype=torch.long)), x_T, 400)
    torch.testing.assert_close(x_0, alone, atol=1e-9, rtol=0)  # Bayes' rule holds at every step, not only at the end
    assert float(x_0.mean()) == pytest.approx(MEAN, abs=0.01) and float(x_0.std()) == pytest.approx(STD, abs=0.02)


def test_classifier_free_guidance_is_classifier_guidance_with_bayes_classifier():
    """e_u + w (e_c - e_u) = e_u - w sqrt(1 - abar) grad log p(y | x_t)."""
    labels, x_T = torch.tensor([0, 1] * 8), standard(16)
    extrapolated = Extrapolation(conditional(SCHEDULE, labels), unconditional(SCHEDULE), 2.5, SCHEDULE)
    gradient = guide(SCHEDULE, "classifier", 2.5, labels)
    torch.testing.assert_close(ddim(extrapolated, x_T, 60), ddim(unconditional(SCHEDULE), x_T, 60, gradient))


# --- P4.4, P4.5: the boundary of two classes --------------------------------------------------------------------------

SCALES = (0.0, 0.25, 0.5, 1.0)
LABELS = torch.arange(512) % 2


@cache
def end_of(measure, scale, network="conditional"):
    denoiser = conditional(SCHEDULE, LABELS) if network == "conditional" else unconditional(SCHEDULE)
    x_0 = ddim(denoiser, standard(512), 50, guide(SCHEDULE, measure, scale, LABELS))
    return clean_entropy(x_0), float(x_0.abs().mean())


def rising(values):
    return all(a < b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("network", ["conditional", "unconditional"])
@pytest.mark.parametrize("measure", ["entropy", "margin", "least_confidence"])
def test_p4_4_uncertainty_guidance_raises_entropy_and_moves_to_the_boundary(measure, network):
    entropies, distances = zip(*(end_of(measure, scale, network) for scale in SCALES), strict=True)
    assert rising(entropies) and rising(distances[::-1])
    assert entropies[-1] > 1.2 * entropies[0]


@pytest.mark.parametrize(("network", "scales"), [("conditional", SCALES), ("unconditional", (1.0, 1.5, 2.0, 3.0))])
def test_p4_4_classifier_guidance_does_the_opposite(network, scales):
    """Without classes in the network, scale 1 makes the class at all: below it, labels and start values still quarrel."""
    entropies, distances = zip(*(end_of("classifier", scale, network) for scale in scales), strict=True)
    assert rising(entropies[::-1]) and rising(distances)
    assert entropies[-1] < entropies[0] / 1.2


@pytest.mark.parametrize("measure", ["entropy", "margin", "least_confidence"])
def test_p4_5_a_negative_scale_lowers_uncertainty(measure):
    """Of the network without classes: one with classes may pull across the boundary what is pushed away from it."""
    entropies, distances = zip(*(end_of(measure, -scale, "unconditional") for scale in SCALES), strict=True)
    assert rising(entropies[::-1]) and rising(distances)


# --- P4.3 and the two stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "error"), [(50, 0.072), (250, 0.015)])
def test_p4_3_without_scale_stage_2_is_the_round_trip(steps, error):
    """The figures are those of the inversion, P1.6."""
    x_0, denoiser = seeded((64, 1)), gaussian_denoiser(SCHEDULE, mean=0.0, std=1.0)
    timesteps = spaced_timesteps(SCHEDULE, steps, "leading")
    off = guide(SCHEDULE, "entropy", 0.0)
    found = disturb(denoiser, x_0, timesteps, schedule=SCHEDULE, guide=off, clip=False)
    assert float((found - x_0).norm() / x_0.norm()) == pytest.approx(error, rel=0.05)
    assert torch.equal(found, disturb(denoiser, x_0, timesteps, schedule=SCHEDULE, guide=None, clip=False))
    refined = disturb(denoiser, x_0, timesteps, schedule=SCHEDULE, guide=off, clip=False, refinements=8)
    torch.testing.assert_close(refined, x_0, atol=1e-3, rtol=0)


def real_images(count=256):
    labels = torch.arange(count) % 2
    return class_means(labels) + STD * standard(count), labels


def test_stage_2_moves_given_images_to_the_boundary_with_gamma_and_keeps_their_order():
    """Real images too: the stage starts from whatever it is given."""
    x_0, labels = real_images()
    timesteps, entropies, ends = spaced_timesteps(SCHEDULE, 50), [], []
    for gamma in SCALES:
        found = disturb(
            conditional(SCHEDULE, labels), x_0, timesteps, schedule=SCHEDULE, guide=guide(SCHEDULE, "entropy", gamma), clip=False
        )
        entropies.append(clean_entropy(found))
        ends.append(found)
    assert rising(entropies)
    for label in (0, 1):  # an image keeps its place among those of its class: it is moved, not drawn anew
        before, after = x_0[labels == label, 0], ends[-1][labels == label, 0]
        assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.9


def test_inversion_sees_no_guide_and_no_clip():
    x_0, labels = real_images(8)
    timesteps, starts = spaced_timesteps(SCHEDULE, 20), []

    def spy(noise, x_t, t):
        if t == timesteps[0]:
            starts.append(x_t)
        return noise + 5.0

    disturb(conditional(SCHEDULE, labels), 4 * x_0, timesteps, schedule=SCHEDULE, guide=spy, clip=True)
    expected = ddim_inversion(conditional(SCHEDULE, labels), 4 * x_0, timesteps, schedule=SCHEDULE)
    assert len(starts) == 1 and torch.equal(starts[0], expected)


def test_clip_acts_on_the_way_back_before_the_guide():
    x_0, labels = 4 * real_images(8)[0], real_images(8)[1]
    grid = spaced_timesteps(SCHEDULE, 50)
    inside = disturb(conditional(SCHEDULE, labels), x_0, grid, schedule=SCHEDULE, guide=None)
    assert float(inside.abs().max()) <= 1 + 1e-12
    free = disturb(conditional(SCHEDULE, labels), x_0, grid, schedule=SCHEDULE, guide=None, clip=False)
    assert float(free.abs().max()) > 1.5
    pushed = disturb(conditional(SCHEDULE, labels), x_0, grid, schedule=SCHEDULE, guide=lambda noise, x, t: noise - 100.0)
    assert float(pushed.min()) > 1.5  # sigma at the last step is 0.01, times 100: the guide has the last word


def test_target_label_translates():
    """The flow keeps a Gaussian's standardised value, so class 0 at x arrives in class 1 at x + 2 m."""
    x_0 = -MEAN + STD * standard(64)
    source, target = (conditional(SCHEDULE, torch.full((64,), label)) for label in (0, 1))
    timesteps = spaced_timesteps(SCHEDULE, 1000)
    moved = disturb(source, x_0, timesteps, schedule=SCHEDULE, guide=None, target=target, clip=False)
    torch.testing.assert_close(moved, x_0 + 2 * MEAN, atol=0.02, rtol=0)


def test_two_stages_from_noise():
    labels, timesteps = LABELS[:256], spaced_timesteps(SCHEDULE, 50)
    denoiser = conditional(SCHEDULE, labels)
    sure, unsure = guide(SCHEDULE, "classifier", 1.0, labels), guide(SCHEDULE, "entropy", 1.0)
    stages = {"schedule": SCHEDULE, "generation": sure, "disturbance": unsure, "clip": False}
    first, second = two_stage(denoiser, standard(256), timesteps, **stages)
    assert torch.equal(first, ddim(denoiser, standard(256), 50, sure))
    assert torch.equal(second, disturb(denoiser, first, timesteps, schedule=SCHEDULE, guide=unsure, clip=False))
    assert clean_entropy(first) < clean_entropy(second)
    assert clean_entropy(first) < clean_entropy(ddim(denoiser, standard(256), 50))


def test_the_second_stage_inverts_without_the_guidance_of_the_first():
    labels, timesteps = LABELS[:8], spaced_timesteps(SCHEDULE, 30)
    plain = conditional(SCHEDULE, labels)
    strong = Extrapolation(plain, unconditional(SCHEDULE), 2.0, SCHEDULE)
    nothing = {"schedule": SCHEDULE, "generation": None, "disturbance": None, "clip": False}
    first, second = two_stage(strong, standard(8), timesteps, inverter=plain, **nothing)
    assert torch.equal(first, ddim(strong, standard(8), 30))
    assert torch.equal(second, disturb(plain, first, timesteps, schedule=SCHEDULE, guide=None, clip=False))
    assert not torch.equal(second, two_stage(strong, standard(8), timesteps, **nothing)[1])


def test_stage_2_refuses_an_empty_set_and_a_bad_grid_and_leaves_images_without_steps():
    x_0, denoiser = seeded((2, 1)), gaussian_denoiser(SCHEDULE)
    with pytest.raises(DataError, match="disturb-empty"):
        disturb(denoiser, x_0[:0], [5, 0], schedule=SCHEDULE, guide=None)
    with pytest.raises(ConfigError, match="timesteps-order"):
        disturb(denoiser, x_0, [0, 5], schedule=SCHEDULE, guide=None)
    assert torch.equal(disturb(denoiser, x_0, [], schedule=SCHEDULE, guide=None), x_0)
