"""SoftMatch's weights, stage 2's consensus and threshold: formulas, laws, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.errors import ConfigError, DataError
from medaug.networks.amst import AuxiliaryHeads, feature_dimension
from medaug.networks.grading import build_network, penultimate
from medaug.training.amst_recipe import ABLATIONS, AmstRecipe, amst_recipe
from medaug.training.amst_stages import consistency_loss
from medaug.training.pseudo_labels import HISTOGRAM_EDGES, HeadScores, accept, head_scores, label_report, score_batches
from medaug.training.softmatch import SoftMatch, momentum_for, truncated_gaussian
from medaug.transforms.views import Views


@settings(deadline=None, max_examples=50)
@given(
    confidence=st.lists(st.floats(0.25, 1), min_size=2, max_size=20),
    mean=st.floats(0.3, 0.95),
    deviation=st.floats(0.05, 1),
    n_sigma=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_weight_is_in_the_unit_interval_one_above_the_mean_and_increasing(confidence, mean, deviation, n_sigma):
    c = torch.tensor(sorted(confidence), dtype=torch.float64)
    weights = truncated_gaussian(c, mean, deviation**2, n_sigma)
    assert ((weights > 0) | (c < mean - 35 * deviation / n_sigma)).all() and (weights <= 1).all()
    assert (weights[c >= mean] == 1).all()
    assert (weights.diff() >= 0).all()
    below = c[(c < mean)]
    expected = [math.exp(-((value - mean) ** 2) / (2 * deviation**2 / n_sigma**2)) for value in below.tolist()]
    assert weights[c < mean].tolist() == pytest.approx(expected, rel=1e-9)


def test_softmatch_updates_before_it_weighs_and_with_the_unbiased_variance():
    weigh = SoftMatch(4, momentum=0.9)
    assert (weigh.mean, weigh.variance) == (0.25, 1.0)
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]], dtype=torch.float64)
    weights = weigh(probs)
    c = np.array([0.7, 0.4, 0.6])
    mean, variance = 0.9 * 0.25 + 0.1 * c.mean(), 0.9 + 0.1 * c.var(ddof=1)
    assert (weigh.mean, weigh.variance) == pytest.approx((mean, variance))
    expected = np.exp(-(np.minimum(c - mean, 0) ** 2) * 4 / (2 * variance))
    assert weights.tolist() == pytest.approx(expected.tolist())
    before = weigh.variance
    weigh(probs[:1])  # one image has no unbiased variance
    assert weigh.variance == before and math.isfinite(weigh.mean)


def test_the_default_momentum_follows_the_steps_of_the_round():
    steps = (1, 10, 20, 350, 10_000, 1_000_000)
    assert [momentum_for(count) for count in steps] == pytest.approx([0, 0, 0.5, 0.97142857, 0.999, 0.999])
    weigh = AmstRecipe().softmatch(2, 20)
    weigh(torch.tensor([[0.9, 0.1], [0.7, 0.3]], dtype=torch.float64))
    assert weigh.mean == pytest.approx(0.5 * 0.5 + 0.5 * 0.8)
    given = AmstRecipe(momentum=0.999).softmatch(2, 20)
    given(torch.tensor([[0.9, 0.1], [0.7, 0.3]], dtype=torch.float64))
    assert given.mean == pytest.approx(0.999 * 0.5 + 0.001 * 0.8)


def test_uniform_alignment_lifts_the_class_that_is_rarely_predicted():
    probs = torch.tensor([[0.8, 0.2]] * 9 + [[0.45, 0.55]], dtype=torch.float64)
    plain, aligned = SoftMatch(2, momentum=0.0), SoftMatch(2, momentum=0.0, uniform_alignment=True)
    marginal = probs.mean(0)
    scaled = probs / marginal / 2
    c = (scaled / scaled.sum(1, keepdim=True)).max(1).values
    assert plain(probs)[-1] < plain(probs)[0] and aligned(probs)[-1] > aligned(probs)[0]
    assert aligned.mean == pytest.approx(float(c.mean()))


def test_equally_sure_images_do_not_divide_by_zero():
    weigh = SoftMatch(2, momentum=0.0)
    assert weigh(torch.tensor([[0.9, 0.1]] * 4)).tolist() == [1.0] * 4


def test_consistency_has_the_gradient_of_the_strong_view_alone():
    torch.manual_seed(0)
    weak = torch.randn(6, 3, requires_grad=True)
    strong = torch.randn(6, 3, requires_grad=True)
    for soft in (False, True):
        loss, weights = consistency_loss(weak, strong, SoftMatch(3), soft)
        loss.backward()
        assert weak.grad is None and strong.grad.abs().sum() > 0
        probs = torch.softmax(weak.detach(), 1)
        target = probs if soft else torch.nn.functional.one_hot(probs.argmax(1), 3).float()
        by_hand = -(weights * (target * torch.log_softmax(strong, 1)).sum(1)).mean()
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
        assert not weights.requires_grad


def random_probs(seed: int, n: int = 30, passes: int = 8, sharpness: float = 3.0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    centre = sharpness * draw.standard_normal((1, n, 1, 3))
    logits = centre + 0.5 * draw.standard_normal((4, n, 1, 3)) + 0.4 * draw.standard_normal((4, n, passes, 3))
    return torch.softmax(torch.from_numpy(logits), dim=-1)


def test_scores_by_hand():
    #             pass 1      pass 2
    one = [[0.9, 0.1], [0.5, 0.5]]  # mean .7: class 0, variance .04
    two = [[0.3, 0.7], [0.3, 0.7]]  # class 1, variance 0
    scores = head_scores(torch.tensor([[one], [two]], dtype=torch.float64))
    assert scores.labels.tolist() == [[0, 1]]
    assert scores.uncertainty[0].tolist() == pytest.approx([0.04, 0.0])
    assert scores.probs[0].tolist() == pytest.approx([0.5, 0.5])
    found = accept(scores, 0.05)
    assert (found.consensus.tolist(), found.accepted.tolist()) == ([False], [False])
    agreeing = accept(head_scores(torch.tensor([[one], [one]], dtype=torch.float64)), 0.05)
    assert agreeing.accepted.tolist() == [True] and agreeing.label.tolist() == [0]
    assert not accept(head_scores(torch.tensor([[one], [one]], dtype=torch.float64)), 0.039).accepted[0]


def test_measures_of_uncertainty():
    probs = random_probs(0)
    values = probs.numpy()
    labels = values.mean(2).argmax(2)
    predicted = np.take_along_axis(values.var(2), labels[..., None], 2)[..., 0].T
    np.testing.assert_allclose(head_scores(probs).uncertainty, predicted, atol=1e-15)
    np.testing.assert_allclose(head_scores(probs, "mean").uncertainty, values.var(2).mean(2).T, atol=1e-15)
    np.testing.assert_allclose(head_scores(probs, "max").uncertainty, values.var(2).max(2).T, atol=1e-15)
    with pytest.raises(ConfigError, match="predicted, mean, max"):
        head_scores(probs, "entropy")


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 500),
    taus=st.tuples(st.floats(0, 0.1), st.floats(0, 0.1)),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_accepted_set_grows_with_tau_and_meets_both_conditions(seed, taus, shares):
    scores = head_scores(random_probs(seed))
    (low, high), (few, many) = sorted(taus), sorted(shares)
    for strict, lenient in (
        (accept(scores, low), accept(scores, high)),
        (accept(scores, quantile=few), accept(scores, quantile=many)),
    ):
        assert (lenient.accepted | ~strict.accepted).all()
        for found in (strict, lenient):
            yes = found.accepted
            assert (scores.labels[yes] == found.label[yes][:, None]).all()
            assert (scores.uncertainty[yes] <= found.threshold).all()
    assert (scores.uncertainty[accept(scores, high).accepted] < high).all()
    assert (accept(scores, quantile=1.0).accepted == accept(scores, math.inf).consensus).all()


def test_quantile_bounds_the_share_that_is_accepted():
    scores = head_scores(random_probs(1, n=200))
    found = accept(scores, quantile=0.3)
    largest = scores.uncertainty.max(1)
    assert (largest <= found.threshold).mean() == pytest.approx(0.3, abs=0.01)


def test_without_dropout_acceptance_is_consensus():
    torch.manual_seed(0)
    network = build_network("simple_cnn", 3, 1, 16)
    heads = AuxiliaryHeads(feature_dimension(network, 1, 16), 3, dropout=0.0)
    shared, centre = torch.randn(3, 128), penultimate(network.eval(), torch.randn(200, 1, 16, 16)).mean(0).detach()
    with torch.no_grad():
        for head in heads.heads:  # heads that agree on the clear cases only
            head.weight.copy_(shared + 0.5 * torch.randn(3, 128))
            head.bias.copy_(-head.weight @ centre)
    x = torch.randn(20, 1, 16, 16)
    scores = score_batches(network, heads, [(x[:12], range(12)), (x[12:], range(12, 20))], key=("k",), passes=5)
    assert (scores.uncertainty == 0).all() and len(scores) == 20
    for found in (accept(scores, 1e-12), accept(scores, quantile=0.0)):
        assert (found.accepted == found.consensus).all()
    assert 0 < found.consensus.sum() < 20


def test_report_counts_everything_once():
    found = accept(head_scores(random_probs(2, n=50)), 0.01)
    seeds = np.random.default_rng(0).integers(0, 3, 50)
    report = label_report(found, seeds, 3)
    assert sum(report["histogram"]["counts"]) == report["scored"] == 50 and HISTOGRAM_EDGES[-1] == 0.25
    assert np.sum(report["confusion"]) == report["accepted"] == found.accepted.sum()
    assert np.sum(report["confusion_all"]) == 50
    assert report["relabelled"] == np.sum(report["confusion"]) - np.trace(report["confusion"])
    assert report["u_quantiles"] == sorted(report["u_quantiles"])


def test_report_of_nothing_accepted():
    scores = HeadScores(np.array([[0, 1]]), np.array([[0.1, 0.1]]), np.array([[0.5, 0.5]]))
    report = label_report(accept(scores), np.array([1]), 2)
    assert report["acceptance_rate"] == 0 and np.sum(report["confusion"]) == 0


def test_recipes_by_name():
    assert amst_recipe("amst") == AmstRecipe()
    assert not amst_recipe("amst-no_cr").consistency
    assert amst_recipe("amst-single_head").heads == ("weak",) and len(AmstRecipe().heads) == 4
    assert [amst_recipe(name).labels for name in ABLATIONS] == ["amst", "amst", "amst", "soft", "seed"]
    made = amst_recipe("amst", {"quantile": 0.5, "views": {"flip": True, "operations": ["rotate"]}})
    assert made.quantile == 0.5 and made.views == Views(flip=True, operations=("rotate",))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"labels": "clip"}, "amst, soft, seed, teacher"),
        ({"uncertainty": "entropy"}, "predicted, mean, max"),
        ({"passes": 0}, "passes must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"quantile": 1.1}, "quantile"),
        ({"pretraining_share": 0.0}, "pretraining_share"),
        ({"rounds": 0}, "rounds"),
        ({"momentum": 1.0}, "momentum in"),
        ({"tau": 0.1}, "amst-unknown-key"),
        ({"views": {"hflip": True}}, "Views has the fields"),
    ],
)
def test_wrong_settings_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        amst_recipe("amst", fields)


def test_other_refusals():
    with pytest.raises(ConfigError, match="amst-no_cr"):
        amst_recipe("amst-no_consistency")
    with pytest.raises(ConfigError, match="threshold-invalid"):
        accept(head_scores(random_probs(0)), -0.1)
    with pytest.raises(DataError, match="images-missing"):
        score_batches(torch.nn.Identity(), AuxiliaryHeads(2, 2), [], key=("k",))


def test_uniform_alignment_survives_a_class_that_nothing_is_of():
    weights = SoftMatch(2, momentum=0.0, uniform_alignment=True)(torch.tensor([[1.0, 0.0]] * 4))
    assert torch.isfinite(weights).all() and (weights > 0).all()
