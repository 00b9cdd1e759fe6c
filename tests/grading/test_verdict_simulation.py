"""How often the verdict errs: simulated benchmarks without and with an effect, no training.

A case is answered rightly if ability + its own ease (shared by the cases of a patient) + the luck of the training run exceeds a
random threshold. Luck has two parts: of a seed, shared by the networks (order, choice and making of synthetic images), and of a
single run. Both are drawn anew for every arm, so differences between arms hold them twice.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from medaug.grading.verdict import Predictions, judge

NUM_PATIENTS, CASES, NUM_CLASSES = 80, 2, 3


def simulate(key, effects, num_networks, num_seeds, seed_luck, run_luck):
    """Predictions of arms whose ability differs from that of `none` by `effects`, in units of the ease of cases (sd 1)."""
    draw = np.random.default_rng(key)
    num_cases = NUM_PATIENTS * CASES
    target = draw.permutation(np.arange(num_cases) % NUM_CLASSES)
    ease = 0.9 + np.repeat(draw.normal(0, 0.7, NUM_PATIENTS), CASES) + draw.normal(0, 0.7, num_cases)
    wrong = (target + 1 + draw.integers(0, NUM_CLASSES - 1, num_cases)) % NUM_CLASSES
    probs = {}
    for arm, effect in effects.items():
        shared = draw.normal(0, seed_luck, num_seeds)
        for network in range(num_networks):
            ability = effect + shared + draw.normal(0, run_luck, num_seeds)
            right = ability[:, None] + ease + draw.normal(0, 0.5, (num_seeds, num_cases)) > 0
            probs[arm, f"n{network}"] = np.eye(NUM_CLASSES)[np.where(right, target, wrong)]
    groups = [f"g{index // CASES}" for index in range(num_cases)]
    return Predictions(target, groups, probs, dict.fromkeys(probs))


def rates(effects, count, **options):
    """Share of benchmarks in which any arm, and the arm `synthetic`, got each verdict."""
    found = [
        {
            arm: entry["verdict"]
            for arm, entry in judge(simulate(key, effects, **options), ordinal=False, num_resamples=400).items()
        }
        for key in range(count)
    ]
    spoken = np.mean([any(verdict != "no evidence" for verdict in verdicts.values()) for verdicts in found])
    return float(spoken), {
        name: float(np.mean([verdicts["synthetic"] == name for verdicts in found])) for name in ("helps", "harms", "no evidence")
    }


NO_EFFECT = {"none": 0.0, "oversample": 0.0, "synthetic": 0.0}
# Standard deviations of luck, in ability: 0.1 moves the accuracy by about 0.025.
LUCK = {
    "none": {"seed_luck": 0.0, "run_luck": 0.0},
    "of runs": {"seed_luck": 0.0, "run_luck": 0.15},
    "of seeds": {"seed_luck": 0.15, "run_luck": 0.1},
    "large": {"seed_luck": 0.5, "run_luck": 0.3},
}


# (luck, networks, seeds, benchmarks)
CASES_OF_NO_EFFECT = [(luck, 2, 3, 400) for luck in LUCK] + [
    ("of seeds", 2, 5, 200),
    ("of seeds", 10, 3, 200),
]


@pytest.mark.slow
@pytest.mark.parametrize("luck, num_networks, num_seeds, count", CASES_OF_NO_EFFECT)
def test_without_an_effect_a_verdict_is_rare(luck, num_networks, num_seeds, count):
    spoken, parts = rates(NO_EFFECT, count, num_networks=num_networks, num_seeds=num_seeds, **LUCK[luck])
    print(f"no effect, luck {luck}, {num_networks} networks, {num_seeds} seeds: any verdict {spoken:.3f}, {parts}")  # noqa: T201
    assert spoken <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / count)  # Monte Carlo error of the count


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds, largest", [(3, 0.4), (5, 0.9)])
def test_power_rises_with_the_effect_and_the_seeds(num_seeds, largest):
    helps = []
    for effect in (0.1, 0.3, 0.6, 1.0):
        _, parts = rates(NO_EFFECT | {"synthetic": effect}, 60, num_networks=2, num_seeds=num_seeds, **LUCK["of seeds"])
        print(f"effect {effect}, {num_seeds} seeds: {parts}")  # noqa: T201
        assert parts["harms"] <= 0.05
        helps.append(parts["helps"])
    assert helps == sorted(helps) and helps[-1] >= largest
    _, parts = rates(NO_EFFECT | {"synthetic": -1.0}, 60, num_networks=2, num_seeds=num_seeds, **LUCK["of seeds"])
    print(f"effect -1.0, {num_seeds} seeds: {parts}")  # noqa: T201
    assert parts["harms"] >= largest


def chosen_on_validation(key, num_ratios, seed_luck, run_luck, num_networks=2, num_seeds=3):
    """Predictions of none, the control and the arm at the ratio of `num_ratios` without effect that is best on validation.

    Validation and test have patients of their own and share the trained networks, and so their luck.
    """
    draw = np.random.default_rng(key)
    names = ["none", *(f"{base}@{ratio}" for ratio in range(num_ratios) for base in ("oversample", "synthetic"))]
    luck = {name: draw.normal(0, seed_luck, num_seeds) + draw.normal(0, run_luck, (num_networks, num_seeds)) for name in names}
    num_cases = NUM_PATIENTS * CASES
    target = draw.permutation(np.arange(num_cases) % NUM_CLASSES)

    def answers():
        ease = 0.9 + np.repeat(draw.normal(0, 0.7, NUM_PATIENTS), CASES) + draw.normal(0, 0.7, num_cases)
        return {name: one[..., None] + ease + draw.normal(0, 0.5, (*one.shape, num_cases)) > 0 for name, one in luck.items()}

    validation, test = answers(), answers()
    best = max(range(num_ratios), key=lambda ratio: validation[f"synthetic@{ratio}"].mean())
    arms = {"none": "none", "oversample": f"oversample@{best}", "synthetic": f"synthetic@{best}"}
    wrong = (target + 1) % NUM_CLASSES
    probs = {
        (arm, f"n{network}"): np.eye(NUM_CLASSES)[np.where(test[name][network], target, wrong)]
        for arm, name in arms.items()
        for network in range(num_networks)
    }
    return Predictions(target, [f"g{index // CASES}" for index in range(num_cases)], probs, dict.fromkeys(probs))


@pytest.mark.slow
@pytest.mark.parametrize("luck", ["of seeds", "large"])
def test_choosing_a_ratio_on_validation_earns_no_verdict(luck):
    """The choice prefers runs that were lucky in training, and that luck reaches the test; the bars of a verdict still hold."""
    count = 200
    for num_ratios in (1, 5):
        found = [chosen_on_validation(key, num_ratios, **LUCK[luck]) for key in range(count)]
        entries = [judge(one, ordinal=False, num_resamples=200)["synthetic"] for one in found]
        helps = float(np.mean([entry["verdict"] == "helps" for entry in entries]))
        bias = float(np.mean([entry["against_none"]["difference"] for entry in entries]))
        print(f"no effect, luck {luck}, best of {num_ratios} ratio(s): helps {helps:.4f}, mean difference {bias:+.4f}")  # noqa: T201
        assert helps <= 0.025 + 2.5 * math.sqrt(0.025 * 0.975 / count)  # a false "helps" is one side of the 5 %


def with_generator_luck(key, own_images, generator_luck, num_seeds, **options):
    """Predictions where the synthetic images of a run are worth more or less than none by luck alone: one run, or one for each seed."""
    worth = np.random.default_rng([key, 1]).normal(0, generator_luck, num_seeds)
    effects = NO_EFFECT | {"synthetic": worth if own_images else worth[0]}
    return simulate(key, effects, num_seeds=num_seeds, **options)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_images_of_its_own_for_every_seed_cover_the_luck_of_the_generator(num_seeds):
    """A luck of 0.3 moves the accuracy by about 0.075. Shared by all seeds it is taken for an effect, and drawn anew it is not."""
    count, spoken = 300, {}
    for own_images in (False, True):
        options = {"num_networks": 2, "num_seeds": num_seeds, **LUCK["of runs"]}
        found = [with_generator_luck(key, own_images, 0.3, **options) for key in range(count)]
        verdicts = [judge(one, ordinal=False, num_resamples=200)["synthetic"]["verdict"] for one in found]
        spoken[own_images] = float(np.mean([verdict != "no evidence" for verdict in verdicts]))
    print(f"no effect, luck of the generator .3, {num_seeds} seeds: one set {spoken[False]:.3f}, own sets {spoken[True]:.3f}")  # noqa: T201
    assert spoken[True] <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / count) < spoken[False]


def test_one_test_patient_earns_no_verdict():
    """Whatever the arms do on a single patient, nothing tells the patient's luck from an effect."""
    one = simulate(0, NO_EFFECT | {"synthetic": 3.0}, num_networks=2, num_seeds=3, seed_luck=0.0, run_luck=0.1)
    many = judge(one, ordinal=False, num_resamples=200)["synthetic"]
    single = judge(replace(one, groups=["g"] * len(one.groups)), ordinal=False, num_resamples=200)["synthetic"]
    assert (many["verdict"], single["verdict"]) == ("helps", "no evidence")
    assert "All test images are of one group" in single["warnings"][0]
