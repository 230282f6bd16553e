"""What tests of skipped batches share: rows of which some are bad, and a fit to them."""

from functools import partial

import torch
from pyro.infer.autoguide import AutoNormal
from support import normal_mean, quiet_trainer
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 40, 8
NAN = float("nan")
STILL = partial(torch.optim.SGD, lr=0.0)


def rows(*bad, count=N):
    x = torch.linspace(-1.0, 2.0, count)
    x[list(bad)] = NAN
    return x


def fit(data, model=normal_mean, guide=AutoNormal, trainer=None, val=None, **options):
    torch.manual_seed(0)
    svi = PyroSVIModule(model, guide, **{"bad_batches": "skip", **options})
    runner = quiet_trainer(**{"max_epochs": 3, **(trainer or {})})
    torch.manual_seed(1)
    if isinstance(data, ArrayDataModule):
        runner.fit(svi, datamodule=data)
    else:
        runner.fit(svi, data if isinstance(data, DataLoader) else in_order(data), val)
    return svi, runner


def in_order(x):
    return DataLoader(x, batch_size=B)
