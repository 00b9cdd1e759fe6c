import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medaug.diffusion import P2, WEIGHTINGS, EDMWeight, MinSNR, Uniform, make_schedule, with_weighting
from medaug.errors import ConfigError

ABAR = make_schedule("linear_beta", 1000).alphas_cumprod
SNR = ABAR / (1 - ABAR)


def test_p2_with_gamma_0_is_uniform():
    assert torch.equal(P2(k=1.0, gamma=0.0)(SNR), Uniform()(SNR))


def test_p2_with_gamma_one_half_is_the_root_of_one_minus_abar():
    torch.testing.assert_close(P2(k=1.0, gamma=0.5)(SNR), (1 - ABAR).sqrt())


def test_p2_by_hand():
    assert P2(k=2.0, gamma=1.0)(torch.tensor([0.0, 2.0, 8.0])).tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 10])


def test_min_snr_caps_the_weight_of_the_x_0_error():
    torch.testing.assert_close(MinSNR(5.0)(SNR) * SNR, SNR.clamp(max=5.0))


def test_edm_weight_is_table_1_on_the_x_0_error():
    sigma = (1 / ABAR - 1).sqrt()
    torch.testing.assert_close(EDMWeight(0.4)(SNR) * SNR, (sigma**2 + 0.4**2) / (sigma * 0.4) ** 2)


@settings(deadline=None, max_examples=25)
@given(snr=st.floats(1e-6, 1e6), name=st.sampled_from(sorted(WEIGHTINGS)))
def test_weights_are_positive_and_finite(snr, name):
    weight = float(WEIGHTINGS[name]()(torch.tensor(snr, dtype=torch.float64)))
    assert 0 < weight < math.inf


@pytest.mark.parametrize(
    "make",
    [lambda: P2(k=0.0), lambda: P2(gamma=-1.0), lambda: MinSNR(0.0), lambda: EDMWeight(math.nan), lambda: P2(gamma=math.inf)],
)
def test_refusals(make):
    with pytest.raises(ConfigError, match="must be (positive|at least 0), got"):
        make()


P2_SETTINGS = {"weighting": "p2", "weighting_options": {"k": 1.0, "gamma": 1.0}}


@pytest.mark.parametrize("parameterisation", ["epsilon", "sample", "v_prediction"])
def test_p2_is_laid_over_what_draws_t_uniformly(parameterisation):
    diffusion = {"parameterisation": parameterisation, "schedule": "cosine", "weighting": None}
    assert with_weighting(diffusion, P2_SETTINGS) == diffusion | P2_SETTINGS
    assert with_weighting(diffusion) == with_weighting(diffusion, {}) == diffusion


@pytest.mark.parametrize("weighting", ["p2", "min_snr", "uniform"])
def test_edm_has_a_weighting_of_its_own(weighting):
    edm = {"parameterisation": "edm", "weighting": None}
    assert with_weighting(edm, None) == edm and with_weighting(edm, {"weighting": "edm"})["weighting"] == "edm"
    for both in ((edm, {"weighting": weighting}), (edm | {"weighting": weighting}, None)):
        with pytest.raises(ConfigError, match=f"weighting-edm.*{weighting}"):
            with_weighting(*both)


def test_two_weightings_are_refused():
    for second in ("p2", "min_snr"):
        with pytest.raises(ConfigError, match=f"weighting-twice.*min_snr.*{second}"):
            with_weighting({"parameterisation": "epsilon", "weighting": "min_snr"}, {"weighting": second})
