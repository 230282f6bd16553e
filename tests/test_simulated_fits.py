"""Simulation-based calibration: ranks of the truth among draws of fits to simulated data."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule, simulation_based_calibration
from pyro_lightning.simulation import rank_among, simulate
from pyro_lightning.uniformity import check_ranks

N = 10


def normal_mean(x):
    """Posterior N(sum(x) / (N + 1), 1 / (N + 1))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def closed_form(width=1.0, shift=0.0):
    """Put the exact posterior in the place of a fit: its sd times a width, shifted by sds."""

    def fit(svi, data):
        (x,) = data.train_dataloader()
        svi._dataset_size = len(x)  # as a fit reads it from the data
        svi.loss(x)
        sd = (N + 1) ** -0.5
        with torch.no_grad():
            svi.guide.locs.mu.copy_(x.sum() / (N + 1) + shift * sd)
            svi.guide.scales.mu = torch.tensor(width * sd)

    return fit


def calibration(fit, seed=0, **options):
    torch.manual_seed(seed)
    return simulation_based_calibration(
        lambda: PyroSVIModule(normal_mean), torch.zeros(N), {"x": 0}, fit, **options
    )


def test_the_exact_posterior_is_calibrated():
    check = calibration(closed_form(), num_simulations=100)
    assert check.calibrated and check["mu"].verdict == "calibrated"
    assert check.verdict.startswith("calibrated, as far as 100 simulations can tell")
    assert check.ranks["mu"].shape == (100,) and check.num_samples == 99


def test_a_guide_of_half_the_width_is_found_too_narrow():
    check = calibration(closed_form(width=0.5), num_simulations=60)
    assert not check.calibrated and check["mu"].verdict == "too narrow"
    # u = Phi(2 z) with z ~ N(0, 1): E[(u - 1/2)^2] is asin(4 / 5) / (2 pi), over 1 / 12 of a
    # uniform u. Its sd over 60 simulations is below 0.12.
    assert check["mu"].spread == pytest.approx(math.asin(0.8) / (2 * math.pi) * 12, abs=0.4)


@pytest.mark.parametrize("shift, words", [(1.0, "too high"), (-1.0, "too low")])
def test_a_guide_that_is_off_by_a_standard_deviation_is_found(shift, words):
    check = calibration(closed_form(shift=shift), num_simulations=40)
    assert not check.calibrated and words in check["mu"].verdict
    # The truth is below a draw at -shift sd: E[u] = Phi(-shift / sqrt(2)).
    expected = 0.5 * math.erfc(shift / 2)
    assert check["mu"].mean == pytest.approx(expected, abs=4 * 0.29 / 40**0.5)


class Regression(PyroSVIModule):
    """Two coefficients by attributes that are drawn, and data by name."""

    def __init__(self):
        super().__init__(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
        self.layer = PyroModule[nn.Linear](2, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def model(self, x, y):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_fits_by_the_trainer_to_data_by_name_are_ranked():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    given = {"x": x.numpy(), "y": torch.zeros(40)}
    torch.manual_seed(0)
    seen = []

    def fit(svi, data):
        (batch,) = data.train_dataloader()
        seen.append(batch["y"].sort().values)
        # Covariates come through as they are, in another order.
        assert torch.equal(batch["x"][:, 0].sort().values, x[:, 0].sort().values)
        quiet_trainer(max_epochs=60).fit(svi, data)

    check = simulation_based_calibration(Regression, given, {"y": "y"}, fit, num_simulations=4)
    assert len({tuple(y.tolist()) for y in seen}) == 4  # new data each time
    assert check.ranks["layer.weight"].shape == (4, 1, 2)
    assert check.ranks["layer.bias"].shape == (4, 1)
    # Of 12 scalars that are fitted each lies outside all draws with a probability of 2 %. Without
    # a fit the guide is N(0, 0.1), and all but one or two lie outside.
    outside = sum(int(((r == 0) | (r == 99)).sum()) for r in check.ranks.values())
    assert outside <= 3


def test_simulated_data_follow_the_prior():
    svi = PyroSVIModule(normal_mean)
    torch.manual_seed(0)
    found = [simulate(svi, torch.zeros(N), {"x": 0}) for _ in range(800)]
    mu = torch.stack([truth["mu"] for truth, _ in found])
    x = torch.stack([data for _, data in found])
    # mu ~ N(0, 1), x - mu ~ N(0, 1): four standard errors of means and of variances.
    assert abs(mu.mean()) < 4 / 800**0.5 and abs(mu.var() - 1) < 4 * (2 / 800) ** 0.5
    noise = x - mu[:, None]
    assert abs(noise.mean()) < 4 / 8000**0.5 and abs(noise.var() - 1) < 4 * (2 / 8000) ** 0.5


def test_a_fit_that_seeds_its_noise_does_not_make_all_data_equal():
    seen = []

    def fit(svi, data):
        (x,) = data.train_dataloader()
        seen.append(float(x.sum()))
        torch.manual_seed(0)
        closed_form()(svi, data)

    calibration(fit, num_simulations=5)
    assert len(set(seen)) == 5


def test_arrays_of_a_file_are_those_in_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(N, dtype=np.float32))
    ranks = []
    for arrays in (tmp_path / "x.npy", torch.zeros(N)):
        torch.manual_seed(0)
        check = simulation_based_calibration(
            lambda: PyroSVIModule(normal_mean), arrays, {"x": 0}, closed_form(), num_simulations=5
        )
        ranks.append(check.ranks["mu"])
    assert torch.equal(*ranks)


# -- tests of ranks ------------------------------------------------------------------------------


def test_pvalues_of_uniform_ranks_are_uniform():
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(100, (200, 400), generator=generator)  # 400 scalars of 200 simulations
    checks = check_ranks({"z": ranks}, 99).checks
    for name in ("p_shift", "p_spread", "p_chi2"):
        p = torch.tensor([getattr(check, name) for check in checks])
        for level in (0.05, 0.5):
            # Four standard errors of a share among 400.
            error = 4 * (level * (1 - level) / 400) ** 0.5
            assert float((p < level).float().mean()) == pytest.approx(level, abs=error)
    assert check_ranks({"z": ranks}, 99).calibrated


def test_the_chi2_test_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    ranks = torch.from_numpy(np.random.default_rng(0).binomial(99, 0.5, 100))
    counts = np.bincount(np.asarray(ranks) // 5, minlength=20)
    expected = stats.chisquare(counts).pvalue
    assert check_ranks({"z": ranks}, 99)["z"].p_chi2 == pytest.approx(expected, rel=1e-9)


def test_ranks_of_another_shape_are_found():
    # Two heaps at a quarter and three quarters: mean and spread near those of uniform ranks.
    ranks = torch.tensor([21, 78] * 200)
    check = check_ranks({"z": ranks}, 99)["z"]
    assert check.verdict == "another shape" and check.p_shift > 0.5


def test_equal_draws_are_ranked_at_random():
    torch.manual_seed(0)
    draws = torch.tensor([0.0] * 4 + [1.0] * 5).expand(3000, 9).T
    ranks = rank_among(draws, torch.ones(3000))
    # Among 4 below and 5 equal ones the rank is one of 4 to 9, each with the same probability.
    counts = torch.bincount(ranks, minlength=10)
    assert counts[:4].sum() == 0 and (counts[4:] - 500).abs().max() < 4 * 500**0.5


def test_a_check_prints_its_scalars_verdict_and_reference():
    ranks = {"mu": torch.arange(100), "w": torch.stack([torch.arange(100), torch.zeros(100)], 1)}
    check = check_ranks(ranks, 99)
    text = str(check)
    assert (
        "Talts" in text and "not calibrated" in text and "at 'w'[1] the guide is too high" in text
    )
    assert check["w"].entry == (1,) and check["mu"].calibrated
    with pytest.raises(KeyError, match="no global latent 'b'; there are 'mu', 'w'"):
        check["b"]


# -- what is refused -----------------------------------------------------------------------------


def simulated(model, arrays, places):
    svi = PyroSVIModule(model, AutoNormal)
    return simulate(svi, arrays, places)


def test_a_model_with_parameters_of_its_own_is_refused():
    def model(x):
        sd = pyro.param("sd", torch.tensor(1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, sd), obs=x)

    with pytest.raises(ValueError, match=r"trainable tensors of shapes \(\)"):
        simulated(model, torch.zeros(N), {"x": 0})


def test_observed_sites_without_a_place_are_refused():
    with pytest.raises(ValueError, match=r"Missing: \['x'\]; not observed in the model: \['y'\]"):
        simulated(normal_mean, torch.zeros(N), {"y": 0})
    with pytest.raises(ValueError, match="'x' stands at 1, but the arrays have 0"):
        simulated(normal_mean, torch.zeros(N), {"x": 1})
    with pytest.raises(TypeError, match="observed must be a dict of sites and places"):
        calibration_of_names = simulation_based_calibration
        calibration_of_names(lambda: None, torch.zeros(N), ["x"], lambda svi, data: None)


def test_values_of_another_shape_are_refused():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x.sum(-1))

    with pytest.raises(ValueError, match=r"with shape \(10,\), but the array at 0 has \(10, 2\)"):
        simulated(model, torch.zeros(N, 2), {"x": 0})


def test_fits_leave_the_datamodule_one_batch_by_default():
    sizes = []

    def fit(svi, data):
        assert isinstance(data, ArrayDataModule)
        sizes.append([len(x) for x in data.train_dataloader()])
        svi._dataset_size = N
        svi.loss(next(iter(data.train_dataloader())))

    calibration(fit, num_simulations=1)
    calibration(fit, num_simulations=1, batch_size=4)
    assert sizes == [[10], [4, 4, 2]]
