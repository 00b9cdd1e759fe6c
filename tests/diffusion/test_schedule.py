import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.diffusion import SCHEDULES, NoiseSchedule, make_schedule, pairs, spaced_timesteps
from medaug.diffusion.schedule import check_timesteps, coefficient, karras_sigmas
from medaug.errors import ConfigError


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [1, 2, 10, 50, 100, 1000, 4000])
def test_abar_falls_strictly_inside_0_1(name, num_train_timesteps):
    abar = make_schedule(name, num_train_timesteps).alphas_cumprod
    assert abar.shape == (num_train_timesteps,) and abar.dtype == torch.float64
    assert (abar > 0).all() and (abar < 1).all() and (abar.diff() < 0).all()


def test_karras_of_one_level():
    assert make_schedule("karras", 1).sigma(0) == pytest.approx(80)


@pytest.mark.parametrize(
    ("name", "options", "index", "expected"),
    [
        ("linear_beta", {}, 0, 0.9999),
        ("linear_beta", {}, 999, 4.04e-5),  # methods: numpy, T = 1000
        ("scaled_linear_beta", {"beta_start": 0.00085, "beta_end": 0.012}, 999, 0.00466),  # Stable Diffusion
        ("scaled_linear_beta", {"beta_start": 0.0015, "beta_end": 0.0195}, 999, 1.4e-4),
        ("karras", {}, 999, 1 / (1 + 80**2)),
        ("karras", {}, 0, 1 / (1 + 0.002**2)),
    ],
)
def test_known_values(name, options, index, expected):
    assert float(make_schedule(name, 1000, **options).abar(index)) == pytest.approx(
        expected, rel=0.02 if expected < 0.9 else 1e-9
    )


def test_cosine_follows_its_formula():
    t = torch.arange(1, 901, dtype=torch.float64)
    f = torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    f_0 = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(make_schedule("cosine").alphas_cumprod[:900], f / f_0)


@pytest.mark.parametrize("name", ["linear_beta", "scaled_linear_beta", "sigmoid_beta"])
@pytest.mark.parametrize("num_train_timesteps", [50, 100, 250])
def test_short_schedules_still_end_in_noise(name, num_train_timesteps):
    end = make_schedule(name, num_train_timesteps).abar(num_train_timesteps - 1)
    assert end < (1e-2 if name == "scaled_linear_beta" else 1e-4)


def test_karras_schedule_places_the_sigmas_of_eq_5():
    schedule = make_schedule("karras", 20, sigma_min=0.01, sigma_max=50.0)
    torch.testing.assert_close(schedule.sigma(torch.arange(20)), karras_sigmas(20, 0.01, 50.0).flip(0))
    ramp = [(50 ** (1 / 7) + i / 19 * (0.01 ** (1 / 7) - 50 ** (1 / 7))) ** 7 for i in range(20)]
    assert karras_sigmas(20, 0.01, 50.0).tolist() == pytest.approx(ramp)


def test_abar_takes_integers_and_tensors_and_is_1_for_the_clean_image():
    schedule = make_schedule("linear_beta", 10)
    assert schedule.abar(-1) == 1 and schedule.sigma(-1) == 0
    t = torch.tensor([[9, -1], [0, 3]])
    assert torch.equal(schedule.abar(t), torch.stack([torch.stack([schedule.abar(int(i)) for i in row]) for row in t]))
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 / schedule.abar(t) - 1)


def test_a_float32_table_becomes_float64():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5], dtype=torch.float32))
    assert schedule.alphas_cumprod.dtype == torch.float64 and schedule.num_train_timesteps == 2


def test_coefficient_has_the_dtype_of_the_images():
    x = torch.zeros(3, 1, 2, 2, 2, dtype=torch.float16)
    assert coefficient(torch.rand(3, dtype=torch.float64), x).shape == (3, 1, 1, 1, 1)
    assert (coefficient(torch.tensor(0.5, dtype=torch.float64), x) * x).dtype == torch.float16


@settings(deadline=None, max_examples=25)
@given(
    total=st.integers(1, 1200),
    fraction=st.floats(0, 1),
    spacing=st.sampled_from(["linspace", "leading", "karras"]),
    name=st.sampled_from(["linear_beta", "cosine", "scaled_linear_beta"]),
)
def test_timesteps_descend_strictly_and_are_as_many_as_asked(total, fraction, spacing, name):
    num = max(1, round(fraction * total))
    schedule = make_schedule(name, max(total, 2))
    try:
        timesteps = spaced_timesteps(schedule, num, spacing)
    except ConfigError as error:
        assert spacing == "leading" and error.code == "num-inference-steps" and max(total, 2) % num != 0
        return
    assert len(timesteps) == num and all(isinstance(t, int) for t in timesteps)
    check_timesteps(schedule, timesteps)


def test_leading_is_refused_where_it_begins_in_the_picture():
    schedule = make_schedule("linear_beta", 1000)
    for num, left in ((501, "7.8%"), (600, "2.6%"), (334, "1.1%")):
        with pytest.raises(ConfigError, match=f"where {left} of the variance"):
            spaced_timesteps(schedule, num, "leading")
    assert [spaced_timesteps(schedule, num, "leading")[0] for num in (1, 2, 250, 300, 500, 1000)] == [0, 500, 996, 897, 998, 999]


def test_linspace_holds_both_ends_and_every_step_at_full_length():
    schedule = make_schedule("linear_beta", 1000)
    assert spaced_timesteps(schedule, 1000) == list(range(999, -1, -1))
    assert spaced_timesteps(schedule, 4) == [999, 666, 333, 0]
    assert spaced_timesteps(schedule, 1) == [999]


def test_leading_is_the_respacing_of_adm():
    assert spaced_timesteps(make_schedule("linear_beta"), 250, "leading") == list(range(996, -1, -4))


def test_karras_spacing_follows_the_noise_levels():
    schedule = make_schedule("linear_beta", 1000)
    timesteps = spaced_timesteps(schedule, 18, "karras", sigma_max=80, sigma_min=0.05)
    wanted = karras_sigmas(18, 0.05, 80.0)
    # neighbouring timesteps differ by up to a fifth in sigma at this end of the table
    torch.testing.assert_close(schedule.sigma(torch.tensor(timesteps)).log(), wanted.log(), atol=0.12, rtol=0)


def test_karras_spacing_on_the_karras_schedule_is_even():
    assert spaced_timesteps(make_schedule("karras", 100), 12, "karras") == [99, 90, 81, 72, 63, 54, 45, 36, 27, 18, 9, 0]


def test_karras_spacing_is_cut_to_the_schedule():
    schedule = make_schedule("linear_beta", 1000)
    assert spaced_timesteps(schedule, 10, "karras", sigma_max=1e6, sigma_min=1e-9)[0] == 999
    assert spaced_timesteps(schedule, 10, "karras", sigma_max=1e6, sigma_min=1e-9)[-1] == 0
    assert schedule.sigma(spaced_timesteps(schedule, 10, "karras")[0]) == pytest.approx(80, rel=0.01)


def test_pairs_end_at_the_clean_image():
    assert pairs([9, 4, 0]) == [(9, 4), (4, 0), (0, -1)]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: make_schedule("linear"), "schedule must be one of linear_beta, .*got 'linear'"),
        (lambda s: make_schedule("cosine", 10, beta_start=1.0), "schedule cosine takes s, got beta_start"),
        (lambda s: make_schedule("linear_beta", 0), "at least 1, got 0"),
        (lambda s: make_schedule("linear_beta", 10, beta_start=0.5, beta_end=0.1), "beta_start <= beta_end"),
        (lambda s: make_schedule("karras", 10, sigma_min=5.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda s: NoiseSchedule(torch.tensor([0.5, 0.5])), "decrease strictly"),
        (lambda s: NoiseSchedule(torch.tensor([0.9, float("nan")])), "decrease strictly"),
        (lambda s: NoiseSchedule(torch.tensor([])), "decrease strictly"),
        (lambda s: s.abar(10), r"\[-1, 9\], got 10"),
        (lambda s: s.abar(torch.tensor([0, -2])), r"\[-1, 9\]"),
        (lambda s: spaced_timesteps(s, 11), r"\[1, 10\], got 11"),
        (lambda s: spaced_timesteps(s, 0), r"\[1, 10\], got 0"),
        (lambda s: spaced_timesteps(s, 5, "trailing"), "linspace, leading or karras, got 'trailing'"),
        (lambda s: spaced_timesteps(s, 5, sigma_max=10.0), "belong to spacing 'karras'"),
        (lambda s: spaced_timesteps(s, 5, "karras", sigma_max=0.01, sigma_min=0.1), "sigma_min < sigma_max"),
        (lambda s: check_timesteps(s, []), "got none"),
        (lambda s: check_timesteps(s, [3, 3, 0]), "descend strictly"),
        (lambda s: check_timesteps(s, [3, 5, 0]), "descend strictly"),
        (lambda s: check_timesteps(s, [10, 5, 0]), r"\[0, 9\]"),
        (lambda s: check_timesteps(s, [5, -1]), r"\[0, 9\]"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ConfigError, match=match):
        call(make_schedule("linear_beta", 10))
