"""Shares of every batch and weights in the loss: exact counts, torch's own mean, and weight 0 as if the source were not there."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from medaug.draws import numpy_generator
from medaug.errors import ConfigError
from medaug.networks.ordinal import weighted_cross_entropy
from medaug.training.classifier import ClassifierRecipe, LabelledImages, fit_classifier, seeded
from medaug.training.mixture import Mixture

SOURCE = ("real",) * 6 + ("a",) * 4 + ("b",) * 20
RECIPE = ClassifierRecipe(num_steps=6, batch_size=8, evaluate_every=3, policy="weak")


class Noise(Dataset):
    def __len__(self) -> int:
        return len(SOURCE)

    def __getitem__(self, index: int):
        image = numpy_generator("noise", index).uniform(-1, 1, (1, 8, 8)).astype(np.float32)
        return {"image": torch.from_numpy(image), "label": index % 2, "id": str(index)}


def trained(positions=None, mixture=None, **options):
    with seeded("mixture"):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    images = LabelledImages(Noise())
    images = images if positions is None else images.select(positions)
    fit_classifier(network, images, None, RECIPE, key=("k",), mixture=mixture, **options)
    return torch.cat([value.flatten().float() for value in network.state_dict().values()])


@pytest.mark.parametrize(
    ("shares", "batch_size", "wanted"),
    [
        ({"real": 0.5}, 8, {"real": 4}),
        ({"real": 0.5, "a": 0.25}, 16, {"real": 8, "a": 4, "b": 4}),
        ({"real": 0.5, "a": 0.3, "b": 0.2}, 10, {"real": 5, "a": 3, "b": 2}),
        ({"real": 1 / 3, "a": 1 / 3, "b": 1 / 3}, 10, {"real": 4, "a": 3, "b": 3}),  # the remainder goes to the first
    ],
)
def test_shares_of_every_batch_are_exact(shares, batch_size, wanted):
    take = Mixture(SOURCE, shares).indices(batch_size, ("k",))
    for step in range(12):
        batch = take(step)
        found = Counter(SOURCE[index] for index in batch)
        assert len(batch) == batch_size and {name: found[name] for name in wanted} == wanted
    again = Mixture(SOURCE, shares).indices(batch_size, ("k",))
    assert np.array_equal(again(7), take(7))  # any step without the ones before


def test_every_image_of_a_source_comes_before_any_one_again():
    take = Mixture(SOURCE, {"real": 0.5}).indices(8, ("k",))
    real = [index for step in range(3) for index in take(step) if SOURCE[index] == "real"]
    assert sorted(real) == sorted([*range(6), *range(6)])
    rest = [index for step in range(6) for index in take(step) if SOURCE[index] != "real"]
    assert sorted(rest) == list(range(6, 30))  # a and b in their natural proportion


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weight", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_an_image_of_weight_two_counts_like_two(smoothing, class_weight):
    draw = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 3, generator=draw), torch.tensor([0, 1, 2, 1, 0])
    importance = torch.tensor([2.0, 1.0, 0.0, 1.0, 3.0])
    repeated = torch.tensor([0, 0, 1, 3, 4, 4, 4])
    options = {"label_smoothing": smoothing}
    found = weighted_cross_entropy(logits, target, weight=class_weight, importance=importance, **options)
    assert found == pytest.approx(
        float(functional.cross_entropy(logits[repeated], target[repeated], weight=class_weight, **options)), rel=1e-5
    ) or (smoothing and class_weight is not None)
    even = weighted_cross_entropy(logits, target, weight=class_weight, importance=torch.ones(5), **options)
    torch.testing.assert_close(even, functional.cross_entropy(logits, target, weight=class_weight, **options))


@pytest.mark.parametrize("shares", [{}, {"real": 0.5}])
def test_weight_zero_trains_as_if_the_source_were_not_there(shares):
    without = [index for index, name in enumerate(SOURCE) if name != "a"]
    absent = Mixture(tuple(SOURCE[index] for index in without), shares)
    assert torch.equal(trained(mixture=Mixture(SOURCE, shares, {"a": 0.0})), trained(without, absent))


def test_a_mixture_that_says_nothing_changes_nothing_and_one_that_says_something_does():
    plain = trained()
    assert torch.equal(trained(mixture=Mixture(SOURCE)), plain)
    assert torch.equal(trained(mixture=Mixture(SOURCE, {}, {"a": 1.0})), plain)
    others = [trained(mixture=Mixture(SOURCE, {"real": 0.5})), trained(mixture=Mixture(SOURCE, {}, {"b": 0.2}))]
    assert not any(torch.equal(other, plain) for other in others)
    torch.testing.assert_close(
        trained(mixture=Mixture(SOURCE, {}, {"real": 2.0, "a": 2.0, "b": 2.0})), plain
    )  # only ratios count


@pytest.mark.parametrize(
    ("shares", "weights", "code"),
    [
        ({"c": 0.5}, {}, "share-without-source"),
        ({"real": 0.5, "a": 0.2, "b": 0.2}, {}, "share-invalid"),
        ({"real": 0.6, "a": 0.4}, {}, "share-invalid"),  # leaves no place for b
        ({"a": 0.5}, {"a": 0.0}, "share-invalid"),
    ],
)
def test_shares_that_make_no_whole_are_refused(shares, weights, code):
    with pytest.raises(ConfigError, match=code):
        Mixture(SOURCE, shares, weights)


def test_a_batch_without_an_image_of_a_source_is_refused():
    with pytest.raises(ConfigError, match="share-too-small"):
        Mixture(SOURCE, {"a": 0.02}).batch_counts(8)
