"""The handler that weighs the KL, beside Pyro's own ``poutine.scale`` and closed forms."""

import math

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_lightning import negative_elbo
from pyro_lightning.annealing import check_weighed, rising_weight, weigh_kl

N, B, WEIGHT = 30, 6, 0.3
X = torch.linspace(-1.0, 2.0, B)


def under(weight):
    return poutine.scale(scale=weight)


class Both:
    """A model and guide with a global latent and one of each row, some terms under a scale."""

    def __init__(self, weight=1.0, discrete=False):
        self.weight, self.discrete = weight, discrete
        self.parameters = [
            torch.tensor(value, requires_grad=True) for value in (0.1, -0.7, 0.4, -0.3)
        ]

    def plate(self, x):
        return pyro.plate("data", N, subsample=torch.arange(len(x)))

    def model(self, x):
        with under(self.weight):
            mu = pyro.sample("mu", dist.Normal(0.2, 0.5))
        pyro.factor("extra", -(mu**2))  # of the likelihood
        with self.plate(x):
            with under(self.weight):
                prior = dist.Bernoulli(0.4) if self.discrete else dist.Normal(mu, 0.8)
                z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(mu + z, 0.6), obs=x)

    def guide(self, x):
        loc, log_scale, slope, row_scale = self.parameters
        with under(self.weight):
            pyro.sample("mu", dist.Normal(loc, log_scale.exp()))
            with self.plate(x):
                row = slope * x
                fn = dist.Normal(row, row_scale.exp())
                pyro.sample("z", dist.Bernoulli(logits=row) if self.discrete else fn)


def ours(both, elbo, weight, seed=0):
    model, guide = weigh_kl(both.model, both.guide, weight)
    torch.manual_seed(seed)
    sizes = {"plates": {"data": N}, "batch_size": B}
    return negative_elbo(elbo, model, guide, (X,), {}, **sizes)


def of_pyro(both, elbo, seed=0):
    torch.manual_seed(seed)
    if isinstance(elbo, TraceGraph_ELBO):  # has no scalar to differentiate of its own
        sizes = {"plates": {}, "batch_size": B}
        return negative_elbo(elbo, both.model, both.guide, (X,), {}, **sizes)
    return torch.as_tensor(elbo.differentiable_loss(both.model, both.guide, X))


def assert_same(loss, expected, parameters, others):
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, others, allow_unused=True)
    assert sum(gradient is not None for gradient in wanted) >= 2
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [WEIGHT, torch.tensor(WEIGHT)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("elbo", "discrete"),
    [
        (Trace_ELBO, False),
        (Trace_ELBO, True),
        (TraceMeanField_ELBO, False),
        (TraceGraph_ELBO, False),
        (TraceGraph_ELBO, True),
    ],
)
def test_loss_and_gradients_are_those_of_scales_by_hand(elbo, discrete, weight):
    both, other = Both(discrete=discrete), Both(WEIGHT, discrete)
    loss = ours(both, elbo(), weight)
    assert_same(loss, of_pyro(other, elbo()), both.parameters, other.parameters)


def test_latent_that_the_guide_enumerates():
    both, other = Both(discrete=True), Both(WEIGHT, True)
    for each in (both, other):
        inner = each.guide
        each.guide = lambda x, inner=inner: poutine.infer_config(
            inner, lambda site: {"enumerate": "parallel"} if site["name"] == "z" else {}
        )(x)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = ours(both, elbo, torch.tensor(WEIGHT))
    assert_same(loss, of_pyro(other, elbo), both.parameters, other.parameters)


def label_model(x, weight=1.0):
    with under(weight):
        mu = pyro.sample("mu", dist.Normal(0.2, 0.5))
    with pyro.plate("data", N, subsample=torch.arange(len(x))):
        label = pyro.sample("label", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(mu + label, 1.0), obs=x)


def test_latent_that_the_model_sums_out_belongs_to_the_likelihood():
    def guide(x, weight=1.0):
        with under(weight):
            pyro.sample("mu", dist.Normal(0.1, 0.6))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    weighed = weigh_kl(label_model, guide, torch.tensor(WEIGHT))
    with torch.no_grad():
        torch.manual_seed(0)
        loss = negative_elbo(elbo, *weighed, (X,), {}, plates={"data": N}, batch_size=B)
    torch.manual_seed(0)
    expected = elbo.loss(label_model, guide, X, weight=WEIGHT)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_weigh_their_auxiliary_draws_and_jacobians(guide):
    def model(x, weight=1.0):
        with under(weight):
            rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(loc, rate), obs=x)

    q = guide(model)
    q(X)
    weighed = weigh_kl(model, q, torch.tensor(WEIGHT))
    torch.manual_seed(0)
    loss = negative_elbo(Trace_ELBO(), *weighed, (X,), {}, plates={"data": N}, batch_size=B)
    torch.manual_seed(0)
    by_hand = poutine.scale(q, scale=WEIGHT)
    expected = Trace_ELBO().differentiable_loss(lambda x: model(x, WEIGHT), lambda x: by_hand(x), X)
    assert_same(loss, expected, list(q.parameters()), list(q.parameters()))


def test_mean_field_weighs_the_analytic_kl_of_a_constrained_latent():
    # The density of AutoNormal's point is a factor of the guide, beside the draw that it shifts.
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, rate), obs=x)

    guide = AutoNormal(model)
    guide(X)
    found = []
    for weight in (0.0, 0.5, 1.0):
        weighed = weigh_kl(model, guide, weight)
        torch.manual_seed(0)
        sizes = {"plates": {"data": N}, "batch_size": B}
        found.append(negative_elbo(TraceMeanField_ELBO(), *weighed, (X,), {}, **sizes).item())
    # It is linear in the weight, from the likelihood alone ...
    assert found[1] == pytest.approx((found[0] + found[2]) / 2, rel=1e-6)
    torch.manual_seed(0)
    rate = guide(X)["rate"]
    likelihood = N / B * dist.Normal(0.0, rate).log_prob(X).sum()
    assert found[0] == pytest.approx(-likelihood.item(), rel=1e-6)
    # ... and its slope is log q - log p of the draw.
    loc, scale = guide.locs.rate, guide.scales.rate
    log_q = dist.Normal(loc, scale).log_prob(rate.log()) - rate.log()
    kl = log_q - dist.Gamma(2.0, 3.0).log_prob(rate)
    assert found[2] - found[0] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize(
    "elbo",
    [
        RenyiELBO(num_particles=2),
        ReweightedWakeSleep(num_particles=2),
        TraceTMC_ELBO(),
        Trace_MMD(kernel=gp.kernels.RBF(1)),
        EnergyDistance(),
    ],
)
def test_elbos_without_a_kl_of_its_own_are_refused(elbo):
    with pytest.raises(ValueError, match=f"{type(elbo).__name__} is no sum"):
        check_weighed(elbo)


def test_cycles_rise_and_stay():
    found = [rising_weight(t, 12, 0.2, 3, 0.5) for t in range(14)]
    one = [0.2, 0.6, 1.0, 1.0]
    assert found == pytest.approx([*one, *one, *one, 1.0, 1.0])


def test_a_cycle_need_not_be_whole_steps():
    found = [rising_weight(t, 5, 0.0, 2, 1.0) for t in range(6)]
    assert found == pytest.approx([0.0, 0.4, 0.8, 0.2, 0.6, 1.0])
    assert not any(math.isnan(weight) for weight in found)
