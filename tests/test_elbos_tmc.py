"""TraceTMC_ELBO: latents of rows are drawn several times, and scaled outside the logarithm."""

from itertools import repeat

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_models import (
    GivenNoise,
    K,
    N,
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
from pyro.infer import RenyiELBO, Trace_ELBO, TraceTMC_ELBO
from torch import nn

from pyro_lightning import PyroSVIModule

SEVERAL = {"enumerate": "parallel", "num_samples": K}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tmc(**options):
    return TraceTMC_ELBO(**{"max_plate_nesting": 1, **options})


def local_module(**options):
    return row_module(tmc(), SEVERAL, **options)


def test_mean_over_a_partition_is_the_loss_of_the_whole():
    svi, columns = local_module(), row_data()
    parts = [value_and_gradients(svi, tuple(c[i : i + 3] for c in columns)) for i in range(0, N, 3)]
    assert_same(average(parts), value_and_gradients(svi, columns))


def test_full_batch_equals_pyros():
    svi, columns = local_module(), row_data()
    pair = value_and_gradients(svi, columns)
    svi.zero_grad()
    with pyro.settings.context(module_local_params=True):
        value = tmc().loss_and_grads(svi.model, svi.guide, *columns)
    assert_same(pair, (value, gradients(svi)))


def test_batch_equals_renyis_bound_of_order_0():
    # The same mean of the same draws, which Renyi's ELBO takes over whole particles.
    batch = tuple(column[:4] for column in row_data())
    svi = local_module()
    other = row_module(RenyiELBO(0, K, 1, vectorize_particles=True))
    assert_same(value_and_gradients(svi, batch), value_and_gradients(other, batch))


def test_exact_guide_gives_the_evidence_whatever_the_draws():
    svi, y = local_module(exact=True), row_data()[0][:4]
    loss = svi.loss((y, None)).detach()
    torch.testing.assert_close(loss, -N / 4 * log_evidence_of_rows(y), rtol=1e-9, atol=0)


class MixedModel(nn.Module):
    """``mu ~ N(0, 1)``, and rows about it with a latent each."""

    def __init__(self):
        super().__init__()
        self.gap = nn.Parameter(torch.tensor(1.2))

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(mu + self.gap * z, 1.0), obs=y)


class MixedGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole = WholeGuide()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def forward(self, y):
        self.whole(y)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(self.slope * y, 0.7))


def test_the_draw_of_a_global_latent_counts_once_and_the_mean_of_each_row_n_over_b_times():
    y, noise = (column[:4] for column in row_data())
    infer = {"enumerate": "parallel", "num_samples": K}

    class Guide(MixedGuide):
        def forward(self, y):
            mu = dist.Normal(self.whole.loc, self.whole.log_s.exp())
            pyro.sample("mu", GivenNoise(mu.loc, mu.scale, repeat(torch.tensor(0.7))))
            with pyro.plate("data", len(y)):
                z = GivenNoise(self.slope * y, torch.full((4,), 0.7), repeat(noise.T))
                pyro.sample("z", z, infer=infer)

    svi = PyroSVIModule(MixedModel(), Guide(), tmc(), dataset_size=N, checks=False)
    pair = value_and_gradients(svi, y)
    svi.zero_grad()
    model, guide = svi.model, svi.guide
    q_mu = dist.Normal(guide.whole.loc, guide.whole.log_s.exp())
    mu = q_mu.loc + q_mu.scale * 0.7
    q_z = dist.Normal(guide.slope * y, 0.7)
    z = q_z.loc + 0.7 * noise.T
    log_w = dist.Normal(mu, 1.0).log_prob(z) - q_z.log_prob(z)
    log_w = log_w + dist.Normal(mu + model.gap * z, 1.0).log_prob(y)
    rows = (log_w.exp().mean(0)).log().sum()
    loss = q_mu.log_prob(mu) - dist.Normal(0.0, 1.0).log_prob(mu) - N / 4 * rows
    loss.backward()
    assert_same(pair, (loss.detach(), gradients(svi)))


@pytest.mark.parametrize("particles", [1, 3])
def test_everything_drawn_once_equals_trace_elbo(particles):
    parts, y = (MixedModel(), MixedGuide()), torch.linspace(-1, 1, 4)
    modules = [
        PyroSVIModule(*parts, elbo, dataset_size=N)
        for elbo in (
            tmc(strict_enumeration_warning=False, num_particles=particles),
            Trace_ELBO(num_particles=particles),
        )
    ]
    for svi in modules:
        svi.loss(y)
    assert_same(*(value_and_gradients(svi, y) for svi in modules))


@pytest.mark.parametrize("in_plate", [True, False])
def test_expectation_with_a_global_latent(in_plate):
    # A particle's draw of mu stands outside the logarithms of its rows: with the exact guide of
    # z given mu the rest is the closed form E[log q(mu) - log p(mu) - N/B sum log p(y | mu)].
    class Guide(MixedGuide):
        def forward(self, y):
            pyro.sample("mu", dist.Normal(0.2, 0.5))
            with pyro.plate("data", len(y)):
                # z ~ N(mu, 1), y ~ N(mu + z, 1)
                pyro.sample("z", dist.Normal(y / 2, 0.5**0.5), infer=SEVERAL)

    class Model(MixedModel):
        def __init__(self):
            super().__init__()
            self.gap = nn.Parameter(torch.tensor(1.0))

    particles = 4000
    options = {"num_particles": particles, "vectorize_particles": True} if in_plate else {}
    count = 1 if in_plate else particles // 4
    svi = PyroSVIModule(Model(), Guide(), tmc(**options), dataset_size=N)
    y = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        loss = torch.stack([svi.loss(y) for _ in range(count)]).mean()
    # y ~ N(2 mu, 2), mu ~ N(0.2, 0.5): (y - 2 mu)^2 has mean (y - 0.4)^2 + 4 / 4.
    rows = 0.5 * (4 * torch.pi * torch.ones(3)).log() + ((y - 0.4) ** 2 + 1.0) / 4
    kl = torch.distributions.kl_divergence(dist.Normal(0.2, 0.5), dist.Normal(0.0, 1.0))
    # One draw has an sd of about 10, the means of 4000 and 1000 an error of 0.15 and 0.3.
    torch.testing.assert_close(loss, kl + N / 3 * rows.sum(), rtol=0, atol=0.6 if in_plate else 1.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation(mode):
    svi, batch = local_module(), row_data()
    with mode():
        value = svi.loss(batch)
    torch.testing.assert_close(value.clone(), svi.loss(batch).detach(), rtol=1e-12, atol=0)


# -- refused ---------------------------------------------------------------------------------------


def test_global_latent_drawn_several_times_in_a_full_batch_equals_pyros():
    y = row_data()[0]
    svi = PyroSVIModule(WholeModel(), WholeGuide(SEVERAL), tmc(), dataset_size=N)
    svi.loss(y)
    pair = value_and_gradients(svi, y)
    svi.zero_grad()
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=True):
        value = tmc().loss_and_grads(svi.model, svi.guide, y)
    assert_same(pair, (value, gradients(svi)))


def test_global_latent_drawn_several_times_in_a_part_of_the_rows_is_refused():
    svi = PyroSVIModule(WholeModel(), WholeGuide(SEVERAL), tmc(), dataset_size=N)
    with pytest.raises(
        ValueError, match=r"'mu', which it draws several times.* draw that site once"
    ):
        svi.loss(torch.zeros(4))


def switches(infer):
    def model(y):
        with pyro.plate("data", len(y)):
            switch = pyro.sample("switch", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(switch, 1.0), obs=y)

    def guide(y):
        logit = pyro.param("logit", torch.tensor(0.4))
        with pyro.plate("data", len(y)):
            switch = dist.Bernoulli(logits=logit.expand(len(y)))
            pyro.sample("switch", switch, infer=infer)

    elbo = tmc(strict_enumeration_warning=False)
    return PyroSVIModule(model, guide, elbo, dataset_size=N)


@pytest.mark.parametrize("infer", [{}, SEVERAL], ids=["once", "several"])
def test_draws_that_would_give_the_guide_no_gradient_are_refused(infer):
    with pytest.raises(ValueError, match=r"no gradient for site 'switch', since a Bernoulli"):
        switches(infer).loss(torch.zeros(4))


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_enumeration_of_all_values_is_refused(how):
    # In a model without guide Pyro's own TraceTMC_ELBO gives log sum p(z)^2 p(y | z).
    with pytest.raises(ValueError, match=r"prior of site 'switch' twice .* Use TraceEnum_ELBO"):
        switches({"enumerate": how}).loss(torch.zeros(4))
