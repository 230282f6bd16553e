"""Networks and models around them, for the tests of networks that functions use.

As a Python module it also is one whose globals the functions of ``test_closures.py`` use.
"""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N, B = 60, 20
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(3))
Y = X @ torch.tensor([1.0, -2.0]) + 0.5
BATCH = X[:B], Y[:B]
ROWS = DataLoader(TensorDataset(X, Y), batch_size=B)

net = nn.Linear(2, 1)
held = SimpleNamespace(net=nn.Linear(2, 1))


def predict(x):
    return net(x)


def linear():
    torch.manual_seed(4)
    return nn.Linear(2, 1)


def observe(loc, y):
    """A global latent, and the rows around it in a plate that is Pyro's own mini-batch of N."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(loc[:, 0] + z, 0.5), obs=y)


def in_closure(net):
    def model(x, y):
        observe(net(x), y)

    return model


def guide(x, y):
    loc = pyro.param("loc", torch.tensor(0.1))
    scale = pyro.param("scale", torch.tensor(0.2), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def steps(svi, count=5):
    """Take steps of Adam, each with the noise of its own seed."""
    svi.loss(BATCH)
    optimizer = torch.optim.Adam(svi.parameters(), lr=0.03)
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        svi.loss(BATCH).backward()
        optimizer.step()


def names(svi):
    """The names by which a module holds the networks of its functions."""
    return set(dict(svi._networks.named_children()))
