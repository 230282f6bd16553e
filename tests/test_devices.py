"""Devices and dtypes: everything follows the module, priors of plain numbers included."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroSample
from support import normal_mean, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.devices import on_device

META = torch.device("meta")
N = 200
X = torch.randn(N, generator=torch.Generator().manual_seed(6)) + 1.0
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NESTED = {
    "plain": (lambda: dist.Normal(0.0, 1.0), lambda d: [d.loc, d.scale]),
    "event": (
        lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1),
        lambda d: [d.base_dist.loc, d.base_dist.scale],
    ),
    "transformed": (
        lambda: dist.LogNormal(torch.zeros(2), 1.0),
        lambda d: [d.base_dist.loc, d.base_dist.scale],
    ),
    "truncated support": (
        lambda: dist.Uniform(torch.zeros(2), torch.ones(2)),
        lambda d: [d.low, d.high],
    ),
    "mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)
        ),
        lambda d: [d.mixture_distribution.probs, d.component_distribution.loc],
    ),
    "masked": (lambda: dist.Normal(0.0, 1.0).mask(torch.tensor(True)), lambda d: [d.base_dist.loc]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_all_tensors_of_a_distribution_move(kind):
    make, tensors = NESTED[kind]
    original = make()
    moved = on_device(original, META)
    assert type(moved) is type(original)
    assert moved.batch_shape == original.batch_shape
    assert moved.event_shape == original.event_shape
    assert {t.device for t in tensors(moved)} == {META}
    assert {t.device for t in tensors(original)} == {torch.device("cpu")}


def test_a_distribution_that_is_there_already_is_returned_as_it_is():
    prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    assert on_device(prior, torch.device("cpu")) is prior


def test_other_values_pass():
    assert on_device("name", META) == "name"
    assert on_device(torch.zeros(2), META).device == META


class PriorsAtBirth(PyroSVIModule):
    """Priors whose tensors are made with the module, on the CPU, and are no buffers."""

    def __init__(self, guide=AutoNormal, **options):
        super().__init__(guide=guide, **options)
        self.mu = PyroSample(dist.Normal(0.0, 0.1))
        self.net = nn.Linear(1, 1)

    def model(self, x):
        mu, level = self.mu, self.net(x.new_ones(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
            pyro.sample("y", dist.Normal(level, 1.0), obs=x)


STYLES = {
    "function": partial(PyroSVIModule, normal_mean),
    "subclass": PriorsAtBirth,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("before", [True, False], ids=["before the first loss", "after it"])
def test_double_gives_a_double_loss(style, before):
    svi = STYLES[style](dataset_size=N)
    if not before:
        svi.loss(X)
    svi.double()
    batch = X.double()
    loss = svi.loss(batch)
    assert loss.dtype == torch.float64
    loss.backward()
    if not before:
        assert {p.grad.dtype for p in svi.parameters()} == {torch.float64}
        assert svi.posterior_samples(3)["mu"].dtype == torch.float64


def test_a_double_loss_is_that_of_double_arithmetic():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(0.25))
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(X)
    svi.double()
    mu, x = torch.tensor(0.25, dtype=torch.float64), X.double()
    expected = -dist.Normal(0 * mu, 0.1).log_prob(mu) - dist.Normal(mu, 1.0).log_prob(x).sum()
    torch.testing.assert_close(svi.loss(x), expected, rtol=1e-12, atol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoMultivariateNormal])
@pytest.mark.parametrize("style", STYLES)
def test_a_fit_on_the_gpu_finds_the_posterior_of_plain_number_priors(style, guide):
    svi = STYLES[style](
        guide=guide,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
    )
    trainer = quiet_trainer(accelerator="gpu", max_epochs=60)
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=50))
    svi.to("cuda")  # Lightning may have brought it back
    torch.manual_seed(0)
    draws = svi.posterior_samples(4000)["mu"]
    assert draws.device.type == "cuda"
    exact, sd = float(X.sum() / (100 + N)), (100 + N) ** -0.5
    # The standard error of 4000 draws is 0.016 sd; the rest is what the optimizer leaves.
    assert float(draws.mean()) == pytest.approx(exact, abs=0.15 * sd)
    if guide is not AutoDelta:
        assert float(draws.std()) == pytest.approx(sd, rel=0.1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("style", STYLES)
def test_a_module_moves_to_the_gpu_and_back(style):
    svi = STYLES[style](dataset_size=N)
    on_cpu = svi.loss(X)
    svi.to("cuda")
    loss = svi.loss(X.cuda())
    assert loss.device.type == "cuda"
    loss.backward()
    assert svi.posterior_samples(2)["mu"].device.type == "cuda"
    svi.to("cpu")
    assert svi.loss(X).device == on_cpu.device
    assert svi.posterior_samples(2)["mu"].device.type == "cpu"
