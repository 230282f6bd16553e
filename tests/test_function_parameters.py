"""What functions declare and use trains: ``pyro.param`` statements and closed-over networks.

A regression through the origin's mean, prior mu ~ N(0, 0.1), noise 0.3, N = 200, centred t. The
weight has its least-squares value, and mu the exact posterior, since the two are orthogonal:
weight 2.005, mu 0.4949 +- 0.0208. In plain Pyro, by ``Trace_ELBO()(model, guide)`` as a Lightning
module would hold it, neither the network nor ``loc`` and ``scale`` are parameters:

- ``torch.optim.Adam(elbo.parameters())`` says "optimizer got an empty parameter list";
- beside one ``nn.Parameter`` of the model, 500 steps run without a word, and leave the weight at
  -0.007, ``loc`` at 0.0 and ``scale`` at 0.1.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 200, 50
T = torch.linspace(-1, 1, N)
Y = 0.5 + 2 * T + 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(5))


def program():
    torch.manual_seed(0)
    net = nn.Linear(1, 1, bias=False)

    def model(t, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(mu + net(t[:, None]).squeeze(-1), 0.3), obs=y)

    def guide(t, y):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.1), constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    return net, model, guide


def test_parameters_of_functions_train():
    net, model, guide = program()
    svi = PyroSVIModule(
        model,
        guide,
        elbo=Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1),
        optimizer=partial(torch.optim.Adam, lr=0.05, betas=(0.9, 0.95)),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.96),
    )
    quiet_trainer(max_epochs=120).fit(svi, datamodule=ArrayDataModule((T, Y), batch_size=B))
    precision = 100 + N / 0.09
    mean = Y.sum() / 0.09 / precision
    found = {name: p.detach() for name, p in svi._pyro_param_store.named_parameters()}
    # What is left of the steps' noise: some hundredths of an sd of each.
    sd = precision**-0.5
    assert abs(float(found["loc"] - mean)) < 0.1 * sd
    assert abs(float(found["scale"].exp()) - sd) < 0.05 * sd
    weight = (T * Y).sum() / T.square().sum()
    assert abs(net.weight.item() - float(weight)) < 0.1 * 0.3 / float(T.square().sum()) ** 0.5
