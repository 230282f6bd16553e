"""Random numbers of compiled code: eager's, fresh at each step, and no others are used."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import CASES, N, regression, regression_batch, values_batch
from compiled_support import AS_TRACED, is_compiled, loss_and_gradients
from support import no_validation, quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning._upstream import compile_graph, make_graph

KINDS = {
    "Normal": lambda p: dist.Normal(p, 1.0),
    "Bernoulli": dist.Bernoulli,
    "Uniform": lambda p: dist.Uniform(p, 1.0),
    "Categorical": lambda p: dist.Categorical(p.expand(5, 3)),
    "Exponential": dist.Exponential,
    "Gamma": lambda p: dist.Gamma(p, p),
    "Beta": lambda p: dist.Beta(p, p),
    "Dirichlet": lambda p: dist.Dirichlet(p.expand(3)),
    "Poisson": dist.Poisson,
    "Binomial": lambda p: dist.Binomial(5, p),
    "Geometric": dist.Geometric,
    "Cauchy": lambda p: dist.Cauchy(p, p),
    "StudentT": lambda p: dist.StudentT(p + 2),
    "Gumbel": lambda p: dist.Gumbel(p, p),
    "Laplace": lambda p: dist.Laplace(p, p),
    "HalfCauchy": dist.HalfCauchy,
    "LogNormal": lambda p: dist.LogNormal(p, p),
    "Weibull": lambda p: dist.Weibull(p, p),
    "Multinomial": lambda p: dist.Multinomial(4, p.expand(3)),
    "NegativeBinomial": lambda p: dist.NegativeBinomial(3.0, p),
    "MultivariateNormal": lambda p: dist.MultivariateNormal(p.expand(3), torch.eye(3).to(p)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_draws_of_all_kinds_are_those_of_eager_and_in_its_order(dtype):
    def draws(p):
        with pyro.validation_enabled(False):
            return [make(p).sample() * 1.0 for make in KINDS.values()]

    p = torch.tensor(0.4, dtype=dtype)
    compiled = compile_graph(make_graph(draws, [p]), [p], {})
    for seed in range(3):
        torch.manual_seed(seed)
        expected = draws(p)
        torch.manual_seed(seed)
        for name, found, wanted in zip(KINDS, compiled(p), expected, strict=True):
            torch.testing.assert_close(found, wanted, msg=name)


def test_noise_is_fresh_at_each_step_and_equal_by_seed():
    case = CASES["AutoNormal"]
    svi, batch = case.make(compile=AS_TRACED), case.batch(0)
    for seed in range(3):
        loss_and_gradients(svi, case.batch(seed), seed)
    assert is_compiled(svi)
    torch.manual_seed(5)
    several = torch.stack([svi.loss(batch).detach() for _ in range(50)])
    assert len(several.unique()) == 50
    torch.manual_seed(5)
    again = torch.stack([svi.loss(batch).detach() for _ in range(50)])
    # Not bit for bit: steps that are compared with eager, others in each, sum in another order.
    torch.testing.assert_close(several, again, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["AutoNormal", "VAE, dropout", "score function", "subsampling plate", "rows"]
)
def test_tracing_and_comparing_use_no_random_numbers(name):
    case = CASES[name]
    svi, eager = case.make(compile=AS_TRACED), case.make()
    states = []
    for module in (svi, eager):
        torch.manual_seed(3)
        for step in range(5):
            module.loss(case.batch(step)).backward()
        states.append(torch.get_rng_state())
    assert is_compiled(svi)
    assert torch.equal(*states)


@no_validation
@pytest.mark.parametrize("steps", [1, 3])
def test_a_compiled_fit_is_the_eager_one(steps):
    found, states = [], []
    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {}):
        torch.manual_seed(0)
        svi = PyroSVIModule(regression, **options)
        data = ArrayDataModule(regression_batch(0, rows=N + 2), batch_size=8)
        quiet_trainer(max_epochs=3).fit(svi, datamodule=data)
        found.append({n: p.detach() for n, p in svi.named_parameters()})
        if options:
            assert svi._compiled.compilations == 1
        states.append(torch.get_rng_state())
    # 18 steps of Adam, each of rounding of its own, which the first steps' tiny second moments
    # enlarge.
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5)
    assert torch.equal(*states)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_nan_by_its_noise_is_an_error_where_it_is_one_in_eager():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("far", torch.where(mu.abs() > 0.15, torch.nan, 0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    bad = []
    for options in ({"compile": AS_TRACED}, {}):
        svi = PyroSVIModule(model, dataset_size=N, checks=False, **options)
        bad.append([])
        for seed in range(100):
            torch.manual_seed(seed)
            try:
                with pyro.validation_enabled(False):  # which would meet the NaN itself
                    svi.loss(values_batch(seed)[0])
            except ValueError as error:
                bad[-1].append(seed)
                assert str(error).startswith("the loss ")
        if options:
            assert is_compiled(svi)
    assert bad[0] == bad[1]
    assert 0 < len(bad[0]) < 50
