"""RenyiELBO: a bound of each row, scaled outside its logarithm; refused where rows share one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_models import (
    K,
    N,
    RowModel,
    Switch,
    SwitchGuide,
    WholeGuide,
    WholeModel,
    assert_same,
    average,
    gradients,
    log_evidence_of_rows,
    row_data,
    row_module,
    value_and_gradients,
)
from pyro.infer import RenyiELBO
from torch import nn

from pyro_lightning import PyroSVIModule

ORDERS = [0.0, 0.5, 2.0, -1.0]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def renyi(alpha=0.0, in_plate=True, particles=K):
    options = {"max_plate_nesting": 1} if in_plate else {}
    return RenyiELBO(alpha, particles, vectorize_particles=in_plate, **options)


@pytest.mark.parametrize("in_plate", [True, False])
@pytest.mark.parametrize("alpha", ORDERS)
def test_mean_over_a_partition_is_the_loss_of_the_whole(alpha, in_plate):
    svi = row_module(renyi(alpha, in_plate))
    columns = row_data()
    parts = [value_and_gradients(svi, tuple(c[i : i + 3] for c in columns)) for i in range(0, N, 3)]
    assert_same(average(parts), value_and_gradients(svi, columns))


@pytest.mark.parametrize("in_plate", [True, False])
@pytest.mark.parametrize("alpha", ORDERS)
def test_batch_is_the_scaled_sum_of_pyros_single_rows(alpha, in_plate):
    # Pyro's own bound of a data set of one row is right; the draws are the same.
    svi = row_module(renyi(alpha, in_plate))
    batch = tuple(column[:4] for column in row_data())
    pair = value_and_gradients(svi, batch)
    svi.zero_grad()
    with pyro.settings.context(module_local_params=True):
        values = [
            renyi(alpha, in_plate).loss_and_grads(svi.model, svi.guide, *(c[[i]] for c in batch))
            for i in range(4)
        ]
    expected = {name: N / 4 * gradient for name, gradient in gradients(svi).items()}
    assert_same(pair, (torch.tensor(sum(values)) * N / 4, expected))


@pytest.mark.parametrize("in_plate", [True, False])
@pytest.mark.parametrize("alpha", ORDERS)
def test_global_latent_in_a_full_batch_equals_pyros(alpha, in_plate):
    y = row_data()[0]
    svi = PyroSVIModule(WholeModel(), WholeGuide(), renyi(alpha, in_plate), dataset_size=N)
    svi.loss(y)
    pair = value_and_gradients(svi, y)
    svi.zero_grad()
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=True):
        value = renyi(alpha, in_plate).loss_and_grads(svi.model, svi.guide, y)
    assert_same(pair, (value, gradients(svi)))


@pytest.mark.parametrize("in_plate", [True, False])
@pytest.mark.parametrize("alpha", ORDERS)
def test_exact_guide_gives_the_evidence_whatever_the_draws(alpha, in_plate):
    svi = row_module(renyi(alpha, in_plate), exact=True)
    y = row_data()[0][:4]
    loss = svi.loss((y, None)).detach()
    torch.testing.assert_close(loss, -N / 4 * log_evidence_of_rows(y), rtol=1e-9, atol=0)


def test_a_guide_that_is_the_prior():
    # Each ratio of densities is that of the observation alone, here of probability 0.6.
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(0.6), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    loss = PyroSVIModule(model, guide, RenyiELBO(num_particles=10), dataset_size=100).loss(
        torch.ones(2)
    )
    torch.testing.assert_close(loss, -100 * torch.tensor(0.6).log(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", ORDERS)
def test_expectation_is_that_of_quadrature(alpha):
    # Many rows of one value are many draws of the bound of two particles. The mean of 40,000 has
    # an error of about 0.5% of the largest gradient here.
    rows = 40_000
    svi = row_module(renyi(alpha, particles=2), size=rows)
    loss, found = value_and_gradients(svi, (torch.full((rows,), 1.3), None))
    nodes = torch.linspace(-7, 7, 401)
    weights = dist.Normal(0.0, 1.0).log_prob(nodes).exp() * (nodes[1] - nodes[0])
    guide = svi.guide
    svi.zero_grad()
    fn = dist.Normal(guide.a + guide.b * 1.3, guide.log_s.exp())
    z = fn.loc + fn.scale * nodes
    ratio = dist.Normal(svi.model.prior, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(
        torch.tensor(1.3)
    )
    powers = (1 - alpha) * (ratio - fn.log_prob(z))
    pairs = torch.logaddexp(powers[:, None], powers[None, :]) - torch.tensor(2.0).log()
    expected = -(weights[:, None] * weights * pairs).sum() / (1 - alpha)
    expected.backward()
    torch.testing.assert_close(loss / rows, expected.detach(), rtol=0.01, atol=0)
    for name, gradient in gradients(svi).items():
        torch.testing.assert_close(found[name] / rows, gradient, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_draws_that_cannot_be_reparametrised(alpha, particles):
    # The expectation is a sum over the values of the particles' switches. Pyro's own estimator
    # gives the guide no gradient at order 0. The mean of 40,000 rows has an error under 0.01.
    rows = 40_000
    svi = PyroSVIModule(
        Switch(), SwitchGuide(), renyi(alpha, particles=particles), dataset_size=rows
    )
    loss, found = value_and_gradients(svi, torch.full((rows,), 0.8))
    svi.zero_grad()
    values = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=svi.guide.logit).log_prob(values)
    ratio = dist.Bernoulli(0.3).log_prob(values) - log_q
    ratio = ratio + dist.Normal(svi.model.loc * values, 1.0).log_prob(torch.tensor(0.8))
    powers = (1 - alpha) * ratio
    if particles == 1:
        bound, weights = powers, log_q.exp()
    else:
        bound = torch.logaddexp(powers[:, None], powers[None, :]) - torch.tensor(2.0).log()
        weights = (log_q[:, None] + log_q).exp()
    expected = -(weights * bound).sum() / (1 - alpha)
    expected.backward()
    torch.testing.assert_close(loss / rows, expected.detach(), rtol=0.01, atol=0)
    for name, gradient in gradients(svi).items():
        torch.testing.assert_close(found[name] / rows, gradient, rtol=0, atol=0.02)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_plate", [True, False])
def test_validation(mode, in_plate):
    svi, batch = row_module(renyi(0.5, in_plate)), row_data()
    with mode():
        value = svi.loss(batch)
    torch.testing.assert_close(value.clone(), svi.loss(batch).detach(), rtol=1e-12, atol=0)


def test_a_deterministic_statement_outside_the_plate_changes_nothing():
    class WithMean(RowModel):
        def forward(self, y, noise):
            pyro.deterministic("mean", y.mean())
            super().forward(y, noise)

    batch = tuple(column[:4] for column in row_data())
    svi = row_module(renyi())
    other = PyroSVIModule(WithMean(), svi.guide, renyi(), dataset_size=N, checks=False)
    assert torch.equal(other.loss(batch), svi.loss(batch))


@pytest.mark.parametrize("in_plate", [True, False])
def test_a_guide_without_latents(in_plate):
    # As many rows as particles, so that no dimension can be taken for another unnoticed.
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), obs=y)

    y = torch.linspace(-1, 1, K)
    svi = PyroSVIModule(model, lambda y: None, renyi(0.5, in_plate), dataset_size=N)
    expected = -N / K * dist.Normal(0.5, 1.0).log_prob(y).sum()
    torch.testing.assert_close(svi.loss(y).detach(), expected, rtol=1e-12, atol=0)


def test_unnamed_data_plate_keeps_rows_apart():
    # Nothing is scaled, and each row still has a logarithm of its own.
    svi = row_module(renyi(), exact=True, data_plate=None)
    y = row_data()[0][:4]
    loss = svi.loss((y, None)).detach()
    torch.testing.assert_close(loss, -log_evidence_of_rows(y), rtol=1e-9, atol=0)


# -- refused ---------------------------------------------------------------------------------------


def whole(elbo, size=N, model=None):
    return PyroSVIModule(model or WholeModel(), WholeGuide(), elbo, dataset_size=size)


def test_global_latent_in_a_part_of_the_rows_is_refused():
    with pytest.raises(ValueError, match=r"RenyiELBO .* latent site 'mu' .* Use Trace_ELBO"):
        whole(renyi()).loss(torch.zeros(4))


def test_a_smaller_batch_later_is_refused_too():
    svi = whole(renyi())
    svi.loss(torch.zeros(N))
    with pytest.raises(ValueError, match="latent site 'mu'"):
        svi.loss(torch.zeros(N - 1))


def test_global_and_local_latents_are_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide_of_whole = WholeGuide()

    def guide(y):
        guide_of_whole(y)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    svi = PyroSVIModule(model, guide, renyi(), dataset_size=N)
    with pytest.raises(ValueError, match=r"latent site 'mu' .*TraceTMC_ELBO, with infer"):
        svi.loss(torch.zeros(4))


def test_an_observed_site_outside_the_plate_is_refused():
    svi = row_module(renyi())

    def model(y, noise):
        pyro.factor("penalty", torch.tensor(-1.0))
        return svi.model(y, noise)

    other = PyroSVIModule(model, svi.guide, renyi(), dataset_size=N, checks=False)
    with pytest.raises(ValueError, match="observed site 'penalty'"):
        other.loss(tuple(column[:4] for column in row_data()))


def test_a_plate_that_visits_rows_one_by_one_is_refused():
    def model(y):
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"y_{i}", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=y[i])

    svi = PyroSVIModule(model, lambda y: None, renyi(in_plate=False), dataset_size=N)
    with pytest.raises(ValueError, match=r"site 'y_0' .* `with pyro.plate"):
        svi.loss(torch.zeros(4))


def test_another_subsampled_plate_is_refused():
    class Columns(nn.Module):
        def __init__(self, guides):
            super().__init__()
            self.guides, self.loc = guides, nn.Parameter(torch.tensor(0.0))

        def forward(self, y):
            columns = pyro.plate("columns", 6, subsample=torch.tensor([0, 3]), dim=-1)
            with pyro.plate("data", len(y), dim=-2), columns:
                if not self.guides:
                    pyro.sample("y", dist.Normal(self.loc, 1.0), obs=y)

    svi = PyroSVIModule(Columns(False), Columns(True), renyi(in_plate=False), dataset_size=N)
    with pytest.raises(ValueError, match=r"subsampled plate 'columns' .* site 'y'"):
        svi.loss(torch.zeros(4, 2))


def test_a_model_that_scales_itself_is_refused():
    svi = row_module(renyi(), data_plate=None)
    scaled = [pyro.poutine.scale(part, scale=3.0) for part in (svi.model, svi.guide)]
    other = PyroSVIModule(*scaled, renyi(), data_plate=None, dataset_size=N, checks=False)
    with pytest.raises(ValueError, match="scale of the model at observed site 'y'"):
        other.loss(tuple(column[:4] for column in row_data()))
