"""Is the guide to be trusted: k-hat of its importance weights, and its marginals against them."""

import io
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.guide_check import judge
from pyro_lightning.log_weights import LogWeights, compute_log_weights
from pyro_lightning.psis import threshold

arviz = pytest.importorskip("arviz", reason="ArviZ, which fits the tail, is not installed")

N, DRAWS = 60, 300


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def correlated_data(correlation=0.95):
    """Two columns whose coefficients are then correlated as strongly, the other way."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, generator=generator)
    x[:, 1] = correlation * x[:, 0] + math.sqrt(1 - correlation**2) * x[:, 1]
    y = x @ torch.tensor([1.0, -1.0]) + 0.5 * torch.randn(N, generator=generator)
    return x, y


def exact_posterior(x, y):
    """Mean and precision of the coefficients, in closed form."""
    x, y = x.double(), y.double()
    precision = x.T @ x / 0.25 + torch.eye(2)
    return torch.linalg.solve(precision, x.T @ y / 0.25), precision


class NormalGuide(nn.Module):
    """A Normal with the given mean and covariance."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean = nn.Parameter(mean.float())
        self.register_buffer("covariance", covariance.float())

    def forward(self, x, y):
        pyro.sample("w", dist.MultivariateNormal(self.mean, self.covariance))


def checked(mean, covariance, data, **options):
    svi = PyroSVIModule(regression, NormalGuide(mean, covariance), dataset_size=N)
    svi.loss(data)
    torch.manual_seed(3)
    return svi.check_guide(ArrayDataModule(data, batch_size=30), DRAWS, **options)


def test_weights_are_posterior_over_guide_up_to_the_evidence():
    data = x, y = correlated_data()
    mean, precision = exact_posterior(x, y)
    check = checked(mean + 0.02, 2 * torch.linalg.inv(precision), data)
    draws = check.draws["w"].double()
    posterior = dist.MultivariateNormal(mean, precision_matrix=precision)
    guide = dist.MultivariateNormal((mean + 0.02).float().double(), 2 * torch.linalg.inv(precision))
    # log p(x, w) = log p(w | x) + log p(x), the last of y's own Normal.
    evidence = dist.MultivariateNormal(
        torch.zeros(N).double(), x.double() @ x.double().T + 0.25 * torch.eye(N)
    ).log_prob(y.double())
    expected = posterior.log_prob(draws) - guide.log_prob(draws) + evidence
    # The model runs in single precision: 60 terms of size 1, and the guide's of size 1.
    torch.testing.assert_close(check.log_weights, expected, rtol=0, atol=1e-3)


def test_the_exact_guide_has_weights_without_a_tail():
    data = correlated_data()
    mean, precision = exact_posterior(*data)
    check = checked(mean, torch.linalg.inv(precision), data)
    # What is left of the weights is rounding, whose tail is light.
    assert check.k < 0.3 and check.reliable and check.verdict.startswith("good")
    assert check.effective_size == pytest.approx(DRAWS, rel=1e-4)
    assert check.agrees and check["w"].agrees and check["w"].verdict == "agrees"


def test_the_best_mean_field_guide_of_a_correlated_posterior_is_found_too_narrow():
    data = correlated_data(0.995)
    mean, precision = exact_posterior(*data)
    # The minimum of the KL divergence has the inverse diagonal of the precision: sds that are
    # sqrt(1 - rho^2) = 0.1 of the posterior's.
    check = checked(mean, torch.diag(1 / precision.diagonal()), data)
    # k is 0.995; of few draws the fit is pulled towards 0.5.
    assert check.k > threshold(DRAWS) and not check.reliable
    assert check.verdict.startswith(("not reliable", "bad"))
    assert "too narrow" in check["w"].verdict and not check["w"].agrees


def test_usable_weights_of_a_guide_that_is_too_narrow_are_not_called_draws_of_the_posterior():
    data = correlated_data(0.5)
    mean, precision = exact_posterior(*data)
    # k is 1 - 0.65, below the threshold, and the sd 0.81 of the posterior's.
    check = checked(mean, 0.65 * torch.linalg.inv(precision), data)
    assert check.reliable and "too narrow" in check["w"].verdict
    assert "only as far as the guide's own draws reach: it is too narrow at 'w'" in check.verdict


def test_weighted_draws_of_a_guide_that_is_too_wide_have_the_posteriors_mean_and_sd():
    data = correlated_data(0.5)
    mean, precision = exact_posterior(*data)
    covariance = torch.linalg.inv(precision)
    check = checked(mean + 0.5 * covariance.diagonal().sqrt(), 2 * covariance, data)
    site, sd = check["w"], covariance.diagonal().sqrt()
    assert check.reliable and not site.agrees and "too wide" in site.verdict
    assert (
        not check.agrees
        and check.verdict.startswith("usable, with weights")
        and "off at 'w'" in check.verdict
    )
    # Four standard errors of a mean and of a sd, by the effective size of the weights.
    error = 4 / check.effective_size**0.5
    assert ((site.weighted_mean - mean) / sd).abs().max() < error
    assert (site.weighted_sd / sd - 1).abs().max() < error
    assert (site.sd_ratio - 2**0.5).abs().max() < 2 * error
    again = check.resample(2000)["w"].double()
    assert again.shape == (2000, 2) and ((again.mean(0) - mean) / sd).abs().max() < 1.5 * error


def test_terms_outside_the_plate_count_once_and_in_plates_of_every_style_alike():
    x, y = correlated_data()
    for plate, named in (
        (lambda x: pyro.plate("data", len(x)), ()),
        (lambda x: pyro.plate("data", N, subsample_size=len(x)), ()),
        (lambda x: nullcontext(), ("y",)),
    ):

        def model(x, y, plate=plate, named=named):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("outside", -w.sum(-1).square())
            with plate(x):
                noise = dist.Normal((x * w).sum(-1), 0.5)
                pyro.sample("y", noise.to_event(1) if named else noise, obs=y)

        guide = AutoMultivariateNormal
        svi = PyroSVIModule(model, guide, scale_sites=named, dataset_size=N)
        svi.loss((x, y))
        data = ArrayDataModule((x, y), batch_size=40)
        weights = compute_log_weights(svi, data.train_dataloader(), DRAWS)
        w = weights.draws["w"].double()
        with torch.no_grad():
            log_q = svi.guide.get_posterior().log_prob(weights.draws["w"]).double()
        likelihood = dist.Normal(w @ x.double().T, 0.5).log_prob(y.double()).sum(1)
        prior = dist.Normal(0.0, 1.0).log_prob(w).sum(1) - w.sum(1).square()
        # Single precision of terms that sum to some 1,000 nats.
        torch.testing.assert_close(
            weights.log_weights, likelihood + prior - log_q, rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoStructured])
def test_guides_of_constrained_latents_have_their_jacobian(guide):
    y = torch.tensor([0.5, -1.0, 2.0])

    def model(y):
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

    # Of one latent each of these guides is a Normal of log(sigma).
    made = guide(model, init_loc_fn=init_to_value(values={"sigma": torch.tensor(1.5)}))
    svi = PyroSVIModule(model, made, dataset_size=3)
    svi.loss(y)
    found = compute_log_weights(svi, [y], 100)
    sigma, scale = found.draws["sigma"].double(), 0.1
    if guide is AutoStructured:
        scale = float(svi.guide.scales.sigma.detach())
    log_q = dist.LogNormal(math.log(1.5), scale).log_prob(sigma)
    prior = dist.LogNormal(0.0, 1.0).log_prob(sigma)
    likelihood = dist.Normal(0.0, sigma[:, None]).log_prob(y.double()).sum(1)
    torch.testing.assert_close(found.log_weights, likelihood + prior - log_q, rtol=0, atol=1e-4)


def test_latents_of_a_pyro_module_are_weighted_after_a_fit():
    class Linear(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[nn.Linear](2, 1)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y):
            mean = self.layer(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    x, y = correlated_data(0.5)
    svi = PyroSVIModule(Linear(), AutoMultivariateNormal)
    data = ArrayDataModule((x, y), batch_size=25)
    quiet_trainer(max_epochs=2).fit(svi, datamodule=data)
    check = svi.check_guide(data, 100)
    weight, bias = check.draws["layer.weight"], check.draws["layer.bias"]
    assert weight.shape == (100, 1, 2) and bias.shape == (100, 1)
    both = torch.cat([weight[:, 0], bias], 1)
    with torch.no_grad():
        log_q = svi.guide.get_posterior().log_prob(both).double()
    prior = dist.Normal(0.0, 1.0).log_prob(both.double()).sum(1)
    mean = weight[:, 0].double() @ x.double().T + bias.double()
    likelihood = dist.Normal(mean, 0.5).log_prob(y.double()).sum(1)
    # Single precision of terms that sum to some 1,000 nats.
    torch.testing.assert_close(check.log_weights, likelihood + prior - log_q, rtol=1e-5, atol=1e-3)


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


def test_a_subsampled_weight_is_off_by_its_standard_error():
    size, batch_size = 1500, 50
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(size, 2, generator=generator)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([1.0, -0.5])), generator=generator)
    guide = AutoNormal(logistic, init_scale=0.1)
    svi = PyroSVIModule(logistic, guide, dataset_size=size)
    svi.loss((x, y))
    with torch.no_grad():
        svi.guide.locs.w.copy_(torch.tensor([1.0, -0.5]))
    z = []
    for seed in range(6):
        torch.manual_seed(seed)
        data = ArrayDataModule((x, y), batch_size=batch_size).train_dataloader()
        part = compute_log_weights(svi, data, 40, max_rows=300)
        w = part.draws["w"].double()
        likelihood = dist.Bernoulli(logits=w @ x.double().T).log_prob(y.double()).sum(1)
        prior = dist.Normal(0.0, 2.0).log_prob(w).sum(1)
        log_q = dist.Normal(torch.tensor([1.0, -0.5]).double(), 0.1).log_prob(w).sum(1)
        off = part.log_weights - (likelihood + prior - log_q)
        z.append(off.std() / part.standard_error)
        assert part.rows == 300
    # What is common to all draws is no error of a weight. Of six runs, in two dimensions whose
    # errors are all but one number each, the mean square of z is 1 within a factor of 3.
    assert 1 / 3 < torch.stack(z).square().mean() < 3


def test_all_rows_at_each_draw_and_a_subsample_of_all_batches_agree():
    data = correlated_data()
    mean, precision = exact_posterior(*data)
    wide = 2 * torch.linalg.inv(precision)
    whole = checked(mean, wide, data)
    part = checked(mean, wide, data, max_rows=N)
    assert part.standard_error == 0 and part.rows == N
    torch.testing.assert_close(part.log_weights, whole.log_weights, rtol=0, atol=2e-3)


def test_a_few_draws_with_all_the_weight_do_not_say_that_a_guide_is_too_wide():
    generator = torch.Generator().manual_seed(0)
    theta, luck = torch.randn(2, 500, generator=generator)
    check = judge(LogWeights({"theta": theta}, 100 * luck.double(), 0.0, 100))
    assert not check.reliable and check.effective_size < 2
    # The sd of one draw or two is a small part of the guide's, whatever the posterior's is.
    assert check["theta"].sd_ratio > 5 and check["theta"].verdict == "cannot tell"


def test_a_latent_that_the_guide_holds_at_a_point_is_called_so():
    theta = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    draws = {"theta": theta, "point": torch.full((500, 3), 0.1)}
    check = judge(LogWeights(draws, torch.zeros(500), 0.0, 10))
    assert check["point"].verdict == "a point" and check.agrees
    with pytest.raises(KeyError, match="no global latent 'x'; there are 'theta', 'point'"):
        check["x"]


def test_an_uncertain_subsample_gives_no_verdict():
    theta = torch.randn(500, generator=torch.Generator().manual_seed(0))
    check = judge(LogWeights({"theta": theta}, 0.1 * theta.double(), 2.0, 100))
    assert not check.reliable and check.verdict.startswith("unknown")
    assert "1,600" in check.verdict  # 100 rows times (2 / 0.5) squared
    assert "cannot tell" in str(check)


def test_a_check_prints_its_sites_verdict_and_reference():
    data = correlated_data()
    mean, precision = exact_posterior(*data)
    check = checked(mean, torch.linalg.inv(precision), data)
    text = str(check)
    assert "w " in text and "Pareto k-hat" in text and "good" in text and "Yao" in text
    rich = pytest.importorskip("rich.console", reason="rich is not installed")
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(check)
    assert "Pareto k-hat" in console.export_text()


def test_a_check_leaves_parameters_gradients_and_buffers_as_they_were():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)  # whose statistics move in every run

        def forward(self, x, y):
            regression(self.norm(x), y)

    svi = PyroSVIModule(Scaled(), AutoNormal, dataset_size=N)
    svi.loss(correlated_data())
    before = {name: value.clone() for name, value in svi.state_dict().items()}
    data = ArrayDataModule(correlated_data(), batch_size=10)
    for max_rows in (None, 40):
        svi.check_guide(data, 100, max_rows=max_rows)
    after = svi.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in svi.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("max_rows", [None, 30])
def test_a_check_on_the_gpu_is_that_on_the_cpu(max_rows):
    data = correlated_data(0.5)
    mean, precision = exact_posterior(*data)
    svi = PyroSVIModule(regression, NormalGuide(mean, torch.linalg.inv(precision)), dataset_size=N)
    svi.loss(data)
    svi.cuda()
    check = svi.check_guide(ArrayDataModule(data, batch_size=10), 200, max_rows=max_rows)
    assert check.draws["w"].is_cuda and check.k < 0.7
    # The weights of the exact posterior are all the evidence.
    assert check.log_weights.std() < 5 * check.standard_error + 1e-2
