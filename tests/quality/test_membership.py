"""Membership by denoising loss: a network that knows its training images is found out, the perfect one of a Gaussian is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from medaug.cohort import Cohort
from medaug.errors import DataError
from medaug.quality.images import image_batches
from medaug.quality.membership import LEVELS, denoising_losses, membership
from medaug.training.diffusion import build_objective

OBJECTIVE = build_objective({"num_train_timesteps": 100})


def posterior_mean(images: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The perfect noise prediction if the data were exactly `images`: a generator that remembers everything."""

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        abar = torch.tensor([float(OBJECTIVE.schedule.abar(int(t))) for t in time])[:, None, None, None]
        difference = ((x[:, None] - abar.sqrt()[:, None] * images[None]) ** 2).flatten(2).sum(2)
        weights = torch.softmax(-difference / (2 * (1 - abar[:, 0, 0])), dim=1)
        mean = torch.einsum("bm,mchw->bchw", weights, images)
        return (x - abar.sqrt() * mean) / (1 - abar).sqrt()

    return network


@pytest.fixture(scope="module")
def real(tmp_path_factory, make_cohort: Callable[..., Cohort]) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("real"), per_class=20, cases_per_group=1)


def test_a_network_that_remembers_is_found_out(real):
    training = torch.cat(list(image_batches(real, real.training)))
    losses = [denoising_losses(posterior_mean(training), OBJECTIVE, real, cases) for cases in (real.training, real.validation)]
    found = membership(*losses)
    assert found["auc"] > 0.85 and found["low"] > 0.7  # not 1: where noise is strong, everything is alike
    assert [row["level"] for row in found["levels"]] == list(LEVELS)
    assert (found["n_training"], found["n_held_out"]) == (36, 12)


def test_a_network_that_knows_nothing_of_images_is_not(real):
    losses = [denoising_losses(lambda x, time: torch.zeros_like(x), OBJECTIVE, real, c) for c in (real.training, real.validation)]
    found = membership(*losses)
    assert found["low"] < 0.5 < found["high"]


def test_losses_belong_to_the_image(real):
    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return 0.5 * x

    all_of_them = denoising_losses(network, OBJECTIVE, real, real.training)
    np.testing.assert_allclose(denoising_losses(network, OBJECTIVE, real, real.training[5:9]), all_of_them[5:9], rtol=1e-6)


def test_faults_are_refused():
    with pytest.raises(DataError, match="held-out"):
        membership(np.zeros((3, 4)), np.zeros((0, 4)))
    with pytest.raises(DataError, match="not finite"):
        membership(np.zeros((3, 4)), np.full((2, 4), np.nan))


def test_equal_losses_remember_nothing():
    for ours, theirs in ((20, 20), (5, 40)):
        found = membership(np.ones((ours, len(LEVELS))), np.ones((theirs, len(LEVELS))))
        assert [found["auc"], *(level["auc"] for level in found["levels"])] == [0.5] * (1 + len(LEVELS))
