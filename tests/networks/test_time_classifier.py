"""The classifier of noisy images: sizes, independence of the batch, the noise level, drop-out votes, refusals."""

from __future__ import annotations

import pytest
import torch

from medaug.diffusion import ClassMeasure, DropoutVotes, EnsembleVotes, GradientGuidance, make_measure, make_schedule
from medaug.errors import ConfigError
from medaug.networks.time_classifier import TimeClassifier, build_time_classifier

SMALL = {"in_channels": 1, "num_classes": 3, "image_size": 16, "channels": (8, 16), "norm_num_groups": 4, "dropout": 0.5}
SCHEDULE = make_schedule("linear_beta", 1000)


@pytest.fixture
def network(awaken):
    torch.manual_seed(0)
    return awaken(TimeClassifier(**SMALL), std=0.2).double().eval()


def images(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "patch"), [(32, 2), (64, 4), (128, 4)])
def test_sizes_and_channels(size, patch, channels):
    network = TimeClassifier(channels, 4, size, channels=(16, 32, 32), patch=patch).eval()
    time = torch.tensor([0.0, 999.0])
    assert network(torch.randn(2, channels, size, size), time).shape == (2, 4)
    assert network.features(torch.randn(2, channels, size, size), time).shape == (2, network.feature_dimension)


def test_an_image_does_not_depend_on_its_batch(network):
    x, time = images(5, 1, 16, 16), torch.tensor([0.0, 10.0, 500.0, 900.0, 999.0])
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(x, time), alone, atol=1e-12, rtol=0)


def test_image_and_noise_level_both_matter(network):
    x = images(1, 1, 16, 16)
    by_level = network(x.expand(3, -1, -1, -1), torch.tensor([0.0, 400.0, 999.0])).detach()
    assert float((by_level[0] - by_level[1]).abs().max()) > 1e-3 and float((by_level[1] - by_level[2]).abs().max()) > 1e-3
    assert float((network(images(1, 1, 16, 16, seed=1), torch.zeros(1)).detach() - by_level[0]).abs().max()) > 1e-3


def test_every_parameter_takes_part(network):
    """In the loss of one noisy batch each weight has a gradient: no block is left out, the noise level neither."""
    loss = torch.nn.functional.cross_entropy(
        network(images(4, 1, 16, 16), torch.tensor([1.0, 300.0, 600.0, 999.0])), torch.tensor([0, 1, 2, 0])
    )
    loss.backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0] == []


# --- drop-out -----------------------------------------------------------------------------------------------------------


def test_dropout_is_off_in_evaluation_and_on_in_training(network):
    x, time = images(3, 1, 16, 16), torch.full((3,), 200.0)
    assert torch.equal(network(x, time), network(x, time))
    network.train()
    torch.manual_seed(0)
    assert not torch.equal(network(x, time), network(x, time))
    network.dropout = 0.0
    torch.testing.assert_close(network(x, time), network.eval()(x, time))


def test_votes_are_sub_networks_whose_mean_is_the_network(network):
    x, time = images(3, 1, 16, 16), torch.full((3,), 200.0)
    kept = (torch.rand(4000, 3, 16, generator=torch.Generator().manual_seed(0)) >= 0.5).double()
    votes = network.vote_logits(x, time, kept)
    assert votes.shape == (4000, 3, 3)
    by_hand = network.features(x, time)[1] * kept[7, 1] / 0.5 @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(votes[7, 1], by_hand)
    spread = float(votes.detach().std(dim=0).max())
    torch.testing.assert_close(votes.mean(dim=0), network(x, time), atol=5 * spread / 4000**0.5, rtol=0)
    assert spread > 1e-3


@pytest.mark.parametrize("measure", ["entropy", "bald"])
def test_the_gradient_by_pixel_matches_finite_differences(network, measure):
    x, h = images(2, 1, 16, 16), 1e-5
    kept = (torch.rand(4, 2, 16, generator=torch.Generator().manual_seed(1)) >= 0.5).double()
    votes = DropoutVotes(network.vote_logits, lambda t: kept, 3) if measure == "bald" else EnsembleVotes([network], 3)
    guidance = GradientGuidance(ClassMeasure(make_measure(measure), votes), 1.0, SCHEDULE)
    force = guidance.force(x, 300)
    index = (1, 0, *divmod(int(force[1, 0].abs().argmax()), 16))
    step = torch.zeros_like(x)
    step[index] = h
    by_difference = (guidance.measure(x + step, 300) - guidance.measure(x - step, 300)).sum().item() / (2 * h)
    assert abs(by_difference) > 1e-8
    assert float(force[index]) == pytest.approx(by_difference, rel=1e-4)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_classes": 1}, "guidance-classes"),
        ({"channels": ()}, "network-config"),
        ({"channels": (8, 10)}, "network-config.*multiples"),
        ({"norm_num_groups": 8}, "network-config.*larger"),  # one channel in each group: the noise level would be normalised away
        ({"norm_num_groups": 0}, "network-config"),
        ({"dropout": 1.0}, "network-config"),
        ({"patch": 0}, "network-config"),
        ({"num_res_blocks": 0}, "network-config"),
        ({"image_size": 18}, "image-size.*multiple of 4"),
        ({"image_size": 0}, "image-size"),
    ],
)
def test_bad_settings(changes, code):
    with pytest.raises(ConfigError, match=code):
        TimeClassifier(**SMALL | changes)


def test_bad_inputs(network):
    for x in (images(2, 1, 32, 32), images(2, 3, 16, 16), images(2, 1, 16, 32)):
        with pytest.raises(ConfigError, match=r"image-size.*\(1, 16, 16\)"):
            network(x, torch.zeros(2))
    with pytest.raises(ConfigError, match="classifier-time"):
        network(images(2, 1, 16, 16), torch.zeros(1))
    guidance = GradientGuidance(ClassMeasure(make_measure("entropy"), EnsembleVotes([network], 3)), 1.0, SCHEDULE)
    with pytest.raises(ConfigError, match="image-size"):
        guidance(images(2, 1, 32, 32), images(2, 1, 32, 32), 5)


def test_build_from_settings():
    settings = {"channels": [16, 32], "dropout": 0.25}
    assert build_time_classifier(settings, 3, 2, 32).dropout == 0.25
    with pytest.raises(ConfigError, match="setting-unknown"):
        build_time_classifier({"width": 3}, 1, 2, 32)
