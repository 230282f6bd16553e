"""Is the guide to be trusted: k-hat of its importance weights, and its marginals against them."""

import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from support import mixed_rows, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule
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
    for plate in (
        lambda x: pyro.plate("data", len(x)),
        lambda x: pyro.plate("data", N, subsample_size=len(x)),
    ):

        def model(x, y, plate=plate):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("outside", -w.sum(-1).square())
            with plate(x):
                pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)

        svi = PyroSVIModule(model, AutoMultivariateNormal, dataset_size=N)
        svi.loss((x, y))
        torch.manual_seed(0)
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


def mixture(x):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        weights = torch.tensor([0.3, 0.7])
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        loc = torch.where(k == 0, locs[..., 0], locs[..., 1])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def mixture_guide():
    return AutoNormal(pyro.poutine.block(mixture, expose=["locs"]))


def test_weights_sum_out_what_the_elbo_sums_out():
    x = mixed_rows(N)[0]
    svi = PyroSVIModule(mixture, mixture_guide(), TraceEnum_ELBO(), dataset_size=N)
    svi.loss(x)
    found = compute_log_weights(svi, [x[:40], x[40:]], 100)
    locs = found.draws["locs"].double()
    each = dist.Normal(locs[:, None], 1.0).log_prob(x.double()[:, None])
    likelihood = (each + torch.tensor([0.3, 0.7]).log()).logsumexp(-1).sum(1)
    prior = dist.Normal(0.0, 3.0).log_prob(locs).sum(1)
    loc = svi.guide.locs.locs.detach().double()
    log_q = dist.Normal(loc, svi.guide.scales.locs.detach().double()).log_prob(locs).sum(1)
    # Single precision of terms that sum to some 100 nats.
    torch.testing.assert_close(found.log_weights, likelihood + prior - log_q, rtol=0, atol=1e-3)


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


# -- what is refused -----------------------------------------------------------------------------


def refused(svi, data, match, **options):
    svi.loss(IndexedBatch(data, torch.arange(N)))
    loader = ArrayDataModule(data, batch_size=25)
    with pytest.raises(ValueError, match=match):
        svi.check_guide(loader, 100, **options)


def test_latents_of_rows_are_refused():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = PyroSVIModule(model, dataset_size=N)
    refused(svi, mixed_rows(N)[0], "'z' stand in the data plate")


def test_max_rows_is_refused_where_latents_are_summed_out():
    svi = PyroSVIModule(mixture, mixture_guide(), TraceEnum_ELBO(), dataset_size=N)
    refused(svi, mixed_rows(N)[0], "max_rows needs gradients", max_rows=30)


@pytest.mark.parametrize(
    "more, match", [("factor", "'more' is a pyro.factor"), ("scale", "has a scale of its own")]
)
def test_terms_beside_latents_that_are_summed_out_are_refused(more, match):
    def model(x):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        scale = pyro.poutine.scale(scale=2.0 if more == "scale" else 1.0)
        with scale, pyro.plate("data", len(x)):
            if more == "factor":
                pyro.factor("more", -x.square())
            weights = torch.tensor([0.3, 0.7])
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[..., k], 1.0), obs=x)

    guide = AutoNormal(pyro.poutine.block(model, expose=["locs"]))
    svi = PyroSVIModule(model, guide, TraceEnum_ELBO(), dataset_size=N, checks=False)
    refused(svi, mixed_rows(N)[0], match)


def test_a_point_is_refused():
    svi = PyroSVIModule(regression, AutoDelta, dataset_size=N)
    refused(svi, correlated_data(), "every draw of the guide is the same point: .*'w'|a point")


def test_other_rows_than_those_of_the_training_set_are_refused():
    svi = PyroSVIModule(regression, dataset_size=2 * N)
    refused(svi, correlated_data(), "the data hold 60 rows, .* N = 120")
    refused(svi, correlated_data(), "the data hold 60 rows, .* N = 120", max_rows=50)


def test_latents_of_two_values_are_checked():
    def model(x):
        flag = pyro.sample("flag", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(flag, 1.0), obs=x)

    def guide(x):
        pyro.sample("flag", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(mixed_rows(N)[0])
    check = svi.check_guide(ArrayDataModule(mixed_rows(N)[0]), 100)
    # Data around 0: the posterior says no, the guide is a fair coin.
    assert check["flag"].guide_mean > 0.3 and check["flag"].weighted_mean < 0.01


def test_few_draws_are_refused():
    svi = PyroSVIModule(regression, dataset_size=N)
    with pytest.raises(ValueError, match="num_samples must be at least 100"):
        svi.check_guide(ArrayDataModule(correlated_data()), 50)
    with pytest.raises(RuntimeError, match="the guide has no parameters yet"):
        svi.check_guide(ArrayDataModule(correlated_data()))
    svi.loss(correlated_data())
    with pytest.raises(TypeError, match="a loader or other iterable of batches, or a datamodule"):
        svi.check_guide(correlated_data()[0])
