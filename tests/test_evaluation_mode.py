"""Results of a fit are those of networks in evaluation mode, whatever mode the module is in."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from support import no_validation, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, LogPredictiveDensity, PyroSVIModule

pytestmark = no_validation


class Network(nn.Module):
    """A regression by a network that normalises, with a noise of its own in training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))

    def forward(self, x, y=None):
        pyro.module("network", self)
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1) + bias, 1.0), obs=y)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))

    def forward(self, x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x).squeeze(-1), 1e-6))


def with_latents(x, y=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def rows():
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(50, 2, generator=generator)
    return x, x.sum(1)


def fitted(*arguments, **options):
    """A module after a fit, in training mode as Lightning leaves it."""
    torch.manual_seed(0)
    svi = PyroSVIModule(*arguments, **options)
    data = ArrayDataModule(rows(), batch_size=10)
    quiet_trainer(max_epochs=2).fit(svi, datamodule=data)
    assert svi.training
    return svi


def of_network(network, x, y, bias):
    """Log-likelihoods by the statistics that training has gathered, by PyTorch alone."""
    norm, _, linear = network.net
    normed = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    mean = (normed * norm.weight + norm.bias) @ linear.weight[0] + linear.bias
    return dist.Normal(mean + bias, 1.0).log_prob(y)


def test_log_likelihoods_after_a_fit_are_those_of_a_network_that_evaluates():
    svi, (x, y) = fitted(Network()), rows()
    posterior = svi.posterior_samples(5)
    found = svi.log_likelihood([(x, y)], posterior=posterior)["y"]
    expected = of_network(svi.model, x, y, posterior["bias"][:, None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_parts_keep_their_modes():
    network = Network()
    svi = fitted(network)
    network.net[0].eval()
    svi.log_likelihood([rows()], 2)
    modes = [svi.training, network.training, network.net[0].training, network.net[1].training]
    assert modes == [True, True, False, True]


def test_validation_and_log_likelihood_agree_on_a_network():
    svi = fitted(Network(), AutoDelta, metrics=[LogPredictiveDensity()])
    data = ArrayDataModule(rows(), batch_size=10, val=rows())
    logged = quiet_trainer().validate(svi, datamodule=data, verbose=False)[0]
    # The draws of a point are equal, so that both are means over the same numbers.
    of_rows = svi.log_likelihood(data, 10)["y"][0]
    assert logged["val_elpd"] == pytest.approx(float(of_rows.mean()), rel=1e-5)


def test_an_encoder_draws_latents_of_a_row_whatever_rows_stand_beside_it():
    svi, (x, y) = fitted(with_latents, Encoder()), rows()
    whole, one = (svi.posterior_samples(1, batch=(x[:n], y[:n]))["z"] for n in (50, 1))
    # The guide's sd is 1e-6.
    torch.testing.assert_close(whole[:, :1], one, rtol=0, atol=1e-4)
