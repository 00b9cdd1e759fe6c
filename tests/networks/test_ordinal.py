"""The ordinal head: probabilities from ordered questions, and its loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medaug.errors import ConfigError
from medaug.networks.grading import build_network, penultimate
from medaug.networks.ordinal import CoralHead, coral_loss, cumulative_logits, cumulative_to_log_probs


def test_probabilities_of_a_worked_case():
    # P(y > 0) = 3/4, P(y > 1) = 1/4
    cumulative = torch.tensor([[3.0, 1 / 3]]).log()
    torch.testing.assert_close(cumulative_to_log_probs(cumulative).exp(), torch.tensor([[0.25, 0.5, 0.25]]))


@given(st.integers(2, 8), st.integers(0, 10_000), st.floats(0.1, 30))
def test_any_weights_give_ordered_questions_and_probabilities(num_classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    head = CoralHead(5, num_classes)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        log_probs = head(torch.randn(7, 5, generator=generator))
        questions = head.direction(torch.zeros(1, 5)) + head.biases()
    assert torch.isfinite(log_probs).all()
    assert (questions.diff(dim=1) < 0).all()
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.softmax(log_probs, 1), log_probs.exp(), atol=1e-4, rtol=1e-3)


def test_cumulative_logits_invert_the_probabilities():
    cumulative = torch.tensor([[2.0, 0.5, -1.0], [8.0, 7.5, -9.0]], dtype=torch.float64)
    torch.testing.assert_close(cumulative_logits(cumulative_to_log_probs(cumulative)), cumulative)


def test_loss_is_the_cross_entropy_of_every_question():
    cumulative = torch.tensor([[2.0, 0.5, -1.0], [1.0, -0.5, -2.0]])
    target = torch.tensor([2, 0])
    yes = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(cumulative, yes)
    log_probs = cumulative_to_log_probs(cumulative)
    torch.testing.assert_close(coral_loss(log_probs, target), expected)
    torch.testing.assert_close(coral_loss(log_probs + 3, target), expected)  # any logits, not only normalised ones
    only_first = torch.tensor([0.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(
        coral_loss(log_probs, target, only_first),
        torch.nn.functional.binary_cross_entropy_with_logits(cumulative[:1], yes[:1]),
    )


def test_with_two_classes_it_is_the_plain_cross_entropy():
    logits, target = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 0, 1])
    torch.testing.assert_close(coral_loss(logits, target), torch.nn.functional.cross_entropy(logits, target))


def test_a_new_head_prefers_no_grade():
    head = CoralHead(3, 5)
    torch.testing.assert_close(head(torch.zeros(1, 3)).exp(), torch.full((1, 5), 0.2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["simple_cnn", "test_vit", "test_resnet"])
def test_any_network_takes_the_head_and_keeps_its_features(name):
    network = build_network(name, num_classes=4, image_size=32, head="coral").eval()
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        log_probs = network(x)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
        assert penultimate(network, x).ndim == 2


def test_learns_an_order():
    torch.manual_seed(0)
    x = torch.rand(400, 1)
    target = (x[:, 0] * 4).long()
    head = CoralHead(1, 4)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        coral_loss(head(x), target).backward()
        optimiser.step()
    assert (head(x).argmax(1) == target).float().mean() > 0.95


def test_one_class_is_no_order():
    with pytest.raises(ConfigError, match="at least 2 ordered classes"):
        CoralHead(3, 1)
