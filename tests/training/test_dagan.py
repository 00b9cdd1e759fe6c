from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medaug.cohort import Cohort
from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.networks.dagan import DaganCritic, DaganGenerator
from medaug.training.best import BestNetwork
from medaug.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from medaug.training.dagan import (
    BalancedBatches,
    ClassPairs,
    DaganIteration,
    critic_loss,
    generator_loss,
    gradient_penalty,
    new_critic,
    new_generator,
    partner,
)
from medaug.training.data import read_case
from medaug.training.ema import ExponentialMovingAverage

NETWORKS: dict[str, Any] = {"channels": [4, 8], "patch": 2, "num_res_blocks": 1}
GENERATOR = NETWORKS | {"latent_dim": 3, "latent_scales": 1}


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    torch.set_num_threads(1)
    return make_cohort(tmp_path_factory.mktemp("dagan"), per_class=10)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
def test_penalty_of_a_linear_critic(slope: float) -> None:
    u = draw(1, 4, 4)
    u /= u.norm()
    x_i, x_j, fake = (draw(6, 1, 4, 4, seed=seed) for seed in (1, 2, 3))
    mix = torch.linspace(0, 1, 6, dtype=torch.float64)

    def critic(first: Tensor, second: Tensor) -> Tensor:
        return 7 * first.flatten(1).sum(1) + slope * (second * u).flatten(1).sum(
            1
        )  # a gradient of the first image must not count

    penalty = gradient_penalty(critic, x_i, x_j, fake, mix)
    assert float(critic_loss(torch.zeros(6), torch.zeros(6), penalty)) == pytest.approx(10 * (slope - 1) ** 2, abs=1e-12)


def test_penalty_is_taken_between_the_real_and_the_generated_image() -> None:
    x_j, fake = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1)
    mix = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    seen: list[Tensor] = []

    def critic(first: Tensor, second: Tensor) -> Tensor:
        seen.append(second.detach())
        return second.square().flatten(1).sum(1) / 2  # its gradient is the image

    penalty = gradient_penalty(critic, x_j, x_j, fake, mix).detach()
    expected = torch.stack([fake[0], 0.25 * x_j[1] + 0.75 * fake[1], x_j[2]])
    torch.testing.assert_close(seen[0], expected)
    assert float(penalty) == pytest.approx(float((expected.flatten(1).norm(dim=1) - 1).square().mean()), rel=1e-12)


def test_penalty_reaches_the_weights_of_the_critic() -> None:
    critic = DaganCritic(1, 8, channels=(4, 4), num_res_blocks=1).double()
    images = [draw(3, 1, 8, 8, seed=seed) for seed in range(3)]
    gradient_penalty(critic, *images, torch.full((3,), 0.5, dtype=torch.float64)).backward()
    assert float(critic.trunk.stem.weight.grad.abs().sum()) > 0


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 0.0])
    assert float(critic_loss(real, fake, torch.tensor(0.5))) == pytest.approx(-0.5 - 2 + 5)
    assert float(generator_loss(fake)) == pytest.approx(0.5)


# --- pairs ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 100))
def test_a_partner_is_another_member(size: int, seed: int) -> None:
    members = np.arange(10, 10 + size)
    for index in members:
        found = partner(members, int(index), numpy_generator(seed))
        assert found is None if size == 1 else (found in members and found != index)


def test_every_partner_is_as_likely_as_every_other() -> None:
    found = [partner([0, 1, 2, 3], 2, numpy_generator("partners", n)) for n in range(3000)]
    assert set(found) == {0, 1, 3}
    assert max(abs(found.count(other) - 1000) for other in (0, 1, 3)) < 130  # five deviations of a binomial


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(1, 12), st.integers(0, 3))
def test_batches_are_balanced_whatever_the_class_sizes(sizes: list[int], batch_size: int, seed: int) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    batches = BalancedBatches(labels, batch_size, seed)
    present = sorted(set(labels))
    rounds = len(present) * max(sizes) * 2
    order = [index for iteration in range(1, rounds + 1) for _, _, index in batches.batch(iteration)]
    counts = [sum(labels[index] == label for index in order) for label in present]
    assert max(counts) - min(counts) <= 1
    for label in present:
        members = [index for index in order if labels[index] == label]
        one_pass = members[: sizes[label]]
        assert len(set(one_pass)) == len(one_pass)  # each once before any twice


@pytest.mark.parametrize("kept", [1, 2, 6])
def test_pairs_are_of_one_class_and_two_images(cohort: Cohort, kept: int) -> None:
    first = [case for case in cohort.training if case.label == 0][:kept]
    pairs = ClassPairs(cohort.with_cases(training=(*first, *(case for case in cohort.training if case.label))), seed=3)
    by_id = {case.id: case for case in cohort.training}
    batches = BalancedBatches(pairs.labels, 9, 3)
    for iteration in range(1, 6):
        rows = [pairs[key] for key in batches.batch(iteration)]
        assert sorted(row["label"] for row in rows) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for row in rows:
            one, two = by_id[row["id"]], by_id[row["partner_id"]]
            assert one.label == two.label == row["label"]
            assert torch.equal(row["image"], read_case(cohort, one))
            alone = row["label"] == 0 and kept == 1
            assert (one.id == two.id) == alone
            assert torch.equal(row["partner"], read_case(cohort, two)) != alone  # alone: its weak augmentation
            assert row["partner"].shape == row["image"].shape


def test_pairs_belong_to_their_key(cohort: Cohort) -> None:
    pairs = ClassPairs(cohort, seed=1, shift=0.1)
    again, other = ClassPairs(cohort, seed=1, shift=0.1), ClassPairs(cohort, seed=2, shift=0.1)
    for key in ((7, 2, 4), (1, 0, 0)):
        one, two = pairs[key], again[key]
        assert one["partner_id"] == two["partner_id"] and torch.equal(one["image"], two["image"])
    keys = [(iteration, 0, 0) for iteration in range(10)]
    assert [pairs[key]["partner_id"] for key in keys] != [other[key]["partner_id"] for key in keys]


def test_an_empty_training_split_is_refused(cohort: Cohort) -> None:
    with pytest.raises(DataError, match="training-empty"):
        ClassPairs(cohort.with_cases(training=()))


# --- updates ----------------------------------------------------------------------------------------------------------


def new_parts(cohort: Cohort, seed: int = 0) -> tuple[Any, TrainingState, DaganIteration]:
    generator = new_generator(GENERATOR, cohort, seed)
    critic = new_critic(NETWORKS, cohort, seed)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9)) for network in (generator, critic)]
    ema = ExponentialMovingAverage(generator, 0.0)
    state = TrainingState(generator, ema, optimizers[0], None, critic, optimizers[1], BestNetwork(generator))
    engine = SimpleNamespace(
        network=generator,
        optimizer=optimizers[0],
        inferer=lambda x, network, z: network(x, z),
        state=SimpleNamespace(device=torch.device("cpu")),
    )
    return engine, state, DaganIteration(critic, optimizers[1], ema, seed)


def batch(cohort: Cohort, iteration: int, size: int = 8) -> dict[str, Any]:
    from torch.utils.data import default_collate

    pairs = ClassPairs(cohort, seed=0)
    return default_collate([pairs[key] for key in BalancedBatches(pairs.labels, size, 0).batch(iteration)])


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).clone()


def test_five_iterations_of_the_critic_then_one_of_the_generator(cohort: Cohort) -> None:
    engine, state, step = new_parts(cohort)
    turns = []
    for iteration in range(1, 13):
        before = weights(state.network), weights(step.critic)
        figures = step(engine, batch(cohort, iteration))
        moved = tuple(not torch.equal(a, weights(b)) for a, b in zip(before, (state.network, step.critic), strict=True))
        assert moved in ((True, False), (False, True))
        assert ("generator_loss" in figures) == moved[0]
        turns.append("G" if moved[0] else "D")
    assert "".join(turns) == "DDDDDGDDDDDG"
    assert torch.equal(weights(state.ema.network), weights(state.network))  # decay 0: no average
    assert all(parameter.requires_grad for parameter in step.critic.parameters())


def test_the_critics_loss_falls_on_a_toy_set(cohort: Cohort) -> None:
    engine, _, step = new_parts(cohort)
    step = replace(step, critic_steps=10**6)  # the critic alone
    found = [step(engine, batch(cohort, iteration)) for iteration in range(1, 41)]
    early, late = (np.mean([row["critic_loss"] for row in part]) for part in (found[:10], found[-10:]))
    assert late < early - 1
    assert np.mean([row["critic_gap"] for row in found[-10:]]) > 0


def test_the_generator_moves_its_images_towards_the_real_ones(cohort: Cohort) -> None:
    engine, _, step = new_parts(cohort)
    step = replace(step, critic_steps=2)
    real = torch.stack([read_case(cohort, case) for case in cohort.training])
    z = draw(len(real), 3).float()

    def distance() -> float:
        with torch.no_grad():
            made = engine.network.eval()(real, z)
        return float((made.mean(dim=0) - real.mean(dim=0)).abs().mean())

    before = distance()  # rises at first: the critic has to learn before it can teach
    for iteration in range(1, 151):
        step(engine, batch(cohort, iteration))
    assert distance() < 0.8 * before


def test_a_diverged_loss_is_refused(cohort: Cohort) -> None:
    engine, _, step = new_parts(cohort)
    with torch.no_grad():
        step.critic.out.bias.fill_(float("nan"))
    for iteration in (1, 6):
        with pytest.raises(ConfigError, match="training-diverged"):
            step(engine, batch(cohort, iteration))


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"penalty_weight": -1.0}])
def test_impossible_settings_are_refused(cohort: Cohort, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="critic-invalid"):
        replace(new_parts(cohort)[2], **changes)


# --- the best network, and the checkpoint of two ----------------------------------------------------------------------


def test_the_best_network_is_the_one_with_the_smallest_figure() -> None:
    def network(value: float) -> nn.Module:
        made = nn.Linear(1, 1)
        nn.init.constant_(made.weight, value)
        return made

    best = BestNetwork(network(0.0))
    offers = [(1.0, None), (2.0, float("nan")), (3.0, 5.0), (4.0, None), (5.0, 5.0), (6.0, 4.0), (7.0, float("nan")), (8.0, 4.5)]
    kept = []
    for iteration, (value, figure) in enumerate(offers):
        best.offer(network(value), figure, iteration)
        kept.append(float(best.network.weight))
    assert kept == [1, 2, 3, 3, 3, 6, 6, 6]
    assert (best.figure, best.iteration) == (4.0, 5)


def test_a_checkpoint_holds_both_networks_and_goes_on_bit_for_bit(cohort: Cohort, tmp_path: Path) -> None:
    engine, whole, step = new_parts(cohort)
    for iteration in range(1, 15):
        if iteration == 8:
            assert whole.best is not None and whole.best.offer(whole.ema.network, 0.5, 7)
            save_checkpoint(tmp_path / "c", whole, epoch=1, iteration=7, config_sha256="x")
        step(engine, batch(cohort, iteration))
    engine, resumed, step = new_parts(cohort, seed=1)
    step(engine, batch(cohort, 1))  # a state that has to be overwritten whole
    step = replace(step, seed=0)
    assert load_checkpoint(tmp_path / "c", resumed, config_sha256="x") == (1, 7)
    for iteration in range(8, 15):
        step(engine, batch(cohort, iteration))
    for part, network in resumed.networks().items():
        for a, b in zip(network.state_dict().values(), whole.networks()[part].state_dict().values(), strict=True):
            assert torch.equal(a, b), part
    assert resumed.best is not None and (resumed.best.figure, resumed.best.iteration) == (0.5, 7)
    assert resumed.chosen is resumed.best.network


def test_networks_depend_on_the_seed_alone(cohort: Cohort) -> None:
    torch.manual_seed(5)
    one, critic = weights(new_generator(GENERATOR, cohort, 0)), weights(new_critic(NETWORKS, cohort, 0))
    torch.manual_seed(6)
    generator = new_generator(GENERATOR, cohort, 0)
    assert isinstance(generator, DaganGenerator) and torch.equal(weights(generator), one)
    assert torch.equal(weights(new_critic(NETWORKS, cohort, 0)), critic)
    assert not torch.equal(weights(new_generator(GENERATOR, cohort, 1)), one)
