"""ReweightedWakeSleep: weights of each row by themselves, scaled outside the logarithm."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_models import (
    K,
    N,
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
from pyro.infer import ReweightedWakeSleep
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_lightning import PyroSVIModule


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def wake_sleep(insomnia=1.0, in_plate=True, particles=K, **options):
    nesting = {"max_plate_nesting": 1} if in_plate else {}
    return ReweightedWakeSleep(
        particles, insomnia, vectorize_particles=in_plate, **nesting, **options
    )


def pyros(elbo, svi, *args):
    """Pyro's own two losses and gradients, of one step."""
    svi.zero_grad()
    with pyro.settings.context(module_local_params=True):
        theta, phi = elbo.loss_and_grads(svi.model, svi.guide, *args)
    return theta, phi, gradients(svi)


@pytest.mark.parametrize("in_plate", [True, False])
def test_mean_over_a_partition_is_the_loss_of_the_whole(in_plate):
    svi, columns = row_module(wake_sleep(in_plate=in_plate)), row_data()
    parts = [value_and_gradients(svi, tuple(c[i : i + 3] for c in columns)) for i in range(0, N, 3)]
    assert_same(average(parts), value_and_gradients(svi, columns))


@pytest.mark.parametrize("in_plate", [True, False])
def test_batch_is_the_scaled_sum_of_pyros_single_rows(in_plate):
    # Pyro weighs the rows of a batch jointly, which is right for one row.
    svi = row_module(wake_sleep(in_plate=in_plate))
    batch = tuple(column[:4] for column in row_data())
    pair = value_and_gradients(svi, batch)
    rows = [pyros(wake_sleep(in_plate=in_plate), svi, *(c[[i]] for c in batch)) for i in range(4)]
    value, found = average([(torch.tensor(theta), each) for theta, _, each in rows])
    assert_same(pair, (N * value, {name: N * gradient for name, gradient in found.items()}))


@pytest.mark.parametrize("insomnia", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("in_plate", [True, False])
def test_global_latent_in_a_full_batch_equals_pyros(in_plate, insomnia):
    y = row_data()[0]
    elbo = wake_sleep(insomnia, in_plate, num_sleep_particles=4)
    svi = PyroSVIModule(WholeModel(), WholeGuide(), elbo, dataset_size=N)
    svi.loss(y)
    pair = value_and_gradients(svi, y)
    torch.manual_seed(0)
    theta, _, found = pyros(elbo, svi, y)
    assert_same(pair, (theta, found))


def test_sleep_of_a_model_without_parameters_equals_pyros():
    y = row_data()[0]
    elbo = wake_sleep(0.0, model_has_params=False)
    svi = PyroSVIModule(WholeModel(), WholeGuide(), elbo, dataset_size=N)
    svi.loss(y)
    pair = value_and_gradients(svi, y)
    torch.manual_seed(0)
    _, phi, found = pyros(elbo, svi, y)
    assert_same(pair, (phi, found))


@pytest.mark.parametrize("style", ["len", "subsample_size"])
def test_expected_sleep_phase_of_a_batch(style):
    # z ~ N(prior, 1), y ~ N(z, 1): E log q(z | y) of one row in closed form, times N whatever B is.
    # The mean over 80,000 rows has an error of about 0.5% of its sd of 1.
    class Model(nn.Module):
        def forward(self, y, observations=None):
            plate = {"len": (len(y),), "subsample_size": (10 * len(y), len(y))}[style]
            with pyro.plate("data", *plate):
                z = pyro.sample("z", dist.Normal(0.3, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor(0.3))

        def forward(self, y, observations=None):
            y = y if observations is None else observations["y"]
            plate = {"len": (len(y),), "subsample_size": (10 * len(y), len(y))}[style]
            with pyro.plate("data", *plate):
                pyro.sample("z", dist.Normal(self.b * y, 1.0))

    rows = 20_000
    elbo = wake_sleep(0.0, in_plate=False, model_has_params=False, num_sleep_particles=4)
    svi = PyroSVIModule(Model(), Guide(), elbo, dataset_size=10 * rows)
    loss, found = value_and_gradients(svi, torch.zeros(rows))
    # E (z - b y)^2 = (1 - b)^2 (0.3^2 + 1) + b^2
    b = torch.tensor(0.3, requires_grad=True)
    square = (1 - b) ** 2 * 1.09 + b**2
    expected = 0.5 * square + 0.5 * torch.tensor(2 * torch.pi).log()
    expected.backward()
    torch.testing.assert_close(loss / (10 * rows), expected.detach(), rtol=0, atol=0.02)
    torch.testing.assert_close(found["guide.b"] / (10 * rows), b.grad, rtol=0, atol=0.03)


@pytest.mark.parametrize("insomnia", [1.0, 0.5])
@pytest.mark.parametrize("in_plate", [True, False])
def test_exact_guide_gives_the_evidence_whatever_the_draws(in_plate, insomnia):
    svi = row_module(wake_sleep(insomnia, in_plate), exact=True)
    y = row_data()[0][:4]
    loss = svi.loss((y, None)).detach()
    torch.testing.assert_close(loss, -N / 4 * log_evidence_of_rows(y), rtol=1e-9, atol=0)


def test_gradient_at_the_exact_guide_is_that_of_the_evidence():
    # There the guide rests, and the model follows the evidence, by the mean over 40,000 rows.
    rows = 40_000
    svi = row_module(wake_sleep(), exact=True, size=rows)
    y = 0.8 + row_data(rows)[0]
    found = value_and_gradients(svi, (y, None))[1]
    prior = torch.tensor(0.3, requires_grad=True)
    expected = -log_evidence_of_rows(y, prior) / rows
    expected.backward()
    torch.testing.assert_close(found["model.prior"] / rows, prior.grad, rtol=0, atol=0.01)
    for name in ("guide.a", "guide.b", "guide.log_s"):
        assert abs(float(found[name]) / rows) < 0.02


def test_discrete_latent_against_the_sum_over_its_values():
    # Two particles, four outcomes. The mean over 40,000 rows has an error under 0.01.
    rows = 40_000
    svi = PyroSVIModule(Switch(), SwitchGuide(), wake_sleep(particles=2), dataset_size=rows)
    loss, found = value_and_gradients(svi, torch.full((rows,), 0.8))
    svi.zero_grad()
    values = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=svi.guide.logit).log_prob(values)
    log_w = dist.Bernoulli(0.3).log_prob(values) - log_q.detach()
    log_w = log_w + dist.Normal(svi.model.loc * values, 1.0).log_prob(torch.tensor(0.8))
    chance = (log_q[:, None] + log_q).exp().detach()
    theta = -(chance * (torch.logaddexp(log_w[:, None], log_w) - torch.tensor(2.0).log())).sum()
    share = (log_w[:, None] - log_w).sigmoid().detach()
    phi = -(chance * (share * log_q[:, None] + (1 - share) * log_q)).sum()
    (theta + phi).backward()
    torch.testing.assert_close(loss / rows, theta.detach(), rtol=0, atol=0.01)
    for name, gradient in gradients(svi).items():
        torch.testing.assert_close(found[name] / rows, gradient, rtol=0, atol=0.02)


def test_autoguide_of_a_positive_latent_gets_the_gradient_of_its_density_alone():
    # Pyro's own detaches the draw and not the autoguide's Jacobian that was computed from it.
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    y = row_data()[0]
    svi = PyroSVIModule(model, AutoNormal, wake_sleep(), dataset_size=N)
    svi.loss(y)
    found = value_and_gradients(svi, y)[1]
    loc, scale = (
        getattr(svi.guide, part).scale.detach().requires_grad_() for part in ("locs", "scales")
    )
    torch.manual_seed(0)
    draws = dist.Normal(loc, scale).sample((K,))
    log_q = dist.Normal(loc, scale).log_prob(draws)
    log_p = dist.Normal(0.0, 1.0).log_prob(draws)
    log_p = log_p + dist.Normal(0.0, draws.exp()[:, None]).log_prob(y).sum(-1)
    loss = -((log_p - log_q).softmax(0).detach() * log_q).sum()
    loss.backward()
    torch.testing.assert_close(found["guide.locs.scale_unconstrained"], loc.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_plate", [True, False])
@pytest.mark.parametrize("insomnia", [1.0, 0.5])
def test_validation(mode, in_plate, insomnia):
    svi, batch = row_module(wake_sleep(insomnia, in_plate)), row_data()
    with mode():
        value = svi.loss(batch)
    torch.testing.assert_close(value.clone(), svi.loss(batch).detach(), rtol=1e-12, atol=0)


def test_global_latent_in_a_part_of_the_rows_is_refused():
    svi = PyroSVIModule(WholeModel(), WholeGuide(), wake_sleep(), dataset_size=N)
    with pytest.raises(ValueError, match=r"ReweightedWakeSleep .* latent site 'mu'"):
        svi.loss(torch.zeros(4))
