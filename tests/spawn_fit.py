"""Fits on two processes that are started from this one, before and after a first loss.

Run as a script, which the started processes import; writes what was found as JSON.
"""

import json
import sys
from functools import partial

import torch
from support import normal_mean, quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 400, 50
DATA = torch.randn(N, generator=torch.Generator().manual_seed(3)) + 1.0


def fit(svi: PyroSVIModule) -> None:
    trainer = quiet_trainer(devices=2, strategy="ddp_spawn", max_epochs=25)
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))


def main(path: str) -> None:
    torch.manual_seed(0)
    svi = PyroSVIModule(normal_mean, optimizer=partial(torch.optim.Adam, lr=0.05), dataset_size=N)
    refused = ""
    try:
        fit(svi)
    except Exception as error:
        refused = str(error)
    svi.loss(DATA[:B])
    fit(svi)
    found = {"refused": refused, "mean": float(svi.posterior_samples(2000)["mu"].mean())}
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
