"""Guidance with the networks that generation runs: drop-out votes per image, weights per image, class embeddings under noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_run import DIFFUSION
from tiny_run import BACKBONE, randomised
from torch import Tensor

from medaug.diffusion import (
    DDIM,
    ClassMeasure,
    ConditionAnnealing,
    EnsembleVotes,
    GradientGuidance,
    OnPredictedX0,
    Timeless,
    disturb,
    make_measure,
    sample,
    spaced_timesteps,
)
from medaug.draws import randn_batch
from medaug.errors import ConfigError
from medaug.generation.class_guidance import AnnealedDenoiser, dropout_votes
from medaug.generation.denoiser import ConditionalDenoiser
from medaug.networks.build import build_guided_unet
from medaug.networks.time_classifier import TimeClassifier
from medaug.training.diffusion import build_objective

OBJECTIVE = build_objective(DIFFUSION)
SCHEDULE = OBJECTIVE.schedule
IDS = ["a", "b", "c", "d"]
LABELS = torch.tensor([0, 1, 2, 0])
TIMESTEPS = spaced_timesteps(SCHEDULE, 5)


@pytest.fixture(scope="module", params=["lean", "monai"])
def network(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(1)
    options = BACKBONE if request.param == "lean" else {"channels": [8, 8], "norm_num_groups": 4, "num_head_channels": 8}
    settings = {"backbone": request.param, "class_conditional": True, "backbone_options": options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build_guided_unet(settings, 1, 3)
    return randomised(built).double().eval()


@pytest.fixture(scope="module")
def classifier() -> TimeClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = TimeClassifier(1, 3, 16, channels=(8, 16), norm_num_groups=4, dropout=0.3)
    made: TimeClassifier = randomised(built).double().eval()
    return made


def start(ids: list[str]) -> Tensor:
    return randn_batch((1, 16, 16), ids, "x_T").double()


def refuse(t: int) -> Tensor:
    raise AssertionError(f"noise drawn at {t}")


def run(denoiser: Any, ids: list[str], guide: Any = None) -> Tensor:
    return sample(denoiser, start(ids), TIMESTEPS, DDIM(), schedule=SCHEDULE, noise=refuse, guide=guide)


# --- drop-out votes -----------------------------------------------------------------------------------------------------


def test_votes_belong_to_the_image_not_to_the_batch(classifier: TimeClassifier) -> None:
    x = start(IDS)
    whole = dropout_votes(classifier, IDS, 0, votes=5)(x, 300)
    assert whole.shape == (5, 4, 3)
    for i, name in enumerate(IDS):
        torch.testing.assert_close(dropout_votes(classifier, [name], 0, votes=5)(x[i : i + 1], 300)[:, 0], whole[:, i])
    assert not torch.allclose(dropout_votes(classifier, IDS, 1, votes=5)(x, 300), whole)
    assert not torch.allclose(whole[0], whole[1])


def test_the_share_of_dropped_features_is_the_dropout(classifier: TimeClassifier) -> None:
    kept = dropout_votes(classifier, [f"i{n}" for n in range(50)], 0, votes=20).kept(0)
    assert kept.shape == (20, 50, 16) and set(kept.unique().tolist()) == {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.02)


def test_bald_guidance_does_not_depend_on_the_batch(network: Any, classifier: TimeClassifier) -> None:
    def guided(ids: list[str], labels: Tensor) -> Tensor:
        measure = ClassMeasure(make_measure("bald"), dropout_votes(classifier, ids, 0))
        return run(ConditionalDenoiser(network, OBJECTIVE, labels), ids, GradientGuidance(measure, 50.0, SCHEDULE))

    whole = guided(IDS, LABELS)
    alone = torch.cat([guided([name], LABELS[i : i + 1]) for i, name in enumerate(IDS)])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=0)  # some coefficients of the network's input are float32
    plain = run(ConditionalDenoiser(network, OBJECTIVE, LABELS), IDS)
    assert float((whole - plain).abs().amax(dim=(1, 2, 3)).min()) > 1e-3


# --- the networks of generation -----------------------------------------------------------------------------------------


def test_weights_per_image_are_those_of_the_images_alone(network: Any) -> None:
    scales = [1.0, 0.0, 2.0, -1.5]
    whole = run(ConditionalDenoiser(network, OBJECTIVE, LABELS, guidance_scale=torch.tensor(scales)), IDS)
    for i, scale in enumerate(scales):
        alone = run(ConditionalDenoiser(network, OBJECTIVE, LABELS[i : i + 1], guidance_scale=scale), [IDS[i]])
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-4, rtol=0)
    ones = ConditionalDenoiser(network, OBJECTIVE, LABELS, guidance_scale=torch.ones(4))
    assert ones.passes == 1


def test_guidance_on_the_predicted_image_goes_through_the_network(network: Any) -> None:
    """Against central differences of the whole chain: network, prediction, clean classifier, entropy."""
    torch.manual_seed(0)
    clean = Timeless(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)).double())
    denoiser = ConditionalDenoiser(network, OBJECTIVE, LABELS, guidance_scale=2.0)
    measure = OnPredictedX0(ClassMeasure(make_measure("entropy"), EnsembleVotes([clean], 3)), denoiser)
    guidance, x, h = GradientGuidance(measure, 1.0, SCHEDULE), start(IDS), 1e-5
    force = guidance.force(x, 600)
    assert force is not None
    index = (2, 0, *divmod(int(force[2, 0].abs().argmax()), 16))
    step = torch.zeros_like(x)
    step[index] = h
    with torch.no_grad():
        by_difference = float((measure(x + step, 600) - measure(x - step, 600)).sum()) / (2 * h)
    assert float(force[index]) == pytest.approx(by_difference, rel=1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_p4_3_stage_2_at_scale_0_leads_back_and_above_0_raises_entropy(network: Any, classifier: TimeClassifier) -> None:
    votes = EnsembleVotes([classifier], 3)
    grid, x_0 = spaced_timesteps(SCHEDULE, 8, "karras", 5.0, 0.02), start(IDS).clamp(-1, 1)
    entropy = ClassMeasure(make_measure("entropy"), votes)

    def disturbed(scale: float) -> Tensor:
        guide = GradientGuidance(entropy, scale, SCHEDULE)
        denoiser = ConditionalDenoiser(network, OBJECTIVE, LABELS)
        return disturb(denoiser, x_0, grid, schedule=SCHEDULE, guide=guide, clip=False, refinements=6)

    torch.testing.assert_close(disturbed(0.0), x_0, atol=0.02, rtol=0)
    with torch.no_grad():
        up, back, down = (float(entropy(disturbed(scale), 0).mean()) for scale in (20.0, 0.0, -20.0))
    assert up > back > down


# --- condition annealing --------------------------------------------------------------------------------------------------


def annealed(network: Any, ids: list[str], labels: Tensor, annealing: ConditionAnnealing, scale: float = 1.0) -> Any:
    conditional = ConditionalDenoiser(network, OBJECTIVE, labels, guidance_scale=scale)
    width = network.unet.class_embedding.embedding_dim
    return AnnealedDenoiser(conditional, annealing, lambda t: randn_batch((width,), ids, "cads", t).double())


def test_annealing_noises_the_class_above_and_leaves_it_below(network: Any) -> None:
    annealing, x = ConditionAnnealing(0.3, 0.8, 1.0), start(IDS)
    plain, noised = ConditionalDenoiser(network, OBJECTIVE, LABELS), annealed(network, IDS, LABELS, annealing)
    assert torch.equal(noised(x, 200).noise, plain(x, 200).noise)
    assert float((noised(x, 900).x_0 - plain(x, 900).x_0).abs().max()) > 1e-3
    assert torch.equal(plain(x, 900).noise, ConditionalDenoiser(network, OBJECTIVE, LABELS)(x, 900).noise)  # nothing stays behind
    assert noised.width == network.unet.class_embedding.embedding_dim


def test_annealing_leaves_the_pass_without_conditions_alone(network: Any) -> None:
    x, annealing = start(IDS), ConditionAnnealing(0.3, 0.8, 1.0)
    unconditional = ConditionalDenoiser(network, OBJECTIVE, LABELS, guidance_scale=0.0)(x, 900)
    torch.testing.assert_close(annealed(network, IDS, LABELS, annealing, 0.0)(x, 900).noise, unconditional.noise)
    with_class = ConditionalDenoiser(network, OBJECTIVE, LABELS, guidance_scale=2.0)(x, 900)
    assert not torch.allclose(annealed(network, IDS, LABELS, annealing, 2.0)(x, 900).noise, with_class.noise)


def test_annealed_images_do_not_depend_on_the_batch(network: Any) -> None:
    annealing = ConditionAnnealing(0.3, 0.8, 1.0)
    whole = run(annealed(network, IDS, LABELS, annealing, 2.0), IDS)
    alone = [run(annealed(network, [name], LABELS[i : i + 1], annealing, 2.0), [name]) for i, name in enumerate(IDS)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-4, rtol=0)


# --- refusals ---------------------------------------------------------------------------------------------------------------


def test_refusals(classifier: TimeClassifier) -> None:
    with pytest.raises(ConfigError, match="measure-votes"):
        dropout_votes(classifier, IDS, 0, votes=1)
    with pytest.raises(ConfigError, match="measure-votes"):
        dropout_votes(TimeClassifier(1, 3, 16, channels=(16,), dropout=0.0), IDS, 0)
    plain = build_guided_unet({"backbone": "lean", "backbone_options": BACKBONE}, 1, 3)
    with pytest.raises(ConfigError, match="annealing-option"):
        AnnealedDenoiser(ConditionalDenoiser(plain, OBJECTIVE), ConditionAnnealing(), lambda t: torch.zeros(1))
