"""Fits on two processes that are started from this one, without and with a first loss.

Run as a script, which the started processes import; writes what was found as JSON.
"""

import json
import os
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, init_to_mean
from support import normal_mean, quiet_trainer
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 400, 50
DATA = torch.randn(N, generator=torch.Generator().manual_seed(3)) + 1.0


def module(**options) -> PyroSVIModule:
    return PyroSVIModule(normal_mean, optimizer=partial(torch.optim.Adam, lr=0.05), **options)


def effects(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 10.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


class Odd:
    """What no checkpoint holds, and so comes back from no process."""

    def __init__(self, x):
        self.x = x


def joined(rows):
    return torch.stack(rows), Odd(rows)


class OfOdd(PyroSVIModule):
    def model(self, x, odd):
        return normal_mean(x)


def fit(svi: PyroSVIModule, strategy: str, **options) -> None:
    os.environ.pop("MASTER_PORT", None)  # that of the fit before may not be free yet
    trainer = quiet_trainer(devices=2, strategy=strategy, **{"max_epochs": 25, **options})
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))


def fit_of_odd() -> str:
    os.environ.pop("MASTER_PORT", None)
    loader = DataLoader(DATA, batch_size=B, collate_fn=joined)
    try:
        quiet_trainer(devices=2, strategy="ddp_fork").fit(OfOdd(), loader)
    except Exception as error:
        return str(error)
    return ""


def main(path: str) -> None:
    torch.manual_seed(0)
    found = {"refused": fit_of_odd(), "mean": {}, "size": {}, "keys": {}}
    for strategy in ("ddp_fork", "ddp_spawn"):
        svi = module()
        fit(svi, strategy)
        found["mean"][strategy] = float(svi.posterior_samples(2000)["mu"].mean())
        found["size"][strategy] = svi.dataset_size
        found["keys"][strategy] = sorted(svi.state_dict())
    svi = module(dataset_size=N)
    svi.loss(DATA[:B])
    fit(svi, "ddp_fork")
    found["mean"]["after a loss"] = float(svi.posterior_samples(2000)["mu"].mean())
    guide = partial(AutoDelta, init_loc_fn=init_to_mean)
    svi = PyroSVIModule(effects, guide, optimizer=partial(torch.optim.Adam, lr=0.2))
    fit(svi, "ddp_fork", max_epochs=40)
    found["rows"] = svi.posterior_samples(1, rows=range(N))["z"][0].tolist()
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
