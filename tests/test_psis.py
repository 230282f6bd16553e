"""Pareto-smoothed weights: k-hat against tails of known shape, and what it is taken to say."""

import math

import numpy as np
import pytest
import torch

from pyro_lightning import arviz_apis as apis
from pyro_lightning.arviz_apis import psislw
from pyro_lightning.guide_check import judge
from pyro_lightning.log_weights import LogWeights
from pyro_lightning.psis import smooth, threshold, verdict

arviz = pytest.importorskip("arviz", reason="ArviZ, which fits the tail, is not installed")


@pytest.fixture(params=["0.x", "1.x"])
def _generation(request, monkeypatch):
    if request.param == "0.x":
        if not arviz.__version__.startswith("0."):
            pytest.skip("this arviz is 1.x")
        monkeypatch.setattr(apis, "_found", lambda name: None)


@pytest.mark.usefixtures("_generation")
@pytest.mark.parametrize("correlation", [0.2, 0.9])
def test_khat_of_a_mean_field_guide_is_the_correlation_of_the_posterior(correlation):
    # With u ~ N(0, I) and R = [[1, rho], [rho, 1]] the weights are exp(u' (I - R) u / 2), which is
    # exp(rho (a^2 - b^2) / 2) of two Normals a and b: P(w > t) falls as t^(-1 / rho), and k = rho.
    u = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    log_weights = -correlation * u.prod(1)
    # The tail of 1,342 weights has an sd of (1 + k) / sqrt(1342) = 0.05 (Hosking and Wallis 1987);
    # logarithmic terms of P make it lighter.
    k = judge(LogWeights({"u": u}, log_weights, 0.0, 1)).k
    assert correlation - 0.25 < k < correlation + 0.1


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_is_the_shape_of_a_generalised_pareto_tail(shape):
    u = np.random.default_rng(0).random(50_000)
    weights = np.expm1(-shape * np.log1p(-u)) / shape
    # The fit is pulled towards 0.5, and takes 671 weights as the tail: its sd is
    # (1 + k) / sqrt(671) < 0.08 (Hosking and Wallis 1987).
    assert psislw(np.log(weights))[1] == pytest.approx(shape, abs=0.16)
    assert smooth(torch.from_numpy(np.log(weights))).k == pytest.approx(shape, abs=0.16)


@pytest.mark.usefixtures("_generation")
def test_weights_of_a_guide_that_is_far_off_have_an_infinite_khat():
    logs = torch.from_numpy(np.random.default_rng(0).standard_normal(1000))
    for spread in (1.0, 100.0, 300.0, 1000.0, 1e6):
        smoothed = smooth(spread * logs)
        # A lognormal's tail, which is light at last, is that of k = sd of the logs or so where the
        # draws are.
        expected = "usable or good" if spread == 1.0 else "bad"
        assert (smoothed.k > threshold(1000)) == (expected == "bad")
        assert float(smoothed.weights.sum()) == pytest.approx(1)
    assert smoothed.k == math.inf and smoothed.effective_size == pytest.approx(1)


def test_both_generations_of_arviz_smooth_alike():
    stats = pytest.importorskip("arviz_stats.base", reason="of ArviZ 1.x, which is not installed")
    if not arviz.__version__.startswith("0."):
        pytest.skip("this arviz is 1.x, of which arviz_stats is a part")
    logs = np.random.default_rng(0).standard_normal(2000)
    new, old = stats.array_stats.psislw(-logs), arviz.psislw(logs)
    assert float(new[1]) == pytest.approx(float(old[1]), abs=0.03)
    np.testing.assert_allclose(np.exp(new[0]), np.exp(old[0]), atol=2e-4)


def test_the_threshold_is_lower_for_few_draws():
    # Vehtari et al. 2024: 1 - 1 / log10(S), 0.7 from S = 2,200 on.
    assert threshold(100) == 0.5 and threshold(1000) == pytest.approx(2 / 3)
    assert threshold(2200) == pytest.approx(0.7, abs=1e-3) and threshold(10**6) == 0.7
    assert verdict(0.68, 1000) == (False, verdict(0.68, 1000)[1])
    assert verdict(0.68, 10_000)[0] and verdict(0.68, 1000)[1].startswith("not reliable")
    assert "1,334" in verdict(0.68, 1000)[1]  # 10 to the power 1 / (1 - 0.68)


def test_without_arviz_the_error_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(apis, "import_module", missing)
    with pytest.raises(ImportError, match=r"pyro-lightning\[arviz\]"):
        smooth(torch.randn(200))
