"""The measures by themselves: known answers, gradients against finite differences and against formulas, all in float64."""

import math

import pytest
import torch
from gaussian_toy import seeded
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medaug.diffusion import MEASURES, ClassMeasure, DropoutVotes, EnsembleVotes, Timeless, make_measure
from medaug.diffusion.uncertainty import bald, entropy, evaluating, least_confidence, log_likelihood, margin, mixture
from medaug.errors import ConfigError

LABELS = torch.tensor([0, 3, 1, 2])


def logits_of(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def log_of(*probs):
    return torch.tensor(probs, dtype=torch.float64).log()


def gradient(measure, logits):
    return torch.autograd.grad(measure(logits.log_softmax(dim=-1)).sum(), logits)[0]


# --- known answers ----------------------------------------------------------------------------------------------------


def test_values_by_hand():
    log_probs = log_of([0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3])
    by_hand = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    torch.testing.assert_close(entropy(log_probs), torch.tensor([by_hand, math.log(3)], dtype=torch.float64))
    torch.testing.assert_close(margin(log_probs), torch.tensor([-0.2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(least_confidence(log_probs), torch.tensor([-0.5, -1 / 3], dtype=torch.float64))
    torch.testing.assert_close(log_likelihood(log_probs, torch.tensor([2, 0])), log_of(0.2, 1 / 3))


def test_entropy_and_class_are_mixed_by_the_weight():
    votes = log_of([[0.7, 0.2, 0.1]])
    measure = make_measure("entropy_class", class_weight=0.5)
    torch.testing.assert_close(measure(votes, torch.tensor([1])), entropy(votes[0]) + 0.5 * log_of(0.2))
    torch.testing.assert_close(make_measure("entropy_class")(votes, torch.tensor([1])), entropy(votes[0]) + log_of(0.2))


def test_several_votes_count_by_their_mean_probability():
    votes = log_of([[0.9, 0.1]], [[0.3, 0.7]])
    torch.testing.assert_close(mixture(votes), log_of([0.6, 0.4]))
    torch.testing.assert_close(make_measure("margin")(votes, None), torch.tensor([-0.2], dtype=torch.float64))
    torch.testing.assert_close(make_measure("least_confidence")(votes, None), torch.tensor([-0.6], dtype=torch.float64))
    torch.testing.assert_close(make_measure("entropy")(votes, None), entropy(log_of([0.6, 0.4])))
    torch.testing.assert_close(make_measure("classifier")(votes, torch.tensor([1])), log_of(0.4))


def test_bald_is_what_votes_disagree_on():
    sure = 1 - 1e-12
    disagree = log_of([[sure, 1 - sure]], [[1 - sure, sure]])
    unsure = log_of([[0.5, 0.5]], [[0.5, 0.5]])
    assert float(bald(disagree)) == pytest.approx(math.log(2), abs=1e-9)
    assert float(bald(unsure)) == pytest.approx(0, abs=1e-15)
    assert float(make_measure("entropy")(unsure, None)) == pytest.approx(math.log(2))  # unsure, but of one mind


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), votes=st.integers(2, 5), classes=st.integers(2, 6), spread=st.floats(0.1, 20))
def test_bald_is_the_mean_divergence_of_the_votes_from_their_mean(seed, votes, classes, spread):
    log_probs = (spread * seeded((votes, 3, classes), seed)).log_softmax(dim=-1)
    mean = log_probs.exp().mean(dim=0)
    divergence = (log_probs.exp() * (log_probs - mean.log())).sum(dim=-1).mean(dim=0)
    torch.testing.assert_close(bald(log_probs), divergence, atol=1e-10, rtol=1e-8)
    assert bool((bald(log_probs) >= -1e-12).all()) and float(bald(log_probs).max()) <= math.log(min(votes, classes)) + 1e-12


@pytest.mark.parametrize("name", MEASURES)
def test_certainty_beyond_the_range_of_numbers_is_finite(name):
    logits = logits_of([[[1e4, 0.0, -1e4, 3.0]], [[0.0, 1e4, 0.0, -1e4]]])
    value = make_measure(name)(logits.log_softmax(dim=-1), torch.tensor([2]))
    (found,) = torch.autograd.grad(value.sum(), logits)
    assert value.shape == (1,) and bool(value.isfinite().all()) and bool(found.isfinite().all())


# --- P4.1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("name", MEASURES)
def test_p4_1_gradients_match_finite_differences(name, votes):
    if name == "bald" and votes == 1:
        votes = 2
    logits = seeded((votes, 4, 4), 3).requires_grad_()
    measure = make_measure(name)
    assert torch.autograd.gradcheck(lambda z: measure(z.log_softmax(dim=-1), LABELS), logits, eps=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 7), spread=st.floats(0.1, 5))
def test_p4_1_gradients_by_logit_are_the_formulas(seed, classes, spread):
    logits = (spread * seeded((5, classes), seed)).requires_grad_()
    log_probs = logits.detach().log_softmax(dim=-1)
    probs = log_probs.exp()
    torch.testing.assert_close(gradient(entropy, logits), -probs * (log_probs + entropy(log_probs)[:, None]), atol=1e-6, rtol=0)
    labels = torch.arange(5) % classes
    likelihood = gradient(lambda log_probs: log_likelihood(log_probs, labels), logits)
    torch.testing.assert_close(likelihood, torch.nn.functional.one_hot(labels, classes) - probs, atol=1e-12, rtol=0)


def test_the_gradient_of_entropy_vanishes_at_the_uniform_point_and_at_saturation():
    for values in ([[0.0, 0.0, 0.0]], [[60.0, 0.0, 0.0]]):
        assert float(gradient(entropy, logits_of(values)).abs().max()) < 1e-15
    assert float(gradient(entropy, logits_of([[1.0, 0.0, 0.0]])).abs().max()) > 0.1


# --- P4.2 -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(a=st.floats(-8, 8), b=st.floats(-8, 8))
def test_p4_2_with_two_classes_all_measures_are_one(a, b):
    assume(abs(a - b) > 1e-3)  # the tie is a kink of both maxima
    logits = logits_of([[a, b]])
    log_probs = logits.detach().log_softmax(dim=-1)
    torch.testing.assert_close(margin(log_probs), -(2 * log_probs.exp().amax(dim=-1) - 1), atol=1e-12, rtol=0)
    by_margin, by_confidence, by_entropy = (gradient(measure, logits) for measure in (margin, least_confidence, entropy))
    torch.testing.assert_close(by_margin, 2 * by_confidence, atol=1e-12, rtol=0)
    for other in (by_confidence, by_entropy):  # collinear, and of the same sense
        determinant = by_margin[0, 0] * other[0, 1] - by_margin[0, 1] * other[0, 0]
        assert abs(float(determinant)) < 1e-15 and float((by_margin * other).sum()) > 0


@pytest.mark.parametrize("measure", [entropy, margin, least_confidence])
def test_uncertainty_rises_towards_the_boundary(measure):
    near, far = log_of([0.6, 0.4]), log_of([0.9, 0.1])
    assert float(measure(near)) > float(measure(far))


# --- the classifiers ----------------------------------------------------------------------------------------------------


def linear(classes, seed):
    weights = seeded((4, classes), seed)
    return lambda x, time: x.flatten(1) @ weights


def test_an_ensemble_gives_its_members_votes():
    x = seeded((3, 1, 2, 2))
    members = [linear(4, 0), linear(4, 1)]
    votes = EnsembleVotes(members, 4)(x, 10)
    for member, vote in zip(members, votes, strict=True):
        torch.testing.assert_close(vote, member(x, None).log_softmax(dim=-1))
    torch.testing.assert_close(ClassMeasure(make_measure("bald"), EnsembleVotes(members, 4))(x, 10), bald(votes))


def test_a_clean_classifier_is_told_no_time():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    x = seeded((2, 1, 2, 2))
    torch.testing.assert_close(EnsembleVotes([Timeless(network)], 3)(x, 7)[0], network(x).log_softmax(dim=-1))


def test_modes_inside_and_after():
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(), torch.nn.BatchNorm1d(3)).train()
    network[1].eval()
    with pytest.raises(KeyError), evaluating(network, len):
        assert not any(module.training for module in network.modules())
        raise KeyError
    assert [module.training for module in network] == [True, False, True] and network.training


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda: make_measure("doubt"), "measure-unknown.*entropy"),
        (lambda: make_measure("entropy", class_weight=1), "measure-option.*no option"),
        (lambda: make_measure("entropy_class", weight=1), "measure-option.*class_weight"),
        (lambda: make_measure("classifier")(log_of([[0.5, 0.5]]), None), "measure-labels"),
        (lambda: make_measure("entropy_class")(log_of([[0.5, 0.5]]), torch.tensor([0, 1])), "measure-labels"),
        (lambda: make_measure("classifier")(log_of([[0.5, 0.5]]), torch.tensor([2])), "label-out-of-range"),
        (lambda: make_measure("classifier")(log_of([[0.5, 0.5]]), torch.tensor([-1])), "label-out-of-range"),
        (lambda: make_measure("bald")(log_of([[0.5, 0.5]]), None), "measure-votes"),
        (lambda: EnsembleVotes([], 3), "measure-votes"),
        (lambda: EnsembleVotes([linear(1, 0)], 1), "guidance-classes"),
        (lambda: DropoutVotes(lambda x, time, kept: x, lambda t: torch.ones(2, 1, 1), 1), "guidance-classes"),
        (lambda: EnsembleVotes([linear(3, 0)], 4)(seeded((2, 1, 2, 2)), 5), "class-mismatch.*3 classes.*have 4"),
        (lambda: EnsembleVotes([linear(4, 0), linear(3, 0)], 4)(seeded((2, 1, 2, 2)), 5), "class-mismatch"),
        (lambda: EnsembleVotes([lambda x, time: x], 4)(seeded((2, 1, 2, 2)), 5), "classifier-output"),
        (
            lambda: DropoutVotes(lambda x, time, kept: kept[:, :, :3], lambda t: torch.ones(2, 2, 5), 4)(seeded((2, 1)), 5),
            "class-mismatch",
        ),
    ],
)
def test_refusals(act, code):
    with pytest.raises(ConfigError, match=code):
        act()
