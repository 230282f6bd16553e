"""``Trainer(sync_batchnorm=True)`` puts every part of a module back in its place."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_lightning import PyroSVIModule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.net(x[:, None])[:, 0] + mu, 1.0), obs=x)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_layers_are_converted_and_the_loss_is_as_before(guide):
    x = torch.linspace(0.0, 1.0, 8)
    svi = PyroSVIModule(Net(), guide, dataset_size=8)
    svi.loss(x)
    svi.eval()  # synchronised layers train on a GPU only
    torch.manual_seed(0)
    before = svi.loss(x)
    # As Lightning does before a fit.
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(svi)
    assert isinstance(converted.model.net[1], nn.SyncBatchNorm)
    torch.manual_seed(0)
    assert converted.loss(x) == before
