"""The parts around the gradient: what a classifier is asked and when, schedules of the scale, the guides that are no gradient, memory."""

import itertools
import math
import weakref

import pytest
import torch
from gaussian_toy import gaussian_denoiser, no_noise, posterior_mean, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from two_gaussians import guide

from medaug.diffusion import (
    DDIM,
    EDM,
    MEASURES,
    SCALE_SCHEDULES,
    ClassMeasure,
    ConditionAnnealing,
    Constant,
    DropoutVotes,
    EnsembleVotes,
    Extrapolation,
    GradientGuidance,
    Interval,
    OnPredictedX0,
    Prediction,
    SqrtAbar,
    Together,
    make_measure,
    make_schedule,
    sample,
    spaced_timesteps,
)
from medaug.errors import ConfigError

SCHEDULE = make_schedule("linear_beta", 1000)
SHAPE = (4, 1, 4, 4)


class Tiny(torch.nn.Module):
    """A classifier with everything that could couple images or count calls: drop-out, batch norm, time."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = torch.nn.Linear(17, 8)
            self.last = torch.nn.Linear(8, classes)
        self.norm = torch.nn.BatchNorm1d(8)
        self.drop = torch.nn.Dropout(0.5)
        self.norm.running_mean += 0.1
        self.seen = []
        self.double()

    def features(self, x, time):
        self.seen.append(time.clone())
        return self.norm(torch.tanh(self.first(torch.cat([x.flatten(1), time.to(x.dtype)[:, None] / 1000], dim=1))))

    def forward(self, x, time):
        return self.last(self.drop(self.features(x, time)))

    def vote_logits(self, x, time, kept):
        return self.last(self.features(x, time) * kept)


def guidance(network, measure="entropy", scale=3.0, labels=None, **options):
    votes = EnsembleVotes([network, Tiny(seed=1)] if measure == "bald" else [network], 3)
    return GradientGuidance(ClassMeasure(make_measure(measure), votes, labels), scale, SCHEDULE, **options)


def run(guide, x_T, timesteps, denoiser=None, **options):
    denoiser = gaussian_denoiser(SCHEDULE) if denoiser is None else denoiser
    return sample(denoiser, x_T, timesteps, DDIM(), schedule=SCHEDULE, noise=no_noise, guide=guide, **options)


# --- P4.1 through the classifier ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_p4_1_the_force_matches_finite_differences_by_pixel(measure):
    x, labels, t, h = seeded(SHAPE), torch.tensor([0, 1, 2, 0]), 300, 1e-5
    guided = guidance(Tiny().eval(), measure, 3.0, labels)
    force = guided.force(x, t)
    assert float(force.abs().min()) > 1e-7
    for index in ((0, 0, 1, 2), (3, 0, 3, 3)):
        step = torch.zeros_like(x)
        step[index] = h
        by_difference = (guided.measure(x + step, t) - guided.measure(x - step, t)).sum().item() / (2 * h)
        assert float(force[index]) == pytest.approx(3.0 * by_difference, rel=1e-6, abs=1e-9)


def test_the_guided_noise_is_the_noise_less_the_force_times_sigma():
    x, noise, guided = seeded(SHAPE), seeded(SHAPE, 1), guidance(Tiny().eval())
    torch.testing.assert_close(guided(noise, x, 300), noise - (1 - SCHEDULE.abar(300)).sqrt() * guided.force(x, 300))


# --- P4.7 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", ["one", "drop-out"])
def test_p4_7_parameters_get_no_gradient_and_states_are_kept(votes):
    network = Tiny().train()
    network.norm.eval()
    network.last.bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in network.parameters()]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    if votes == "one":
        guided = guidance(network)
    else:
        kept = torch.ones(2, 4, 8, dtype=torch.float64)
        guided = GradientGuidance(
            ClassMeasure(make_measure("entropy"), DropoutVotes(network.vote_logits, lambda t: kept, 3)), 1.0, SCHEDULE
        )
    run(guided, seeded(SHAPE), [900, 500, 0])
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [parameter.requires_grad for parameter in network.parameters()] == before
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())  # running means too
    assert network.training and network.drop.training and not network.norm.training


def test_p4_7_a_classifier_left_in_training_mode_is_asked_in_evaluation_mode():
    x_T = seeded(SHAPE)
    assert torch.equal(run(guidance(Tiny().train()), x_T, [900, 500, 0]), run(guidance(Tiny().eval()), x_T, [900, 500, 0]))


@pytest.mark.parametrize("measure", MEASURES)
def test_p4_7_an_image_does_not_depend_on_its_batch(measure):
    x_T, labels, scale = seeded((6, 1, 4, 4)), torch.arange(6) % 3, torch.linspace(1, 5, 6)
    timesteps = spaced_timesteps(SCHEDULE, 10)
    whole = run(guidance(Tiny(), measure, scale, labels), x_T, timesteps)
    alone = [run(guidance(Tiny(), measure, scale[i : i + 1], labels[i : i + 1]), x_T[i : i + 1], timesteps) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-10, rtol=0)
    assert float((whole - run(None, x_T, timesteps)).abs().amax(dim=(1, 2, 3)).min()) > 1e-6  # every image was guided


def test_one_scale_for_each_image():
    x_T, timesteps = seeded(SHAPE), [900, 500, 0]
    scales = [0.0, 2.0, -2.0, 5.0]
    whole = run(guidance(Tiny(), scale=torch.tensor(scales)), x_T, timesteps)
    for i, scale in enumerate(scales):
        torch.testing.assert_close(whole[i], run(guidance(Tiny(), scale=scale), x_T, timesteps)[i], atol=1e-12, rtol=0)


# --- P4.8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_inference_steps, spacing",
    [*itertools.product([7, 250], ["linspace", "leading", "karras"]), (1, "linspace"), (1, "karras")],
)
def test_p4_8_the_classifier_is_told_the_original_timestep(num_inference_steps, spacing):
    network, timesteps = Tiny(), spaced_timesteps(SCHEDULE, num_inference_steps, spacing)
    run(guidance(network), seeded((2, 1, 4, 4)), timesteps)
    assert [time.tolist() for time in network.seen] == [[float(t)] * 2 for t in timesteps]
    assert all(time.dtype == torch.float32 for time in network.seen)


def test_p4_8_also_where_the_generator_is_told_another_time():
    network, told = Tiny(), []
    edm = EDM()

    def unet(x, time):
        told.append(float(time[0]))
        return 0.1 * x

    def denoiser(x, t):
        return edm.denoise(unet, x, edm.level(SCHEDULE, t, len(x)))

    kept = torch.ones(2, 2, 8, dtype=torch.float64)
    votes = DropoutVotes(network.vote_logits, lambda t: kept, 3)
    run(GradientGuidance(ClassMeasure(make_measure("bald"), votes), 1.0, SCHEDULE), seeded((2, 1, 4, 4)), [900, 40], denoiser)
    assert [float(time[0]) for time in network.seen] == [900.0, 40.0]
    assert told == pytest.approx([250 * math.log(float(SCHEDULE.sigma(t))) for t in (900, 40)])


# --- schedules of the scale -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(t=st.integers(0, 999), high=st.integers(0, 999), low=st.integers(0, 999))
def test_schedules_are_their_formulas(t, high, low):
    assert Constant()(t, SCHEDULE) == 1.0
    assert SqrtAbar()(t, SCHEDULE) == pytest.approx(float(SCHEDULE.abar(t)) ** 0.5)
    if high < low:
        with pytest.raises(ConfigError, match="guidance-interval"):
            Interval(high, low)
        return
    assert Interval(high, low)(t, SCHEDULE) == (1.0 if low <= t <= high else 0.0)
    assert Interval(high, low, SqrtAbar())(t, SCHEDULE) == (SqrtAbar()(t, SCHEDULE) if low <= t <= high else 0.0)
    assert set(SCALE_SCHEDULES) == {"constant", "sqrt_abar", "interval"}


def test_a_schedule_multiplies_the_scale():
    x, noise, t = seeded(SHAPE), seeded(SHAPE, 1), 300
    by_schedule = guidance(Tiny(), scale=2.0, scale_schedule=SqrtAbar())(noise, x, t)
    torch.testing.assert_close(by_schedule, guidance(Tiny(), scale=2.0 * float(SCHEDULE.abar(t)) ** 0.5)(noise, x, t))


def test_outside_its_interval_guidance_asks_nobody():
    network, timesteps = Tiny(), [900, 700, 500, 300, 0]
    guided = run(guidance(network, scale_schedule=Interval(700, 300)), seeded(SHAPE), timesteps)
    assert [float(time[0]) for time in network.seen] == [700.0, 500.0, 300.0]
    assert not torch.equal(guided, run(None, seeded(SHAPE), timesteps))
    off = Tiny()
    assert torch.equal(run(guidance(off, scale=0.0), seeded(SHAPE), timesteps), run(None, seeded(SHAPE), timesteps))
    assert off.seen == []


# --- several guides -----------------------------------------------------------------------------------------------------


def test_guides_add_up_in_any_order_and_none_is_the_identity():
    x, noise, labels = seeded(SHAPE), seeded(SHAPE, 1), torch.tensor([0, 1, 2, 0])
    one, two = guidance(Tiny(), "entropy", 2.0), guidance(Tiny(), "classifier", -1.5, labels)
    shifts = [part(noise, x, 300) - noise for part in (one, two)]
    torch.testing.assert_close(Together([one, two])(noise, x, 300) - noise, shifts[0] + shifts[1])
    torch.testing.assert_close(Together([two, one])(noise, x, 300), Together([one, two])(noise, x, 300))
    assert torch.equal(Together([])(noise, x, 300), noise)


def test_entropy_and_class_together_is_the_mixed_measure():
    x, noise, labels = seeded(SHAPE), seeded(SHAPE, 1), torch.tensor([0, 1, 2, 0])
    parts = Together([guidance(Tiny(), "entropy", 2.0), guidance(Tiny(), "classifier", 2.0, labels)])
    torch.testing.assert_close(guidance(Tiny(), "entropy_class", 2.0, labels)(noise, x, 300), parts(noise, x, 300))


# --- on the predicted x_0 -----------------------------------------------------------------------------------------------


def test_the_gradient_of_a_clean_measure_flows_through_the_denoiser():
    """For Gaussian data x_0(x_t) is linear: the chain rule multiplies by its gain."""
    x, t, std = seeded((5, 1)), 300, 0.3
    abar = SCHEDULE.abar(t)
    gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
    measure = OnPredictedX0(lambda x_0, t: (x_0**3).sum(dim=1), gaussian_denoiser(SCHEDULE))
    force = GradientGuidance(measure, 2.0, SCHEDULE).force(x, t)
    torch.testing.assert_close(force, 2.0 * 3 * posterior_mean(x, abar) ** 2 * gain)


@pytest.mark.parametrize("on", ["x_t", "x0hat"])
def test_only_a_measure_of_x_0_makes_a_graph_of_the_denoiser(on):
    unet, graphs = torch.nn.Conv2d(1, 1, 3, padding=1).double(), []

    def denoiser(x, t):
        graphs.append(torch.is_grad_enabled())
        noise = unet(x)
        return Prediction(x - noise, noise)

    inner = ClassMeasure(make_measure("entropy"), EnsembleVotes([Tiny()], 3))
    measure = inner if on == "x_t" else OnPredictedX0(inner, denoiser)
    x_0 = run(GradientGuidance(measure, 1.0, SCHEDULE), seeded(SHAPE), [900, 500, 0], denoiser)
    assert graphs == ([False] * 3 if on == "x_t" else [False, True] * 3)
    assert all(parameter.grad is None for parameter in unet.parameters()) and not x_0.requires_grad


@pytest.mark.parametrize("on", ["x_t", "x0hat"])
def test_memory_does_not_grow_with_the_steps(on):
    """Every tensor that autograd keeps for a backward pass is counted; after a step none is left."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    alive, made, counts = weakref.WeakSet(), [0], []

    def pack(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        made[0] += 1
        return kept

    inner = ClassMeasure(make_measure("entropy"), EnsembleVotes([Tiny()], 3))
    measure = inner if on == "x_t" else OnPredictedX0(inner, gaussian_denoiser(SCHEDULE))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        run(
            GradientGuidance(measure, 1.0, SCHEDULE),
            seeded(SHAPE),
            spaced_timesteps(SCHEDULE, 20),
            on_step=lambda t, x, prediction: counts.append(
                (len(alive), x.requires_grad or x.grad_fn is not None, prediction.noise.grad_fn)
            ),
        )
    assert made[0] > 20  # there were graphs to forget
    assert counts == [(0, False, None)] * 20


def test_inside_inference_mode():
    guided = guidance(Tiny())
    with torch.inference_mode():
        inside = run(guided, seeded(SHAPE), [900, 500, 0])
    assert torch.equal(inside, run(guided, seeded(SHAPE), [900, 500, 0]))


# --- one prediction against another -----------------------------------------------------------------------------------


def spied(denoiser, asked):
    def denoise(x_t, t):
        asked.append(t)
        return denoiser(x_t, t)

    return denoise


def test_extrapolation_has_its_ends_and_asks_the_weak_one_only_if_needed():
    strong, weak, x = gaussian_denoiser(SCHEDULE, std=0.3), gaussian_denoiser(SCHEDULE, std=0.9), seeded((3, 1))
    asked = []
    plain = Extrapolation(strong, spied(weak, asked), 1.0, SCHEDULE)(x, 300)
    assert torch.equal(plain.noise, strong(x, 300).noise) and asked == []
    other = Extrapolation(strong, spied(weak, asked), 0.0, SCHEDULE)(x, 300)
    assert torch.equal(other.noise, weak(x, 300).noise) and asked == [300]


@settings(deadline=None, max_examples=20)
@given(scales=st.lists(st.floats(-2, 8), min_size=3, max_size=3), t=st.integers(0, 999))
def test_autoguidance_is_affine_and_still_explains_x_t(scales, t):
    strong, weak, x = gaussian_denoiser(SCHEDULE, std=0.3), gaussian_denoiser(SCHEDULE, std=0.9), seeded((3, 1))
    w, abar = torch.tensor(scales, dtype=torch.float64), SCHEDULE.abar(t)
    found = Extrapolation(strong, weak, w, SCHEDULE)(x, t)
    s, k = strong(x, t).x_0, weak(x, t).x_0
    torch.testing.assert_close(found.x_0, k + w[:, None] * (s - k), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(abar.sqrt() * found.x_0 + (1 - abar).sqrt() * found.noise, x, atol=1e-9, rtol=1e-9)


def test_autoguidance_narrows_what_a_weaker_network_widens():
    """Strong and weak both know the mean; the weak one spreads too far, and moving away from it draws together."""
    strong, weak = gaussian_denoiser(SCHEDULE, std=0.3), gaussian_denoiser(SCHEDULE, std=0.5)
    x_T, timesteps = seeded((512, 1)), spaced_timesteps(SCHEDULE, 50)
    stds = [float(run(None, x_T, timesteps, Extrapolation(strong, weak, w, SCHEDULE)).std()) for w in (0.0, 1.0, 2.0, 3.0)]
    assert stds[0] > stds[1] > stds[2] > stds[3]
    assert stds[0] / stds[1] == pytest.approx(0.5 / 0.3, rel=0.05)


def test_the_interval_of_an_extrapolation_is_off_at_1():
    strong, weak, asked = gaussian_denoiser(SCHEDULE, std=0.3), gaussian_denoiser(SCHEDULE, std=0.9), []
    denoiser = Extrapolation(strong, spied(weak, asked), 3.0, SCHEDULE, Interval(700, 300))
    for t in (900, 700, 500, 300, 100):
        inside = Extrapolation(strong, weak, 3.0 if 300 <= t <= 700 else 1.0, SCHEDULE)
        assert torch.equal(denoiser(seeded((3, 1)), t).noise, inside(seeded((3, 1)), t).noise)
    assert asked == [700, 500, 300]


# --- a condition under noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "kept"), [(0, 1.0), (299, 1.0), (999, 0.0), (700, 0.0)])
def test_the_condition_is_whole_below_and_gone_above(t, kept):
    annealing, y, n = ConditionAnnealing(0.3, 0.7, 0.5, mixing=0.0), seeded((2, 6)), seeded((2, 6), 1)
    assert annealing.kept(t, SCHEDULE) == kept
    torch.testing.assert_close(annealing(y, n, t, SCHEDULE), y if kept == 1 else 0.5 * n)


@settings(deadline=None, max_examples=30)
@given(t=st.integers(0, 999), s=st.floats(0.01, 2), mixing=st.floats(0, 1))
def test_annealing_is_its_formula_and_brings_back_mean_and_std(t, s, mixing):
    y, n = 2 + 3 * seeded((3, 2, 4)), seeded((3, 2, 4), 1)
    share = min(1.0, max(0.0, (0.8 - t / 999) / 0.6))
    noised = share**0.5 * y + s * (1 - share) ** 0.5 * n
    flat = noised.flatten(1)
    rescaled = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    rescaled = rescaled * y.flatten(1).std(1, correction=0, keepdim=True) + y.flatten(1).mean(1, keepdim=True)
    expected = mixing * rescaled.reshape(y.shape) + (1 - mixing) * noised
    found = ConditionAnnealing(0.2, 0.8, s, mixing)(y, n, t, SCHEDULE)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    alone = ConditionAnnealing(0.2, 0.8, s, mixing)(y[1:2], n[1:2], t, SCHEDULE)
    torch.testing.assert_close(found[1:2], alone)


def test_a_constant_condition_stays_finite():
    zeros = torch.zeros(2, 6, dtype=torch.float64)
    assert not ConditionAnnealing(noise_scale=0.0)(zeros, seeded((2, 6)), 999, SCHEDULE).any()


# --- refusals -----------------------------------------------------------------------------------------------------------


def force_of(measure, scale=1.0):
    return lambda: GradientGuidance(measure, scale, SCHEDULE)(seeded(SHAPE), seeded(SHAPE, 1), 40)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (force_of(lambda x, t: x.sum()), r"measure-shape.*\(4,\), got \(\)"),
        (force_of(lambda x, t: x.flatten(1)), r"measure-shape.*\(4,\), got \(4, 16\)"),
        (force_of(lambda x, t: x[:2].sum(dim=(1, 2, 3))), r"measure-shape.*got \(2,\)"),
        (force_of(lambda x, t: x.flatten(1).argmax(dim=1).double()), "measure-gradient"),
        (force_of(lambda x, t: x.detach().sum(dim=(1, 2, 3))), "measure-gradient"),
        (force_of(lambda x, t: torch.ones(4, requires_grad=True) * 2), "measure-gradient"),
        (force_of(lambda x, t: (x.sum(dim=(1, 2, 3)) * 0).sqrt(), 7.5), "guidance-diverged.*timestep 40.*7.5.*smaller"),
        (
            force_of(lambda x, t: (x.sum(dim=(1, 2, 3)) * 0).sqrt(), torch.tensor([1.0, -9.0, 3.0, 2.0])),
            "guidance-diverged.*guidance_scale -9;",
        ),
        (force_of(lambda x, t: x.sum(dim=(1, 2, 3)), math.nan), "guidance-scale"),
        (force_of(lambda x, t: x.sum(dim=(1, 2, 3)), math.inf), "guidance-scale"),
        (force_of(lambda x, t: x.sum(dim=(1, 2, 3)), torch.ones(4, 1)), "guidance-scale"),
        (lambda: Extrapolation(gaussian_denoiser(SCHEDULE), gaussian_denoiser(SCHEDULE), math.nan, SCHEDULE), "guidance-scale"),
        (lambda: Interval(5, -1), "guidance-interval"),
        (lambda: ConditionAnnealing(0.9, 0.6), "annealing-option"),
        (lambda: ConditionAnnealing(mixing=1.5), "annealing-option"),
        (lambda: ConditionAnnealing(noise_scale=-1.0), "annealing-option"),
        (lambda: run(guidance(Tiny(classes=2)), seeded(SHAPE), [5, 0]), "class-mismatch.*2 classes.*have 3"),
    ],
)
def test_refusals(act, code):
    with pytest.raises(ConfigError, match=code):
        act()


def test_a_scale_that_blows_up_stops_with_the_step_it_blew_up_at():
    """The image overflows, so the next gradient is not finite: no picture of NaN is returned."""
    wild = GradientGuidance(lambda x, t: x.pow(4).sum(dim=(1, 2, 3)), 1e60, SCHEDULE)
    with pytest.raises(ConfigError, match=r"guidance-diverged.*timestep \d+ with guidance_scale 1e\+60; use a smaller scale"):
        run(wild, seeded(SHAPE), spaced_timesteps(SCHEDULE, 10))


def test_a_negative_scale_is_allowed():
    x, noise = seeded((2, 1)), seeded((2, 1), 1)
    up, down = guide(SCHEDULE, "entropy", 2.0)(noise, x, 300), guide(SCHEDULE, "entropy", -2.0)(noise, x, 300)
    torch.testing.assert_close(up + down, 2 * noise)
